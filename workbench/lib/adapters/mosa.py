"""MoSA: one bottleneck adapter cut into sparse pieces, which are trained at random and are one adapter in the end.

Zhang et al. 2023, "Split & Merge: Unlocking the Potential of Visual Adapters via Sparse Training" (arXiv:2312.02923);
public code: Theia-4869/MoSA. Beside a frozen block stands AdaptFormer's adapter,

    y = block(h) + s W_up gelu(W_dn norm(h) + b_dn) + s b_up      W_dn (b, D), W_up (D, b), W_up = 0 at first, s = 0.1

    split    each matrix falls at random into E pieces M_1..E of equal size, which have no entry in common
    train    every forward draws one expert e for W_dn and one for W_up, each block by itself:
                 W^e = V on M_e, the initial W0 elsewhere
             A step of the optimiser changes the drawn pieces alone: moments, counts of steps and decay of the others
             stay, `MaskedAdamW`.
    agree    a batch is run twice, and the two draws are to say the same, `consistency`:
                 CE(z1, y) + w_add CE(z2, y) + w_reg (KL(sg p2 || p1) + KL(sg p1 || p2)) / 2
    merge    W = mean_e W^e = (V + (E - 1) W0) / E: an ordinary adapter, at no cost

The pieces are disjoint, so one tensor V and a byte an entry hold all experts; W0 is kept beside it for W_dn only.
Biases belong to no piece: every expert has its own, and the mean of them stays. One of the two projections can be whole
and common to all experts (`share`, the paper's hierarchical scheme as we read it). With `share="down"` the merged
adapter says the mean of what its experts say, exactly. The code's own AdamW decays entries of the other pieces too, and
its loss between hidden states, off by default, is not here.

It is no `Adapter` of `core.adapt`: those take the place of linear layers and, unless they route, fold back into the
weight. This stands beside a whole block, bends between its two matrices, so that it folds into none, and trains by an
optimiser of its own.

Tensor letters: D width, b bottleneck, E experts, I input width, O output width, B batch, C classes.
"""

import math
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.adamw import adamw

from workbench.catalogue import Method
from workbench.errors import InputError, unknown
from workbench.lib.core.routing import Context
from workbench.lib.core.task import Batch, Classification, device_of
from workbench.lib.data.types import Arrays

METHOD = Method(
    slug="mosa",
    title="MoSA: Split & Merge: Unlocking the Potential of Visual Adapters via Sparse Training",
    family="adapters",
    year=2023,
    paper="arXiv:2312.02923",
    claim="Training disjoint sparse pieces of one adapter at random and merging them at the end beats training the "
    "adapter whole, at no extra inference cost.",
    objects=(
        "MoSA",
        "MoSAAdapter",
        "SparseExpertLinear",
        "random_partition",
        "MaskedAdamW",
        "TwoPasses",
        "consistency",
    ),
)

MODES = ("all", "row", "column")
MERGES = ("mean", "union")
SHARES = ("down", "up", None)
MOST_EXPERTS = 256


def example() -> nn.Module:
    """A feed-forward block with an adapter of four experts beside it."""
    block = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))
    return Beside(block, MoSAAdapter(32, bottleneck=8, experts=4))


def random_partition(
    shape: tuple[int, int], experts: int, mode: str = "all", generator: torch.Generator | None = None
) -> UInt8[Tensor, "d_out d_in"]:
    """Which expert an entry of a matrix belongs to: scores from U(0, 1), cut into E quantile bands.

    Args:
        mode: sizes are equal, but for one entry, over the whole matrix ("all"), in each "row" or in each "column".
        generator: of the scores; None: torch's own.
    """
    if mode not in MODES:
        raise unknown("mode", mode, MODES)
    together = {"all": shape[0] * shape[1], "row": shape[1], "column": shape[0]}[mode]
    if not 1 <= experts <= min(together, MOST_EXPERTS):
        raise InputError(f"experts is {experts} but must be between 1 and {min(together, MOST_EXPERTS)} here")
    scores = torch.rand(shape, generator=generator)
    if mode == "all":
        scores = scores.view(1, -1)
    axis = 0 if mode == "column" else 1
    rank = scores.argsort(axis).argsort(axis)
    return (rank * experts // together).to(torch.uint8).view(shape)


class SparseExpertLinear(nn.Linear):
    """E linear maps in one tensor: expert e has the trained values on its piece and the initial ones elsewhere.

    Args:
        zero: start at 0 instead of as `nn.Linear` does; the biases always start at 0.
        mode, generator: see `random_partition`.

    Attributes:
        weight: V (O, I).
        biases: (E O,) those of the first expert first.
        part: (O, I) the expert of each entry.
        initial: W0 (O, I), or () where it is 0 everywhere.
        reached: the experts that a gradient has reached since `MaskedAdamW` last looked.
    """

    def __init__(
        self,
        d_in: int,
        d_out: int,
        experts: int,
        zero: bool = False,
        mode: str = "all",
        generator: torch.Generator | None = None,
    ):
        super().__init__(d_in, d_out, bias=False)
        self.n_experts = experts
        self.biases = nn.Parameter(torch.zeros(experts * d_out))
        if zero:
            nn.init.zeros_(self.weight)
        self.register_buffer("part", random_partition((d_out, d_in), experts, mode, generator))
        known = zero or experts == 1  # of one expert every entry is trained, and none is the initial one
        self.register_buffer("initial", torch.zeros(()) if known else self.weight.detach().clone())
        self.reached: set[int] = set()

    def forward(self, x: Float[Tensor, "*batch d_in"], expert: int | None = None) -> Float[Tensor, "*batch d_out"]:
        """The map of one expert; None: the mean of all."""
        if expert is None:
            return F.linear(x, *self.mean())
        y = F.linear(x, *self.expert(expert))
        if y.requires_grad:
            y.register_hook(lambda _: self.reached.add(expert))
        return y

    def expert(self, e: int) -> tuple[Float[Tensor, "d_out d_in"], Float[Tensor, " d_out"]]:
        """Weight and bias of an expert. The gradient of V is 0 outside of its piece."""
        if not 0 <= e < self.n_experts:
            raise InputError(f"expert is {e} but must be between 0 and {self.n_experts - 1}")
        return torch.where(self.part == e, self.weight, self.initial), self.biases[self.piece("biases", e)]

    def mean(self) -> tuple[Float[Tensor, "d_out d_in"], Float[Tensor, " d_out"]]:
        """Weight and bias, the mean of the experts."""
        weight = (self.weight + (self.n_experts - 1) * self.initial) / self.n_experts
        return weight, self.biases.view(self.n_experts, -1).mean(0)

    def piece(self, name: str, e: int) -> Any:
        """The index of what an expert has of the parameter "weight" or "biases"."""
        if self.n_experts == 1:
            return ...
        return self.part == e if name == "weight" else slice(e * self.out_features, (e + 1) * self.out_features)

    @torch.no_grad()
    def merge(self, of: int | str = "mean") -> nn.Linear:
        """An ordinary layer.

        Args:
            of: the "mean" of the experts; the "union" of the pieces as they are, which no expert was trained to be a
                part of, with the mean of the biases; or a single expert, by its number.
        """
        if isinstance(of, str) and of not in MERGES:
            raise unknown("of", of, MERGES)
        weight, bias = self.mean() if isinstance(of, str) else self.expert(of if self.n_experts > 1 else 0)
        made = nn.Linear(self.in_features, self.out_features).to(weight)
        made.weight.copy_(self.weight if of == "union" else weight)
        made.bias.copy_(bias)
        return made


class BottleneckAdapter(nn.Module):
    """s up(dropout(gelu(down(norm(x))))): what MoSA is in the end."""

    def __init__(self, norm: nn.LayerNorm, down: nn.Linear, up: nn.Linear, scale: float, dropout: float):
        super().__init__()
        self.norm, self.down, self.up, self.scale, self.dropout = norm, down, up, scale, nn.Dropout(dropout)

    def forward(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        return self.scale * self.up(self.dropout(F.gelu(self.down(self.norm(x)))))


class MoSAAdapter(nn.Module):
    """The same with experts. In training every forward draws one for each projection; in evaluation it is the merged.

    Args:
        dim, bottleneck: D and b.
        experts: E; 1 is the ordinary adapter.
        share: which projection is whole and the same for all experts: "down", "up" or None.
        scale, dropout: as in AdaptFormer.
        mode: see `random_partition`.
        generator: of the pieces, and from then on of the draws; None: torch's own, which `core.train` seeds at each
            step, so that a training that goes on from a checkpoint draws as if it had never stopped.
    """

    def __init__(
        self,
        dim: int,
        bottleneck: int,
        experts: int,
        share: str | None = "down",
        scale: float = 0.1,
        dropout: float = 0.1,
        mode: str = "all",
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        if share not in SHARES:
            raise unknown("share", share, map(str, SHARES))
        for name, value in (("dim", dim), ("bottleneck", bottleneck)):
            if value < 1:
                raise InputError(f"{name} is {value} but must be at least 1")
        if not 0 <= dropout < 1 or not abs(scale) < math.inf:
            raise InputError(
                f"dropout, scale are {dropout}, {scale} but must be from 0 to below 1, and a finite number"
            )
        down, up = (1 if share == name else experts for name in ("down", "up"))
        self.norm = nn.LayerNorm(dim)
        self.down = SparseExpertLinear(dim, bottleneck, down, mode=mode, generator=generator)
        self.up = SparseExpertLinear(bottleneck, dim, up, zero=True, mode=mode, generator=generator)
        self.scale, self.dropout, self.generator = scale, nn.Dropout(dropout), generator

    def draw(self) -> tuple[int, int]:
        """One expert of each projection, independently; a projection that is whole takes no random number."""
        down, up = (
            int(torch.randint(n, (), generator=self.generator)) if n > 1 else 0
            for n in (self.down.n_experts, self.up.n_experts)
        )
        return down, up

    def forward(
        self, x: Float[Tensor, "*batch dim"], experts: tuple[int, int] | None = None
    ) -> Float[Tensor, "*batch dim"]:
        """Args: experts: of down and up; None: drawn in training, all in evaluation."""
        down, up = experts if experts is not None else self.draw() if self.training else (None, None)
        hidden = self.dropout(F.gelu(self.down(self.norm(x), down)))
        return self.scale * self.up(hidden, up)

    def merge(self, of: int | str = "mean") -> BottleneckAdapter:
        """The ordinary adapter, which has this one's norm. For `of` see `SparseExpertLinear.merge`."""
        made = BottleneckAdapter(self.norm, self.down.merge(of), self.up.merge(of), self.scale, self.dropout.p)
        return made.train(self.training)


class Beside(nn.Module):
    """block(x) + adapter(x)."""

    def __init__(self, block: nn.Module, adapter: MoSAAdapter | BottleneckAdapter):
        super().__init__()
        self.block, self.adapter = block, adapter

    def forward(self, x: Float[Tensor, "*batch dim"], *rest: Any, **keywords: Any) -> Float[Tensor, "*batch dim"]:
        return self.block(x, *rest, **keywords) + self.adapter(x)


class MaskedAdamW(torch.optim.AdamW):
    """AdamW to which the pieces of a `SparseExpertLinear` are parameters of their own.

    A piece that no gradient has reached keeps its values, moments and count of steps, and is not decayed. To all other
    parameters it is torch's own. Matrices are decayed, vectors are not.

    Args:
        model: its trained parameters are trained.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ):
        sparse = [module for module in model.modules() if isinstance(module, SparseExpertLinear)]
        self._pieces = {p: (layer, name) for layer in sparse for name, p in layer.named_parameters()}
        trained = [p for p in model.parameters() if p.requires_grad]
        matrices, vectors = [p for p in trained if p.ndim > 1], [p for p in trained if p.ndim < 2]
        groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        super().__init__(groups, lr=lr, betas=betas, eps=eps, foreach=False)

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self._step(group)
        self._forget()
        return loss

    def _step(self, group: dict[str, Any]) -> None:
        found, steps = [], []
        for p in group["params"]:
            if p.grad is None:
                continue
            layer, name = self._pieces.get(p, (None, ""))
            state = self.state[p]
            if not state:
                state["step"] = torch.zeros(1 if layer is None else layer.n_experts)
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
            for expert in (0,) if layer is None else sorted(layer.reached):
                index = ... if layer is None else layer.piece(name, expert)
                found.append(((p, p.grad, state["exp_avg"], state["exp_avg_sq"]), index))
                steps.append(state["step"][expert])
        if not found:
            return
        parts = [[tensor[index] for tensor in tensors] for tensors, index in found]
        rates = {name: group[name] for name in ("lr", "weight_decay", "eps")}
        rates |= dict(zip(("beta1", "beta2"), group["betas"], strict=True))
        adamw(*map(list, zip(*parts, strict=True)), [], steps, foreach=False, amsgrad=False, maximize=False, **rates)
        for (tensors, index), part in zip(found, parts, strict=True):
            if isinstance(index, Tensor):  # what a mask picks is a copy; all else is a view, and changed already
                for i in (0, 2, 3):
                    tensors[i][index] = part[i]

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        self._forget()

    def _forget(self) -> None:
        for layer, _ in self._pieces.values():
            layer.reached.clear()


class MoSA:
    """Adapters with experts beside blocks of a model, which is changed in place and frozen but for them.

        mosa = MoSA(model, "blocks.*", dim=64, bottleneck=8, experts=4)
        optimizer = mosa.optimizer(1e-2)
        ...                                       # train with it, on `TwoPasses` or with `consistency`
        mosa.merge()                              # ordinary adapters

    Args:
        targets: glob patterns over the names of modules (..., D) -> (..., D). Of modules inside each other the outer
            one is taken.
        dim: D.
        options: of each `MoSAAdapter`.

    Attributes:
        layers: the adapters, by the name of their block.
    """

    def __init__(self, model: nn.Module, targets: str | Sequence[str], dim: int, bottleneck: int, **options: Any):
        patterns = (targets,) if isinstance(targets, str) else tuple(targets)
        named = dict(model.named_modules(remove_duplicate=False))  # a block may be in several places
        if there := [name for name, module in named.items() if isinstance(module, Beside)]:
            raise InputError(f"model has adapters already, at {', '.join(there)}")
        found: list[str] = []
        for name in named:  # outer ones come first
            inside = any(name.startswith(f"{outer}.") for outer in found)
            if name and not inside and any(fnmatchcase(name, pattern) for pattern in patterns):
                found.append(name)
        if not found:
            raise InputError(f"targets is {targets!r} but matches no module of the model")
        self.model, self.layers = model, {}
        self._base = sum(p.numel() for p in model.parameters())
        made: dict[nn.Module, Beside] = {}
        for name in found:
            if (block := named[name]) not in made:
                like = next((p for p in block.parameters() if p.is_floating_point()), torch.empty(0))
                self.layers[name] = MoSAAdapter(dim, bottleneck, **options).to(like)
                made[block] = Beside(block, self.layers[name]).train(block.training)
        model.requires_grad_(False)
        for name in found:
            model.set_submodule(name, made[named[name]])

    def optimizer(self, lr: float, weight_decay: float = 0.01) -> MaskedAdamW:
        return MaskedAdamW(self.model, lr, weight_decay=weight_decay)

    def report(self) -> dict[str, int]:
        """Parameters of the base, of the adapters as they are now and, of these, trained: E biases while there are."""
        added = [p for adapter in self.layers.values() for p in adapter.parameters()]
        trained = sum(p.numel() for p in added if p.requires_grad)
        return {"base": self._base, "added": sum(p.numel() for p in added), "trained": trained}

    def merge(self, of: int | str = "mean") -> nn.Module:
        """Put the ordinary adapter in the place of each, and return the model. For `of` see `SparseExpertLinear`.

        Raises:
            InputError: they are ordinary already.
        """
        if any(isinstance(adapter, BottleneckAdapter) for adapter in self.layers.values()):
            raise InputError("the adapters are merged already")
        for name, adapter in self.layers.items():
            self.layers[name] = self.model.get_submodule(name).adapter = adapter.merge(of)
        return self.model


def consistency(one: Float[Tensor, "batch classes"], other: Float[Tensor, "batch classes"]) -> Float[Tensor, ""]:
    """(KL(sg p2 || p1) + KL(sg p1 || p2)) / 2 of two logits, in nats, mean over the batch."""
    p, q = one.log_softmax(-1), other.log_softmax(-1)
    there = F.kl_div(p, q.detach(), reduction="batchmean", log_target=True)
    back = F.kl_div(q, p.detach(), reduction="batchmean", log_target=True)
    return (there + back) / 2


def mosa_loss(
    model: nn.Module, x: Tensor, y: Int[Tensor, " batch"], w_add: float = 0.0, w_reg: float = 1.0
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """CE(z1, y) + w_add CE(z2, y), and w_reg times the consistency, of two passes of the model."""
    one, other = model(x), model(x)
    return F.cross_entropy(one, y) + w_add * F.cross_entropy(other, y), w_reg * consistency(one, other)


class TwoPasses(Classification):
    """A classification that is trained by `mosa_loss`: the consistency is `Context.aux`, for `core.train` to add."""

    def __init__(self, data: Arrays, w_add: float = 0.0, w_reg: float = 1.0):
        super().__init__(data)
        self.w_add, self.w_reg = w_add, w_reg

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Context]:
        batch = batch.to(device_of(model))
        loss, aux = mosa_loss(model, batch.inputs, batch.targets, self.w_add, self.w_reg)
        return loss, Context(aux=aux)
