"""Muon++: orthogonalised momentum, scaled so that every update has the spectral size that muP asks for, at any width.

Zhao 2026, "Towards a Principled Muon under muP" (arXiv:2601.01306); no public code. Muon is Jordan et al. 2024, the
spectral condition Yang, Simon and Bernstein 2023 (arXiv:2310.17813). A matrix W (O, I) has the norm

    |W|_R = sqrt(I / O) s_1(W),     the most by which it makes the root mean square of a vector larger,

and features move alike at every width if |W|_R and |dW|_R / lr are of order 1 at every width. The step:

    M <- mu M + G,   X = NS(G + mu M),   W <- (1 - lr weight_decay) W - lr sqrt(O / I) X

NS (`kernels.newton_schulz`) puts every singular value that matters near 1 and none above 1.2025. So |dW|_R / lr is at
most that for every gradient, with no norm estimated, and |W|_R stays below `norm_bound` with no weight touched: below
max(|W_0|_R, 1.2025 / weight_decay), or as far as the sum of the learning rates goes. From the abstract, of which the
scale, the bound and the adaptive form below are a reconstruction.

Of `adaptive`: a worst case bounds the features' change; what they did change by is the stretch RMS(sqrt(O / I) X h) /
RMS(h) over the rows h that went into the layer. Its mean over time (0.9 of the last, 0.1 of the new) is kept, and the
step is made ref / stretch times as large, within a factor of 3, ref the geometric mean over the layers at their first
step. Where O >= I the stretch of an orthonormal X is 1 whatever h is: only wide layers, and those whose gradient lacks
rank, can differ. The norm of X needs no estimate here, as it is part of the stretch.

Tensor letters: O output width, I input width, E matrices of a bank.
"""

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle

from workbench.catalogue import Method
from workbench.errors import InputError, unknown
from workbench.kernels.newton_schulz import CEILING, newton_schulz
from workbench.lib.core.optim import MatrixOptimizer, matrix_shape
from workbench.lib.core.train import Hook
from workbench.lib.core.train import State as Training
from workbench.lib.measures.operators import data_alignment
from workbench.lib.measures.spectra import as_matrix, measures, singular_values

METHOD = Method(
    slug="muon-pp",
    title="Muon++: Towards a Principled Muon under muP: Ensuring Spectral Conditions throughout Training",
    family="low_rank",
    year=2026,
    paper="arXiv:2601.01306",
    claim="Controlling the spectral size of the updates alone keeps the muP conditions during training, so the "
    "learning rate transfers across widths.",
    objects=("MuonPP", "SpectralMonitor", "coord_check", "spectral_init_", "norm_bound", "polar"),
    kind="optimiser",
)

#: name -> factor of X for a matrix (O, I); "jordan" and "rms" as torch.optim.Muon's "original", "match_rms_adamw"
SCALES: dict[str, Callable[[int, int], float]] = {
    "spectral": lambda o, i: (o / i) ** 0.5,
    "jordan": lambda o, i: max(1.0, o / i) ** 0.5,
    "rms": lambda o, i: 0.2 * max(o, i) ** 0.5,
    "none": lambda o, i: 1.0,
}
PRECISIONS = ("bfloat16", "full")
POLISH = (15 / 8, -10 / 8, 3 / 8)  # from [0.68, CEILING] its second step is within 1e-3 of 1
MEMORY, CLIP = 0.9, 3.0  # of the stretch


def example() -> Callable[[Iterable], torch.optim.Optimizer]:
    """Makes a Muon++ of what it is given: its matrices are orthogonalised, all else has AdamW."""
    return partial(MuonPP, lr=0.1)


class MuonPP(MatrixOptimizer):
    """See the module's docstring; what is no matrix has AdamW's step, see `lib.core.optim.matrix`.

    Put only hidden matrices into it as such: `lib.core.optim.parameter_groups(model, 0.1, ["head"])` makes groups in
    which embeddings, vectors and heads have AdamW's step. All of this may differ between groups.

    Args:
        params: parameters, or groups of them.
        lr: |dW|_R of a step, within 0.68 .. 1.2025 of it; of AdamW for all else.
        momentum: mu; 0 keeps none.
        nesterov: False orthogonalises M.
        ns_steps: of Newton-Schulz; None takes the exact polar factor, by an SVD.
        scale: one of `SCALES`; bounds hold for "spectral".
        weight_decay: decoupled, lr * weight_decay a step.
        exact_norm: two more steps, in float32 or wider, that bring all of these singular values within 1e-3 of 1.
        adaptive: make the features change alike; `observe(model)` has to be called, and only `nn.Linear` can be.
        precision: of the products. "full" is float32 or wider; bfloat16, which Muon was made for and which
            torch.optim.Muon takes, moves singular values by a per cent.
        betas, eps: of AdamW.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float = 0.02,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int | None = 5,
        scale: str = "spectral",
        weight_decay: float = 0.0,
        exact_norm: bool = False,
        adaptive: bool = False,
        precision: str = "bfloat16",
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
    ):
        self._seen: dict[Tensor, Tensor] = {}  # parameter -> rows that went into its layer last
        self._rows: Tensor | None = None  # those of the matrix whose step is being made
        own = {"momentum": momentum, "nesterov": nesterov, "ns_steps": ns_steps, "scale": scale}
        own |= {"exact_norm": exact_norm, "adaptive": adaptive, "precision": precision}
        super().__init__(params, lr, weight_decay, betas, eps, **own)

    def check(self, group: dict[str, Any], shape: torch.Size) -> None:
        if not 0 <= group["momentum"] < 1:
            raise InputError(f"momentum is {group['momentum']} but must be at least 0 and below 1")
        if group["ns_steps"] is not None and (not isinstance(group["ns_steps"], int) or group["ns_steps"] < 1):
            raise InputError(f"ns_steps is {group['ns_steps']!r} but must be a whole number, at least 1, or None")
        for name, allowed in (("scale", SCALES), ("precision", PRECISIONS)):
            if group[name] not in allowed:
                raise unknown(name, group[name], allowed)
        if group["adaptive"] and len(shape) > 2:
            raise InputError(f"adaptive is on for a bank of matrices {tuple(shape)} but must be off, or it a matrix")

    def fresh(self, shape: torch.Size, group: dict[str, Any], **where: Any) -> dict[str, Tensor]:
        state = {"momentum": torch.zeros(shape, **where)} if group["momentum"] else {}
        if group["adaptive"]:  # 0: not seen yet
            state |= {"first_stretch": torch.zeros((), **where), "stretch": torch.zeros((), **where)}
        return state

    def direction(self, grad: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> Tensor:
        if mu := group["momentum"]:
            state["momentum"].mul_(mu).add_(grad)
            grad = grad.add(state["momentum"], alpha=mu) if group["nesterov"] else state["momentum"]
        x = orthogonalised(grad, group["ns_steps"], group["exact_norm"], group["precision"])
        x = x.mul_(SCALES[group["scale"]](*grad.shape[-2:]))
        return x if self._rows is None else x.mul_(self._factor(x, self._rows, state))

    def observe(self, model: nn.Module, rows: int = 256) -> list[RemovableHandle]:
        """Keep what goes into the linear layers of `model` while it trains, for `adaptive`: `rows` rows of the last
        forward pass, evenly taken. Call `remove()` of all that it returns to end that.
        """
        if rows < 1:
            raise InputError(f"rows is {rows} but must be at least 1")
        mine = {p for group in self.param_groups for p in group["params"] if group["adaptive"]}

        def keep(p: Tensor, layer: nn.Linear, inputs: tuple[Tensor, ...]) -> None:
            if layer.training and torch.is_grad_enabled():
                hidden = inputs[0].detach().reshape(-1, layer.in_features)
                self._seen[p] = hidden[:: -(-len(hidden) // rows)].clone()

        layers = [m for m in model.modules() if isinstance(m, nn.Linear) and m.weight in mine]
        return [layer.register_forward_pre_hook(partial(keep, layer.weight)) for layer in layers]

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of a copy, which has seen nothing, and of a state dict."""
        super().__setstate__(state)
        self.__dict__.setdefault("_seen", {})
        self.__dict__.setdefault("_rows", None)

    def _refuse(self) -> None:
        super()._refuse()
        for group in self.param_groups:
            for p in group["params"]:
                if not group["adaptive"] or p.grad is None or matrix_shape(p, group) is None:
                    continue
                if isinstance(p, DTensor) or (dist.is_initialized() and dist.get_world_size() > 1):
                    raise InputError("adaptive is on, but of several processes each sees other rows: it must be off")
                if p not in self._seen:
                    raise InputError(
                        f"adaptive is on for a parameter {tuple(p.shape)} but nothing was seen that went into its "
                        "layer: call observe(model) before the forward pass, and turn it off for what is not nn.Linear"
                    )

    def _step_matrix(self, p: Tensor, shape: torch.Size, group: dict[str, Any]) -> None:
        self._rows = self._seen[p] if group["adaptive"] else None
        super()._step_matrix(p, shape, group)

    def _factor(self, update: Tensor, rows: Tensor, state: dict[str, Tensor]) -> float:
        """How much larger the step is to be; 1 at the first, and where the rows or the update are zero."""
        now = float(_rms(rows.to(update) @ update.mT) / _rms(rows.to(update)))
        if not now > 0:
            return 1.0
        if not state["first_stretch"]:
            state["first_stretch"].fill_(now), state["stretch"].fill_(now)
            return 1.0
        state["stretch"].mul_(MEMORY).add_((1 - MEMORY) * now)
        firsts = [float(other.get("first_stretch", 0.0)) for other in self.state.values()]
        reference = math.exp(statistics.fmean(math.log(first) for first in firsts if first > 0))
        return min(max(reference / float(state["stretch"]), 1 / CLIP), CLIP)


def orthogonalised(
    grad: Float[Tensor, "*stack O I"], steps: int | None = 5, exact_norm: bool = False, precision: str = "full"
) -> Float[Tensor, "*stack O I"]:
    """X of the module's docstring, in the type of `grad`, float32 or wider; the options are those of `MuonPP`."""
    if steps is None:
        return polar(grad)
    x = newton_schulz(grad.bfloat16() if precision == "bfloat16" else grad, steps=steps).to(grad.dtype)
    return newton_schulz(x, steps=2, coefficients=POLISH, normalise=False) if exact_norm else x


def polar(grad: Float[Tensor, "*stack O I"]) -> Float[Tensor, "*stack O I"]:
    """U V^T of grad = U S V^T: what Newton-Schulz comes near to. Directions in which grad is zero stay zero."""
    u, s, vh = torch.linalg.svd(grad, full_matrices=False)
    there = s > s.amax(-1, keepdim=True) * max(grad.shape[-2:]) * torch.finfo(s.dtype).eps
    return (u * there.unsqueeze(-2)) @ vh


@torch.no_grad()
def spectral_init_(
    weight: Float[Tensor, "out ..."], kappa: float = 1.0, generator: torch.Generator | None = None
) -> Tensor:
    """Fill the weight of one layer with normal numbers, scaled to |W|_R = kappa exactly; a convolution is (O, I h w).

    Standard starts have another norm for each shape: 1/sqrt(3) (1 + sqrt(I / O)) is that of `nn.Linear` in the limit.
    """
    if not 0 < kappa < math.inf:
        raise InputError(f"kappa is {kappa} but must be above 0 and finite")
    matrix = as_matrix(weight)
    drawn = torch.randn(matrix.shape, generator=generator, dtype=torch.promote_types(weight.dtype, torch.float32))
    o, i = matrix.shape
    return weight.copy_((kappa * (o / i) ** 0.5 / torch.linalg.matrix_norm(drawn, 2) * drawn).view(weight.shape))


def norm_bound(
    start: float, rates: Sequence[float], weight_decay: float = 0.0, ceiling: float = CEILING
) -> list[float]:
    """What |W|_R cannot pass under scale="spectral": before the first step, where it is `start`, and after each.

    b <- (1 - lr weight_decay) b + ceiling lr. With decay it never passes max(start, ceiling / weight_decay).
    """
    bounds = [float(start)]
    for lr in rates:
        bounds.append(abs(1 - lr * weight_decay) * bounds[-1] + ceiling * lr)
    return bounds


class Spectral(NamedTuple):
    """One layer at one step: |W|_R after it, |dW|_R / lr, RMS(dW h) / (|dW|_R RMS(h)), and the stable rank of dW."""

    step: int
    weight: float
    update: float
    alignment: float
    stable_rank: float


class SpectralMonitor(Hook):
    """What the linear layers of a model do in every `every`-th step: `found[name]` is a list of `Spectral`.

    A hook of `lib.core.train`. The update is what was really added, decay and clipping included, and h what went into
    the layer in that step. Norms are exact up to a shorter side of 256. NaN where nothing was added.
    """

    def __init__(self, every: int = 10):
        if every < 1:
            raise InputError(f"every is {every} but must be at least 1")
        self.every, self.found = every, {}
        self._before: dict[str, Tensor] = {}
        self._hidden: dict[str, Tensor] = {}
        self._handles: list[RemovableHandle] = []

    def before_step(self, state: Training) -> None:
        if state.step % self.every:
            return
        for name, layer in linear_layers(state.model).items():
            self._before[name] = layer.weight.detach().clone()
            self._handles.append(layer.register_forward_pre_hook(partial(self._keep, name)))

    def before_update(self, state: Training) -> None:
        while self._handles:
            self._handles.pop().remove()

    def after_step(self, state: Training) -> None:
        layers = linear_layers(state.model) if self._before else {}
        for name, before in self._before.items():
            weight = layers[name].weight.detach()
            update = weight - before
            of_weight, of_update = (measures(singular_values(w), tuple(w.shape)) for w in (weight, update))
            self.found.setdefault(name, []).append(
                Spectral(
                    state.step,
                    float(of_weight["rms_operator_norm"]),
                    float(of_update["rms_operator_norm"]) / state.lr if state.lr else math.nan,
                    float(data_alignment(update, self._hidden[name])) if name in self._hidden else math.nan,
                    float(of_update["stable_rank"]),
                )
            )
        self._before, self._hidden = {}, {}

    def _keep(self, name: str, layer: nn.Linear, inputs: tuple[Tensor, ...]) -> None:
        self._hidden[name] = inputs[0].detach().reshape(-1, layer.in_features)


@dataclass(frozen=True)
class CoordCheck:
    """How large the outputs of each linear layer are over widths, and how far they moved.

    Attributes:
        widths: ascending.
        size: layer -> root mean square of its outputs at the start, for each width.
        change: layer -> root mean square of the difference that the steps made.
    """

    widths: tuple[int, ...]
    size: dict[str, list[float]]
    change: dict[str, list[float]]

    def slopes(self, what: str = "change") -> dict[str, float]:
        """Layer -> exponent of the width in "size" or "change", by least squares on logarithms: 0 where flat."""
        if what not in ("size", "change"):
            raise unknown("what", what, ("size", "change"))
        x = [math.log(width) for width in self.widths]
        return {
            name: statistics.linear_regression(x, [math.log(value) for value in values]).slope
            for name, values in getattr(self, what).items()
        }


def coord_check(
    make: Callable[[int], tuple[nn.Module, torch.optim.Optimizer]],
    loss: Callable[[nn.Module], Tensor],
    widths: Sequence[int],
    steps: int = 1,
) -> CoordCheck:
    """Train a model of each width for a few steps on one batch, and see what that does to the same batch.

    Args:
        make: width -> model and optimiser, its linear layers called alike at every width.
        loss: runs the model on the batch.
        widths: two at least, ascending.
    """
    widths = tuple(widths)
    if len(widths) < 2 or list(widths) != sorted(set(widths)):
        raise InputError(f"widths are {widths} but must be at least two, ascending")
    if steps < 1:
        raise InputError(f"steps is {steps} but must be at least 1")
    size: dict[str, list[float]] = {}
    change: dict[str, list[float]] = {}
    for width in widths:
        model, optimizer = make(width)
        before = _outputs(model, loss)
        for _ in range(steps):
            optimizer.zero_grad(set_to_none=True)
            loss(model).backward()
            optimizer.step()
        for name, after in _outputs(model, loss).items():
            size.setdefault(name, []).append(float(_rms(before[name])))
            change.setdefault(name, []).append(float(_rms(after - before[name])))
    return CoordCheck(widths, size, change)


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


@torch.no_grad()
def _outputs(model: nn.Module, loss: Callable[[nn.Module], Tensor]) -> dict[str, Tensor]:
    seen: dict[str, Tensor] = {}

    def keep(name: str, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        seen[name] = output.detach().clone()

    handles = [layer.register_forward_hook(partial(keep, name)) for name, layer in linear_layers(model).items()]
    try:
        loss(model)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _rms(x: Tensor) -> Tensor:
    return x.square().mean().sqrt()
