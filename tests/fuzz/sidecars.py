"""Sidecars of checkpoints that are not what `save` writes, most of them with the right digest of what they say: 320.

What must hold: the checkpoint is loaded, with the weights that were saved, or it is refused in words and the model is
bit for bit as it was.
"""

import copy
import json
import random
import shutil
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tests.fuzz.harness import Case
from workbench.lib.core.checkpoint import load, save, weights_digest
from workbench.lib.core.experts import GLUExperts
from workbench.lib.core.moe import MoELayer
from workbench.lib.core.routers import LinearRouter
from workbench.lib.core.sidecar import SIDECAR, _digest

SIDECARS = 320

#: In the place of any value.
ODD: tuple[Any, ...] = (
    *(None, True, 0, -1, 1, 2**31, 10**400, 0.5, -0.0, 1e308, float("nan"), float("inf")),
    *("", "x", "../outside", "/nowhere/at/all", "a\x00b", "\ud800", "x" * 5000, "<b>text</b>", "model.safetensors"),
    *([], {}, [[]], [1, 2], {"": None}, {"content": {}}, ["x"] * 1000),
)


class Model(nn.Module):
    def __init__(self, seed: int):
        super().__init__()
        torch.manual_seed(seed)
        self.layer = MoELayer(LinearRouter(4, 4, 2, coefficients={"lbl": 0.01}, bias_rate=0.1), GLUExperts(4, 4, 4))


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.1)


def cases(folder: Path, seed: int) -> Iterator[Case]:
    saved, here, model = folder / "saved", folder / "step-00000001", Model(0)
    optimizer = adam(model)
    model.layer(torch.ones(3, 4)).sum().backward()
    optimizer.step()
    path = save(saved, 1, model, optimizer, controls={"balance": 0.3}, extra={"seen": torch.arange(3)})
    good, text = weights_digest(model), (path / SIDECAR).read_text()
    for name, content in islice(variants(random.Random(seed), text), SIDECARS):
        other = Model(1)
        before = weights_digest(other)
        shutil.rmtree(here, ignore_errors=True)
        shutil.copytree(path, here)
        (here / SIDECAR).write_bytes(content)

        def wrong(came_back: bool, other: Model = other, before: str = before) -> str | None:
            return None if weights_digest(other) == (good if came_back else before) else "the weights are others"

        yield Case("sidecars", name, partial(load, folder, other, adam(other)), wrong)


def variants(draw: random.Random, text: str) -> Iterator[tuple[str, bytes]]:
    """What was done, and the sidecar."""
    content = json.loads(text)["content"]
    for turn in range(2**63):
        how = turn % 10
        if how < 6:  # values or keys are others
            changed, what = copy.deepcopy(content), []
            for _ in range(draw.choice((1, 1, 2))):
                what.append(change(draw, *draw.choice(list(places(changed)))))
            yield " and ".join(what), sealed(changed)
        elif how == 6:  # nested: inside a value, or from the first character
            depth = draw.choice((10, 900, 20_000, 200_000))
            opening, closing = draw.choice((("[", "]"), ('{"a":', "}")))
            nest = opening * depth + "1" + closing * depth * draw.choice((0, 1))
            name = draw.choice((*content, None))
            inside = text.replace(f'"{name}": ', f'"{name}": {nest}, "was": ', 1)
            yield f"{depth} deep in {name}", (nest if name is None else inside).encode()
        elif how == 7:  # cut off, or with bytes that no text has
            cut = draw.randrange(len(text))
            yield f"cut at {cut}", text.encode()[:cut] + draw.choice((b"", b"\xff\xfe", b"\x00" * 50))
        elif how == 8:  # another value altogether
            value = draw.choice(ODD)
            yield f"all of it {value!s:.20}", draw.choice((dumped(value), sealed(value)))
        else:  # what `save` writes, in another form
            yield "in another form", draw.choice((text, " " * 10_000 + text, text.replace("\n", "\r\n"))).encode()


def places(node: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) in a JSON value."""
    for key, value in node.items() if isinstance(node, dict) else enumerate(node):
        yield node, key
        if isinstance(value, dict | list):
            yield from places(value)


def change(draw: random.Random, where: Any, at: Any) -> str:
    how = draw.choice(("another", "another", "another", "none", "wrapped", "renamed"))
    if how == "another":
        where[at] = copy.deepcopy(draw.choice(ODD))
        return f"{at} is {where[at]!s:.20}"
    if how == "wrapped":
        where[at] = draw.choice(([where[at]], {"value": where[at]}))
        return f"{at} is wrapped"
    if how == "renamed" and isinstance(where, dict):
        name = draw.choice([odd for odd in ODD if isinstance(odd, str)])
        where[name] = where.pop(at)
        return f"{at} is called {name:.20}"
    del where[at]
    return f"no {at}"


def dumped(value: Any) -> bytes:
    try:
        return json.dumps(value).encode()
    except ValueError:  # an integer with more digits than Python writes
        return b"1" + b"0" * 5000


def sealed(content: Any) -> bytes:
    return dumped({"content": content, "sha256": _digest(content)})
