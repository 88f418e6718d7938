"""Models that are trained once and kept by the digest of their recipe, so that many studies can start from them."""

import fcntl
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from workbench.lib.core import attention, experts, models, train
from workbench.lib.core.train import attended, is_attended, nobody
from workbench.lib.data import cache
from workbench.paths import home

CODE = (attention, experts, models, train)
"""Modules every recipe depends on."""


def pretrained(
    name: str,
    recipe: Mapping[str, Any],
    build: Callable[[], nn.Module],
    teach: Callable[[nn.Module], object],
    code: Sequence[ModuleType] = (),
    *,
    watched: bool = False,
) -> nn.Module:
    """A model trained by a recipe: from its file where it is whole, else trained now and kept.

    Of several processes that want the same model one trains it while the others wait. A full disk or a home that
    cannot be written costs time, not the result. Torch's global generator is where it was before. A bed is nothing to
    watch: nobody attends its training (`lib.core.train.attended`).

    Args:
        name: the file's name begins with it.
        recipe: plain JSON values that say all that decides the weights, seed and data among them.
        build: gives the model before training.
        teach: trains it in place.
        code: further modules whose source decides the weights; a change of it makes another model.
        watched: the training is a part of what is studied: where somebody attends, it is made before their eyes even if
            a file is there, and not kept, for they may have changed it.
    """
    if watched and is_attended():
        with torch.random.fork_rng(devices=[]):
            model = build()
            teach(model)
        return model.eval()
    path = cached_path(name, recipe, code)
    with _one_at_a_time(path), torch.random.fork_rng(devices=[]), attended(nobody):
        model = build()
        if (found := cache.read(path)) is not None:
            model.load_state_dict(found[0])
            return model.eval()
        teach(model)
        with suppress(OSError):
            cache.write(path, {key: value.contiguous() for key, value in model.state_dict().items()}, dict(recipe))
    return model.eval()


def cached_path(name: str, recipe: Mapping[str, Any], code: Sequence[ModuleType] = ()) -> Path:
    """Where it is kept: ``$WORKBENCH_HOME/models/<name>-<digest of recipe, code and torch's version>.safetensors``."""
    digest = hashlib.sha256(json.dumps([dict(recipe), torch.__version__], sort_keys=True).encode())
    for module in (*CODE, *code):
        digest.update(Path(module.__file__).read_bytes())
    return home() / "models" / f"{name}-{digest.hexdigest()[:24]}.safetensors"


@contextmanager
def _one_at_a_time(path: Path) -> Iterator[None]:
    with ExitStack() as stack:
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            fcntl.flock(stack.enter_context(path.with_suffix(".lock").open("a")), fcntl.LOCK_EX)
        yield
