"""Merging of LoRAs: low-rank updates of the same base, made into one adapter or added to the base's weights.

    deltas = read_deltas(["a", "b"])                   # LoRA folders, of peft or of our own
    merged = concatenate(deltas, [0.5, 0.5])           # exactly 0.5 a + 0.5 b; ranks add
    merged = truncate(merged, 8)                       # the best of rank 8
    merged.save("merged")                              # a folder that peft loads; deltas of packed experts as well
    state = merged.added_to(model.state_dict())        # or full weights

What a layer's update is, s B A, is settled when a folder is read, with rsLoRA's alpha / sqrt(r) and the patterns of
ranks and alphas; a merge never sees r or alpha again. What is no such update is refused by name: DoRA, whose update
depends on the base's norms, biases, layers trained whole, adapters that change the base first (PiSSA, OLoRA).

Tensor letters: n adapters, r rank, I input width, O output width.
"""

import hashlib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from workbench.errors import InputError
from workbench.lib.core.adapt.files import SIDECAR, read_adapter
from workbench.lib.core.adapt.matrix import is_linear, is_turned
from workbench.lib.core.adapt.packed import find_packed, unpack
from workbench.lib.core.adapt.peft import read_folder, write_peft
from workbench.lib.core.low_rank import LowRankExperts
from workbench.lib.core.merge.linear import TaskArithmetic
from workbench.lib.core.merge.merger import Merger, merged_state
from workbench.lib.core.merge.sources import Source, open_source
from workbench.lib.core.merge.vectors import PIECE, TaskVectors, narrowed

Factors = tuple[Tensor, Tensor, float]


@dataclass(frozen=True, eq=False)
class LowRankDeltas(Mapping[str, Factors]):
    """The update of each adapted layer: name -> (A (r, I), B (O, r), scale), the update being scale B A.

    Attributes:
        layers: one of packed experts has an entry for each expert, "mlp.experts.0.gate_up_proj" and so on.
        packed: names of the packed parameters, "mlp.experts.gate_up_proj", of a module in its own order.
        base: what is known of the base: "sha256" of the adapted weights, or "name".
        transposed: whether the adapter says that weights of the base lie as (I, O), as in GPT-2. peft says it of the
            layer that it adapted last, so this is not of all where a model has both.
        turned: of a layer whether its own weight lies as (I, O), as far as it is known.
        ordered: whether the layers are in the order in which "sha256" was made.
    """

    layers: dict[str, Factors]
    packed: tuple[str, ...] = ()
    base: tuple[tuple[str, str], ...] = ()
    transposed: bool = False
    turned: dict[str, bool] = field(default_factory=dict)
    ordered: bool = False

    def __getitem__(self, name: str) -> Factors:
        return self.layers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        """A (r, I) and B (O, r) with the scale in B, in float32 or better."""
        a, b, scale = self.layers[name]
        kind = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
        return a.to(kind), b.to(kind) * scale

    def dense(self, name: str) -> Tensor:
        """The update (O, I)."""
        a, b = self.factors(name)
        return b @ a

    def shape(self, name: str) -> tuple[int, int]:
        """(O, I)."""
        a, b, _ = self.layers[name]
        return b.shape[0], a.shape[1]

    def save(self, folder: str | Path) -> Path:
        """Write a LoRA folder that peft loads and `read_deltas` reads to the same updates.

        Raises:
            InputError: something else is at `folder`; or packed experts of one parameter have unequal ranks.
            OSError: the disk is full or not writable; what was there still is.
        """
        banks = {name: LowRankExperts.from_loras([(*_narrowed(*self.factors(name)), 1.0)]) for name in self}
        for name, bank in banks.items():
            bank.turned = self.turned.get(name, self.transposed)
        said = {"base_model_name_or_path": dict(self.base).get("name")}
        return write_peft(banks, folder, packed=self.packed, settings=said)

    def added_to(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The weights with the updates in them, each added in float32 or better and in the weight's own type again.

        Args:
            state: of the base, by the names of its parameters; not changed.

        Raises:
            InputError: weights that are missing or of other shapes, all of them named; or square weights of which
                nothing says whether they lie as (O, I) or (I, O); or what `check_base` refuses; or sums that the type
                of a weight cannot hold.
        """
        merged, placements = dict(state), self.placed({key: value.shape for key, value in state.items()})
        check_base(self, open_source(state, "state"), "the adapter")
        for key, placed in placements.items():
            delta = placed.rows().view(state[key].shape)
            merged[key] = narrowed(state[key].to(delta.dtype) + delta, state[key].dtype, key)
        return merged

    def placed(self, shapes: Mapping[str, Sequence[int]]) -> dict[str, "Placed"]:
        """How the updates lie in the weights of a base, by the weights' names.

        Raises:
            InputError: as `added_to`.
        """
        by_weight = self.by_weight()
        wrong = [f"no weight {key!r}" for key in by_weight if key not in shapes]
        fits = {key: _fits(shapes[key], self, names) for key, names in by_weight.items() if key in shapes}
        wrong += [
            f"{key} has shape {tuple(shapes[key])} but the update is {self.shape(by_weight[key][0])}"
            for key, fit in fits.items()
            if not fit
        ]
        if wrong:
            raise InputError(f"the base does not fit the adapter: {'; '.join(wrong)}")
        square = {key: self.turned.get(by_weight[key][0]) for key, fit in fits.items() if len(fit) == 2}
        sides = {side for fit in fits.values() if len(fit) == 1 for side in fit}
        claimed = self.transposed or True in sides
        sides |= _sides(shapes) | {claimed}
        doubtful = [key for key, known in square.items() if known is None and not _clear(key, shapes, sides, claimed)]
        if doubtful:
            raise InputError(
                f"{', '.join(doubtful)} may lie as (O, I) or as (I, O), and nothing says which: give read_deltas the "
                "model; or adapt the model with the adapter and use its merge_back"
            )
        turned = {key: fit == {True} for key, fit in fits.items()}
        turned |= {key: claimed if known is None else known for key, known in square.items()}
        return {key: Placed([self.factors(name) for name in by_weight[key]], side) for key, side in turned.items()}

    def by_weight(self) -> dict[str, list[str]]:
        """The names of the updates of each weight of the base: one, or one for each packed expert."""
        experts = {whole: [n for e in range(len(self)) if (n := _expert(whole, e)) in self] for whole in self.packed}
        taken = {name for names in experts.values() for name in names}
        return experts | {f"{name}.weight": [name] for name in self if name not in taken}


@dataclass(frozen=True)
class Placed:
    """The updates of one weight: as its rows lie, of which only some need be computed.

    Attributes:
        factors: A (r, I) and B (O, r), of each packed expert where it has several.
        turned: whether the weight is (I, O).
    """

    factors: list[tuple[Tensor, Tensor]]
    turned: bool

    def rows(self, start: int = 0, stop: int | None = None) -> Tensor:
        """The entries start to stop of the flattened update of the weight."""
        sides = [(a.T, b.T) if self.turned else (b, a) for a, b in self.factors]
        high, wide = len(sides[0][0]), sides[0][1].shape[1]
        start, stop, _ = slice(start, stop).indices(len(sides) * high * wide)
        first, last = start // wide, -(-stop // wide)  # rows of all experts, one below the other
        found = [
            left[max(first - e * high, 0) : max(last - e * high, 0)] @ right for e, (left, right) in enumerate(sides)
        ]
        return torch.cat(found).flatten()[start - first * wide : stop - first * wide]


def read_deltas(folders: Sequence[str | Path], model: nn.Module | None = None) -> list[LowRankDeltas]:
    """The updates of LoRA folders, of peft or as `Adapted.save` writes them, which must be of one base.

    Args:
        model: the base; needed where packed experts are adapted, for what lies in their A and B, and where square
            weights may lie as (O, I) or as (I, O).

    Raises:
        InputError: everything that is wrong with any of the folders, and every way in which they do not go together.
    """
    if isinstance(folders, str | Path) or not folders:
        raise InputError(f"folders is {folders!r} but must be a list of at least one folder")
    deltas, wrong = [], []
    for folder in map(Path, folders):
        try:
            deltas.append(_read_own(folder, model) if (folder / SIDECAR).is_file() else _read_peft(folder, model))
        except InputError as error:
            wrong.append(str(error))
    if wrong:
        raise InputError("; ".join(wrong))
    _together(deltas, [str(folder) for folder in folders])
    return deltas


def check_base(deltas: LowRankDeltas, base: Source, label: str) -> None:
    """Raise an `InputError` where it is known that an adapter was made on other weights than the base's.

    It is of our own folders, but for layers that lie as (I, O) and packed experts, whose digest is of what they are
    seen as.
    """
    known = dict(deltas.base).get("sha256")
    if known is None or not deltas.ordered or deltas.packed or any(deltas.turned.values()):
        return
    digest = hashlib.sha256()
    for name in (f"{layer}.{key}" for layer in deltas for key in ("weight", "bias")):
        if name in base.specs:
            shape, dtype = base.specs[name]
            digest.update(f"{name} {dtype} {shape}".encode())
            for start in range(0, math.prod(shape), PIECE):
                digest.update(base.read(name, start, start + PIECE).cpu().contiguous().view(torch.uint8).numpy().data)
    if digest.hexdigest() != known:
        raise InputError(f"{label} was made on layers with other weights, or in another type, than {base.label} has")


def _read_peft(folder: Path, model: nn.Module | None) -> LowRankDeltas:
    loras, config, names = read_folder(folder, model)
    # a packed parameter has no LoRA of its own name, only its experts have
    base = (("name", config.base_name),) if isinstance(config.base_name, str) and config.base_name else ()
    packed = tuple(name for name in names if name not in loras)
    return LowRankDeltas(loras, packed, base, config.transposed, _turned(loras, packed, model))


def _read_own(folder: Path, model: nn.Module | None) -> LowRankDeltas:
    said, tensors = read_adapter(folder)
    if said["slug"] != "lora":
        raise InputError(f"{folder} is a {said['slug']!r} but only plain LoRAs, 'lora', are merged: others are no sum")
    layers: dict[str, Factors] = {}
    for key in tensors:
        name, _, half = key.rpartition(".experts.")
        if not name or half not in ("a", "b", "scale") or tensors[key].shape[:1] != (1,):
            raise InputError(f"{folder} holds {key!r} of shape {tuple(tensors[key].shape)}, which is no plain LoRA's")
        halves = [tensors.get(f"{name}.experts.{h}") for h in ("a", "b", "scale")]
        if any(half is None or not half.isfinite().all() for half in halves):
            raise InputError(f"{folder} has no whole LoRA of {name} in finite numbers")
        a, b, scale = halves
        if (a.ndim, b.ndim, scale.ndim) != (3, 3, 1) or a.shape[1] != b.shape[2]:
            raise InputError(f"{folder} has A {tuple(a.shape)} and B {tuple(b.shape)} of unequal ranks at {name}")
        layers[name] = (a[0], b[0], float(scale[0]))
    order = said.get("layers") or []
    if ordered := set(order) == set(layers):  # of packed experts the digest is of the module that holds them
        layers = {name: layers[name] for name in order}
    packed, turned = _packed(folder, layers, model), said.get("turned")
    known = _turned(layers, packed, model) if turned is None else {name: name in turned for name in layers}
    return LowRankDeltas(layers, packed, (("sha256", said["base_sha256"]),), turned=known, ordered=ordered)


def _turned(layers: Mapping[str, Factors], packed: Sequence[str], model: nn.Module | None) -> dict[str, bool]:
    """Whether the weights of layers lie as (I, O), of those that the model has."""
    if model is None:
        return {}
    modules = dict(model.named_modules())
    found = {name: is_turned(modules[name]) for name in layers if name in modules and is_linear(modules[name])}
    for whole in packed:
        module = modules[whole.rpartition(".")[0]]
        known = unpack(module)  # else what peft goes by
        side = getattr(module, "is_transposed", False) if known is None else known.get_submodule("0").form.transposed
        found |= {name: side for e in range(len(layers)) if (name := _expert(whole, e)) in layers}
    return found


def _packed(folder: Path, layers: Mapping[str, Factors], model: nn.Module | None) -> tuple[str, ...]:
    """The packed parameters that the layers are experts of, in the order in which their modules have them."""
    if model is None:
        if doubtful := [name for name in layers if re.search(r"\.\d+\.(gate_up|up|down)_proj$", name)]:
            raise InputError(f"{folder} adapts experts, {doubtful[0]} ..: give the model, which says how they lie")
        return ()
    names = (f"{place}.{key}" for place, module in model.named_modules() for key in find_packed(module))
    return tuple(name for name in names if _expert(name, 0) in layers)


def _expert(whole: str, index: int) -> str:
    """The name of one expert of a packed parameter."""
    place, _, key = whole.rpartition(".")
    return f"{place}.{index}.{key}"


def _together(deltas: Sequence[LowRankDeltas], names: Sequence[str]) -> None:
    """Raise an `InputError` of all ways in which the adapters are not of one base."""
    wrong = []
    for key in ("sha256", "name"):
        # a digest is of the adapted weights, so it says something only between adapters of the same layers
        known = {n: d for n, d in zip(names, deltas, strict=True) if key in dict(d.base)}
        bases = {n: (dict(d.base)[key], frozenset(d) if key == "sha256" else None) for n, d in known.items()}
        if len(set(bases.values())) > len({layers for _, layers in bases.values()}):
            wrong.append("bases differ: " + ", ".join(f"{name} is of {base!r}" for name, (base, _) in bases.items()))
    for layer in dict.fromkeys(layer for d in deltas for layer in d):
        shapes = {name: d.shape(layer) for name, d in zip(names, deltas, strict=True) if layer in d}
        if len(set(shapes.values())) > 1:
            wrong.append(f"{layer} is " + ", ".join(f"{shape} in {name}" for name, shape in shapes.items()))
    for layer in dict.fromkeys(layer for d in deltas for layer in d.turned):
        if len({d.turned[layer] for d in deltas if layer in d.turned}) > 1:
            wrong.append(f"the weight of {layer} lies as (I, O) for some and as (O, I) for others")
    for layer in dict.fromkeys(whole for d in deltas for whole in d.packed):
        # the experts of a parameter are known only from its own adapter; another's layer of that name is another layer
        if lacking := [n for n, d in zip(names, deltas, strict=True) if layer not in d.packed]:
            wrong.append(f"packed experts {layer} are not adapted by {', '.join(lacking)}")
    if wrong:
        raise InputError(f"the adapters do not go together: {'; '.join(wrong)}")


def _weighed(deltas: Sequence[LowRankDeltas], weights: Sequence[float]) -> dict[str, list[tuple[LowRankDeltas, float]]]:
    """Of each layer, the adapters that have it and their weights; after all checks."""
    deltas = list(deltas)
    if not deltas:
        raise InputError("deltas is empty but must hold at least one adapter")
    if len(weights) != len(deltas) or not all(abs(w) < float("inf") for w in weights):
        raise InputError(f"weights is {list(weights)} but must be {len(deltas)} finite numbers, one for each adapter")
    _together(deltas, [f"adapter {i}" for i in range(len(deltas))])
    layers = dict.fromkeys(name for d in deltas for name in d)
    return {name: [(d, w) for d, w in zip(deltas, weights, strict=True) if name in d] for name in layers}


def _like(deltas: Sequence[LowRankDeltas], layers: dict[str, Factors]) -> LowRankDeltas:
    if endless := [name for name, (a, b, _) in layers.items() if not (a.isfinite().all() and b.isfinite().all())]:
        raise InputError(f"{', '.join(endless)} comes out of the merge with numbers that are not finite")
    base = dict(pair for d in deltas for pair in d.base)
    if any(set(d) != set(layers) for d in deltas):
        base.pop("sha256", None)
    transposed, turned = any(d.transposed for d in deltas), {k: v for d in deltas for k, v in d.turned.items()}
    ordered = deltas[0].ordered and list(layers) == list(deltas[0])
    return LowRankDeltas(layers, deltas[0].packed, tuple(base.items()), transposed, turned, ordered)


def concatenate(deltas: Sequence[LowRankDeltas], weights: Sequence[float]) -> LowRankDeltas:
    """Exactly sum_i w_i (s_i B_i A_i) for every layer: A and B side by side, so that ranks add (peft's `cat`).

    A layer that an adapter has not is zero in it. Where the ranks add to more than a layer's smaller width, the sum is
    held in that rank, which is enough for any matrix.
    """
    layers = {}
    for name, found in _weighed(deltas, weights).items():
        pairs = [(d.factors(name), w) for d, w in found]
        a, b = torch.cat([a for (a, _), _ in pairs]), torch.cat([b * w for (_, b), w in pairs], dim=1)
        layers[name] = (*_narrowed(a, b), 1.0)
    return _like(deltas, layers)


def linear(deltas: Sequence[LowRankDeltas], weights: Sequence[float]) -> LowRankDeltas:
    """A and B summed each by itself, as in peft's `linear`: NOT the weighted sum of the updates.

    A = sum_i sign(w_i) sqrt(|w_i| s_i) A_i, B likewise without signs, so that B A has all products B_i A_j as well: two
    equal adapters at [0.5, 0.5] come out doubled. For comparison; `concatenate` and `truncate` are what a sum is.

    Raises:
        InputError: layers whose ranks differ, all named, for there is nothing to add.
    """
    found, layers = _weighed(deltas, weights), {}
    ranks = {name: [len(d[name][0]) for d, _ in of] for name, of in found.items()}
    if unequal := [f"{name}: {', '.join(map(str, r))}" for name, r in ranks.items() if len(set(r)) > 1]:
        raise InputError(f"linear needs equal ranks but has {'; '.join(unequal)}; concatenate takes any")
    for name, of in found.items():
        a, b = 0, 0
        for d, w in of:
            one, other, scale = d[name]
            root = abs(w * scale) ** 0.5
            a, b = a + one.float() * (root if w * scale >= 0 else -root), b + other.float() * root
        layers[name] = (a, b, 1.0)
    return _like(deltas, layers)


def truncate(deltas: LowRankDeltas, rank: int) -> LowRankDeltas:
    """The best update of at most that rank for each layer (peft's `svd`), by an SVD of no more than r x r numbers.

    Raises:
        InputError: `rank` is no whole number of at least 1.
    """
    if type(rank) is not int or rank < 1:
        raise InputError(f"rank is {rank!r} but must be a whole number of at least 1")
    layers = {}
    for name in deltas:
        a, b = (half.double() for half in deltas.factors(name))
        (qb, rb), (qa, ra) = torch.linalg.qr(b), torch.linalg.qr(a.T)
        u, s, v = torch.linalg.svd(rb @ ra.T, full_matrices=False)
        root, kind = s[:rank].sqrt(), deltas.factors(name)[0].dtype
        layers[name] = ((root[:, None] * (v[:rank] @ qa.T)).to(kind), (qb @ u[:, :rank] * root).to(kind), 1.0)
    return replace(deltas, layers=layers)


def merge_adapters(deltas: Sequence[LowRankDeltas], merger: Merger, rank: int | None = None) -> LowRankDeltas:
    """Any way to merge on the updates themselves, which are the task vectors; a layer that one has not is zero in it.

    Args:
        rank: what each result is truncated to; default none. Sums are exact then, and of the ranks together; of any
            other method results have the rank that they have, up to a layer's smaller width.

    Raises:
        InputError: adapters that do not go together, or what the method says.
    """
    shapes = {name: of[0][0].shape(name) for name, of in _weighed(deltas, [1.0] * len(deltas)).items()}
    zeros = {name: torch.zeros(shape) for name, shape in shapes.items()}
    dense = [{name: d.dense(name).float() if name in d else zeros[name].clone() for name in shapes} for d in deltas]
    vectors = TaskVectors(zeros, dense)
    if isinstance(merger, TaskArithmetic):
        merged = concatenate(deltas, merger.facts(vectors))
    else:
        found = merged_state(vectors, merger)
        merged = _like(deltas, {name: (*_as_factors(full), 1.0) for name, full in found.items()})
    return merged if rank is None else truncate(merged, rank)


def _narrowed(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The same product in a rank of at most its smaller width."""
    d_out, d_in = b.shape[0], a.shape[1]
    if len(a) <= min(d_out, d_in):
        return a, b
    return _as_factors((b.double() @ a.double()).to(b.dtype))


def _as_factors(full: Tensor) -> tuple[Tensor, Tensor]:
    d_out, d_in = full.shape
    return (torch.eye(d_in, dtype=full.dtype), full) if d_in <= d_out else (full, torch.eye(d_out, dtype=full.dtype))


def _fits(shape: Sequence[int], deltas: LowRankDeltas, names: list[str]) -> set[bool]:
    """In which ways a weight of that shape can take the updates: as (O, I), False, as (I, O), True."""
    d_out, d_in = deltas.shape(names[0])
    experts = (len(names),) if len(shape) == 3 else ()
    sides = {False: (*experts, d_out, d_in), True: (*experts, d_in, d_out)}
    return {turned for turned, side in sides.items() if tuple(shape) == side}


def _sides(shapes: Mapping[str, Sequence[int]]) -> set[bool]:
    """In which ways the linear layers of a base lie, as far as it shows in the widths of their biases."""
    found = set()
    for key, shape in shapes.items():
        bias = tuple(shapes.get(f"{key.removesuffix('weight')}bias", ()))
        if key.endswith(".weight") and len(shape) == 2 and shape[0] != shape[1] and bias in ((shape[0],), (shape[1],)):
            found.add(bias == (shape[1],))
    return found


def _clear(key: str, shapes: Mapping[str, Sequence[int]], sides: set[bool], claimed: bool) -> bool:
    """Whether a square weight lies as `claimed`, where the layers of the base lie in the ways `sides`."""
    if len(sides) > 1 or not key.endswith(".weight"):
        return False
    # of the layers that are known to lie as (I, O) each has a bias
    return not claimed or f"{key.removesuffix('weight')}bias" in shapes
