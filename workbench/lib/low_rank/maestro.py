"""Maestro: layers of two factors whose components training sorts by importance, so that their rank comes out of it.

Horvath et al. 2023, "Maestro: Uncovering Low-Rank Structures via Trainable Decomposition" (arXiv:2308.14929, ICML
2024); public code: SamuelHorvath/Maestro-LoD. A linear layer, or a convolution seen as (O, I k k), is

    y = B[:, :b] A[:b] x + bias        A (R, I), B (O, R), R = min(O, I), from the SVD of the usual initial weight

- **Ordered sampling.** Beside the whole model, each step trains one in which a single layer is cut to its first b
  components; (layer, b) run through all pairs without replacement (`PrefixSampler`). A component is in the prefix more
  often the earlier it stands: that sorts them. For a linear map it makes the prefixes those of the SVD.
- **Hierarchical group lasso.** sum over layers and b of ||A[b:]|| + ||B[:, b:]||: component b is charged b times, so
  the tail dies first.
- **Progressive shrinking.** After an epoch a layer keeps its components of importance ||A[b:]|| ||B[:, b:]|| >= eps.
  What is cut is sliced off in the forward pass and stays in the parameters, so an optimizer keeps its state.
- **Nested models.** Cutting further, the least important component of all layers first, gives smaller models without
  training; batch norms are to be calibrated again for each.

The importance of a prefix is that of all that follows, so in the linear case it is about the *sum* of the singular
values from b on, and `strength` the single ones.

    found = decompose(model, skip_last=True)
    sampler = PrefixSampler(model, seed=0)
    ...                                     # loss = maestro_loss(model, sampler, x, y, weight=1e-4), and each epoch:
    progressive_shrink(model, eps=1e-3)
    small = extract(model, budget=20_000)   # plain layers, dense where that is smaller

Tensor letters: B batch, I input width (of a convolution with its window), O output width, R full rank, r rank.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import accumulate
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import update_bn

from workbench.catalogue import Method
from workbench.errors import InputError, unknown
from workbench.lib.core.adapt.adapted import replace_module
from workbench.lib.core.adapt.put import check_model
from workbench.lib.core.budget import count_params
from workbench.lib.core.factored import find_linears, replace_linears, weight_users
from workbench.lib.core.train import step_seed
from workbench.lib.low_rank.ordered import MaestroConv2d, MaestroLinear, Ordered, why_not

METHOD = Method(
    slug="maestro",
    title="Maestro: Uncovering Low-Rank Structures via Trainable Decomposition",
    family="low_rank",
    year=2023,
    paper="arXiv:2308.14929",
    claim="Ordered dropout on factorised weights finds each layer's rank during training and recovers the SVD in the "
    "linear case.",
    objects=(
        "decompose",
        "MaestroLinear",
        "MaestroConv2d",
        "PrefixSampler",
        "maestro_loss",
        "hierarchical_group_lasso",
        "progressive_shrink",
        "extract",
        "nested_curve",
        "merge_back",
    ),
)

MODES = ("per_layer", "across_layers")
TARGETS = ("soft", "hard")


@dataclass(frozen=True)
class Decomposition:
    """What was put where; `report` says what it has come to.

    Attributes:
        model: changed in place.
        layers: the ordered ones by name, in the order of the model.
        left_out: what the targets match and stays as it is, with the reason.
    """

    model: nn.Module
    layers: Mapping[str, Ordered]
    left_out: Mapping[str, str]

    def report(self) -> dict[str, Any]:
        """Parameters of the model, dense and as `extract` would make it now, and each layer with its operations.

        Operations are those of a token, or of a place in the output of a convolution.
        """
        rows = {}
        for name, layer in self.layers.items():
            full = layer.full_rank
            dense, now = 2 * layer.a[0].numel() * len(layer.b), layer.flops
            rows[name] = {
                "rank": layer.rank,
                "full_rank": full,
                "params_before": layer.params_at(full),
                "params": layer.params_at(layer.rank),
                "flops_before": dense,
                "flops": min(now, dense),
            }
        outside = count_params(self.model) - sum(count_params(layer) for layer in self.layers.values())
        totals = {key: sum(row[key] for row in rows.values()) for key in ("params_before", "params")}
        flops = {key: sum(row[key] for row in rows.values()) for key in ("flops_before", "flops")}
        totals = {key: outside + value for key, value in totals.items()}
        return totals | flops | {"layers": rows, "left_out": dict(self.left_out)}


def decompose(
    model: nn.Module, targets: str | Sequence[str] = "*", skip_first: int = 0, skip_last: bool = False
) -> Decomposition:
    """Put ordered factors in the place of the linear layers and convolutions whose names match: the same function.

    Args:
        model: any module; changed in place.
        targets: glob patterns over the names of linear layers (GPT-2's `Conv1D` among them) and of `nn.Conv2d`.
        skip_first: how many of the first of them stay as they are.
        skip_last: whether the last stays, as a head of few classes has no rank to lose.

    Raises:
        InputError: targets that match nothing of the kind, or nothing is left of them; a weight that is not finite; a
            model that is wrapped, compiled or adapted. The model is as it was then.
    """
    linears, convolutions, left_out = _find(model, (targets,) if isinstance(targets, str) else tuple(targets))
    names = [name for name, _ in model.named_modules() if name in linears or name in convolutions]
    if skip_first < 0:
        raise InputError(f"skip_first is {skip_first} but must be at least 0")
    chosen = names[skip_first : len(names) - bool(skip_last)]
    if not chosen:
        raise InputError(f"skip_first={skip_first}, skip_last={skip_last} leave nothing of {len(names)} layers")
    made = {name: MaestroConv2d.from_dense(convolutions[name]) for name in chosen if name in convolutions}
    if flat := [name for name in chosen if name in linears]:
        replace_linears(model, lambda layer, name: MaestroLinear.from_dense(layer), flat)
    for name, layer in made.items():
        for p in (layer.a, layer.b):
            p.requires_grad_(convolutions[name].weight.requires_grad)
        replace_module(model, convolutions[name], layer.train(convolutions[name].training))
    found = ordered_layers(model)
    return Decomposition(model, {name: found[name] for name in chosen}, left_out)


def _find(model: nn.Module, patterns: tuple[str, ...]) -> tuple[dict[str, nn.Module], dict[str, nn.Module], dict]:
    """The linear layers and the convolutions that match, and what matches and is left out."""
    check_model(model)
    if not patterns:
        raise InputError("targets is empty but must hold at least one pattern")
    linears, convolutions, left_out, users = {}, {}, {}, weight_users(model)

    def reason(name: str, layer: nn.Module) -> str | None:
        if "weight" not in layer._parameters:
            return "a convolution whose weight is computed from others"
        others = [user for user in users[layer.weight] if user != f"{name}.weight".lstrip(".")]
        return why_not(layer) or (f"its weight is {others[0]} too" if others else None)

    for pattern in patterns:
        here = {n: m for n, m in model.named_modules() if isinstance(m, nn.Conv2d) and fnmatchcase(n, pattern)}
        left_out |= {name: why for name, layer in here.items() if (why := reason(name, layer))}
        fits = {name: layer for name, layer in here.items() if name not in left_out}
        try:
            found, left = find_linears(model, pattern)
        except InputError:
            if not fits:
                raise
            found, left = {}, {}
        linears |= found
        convolutions |= fits
        left_out |= {name: why for name, why in left.items() if name not in here}
    return linears, convolutions, left_out


def ordered_layers(model: nn.Module) -> dict[str, Ordered]:
    """The ordered layers of a model by name; an `InputError` where there is none."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, Ordered)}
    if not found:
        raise InputError("model has no ordered layer: decompose(model) puts them in")
    return found


class PrefixSampler(nn.Module):
    """Which layer is cut, and to which width, at each step.

    "per_layer", as in the paper, cuts one layer a step and all others not at all: the pairs (layer, b), 1 <= b <= r,
    come in a shuffled pass, each once, which begins anew when a rank has changed. "across_layers" draws a b for every
    layer.

    It is a module so that its place in the pass is saved with the model that holds it: what is drawn follows from the
    seed and that place alone. It does not hold the layers.
    """

    def __init__(self, model: nn.Module, mode: str = "per_layer", seed: int = 0):
        super().__init__()
        if mode not in MODES:
            raise unknown("mode", mode, MODES)
        self._layers, self.mode, self.seed = tuple(ordered_layers(model).items()), mode, seed
        self.register_buffer("drawn", torch.tensor([-1, 0]))  # the pass, and the pairs of it that were drawn
        self.register_buffer("ranks", torch.zeros(len(self._layers), dtype=torch.int64))  # when it began
        self._order: tuple[int, Tensor] = (-1, torch.empty(0))

    def draw(self) -> dict[str, int]:
        """The next width of each layer that is to be cut, by its name."""
        ranks = [layer.rank for _, layer in self._layers]
        passes, place = self.drawn.tolist()
        if ranks != self.ranks.tolist() or place == sum(ranks):
            passes, place = passes + 1, 0
            self.ranks.copy_(torch.tensor(ranks))
        self.drawn.copy_(torch.tensor([passes, place + 1]))
        if self.mode == "across_layers":
            generator = torch.Generator().manual_seed(step_seed(step_seed(self.seed, passes), place))
            drawn = [int(torch.randint(1, rank + 1, (), generator=generator)) for rank in ranks]
            return {name: width for (name, _), width in zip(self._layers, drawn, strict=True)}
        if self._order[0] != passes or len(self._order[1]) != sum(ranks):
            generator = torch.Generator().manual_seed(step_seed(self.seed, passes))
            self._order = passes, torch.randperm(sum(ranks), generator=generator)
        pair = int(self._order[1][place])
        layer = next(i for i, end in enumerate(accumulate(ranks)) if pair < end)
        return {self._layers[layer][0]: pair - sum(ranks[:layer]) + 1}

    @contextmanager
    def step(self) -> Iterator[dict[str, int]]:
        """Forward passes inside are cut as `draw` says, which is what is yielded."""
        widths = self.draw()
        layers = dict(self._layers)
        for name, width in widths.items():
            layers[name].sampled = width
        try:
            yield widths
        finally:
            for name in widths:
                layers[name].sampled = None


def hierarchical_group_lasso(model: nn.Module, eps: float = 1e-12) -> Tensor:
    """sum over layers and 1 <= b <= r of ||A[b:]||_F + ||B[:, b:]||_F; no layer, an `InputError`.

    Args:
        eps: added to the squared norms, as the root has no gradient at 0.
    """
    return torch.stack([layer.group_lasso(eps) for layer in ordered_layers(model).values()]).sum()


def maestro_loss(
    model: nn.Module,
    sampler: PrefixSampler,
    inputs: Tensor | Mapping[str, Any],
    targets: Tensor,
    weight: float,
    target: str = "soft",
) -> tuple[Tensor, Tensor]:
    """(cross entropy of the whole model, that of the one the sampler cuts + weight * lasso): their sum is the loss.

    Args:
        inputs: model(inputs), or model(**inputs), gives logits (..., classes), or what has them as `logits`.
        targets: classes (...).
        weight: lambda of the group lasso.
        target: what the cut model learns. "soft": what the whole one says, without a gradient, as the released code
            trains its networks; "hard": the targets, as the paper writes it and the code's linear examples do.
    """
    if target not in TARGETS:
        raise unknown("target", target, TARGETS)
    logits = _logits(model, inputs)
    with sampler.step():
        cut = _logits(model, inputs)
    goal = logits.detach().softmax(-1) if target == "soft" else targets.flatten()
    further = F.cross_entropy(cut, goal)
    if weight:
        further = further + weight * hierarchical_group_lasso(model)
    return F.cross_entropy(logits, targets.flatten()), further


def _logits(model: nn.Module, inputs: Tensor | Mapping[str, Any]) -> Float[Tensor, "rows classes"]:
    output = model(**inputs) if isinstance(inputs, Mapping) else model(inputs)
    return getattr(output, "logits", output).flatten(0, -2)


def progressive_shrink(model: nn.Module, eps: float) -> dict[str, int]:
    """Cut every layer's components of importance below `eps`, and say what rank each has left; none grows again.

    Raises:
        InputError: a layer would lose all of them, or its importances are not finite. No layer is cut then.
    """
    layers, ranks = ordered_layers(model), {}
    for name, layer in layers.items():
        try:
            ranks[name] = layer.rank_at(eps)
        except InputError as error:
            raise InputError(f"{name or 'the model'} cannot be shrunk: {error}") from None
    for name, rank in ranks.items():
        layers[name].cut(rank)
    return ranks


def fit_ranks(model: nn.Module, budget: int, whole: str | Sequence[str] = ()) -> dict[str, int]:
    """The ranks at which `extract` makes a model of at most `budget` parameters: the least important component of all
    layers goes first, and each layer keeps one.

    Args:
        whole: patterns of layers that keep what they have.

    Raises:
        InputError: no ranks meet the budget, a pattern matches no layer, or importances are not finite.
    """
    layers = ordered_layers(model)
    patterns = (whole,) if isinstance(whole, str) else tuple(whole)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in layers):
            raise unknown("whole", pattern, layers)
    free = [name for name in layers if not any(fnmatchcase(name, pattern) for pattern in patterns)]
    importance = {name: layers[name].importance().tolist() for name in free}
    if wrong := [name for name in free if not layers[name].importance().isfinite().all()]:
        raise InputError(f"the importances of {wrong[0]} are not finite, so its components have no order")
    ranks = {name: layer.rank for name, layer in layers.items()}
    outside = count_params(model) - sum(count_params(layer) for layer in layers.values())
    size = outside + sum(layer.params_at(ranks[name]) for name, layer in layers.items())
    while size > budget:
        left = [name for name in free if ranks[name] > 1]
        if not left:
            raise InputError(f"budget is {budget} parameters but no ranks meet it: the smallest model has {size}")
        least = min(left, key=lambda name: importance[name][ranks[name] - 1])
        size -= layers[least].params_at(ranks[least]) - layers[least].params_at(ranks[least] - 1)
        ranks[least] -= 1
    return ranks


def extract(
    model: nn.Module,
    ranks: Mapping[str, int] | None = None,
    *,
    budget: int | None = None,
    whole: str | Sequence[str] = (),
) -> nn.Module:
    """A copy of the model with plain layers: `LowRankLinear`, two convolutions, or dense where r (I + O) > I O.

    Args:
        ranks: of layers by name; those that are not named keep theirs.
        budget: parameters of the whole copy instead, see `fit_ranks`, which `whole` is for.

    Raises:
        InputError: both are given; a rank above what is left of its layer, or below 1; a name that no layer has; a
            budget that no ranks meet.
    """
    layers = ordered_layers(model)
    if ranks is not None and budget is not None:
        raise InputError("ranks and budget are both given but only one of them can say what is left")
    ranks = fit_ranks(model, budget, whole) if budget is not None else dict(ranks or {})
    for name in ranks:
        if name not in layers:
            raise unknown("ranks", name, layers)
    made = copy.deepcopy(model)
    for name, layer in ordered_layers(made).items():
        try:
            plain = layer.to_factored(ranks.get(name, layer.rank))
        except InputError as error:
            raise InputError(f"ranks of {name or 'the model'}: {error}") from None
        if layer is made:
            return plain
        replace_module(made, layer, plain)
    return made


def recalibrate(model: nn.Module, batches: Iterable[Tensor]) -> nn.Module:
    """Estimate the statistics of the batch norms anew, over these inputs: they are those of a wider model."""
    update_bn(batches, model)
    return model


@dataclass(frozen=True)
class Nested:
    """One of the models that lie in another: its size, its ranks by layer, and what it reaches."""

    params: int
    ranks: Mapping[str, int]
    metric: float


def nested_curve(
    model: nn.Module,
    metric: Callable[[nn.Module], float],
    budgets: Iterable[int],
    *,
    batches: Sequence[Tensor] = (),
    whole: str | Sequence[str] = (),
) -> list[Nested]:
    """What the models of these sizes reach that lie in one that was trained, without further training.

    Args:
        metric: of a model.
        budgets: parameters, see `extract`.
        batches: inputs on which the batch norms of each are calibrated; needed where the model has such.
        whole: patterns of layers that are not cut.
    """
    if not batches and any(isinstance(module, _BatchNorm) for module in model.modules()):
        raise InputError("batches is empty but must hold inputs: the model has batch norms, which are to be calibrated")
    curve = []
    for budget in budgets:
        ranks = fit_ranks(model, budget, whole)
        small = recalibrate(extract(model, ranks), batches)
        curve.append(Nested(count_params(small), ranks, float(metric(small))))
    return curve


def merge_back(model: nn.Module) -> nn.Module:
    """Put dense layers of the kind that was there in the place of the ordered ones: the same function, but rounded."""
    for layer in ordered_layers(model).values():
        replace_module(model, layer, layer.dense())
    return model


def example() -> nn.Module:
    model = nn.Sequential(nn.Linear(32, 48), nn.GELU(), nn.Linear(48, 32))
    return decompose(model).model
