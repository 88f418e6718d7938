"""Every mixture of experts in the registry of transformers, tiny: the loads that `watch` records are the experts' own.

What they were given is counted apart from `watch`: by the rows of the matrix products with each expert's weights.
The outcome is "right", a kind of what was said to the user where it is not recorded, or "wrong: " and how. The same for
the experts implementation "workbench" of `workbench.kernels`: its outputs are those of "eager" in every precision, and
every bank of experts was computed by it, or it was refused.
"""

import re
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers.models.auto import configuration_auto

from tests.sweep import models, sizes
from tests.sweep.models import NotBuilt, architectures, build
from workbench.errors import InputError
from workbench.kernels import dispatch, register_transformers
from workbench.live.store import Run
from workbench.live.watch import watch

TABLE = Path(__file__).with_name("watch.tsv")
MIXED = re.compile(r"^class \w*(Expert|MoE|MoeBlock|NaiveMoe|SparseMLP)\w*\(nn\.", re.MULTILINE)
MORE = {
    "dbrx": {
        "attn_config": {"kv_n_heads": 1, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 32, "moe_top_k": 2},
    },
    "diffusion_gemma_text": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32},
    "doge": {"is_moe": True, "num_experts": 16, "num_experts_per_tok": 4},
    "flint": {"mlp_only_layers": [0]},
    "gemma4_text": {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32},
    "granitemoeshared": {"num_local_experts": 4},
    "hunyuan_v1_moe": {"num_experts": 4, "moe_topk": 2},
    "vitpose_backbone": {"num_experts": 4, "part_features": 8},
}  # fmt: skip
"""What makes a mixture of an architecture that is none by default."""

LARGEST = 40_000_000
"""Parameters up to which an architecture is tried: there are fewer mixtures than models."""

PRODUCTS = ("linear", "matmul", "__matmul__", "bmm", "mm")
SAME = ("t", "T", "mT", "transpose", "view", "reshape", "squeeze", "to", "contiguous", "__get__")
CLOSE = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 3e-3}
"""How near the kernel is to "eager", relative to the largest output."""


def mixtures() -> list[str]:
    """The architectures in whose source code a class has the name of a mixture of experts."""
    folder = Path(transformers.__file__).parent / "models"
    files = {name: folder / configuration_auto.model_type_to_module_name(name) for name in architectures()}
    return [
        n for n, file in files.items() if any(MIXED.search(path.read_text()) for path in file.glob("modeling_*.py"))
    ]


COLUMNS = ("watch", "kernel")


def row(name: str, columns: Sequence[str] = COLUMNS) -> dict[str, str]:
    """The outcomes of an architecture in these columns; alone, why there are none."""
    try:
        with larger():
            model, inputs = build(name)
    except (NotBuilt, ValueError) as reason:
        return {"class": f"not built: {reason}"}
    banks = dict(routed(model))
    if not banks and not any(MIXED.match(f"class {type(module).__name__}(nn.") for module in model.modules()):
        return {"class": "no mixture"}
    asked = {"watch": watched, "kernel": computed}
    return {"class": type(model).__name__} | {column: asked[column](model, inputs, banks) for column in columns}


@contextmanager
def larger() -> Iterator[None]:
    """The builder of tiny models, of mixtures where it can."""
    before = models.LARGEST, sizes.ALSO
    models.LARGEST, sizes.ALSO = LARGEST, {**before[1], **{n: before[1].get(n, {}) | more for n, more in MORE.items()}}
    try:
        yield
    finally:
        models.LARGEST, sizes.ALSO = before


# -- watch


def watched(model: nn.Module, inputs: dict[str, Any], banks: dict[str, nn.Module]) -> str:
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    recorded, said = recording(model, inputs, given := Given(banks))
    loads = {bank: load for bank in banks if (load := given.load(bank)) is not None}
    if not loads:
        return "said: not found" if "not read: " in said else "not called"
    kinds = {compared(bank, given.same(bank), load, recorded, said) for bank, load in loads.items()}
    alarms = said.count("not read: ") + said.count("workbench.watch: ") * (len(loads) == len(banks))
    if kinds == {"right"} and alarms:
        return f"wrong: all are right, and yet it was said: {said}"
    return worst(kinds)


def holder(bank: str, recorded: dict[str, Tensor]) -> str | None:
    """The innermost layer that was recorded and holds these experts."""
    return max((layer for layer in recorded if not layer or f"{bank}.".startswith(f"{layer}.")), key=len, default=None)


def compared(bank: str, same: list[str], load: Tensor, recorded: dict[str, Tensor], said: str) -> str:
    """What became of the experts of this name, called with `load` tokens each by all banks of the `same` weights."""
    layers = [block for each in same for block in [holder(each, recorded)] if block is not None]
    if layers and torch.equal(sum(recorded[layer] for layer in layers)[: len(load)], load):
        return "right"
    if "were called with" in said:
        return "said: the experts are given other tokens than the router chose"
    if not layers and "cannot be read" in said:
        return "said: the decision cannot be read"
    if not layers and "not read: " in said:
        return "said: not found"
    return f"wrong: {bank} was given {load.tolist()}, recorded {[recorded[name].tolist() for name in layers]}"


def recording(model: nn.Module, inputs: dict[str, Any], given: "Given") -> tuple[dict[str, Tensor], str]:
    """The loads of one training step by layer, and what was said."""
    cadence = {"routing": 1, "structure": 0, "conflict": 0}
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with watch(model.train(), Path(folder) / "run", cadence=cadence) as probes, torch.no_grad():
            torch.manual_seed(0)
            with given:
                model(**inputs)
            probes.step()
            said = [probes.found, *(str(each.message) for each in caught if "workbench" in str(each.message))]
        with Run(Path(folder) / "run") as run:
            names = [layer["name"] for layer in run.meta["model"]["layers"]]
            series = {name: f"load/{name or 'model'}" for name in names}
            loads = {name: run.tensor(load)[1] for name, load in series.items() if load in run.names("load/")}
    model.eval()
    return {name: torch.from_numpy(load.astype("int64")) for name, load in loads.items()}, "\n".join(said)


def routed(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Banks of experts by name: modules with an axis of experts in their parameters, or with a module for each."""
    for name, module in model.named_modules():
        if "shared" in name or not ("expert" in type(module).__name__.lower() or name.endswith("experts")):
            continue
        apart = isinstance(module, nn.ModuleList | nn.ModuleDict)
        if apart or hasattr(module, "moe_num_experts") or any(p.ndim == 3 for p in module.parameters(recurse=False)):
            yield name, module


def members(bank: nn.Module) -> list[nn.Module]:
    """The experts of a list or a dictionary of them."""
    first, *others = bank.children()
    return [first, *(other for other in others if type(other) is type(first))]


class Given(TorchFunctionMode):
    """Counts, while it is entered, the rows that are multiplied by each expert's weights."""

    def __init__(self, banks: dict[str, nn.Module]):
        self.counts: dict[tuple[str, str], Tensor] = {}
        self.known: dict[int, tuple[Tensor, str, str, int | None]] = {}  # tensor, bank, parameter, expert
        self.sizes: dict[str, int] = {}
        self.first: dict[str, str] = {}  # of the banks with the same weights, by bank
        for name, bank in banks.items():
            if isinstance(bank, nn.ModuleList | nn.ModuleDict):
                self.sizes[name] = len(members(bank))
                for expert, member in enumerate(members(bank)):
                    self._know(member, name, expert)
            else:
                packed = [len(p) for p in bank.parameters(recurse=False) if p.ndim == 3]
                self.sizes[name] = min(packed) if packed else bank.moe_num_experts
                self._know(bank, name, None)

    def _know(self, module: nn.Module, bank: str, expert: int | None) -> None:
        for key, parameter in module.named_parameters():
            if parameter.ndim in (2, 3):
                self.first[bank] = self.known.setdefault(id(parameter), (parameter, bank, key, expert))[1]

    def same(self, bank: str) -> list[str]:
        """The banks with the same weights."""
        return [other for other, first in self.first.items() if first == self.first[bank]]

    def load(self, bank: str) -> Tensor | None:
        """(E,) rows of each expert of a bank; None where it was not called."""
        found = [counts for (name, _), counts in self.counts.items() if name == bank]
        return max(found, key=lambda counts: int(counts.sum())) if found else None

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = function(*args, **kwargs or {})
        place = next((i for i, arg in enumerate(args) if id(arg) in self.known), None)
        if place is None:
            return result
        _, bank, key, expert = self.known[id(args[place])]
        name = getattr(function, "__name__", "")
        if name in PRODUCTS:
            counts = self.counts.setdefault((bank, key), torch.zeros(self.sizes[bank], dtype=torch.int64))
            x = args[1 - place]
            if expert is not None:
                counts[expert] += x.numel() // x.shape[-1]
            elif x.ndim == 3:  # every expert on every token, those that are not meant for it being zero
                counts += (x != 0).any(-1).sum(1)
        elif isinstance(result, Tensor):
            one = name == "__getitem__" and expert is None and args[0].ndim == 3
            if one or name in SAME:
                self.known[id(result)] = (result, bank, key, int(args[1]) if one else expert)
        return result


def worst(kinds: set[str]) -> str:
    """Of the outcomes of several layers the wrong one, else all that there are."""
    return next((kind for kind in sorted(kinds) if kind.startswith("wrong: ")), "; ".join(sorted(kinds)))


# -- the kernel


def computed(model: nn.Module, inputs: dict[str, Any], banks: dict[str, nn.Module]) -> str:
    """Each bank of experts with what it is given in the model, alone: rounding may turn the choices of a router."""
    register_transformers()
    try:
        model.set_experts_implementation("workbench")
    except InputError as error:
        return f"refused: {kind_of(str(error))}"
    kinds = {precise(model, inputs, banks, dtype) for dtype in CLOSE}
    model.float()
    return worst(kinds - {""})


def precise(model: nn.Module, inputs: dict[str, Any], banks: dict[str, nn.Module], dtype: torch.dtype) -> str:
    cast = {key: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for key, v in inputs.items()}
    calls: dict[str, tuple] = {}

    def keep(name: str) -> Any:
        return lambda module, args: calls.__setitem__(name, args)

    hooks = [bank.register_forward_pre_hook(keep(name)) for name, bank in banks.items()]
    model.set_experts_implementation("eager")
    try:
        model.to(dtype)(**cast)
    except Exception as error:  # a model that has no such precision
        return "" if dtype != torch.float32 else f"wrong: {models.one_line(error)}"
    finally:
        for hook in hooks:
            hook.remove()
    for name, args in calls.items():
        args = tuple(arg.detach() for arg in args)
        model.set_experts_implementation("eager")
        theirs = banks[name](*args)
        model.set_experts_implementation("workbench")
        try:
            with dispatch.recording() as seen:
                ours = banks[name](*args)
        except InputError as error:
            return f"refused: {kind_of(str(error))}"
        if ("moe_mlp", "cpu") not in seen and ("moe_mlp", "native") not in seen:
            return f"wrong: {name} stays on its own code in {dtype}"
        error = float((ours - theirs).detach().abs().max() / theirs.detach().abs().max())
        if not error <= CLOSE[dtype]:
            return f"wrong: {name} is off by {error:.1e} in {dtype}"
    return "right" if calls else "not called"


def kind_of(message: str) -> str:
    kinds = {"code of their own": "code of its own", "activation": "activation", "gate of its own": "gate"}
    return next(
        (kind for words, kind in kinds.items() if words in message), re.sub(r"^\w+\.", "", message).split(";")[0]
    )
