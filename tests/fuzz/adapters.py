"""Folders of adapters, ours and peft's: 700 variants of their settings, 250 of their tensors.

What must hold: they are read or refused in words, in time; nothing is written; a model that refuses is bit for bit as
it was, and so is one that reads, once the adapter is removed. A peft folder that is read is the function that peft
makes of it, where peft is installed and makes one.
"""

import copy
import hashlib
import json
import random
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tests.fuzz.harness import Case
from workbench.lib.core.adapt import adapt, load_adapter
from workbench.lib.core.adapt import files as ours
from workbench.lib.core.adapt import peft as theirs
from workbench.lib.core.adapt.peft import read_peft, write_peft

JSONS, TENSORS = 700, 250
SYSTEMS = {
    "lora": {"rank": 2, "alpha": 3},
    "mixlora": {"experts": 3, "rank": 2},
    "smora": {"rank": 4, "active_rank": 2},
    "mhr": {"experts": 3, "rank": 2, "tasks": 2},
    "flexmore": {"experts": 2},
    "lora-mixer": {"experts": 2},
    "llava-mole": {"rank": 2},
    "mole-diffusion": {"rank": 2},
    "remix": {"experts": 3, "rank": 2},
    "charluma": {},
    "dynamic-dino": {"experts": 4},
}

BASE = "base_model.model."
LONG = 10**400
JUNK: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 1.5, 0.0, 2**40, 10**30, -(2**63), LONG, 1e308, float("nan"), float("inf")),
    *("", "x", "lora", "*", "**", "[", "[!", "../there", "first", "none", "all-linear", "\x00", "é", "a" * 5000),
    *([], [None], ["x"], [["x"]], [1, 2], {}, {"x": 1}, {"x": {"y": []}}, {"": None}),
)
PATTERNS = (
    *("first", "^first", "first$", r"^first$", "fir.t", r"block\.out", ".*", "(x+)+y", "[", "(", "\\", "first|out"),
    *("out", r"\d", "", "^", "$", "a" * 3000, "(?=first)first", r"(f)\1", "irst", r"^block\.out"),
)
PEFT_KEYS = (
    *("use_dora", "use_rslora", "lora_bias", "init_lora_weights", "alora_invocation_tokens", "modules_to_save"),
    *("layer_replication", "trainable_token_indices", "target_parameters", "use_qalora", "arrow_config", "bias"),
    *("eva_config", "loftq_config", "corda_config", "kasa_config", "rank_pattern", "alpha_pattern", "r", "lora_alpha"),
    *("fan_in_fan_out", "ensure_weight_tying", "lora_dropout", "target_modules", "exclude_modules", "a_new_one"),
)
PEFT_VALUES = ("pissa", "olora", "loftq", "gaussian", "eva", "all", [1, 2], [[0, 1]], {"start": 1}, 8, 0.5)


class Block(nn.Module):
    """Two layers, one of whose names ends the other's."""

    def __init__(self):
        super().__init__()
        self.out = nn.Linear(8, 6)

    def forward(self, x):
        return self.out(x)


class FeedForward(nn.Module):
    """Recognised as one, so that systems put mixtures of whole blocks on it."""

    def __init__(self):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 6)
        self.act_fn = nn.SiLU()

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.block, self.mlp, self.out = nn.Linear(6, 8), Block(), FeedForward(), nn.Linear(6, 4)

    def forward(self, x):
        return self.out(self.mlp(self.block(torch.tanh(self.first(x)))))


def cases(folder: Path, seed: int = 0) -> Iterator[Case]:
    """All of them, shuffled, so that the first few are of every sort."""
    base, good = Net(), _good_folders(folder)
    plan = [(kind, "JSON") for kind in ("adapter", "peft") for _ in range(JSONS // 2)]
    plan += [(kind, "tensors") for kind in ("adapter", "peft") for _ in range(TENSORS // 2)]
    random.Random(seed).shuffle(plan)
    for number, (kind, part) in enumerate(plan):
        rng = random.Random(f"{seed} {number}")
        source = rng.choice(good[kind])
        there = folder / f"case {number}"
        shutil.copytree(source, there)
        if part == "JSON":
            name = _spoil_settings(there / (ours.SIDECAR if kind == "adapter" else theirs.CONFIG), kind, rng)
        else:
            name = _spoil_tensors(there / (ours.TENSORS if kind == "adapter" else theirs.TENSORS), rng)
            if kind == "adapter":
                _sign(there)
        yield _case(f"{kind} {part}", f"{source.name}: {name}", base, there, kind)
        shutil.rmtree(there)


def _good_folders(folder: Path) -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {"adapter": [], "peft": []}
    for slug, options in SYSTEMS.items():
        adapted = adapt(Net(), slug, **options)
        for p in adapted.parameters():
            nn.init.normal_(p, std=0.3)
        found["adapter"].append(adapted.save(folder / slug))
        if slug == "lora":
            banks = {name: layer.experts for name, layer in adapted.layers.items()}
            found["peft"].append(write_peft(banks, folder / "peft by us"))
    # the same as peft 0.21.2 writes it, every setting in it
    content = json.loads((found["peft"][0] / theirs.CONFIG).read_text()) | dict.fromkeys(PEFT_OFF) | PEFT_PLAIN
    shutil.copytree(found["peft"][0], folder / "peft by peft")
    (folder / "peft by peft" / theirs.CONFIG).write_text(json.dumps(content))
    found["peft"].append(folder / "peft by peft")
    return found


PEFT_OFF = (
    *("alora_invocation_tokens", "arrow_config", "auto_mapping", "corda_config", "eva_config", "exclude_modules"),
    *("kasa_config", "layer_replication", "layers_pattern", "layers_to_transform", "lora_ga_config", "megatron_config"),
    *("modules_to_save", "monteclora_config", "revision", "target_parameters", "trainable_token_indices", "use_bdlora"),
    "velora_config",
)
PEFT_PLAIN = {
    "ensure_weight_tying": False,
    "loftq_config": {},
    "lora_bias": False,
    "megatron_core": "megatron.core",
    "peft_version": "0.21.2",
    "qalora_group_size": 16,
    "target_modules": ["first", "out", "gate_proj", "up_proj", "down_proj"],
    "use_qalora": False,
}


def _spoil_settings(path: Path, kind: str, rng: random.Random) -> str:
    """Change the settings, or the file they are in; says how."""
    text = path.read_text()
    settings = json.loads(text)
    if rng.random() < 0.15:
        at = rng.randrange(len(text))
        name, content = rng.choice(
            [
                (f"cut at {at}", text[:at].encode()),
                (f"a byte at {at}", text[:at].encode() + bytes([rng.randrange(256)]) + text[at + 1 :].encode()),
                ("nested deep", b"[" * 100_000),
                ("nested deep inside", b'{"format": ' + b'{"a": ' * 50_000),
                ("empty", b""),
                ("twice", (text + text).encode()),
                ("a mark before it", b"\xef\xbb\xbf" + text.encode()),
                ("in UTF-16", text.encode("utf-16")),
            ]
        )
        path.write_bytes(content)
        return name
    names = []
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        if not isinstance(settings, dict) or not settings:
            break
        change = rng.choice(("value", "value", "inner", "gone", "more", "own", "own", "whole"))
        key = rng.choice(list(settings))
        inner = [k for k, v in settings.items() if isinstance(v, dict | list) and v]
        if change == "own" and kind == "peft":
            key, value = rng.choice(PEFT_KEYS), copy.deepcopy(rng.choice((*PEFT_VALUES, *JUNK)))
            if key in ("rank_pattern", "alpha_pattern") and rng.random() < 0.8:
                value = {rng.choice(PATTERNS): rng.choice((2, 3, 7, 7, *JUNK)) for _ in range(rng.randint(1, 3))}
            settings[key] = value
        elif change == "own":
            key = (
                rng.choice([*settings["options"], "model", "slug"])
                if isinstance(settings.get("options"), dict)
                else "x"
            )
            value = _junk(rng)
            settings["options"] = {**settings["options"], key: value} if key != "x" else value
        elif change == "inner" and inner:
            key, value = rng.choice(inner), _junk(rng)
            at = rng.choice(list(settings[key]) if isinstance(settings[key], dict) else range(len(settings[key])))
            settings[key][at] = value
            key = f"{key}.{at}"
        elif change == "gone":
            value = "gone"
            del settings[key]
        elif change == "more":
            key, value = rng.choice(("x", "Format", "", "targets ")), _junk(rng)
            settings[key] = value
        elif change == "whole":
            if rng.random() < 0.7:
                continue
            value = settings = _junk(rng)
        else:
            value = settings[key] = _junk(rng)
        names.append(f"{key} = {repr(value)[:60]}")
    path.write_text(_dumps(settings))
    return ", ".join(names) or "as it was"


def _junk(rng: random.Random) -> Any:
    return copy.deepcopy(rng.choice(JUNK))  # it may be changed in its turn


def _dumps(value: Any) -> str:
    # json writes no integer of more digits than Python shows; a file may hold one
    return json.dumps(_shown(value)).replace('"LONG"', "1" + "0" * 5000)


def _shown(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _shown(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_shown(v) for v in value]
    return "LONG" if type(value) is int and value == LONG else value


def _spoil_tensors(path: Path, rng: random.Random) -> str:
    """Change a safetensors file; says how."""
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + size]), content[8 + size :]
    change = rng.choice(("cut", "byte", "length", "more", "numbers", "entry", "entry", "entry", "entry", "entry"))
    if change == "cut":
        at = rng.randrange(len(content))
        path.write_bytes(content[:at])
        return f"cut at {at}"
    if change == "byte":
        at, byte = rng.randrange(8 + size), rng.randrange(256)
        path.write_bytes(content[:at] + bytes([byte]) + content[at + 1 :])
        return f"byte {at} is {byte}"
    if change == "length":
        length = rng.choice((0, 1, size - 1, size + 1, 2**31, 2**63, 2**64 - 1))
        path.write_bytes(length.to_bytes(8, "little") + content[8:])
        return f"header of {length} bytes"
    if change == "more":
        path.write_bytes(content + bytes(16))
        return "bytes after the end"
    if change == "numbers":
        value = rng.choice((float("nan"), float("inf"), 3e38))
        path.write_bytes(content[: 8 + size] + torch.full((len(data) // 4,), value).numpy().tobytes())
        return f"all numbers are {value}"
    names = [name for name in header if name != "__metadata__"]
    name = rng.choice(names)
    entry = header[name]
    rows, end = entry["shape"], entry["data_offsets"][1]
    what, value = rng.choice(
        [
            *(("dtype", kind) for kind in ("I32", "U32", "F8_E4M3", "F64", "C64", "BOOL", "F4", "X", None, 5)),
            *(("shape", shape) for shape in ([], rows[::-1], [*rows, 1], [0, *rows[1:]], [-1], [2**62, 4], "x", [1.5])),
            *(("data_offsets", at) for at in ([0, 0], [end, 0], [0, 2**62], [-4, end], [1], "x", [0.5, 4], [0, end])),
            *(
                ("name", new)
                for new in ("", "x", "../x", rng.choice(names), name + ".", "base_model.model.first.weight")
            ),
            *((f"{BASE}x.lora_A.weight", {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}),),
            *(("__metadata__", junk) for junk in (None, 5, {"x": "y"}, {"x": 5}, [])),
            ("gone", None),
        ]
    )
    if what == "gone":
        del header[name]
    elif what == "name":
        header[value] = header.pop(name)
    elif what in entry:
        header[name] = {**entry, what: value}
    else:
        header[what] = value
    raw = json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)
    return f"{name}: {what} = {str(value)[:60]}"


def _sign(folder: Path) -> None:
    """Let the sidecar have the digest of the tensors as they are now: what is tried is what comes after that check."""
    sidecar = json.loads((folder / ours.SIDECAR).read_text())
    sidecar["sha256"] = hashlib.sha256((folder / ours.TENSORS).read_bytes()).hexdigest()
    (folder / ours.SIDECAR).write_text(json.dumps(sidecar))


def _case(sort: str, name: str, base: nn.Module, folder: Path, kind: str) -> Case:
    model = copy.deepcopy(base)
    before, adapted = fingerprint(model), []
    read: Callable = load_adapter if kind == "adapter" else read_peft

    def wrong(came_back: bool) -> str | None:
        if not came_back:
            return None if fingerprint(model) == before else "refused, but the model is not as it was"
        other = another_function(base, model, folder) if kind == "peft" else None
        adapted[0].remove()
        return other or (None if fingerprint(model) == before else "removed, but the model is not as it was")

    return Case(sort, name, lambda: adapted.append(read(model, folder)), wrong)


def fingerprint(model: nn.Module) -> str:
    """Of everything in a model that reading an adapter could change."""
    digest = hashlib.sha256()
    for name, module in model.named_modules():
        hooks = len(module._forward_hooks) + len(module._forward_pre_hooks)
        digest.update(f"{name} {type(module)} {module.training} {hooks}".encode())
    for name, p in model.named_parameters():
        digest.update(f"{name} {p.dtype} {tuple(p.shape)} {p.requires_grad}".encode())
        digest.update(p.detach().numpy().tobytes())
    return digest.hexdigest()


def another_function(base: nn.Module, model: nn.Module, folder: Path) -> str | None:
    """How the model differs from what peft makes of the folder; None where it does not, or peft is not here."""
    try:
        import peft
    except ImportError:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            public = peft.PeftModel.from_pretrained(copy.deepcopy(base), folder)
        except Exception:  # what peft itself cannot read has no right answer
            return None
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        a, b = model.eval()(x), public.eval()(x)
    model.train(base.training)
    # numbers too large for their kind overflow here and there in an order of one's own
    same = torch.allclose(a, b, rtol=1e-5, atol=1e-5) or not b.isfinite().all()
    return None if same else f"another function than peft's by {float((a - b).abs().max()):g}"
