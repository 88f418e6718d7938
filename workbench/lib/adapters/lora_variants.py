"""LoRA and what has been made of it: one frame, and every variant a choice in it.

He et al. 2026, "A Unified Study of LoRA Variants: Taxonomy, Review, Codebase, and Empirical Evaluation"
(arXiv:2601.22708). y = W x + s B A u with u = dropout(x), A (r, I), B (O, r). Of G = dL/dW the factors get
dB = s G A^T and dA = s B^T G, so a step of plain descent at the rate eta moves the weight by

    dW = -eta s^2 (B B^T G + G A^T A) + O(eta^2)

and a variant changes s, one of the two matrices around G, where they start, or what rank the sum may reach:

    scale       rslora       s = alpha / sqrt(r) in place of alpha / r
    form        dora         m (W + s B A) / |rows of it|, the norm no part of the gradient; m starts as the row norms
                hira         W * (s B A), element by element
                vera         diag(b) B diag(d) A; A and B random, the same in all layers and fixed; b = 0, d = 0.1
                randlora     s sum_n B_n diag(l_n) A diag(g_n), of full rank; A and all B_n as in vera; l = 0
                adalora      s P diag(l) Q; ranks move to where they matter, s = alpha / the ranks a layer has now
    optimiser   lora+        B at `ratio` times the rate of A
                lora-fa      A is not trained
                riemannian   dA <- (B^T B + d)^-1 dA,  dB <- dB (A A^T + d)^-1
                lora-pro     dA, dB: of those whose s (B dA + dB A) is nearest to G, the ones nearest to LoRA's own
                relora       every so many steps s B A goes into the weight and begins anew, with most moments at 0
    start       pissa        B A = the r largest parts of the SVD of W / s;  milora: the r smallest
                olora        B = Q, A = R of the QR decomposition of W, the first r
                lora-ga      A = k V_1..r^T, B = k U_r+1..2r of the SVD of G, k = O^(1/4) / sqrt(gamma); s as rslora
                eva          A = the r main directions of the layer's inputs

What a start puts in is taken out again by a fixed B0 A0 beside it, y = W x + s (B A u - B0 A0 x): the function does not
change, the weight stays as it was, and the whole is a LoRA of rank 2 r (`plain_loras`), which peft loads. For vera,
randlora, hira and adalora peft has folders of their own, see `adapters.peft_variants`.

lora-ga and eva look at data first: `adapted.adapter.fit(adapted, batches, loss)`; eva gives all layers the same rank.
What is of the optimiser, and adalora's ranks, happens in the steps of `adapted.optimizer()`, and with no other: give it
to the loop, to transformers' `Trainer` as `optimizers=(adapted.optimizer(lr), None)`. lora-fa is the exception.

The survey's axis of mixtures is the family `lora_experts`. LoRA-Pro hands its gradients to AdamW, which is not the
paper's own form of Adam; what AdaLoRA is fined for directions that are not orthogonal is added to the gradients after
any clipping of them. peft's LoRA-GA multiplies B0 by S as well; here it is as in the paper (2407.05000).

Tensor letters: O output width, I input width, r rank.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from workbench.catalogue import Method
from workbench.errors import InputError, unknown
from workbench.lib.core.adapt import Adapted, AdaptedLayer, Adapter
from workbench.lib.core.low_rank import LowRankExperts, fitting_rank

METHOD = Method(
    slug="lora-variants",
    title="A Unified Study of LoRA Variants: Taxonomy, Review, Codebase, and Empirical Evaluation",
    family="adapters",
    year=2026,
    paper="arXiv:2601.22708",
    claim="The learning rate matters more than any other setting, and tuned plain LoRA matches or beats most of its "
    "variants.",
    objects=("LoRAVariants", "ProductLinear", "plain_loras", "rank_budget"),
)

STARTS = ("pissa", "milora", "olora")
FITTED = ("lora-ga", "eva")
OWN: dict[str, dict[str, float]] = {
    "lora": {},
    "rslora": {},
    "lora+": {"ratio": 16.0},
    "lora-fa": {},
    "dora": {},
    "pissa": {},
    "milora": {},
    "olora": {},
    "lora-ga": {"gamma": 16.0},
    "eva": {},
    "riemannian": {"damping": 1e-6},
    "lora-pro": {"damping": 1e-8},
    "relora": {"every": 100, "prune": 0.99, "warm": 10},
    "hira": {},
    "vera": {"d": 0.1},
    "randlora": {"peft_order": 0},
    "adalora": {"target": 0, "begin": 50, "end": 200, "every": 10, "gamma": 0.1, "beta": 0.85},
}
"""The variants, and the settings that each has of its own."""
IN_STEPS = {
    "riemannian": "gradients divided by the other factor's product with itself",
    "lora-pro": "gradients whose step is nearest to that of the whole weight",
    "relora": "the product put into the weight every so many steps, to begin anew",
    "adalora": "ranks that move to where they matter",
}
"""What some do in the steps of `Adapted.optimizer`."""


def example() -> nn.Module:
    """A linear layer with a LoRA that starts as the four largest parts of its weight."""
    layer = ProductLinear(nn.Linear(32, 32), 4, 1.0)
    layer.begin(*of_weight("pissa", layer.base.weight, 4, 1.0))
    return layer


class ProductLinear(AdaptedLayer):
    """y = W x + s (B A u - B0 A0 x) + M x: what starts, and what has been put into the weight, beside the product.

    Attributes:
        experts: a bank of the one A, B and s.
        a0, b0: (r, I), (O, r) what the product started as, where that is not 0; else None.
        moved: (O, I) what relora has put into the weight; else None.
    """

    def __init__(self, base: nn.Linear, rank: int, scale: float, dropout: float = 0.0, variant: str = "lora"):
        super().__init__(base)
        self.experts = LowRankExperts(1, base.in_features, base.out_features, rank, scale * rank)
        self.dropout = nn.Dropout(dropout)
        started = variant in (*STARTS, "lora-ga")
        self.register_buffer("a0", torch.zeros_like(self.experts.a[0]) if started else None)
        self.register_buffer("b0", torch.zeros_like(self.experts.b[0]) if started else None)
        self.register_buffer("moved", torch.zeros(base.out_features, base.in_features) if variant == "relora" else None)
        self.register_buffer("steps", torch.tensor(0) if variant == "relora" else None)
        self.register_buffer("fitted", torch.tensor(False) if variant in FITTED else None)
        self.experts.a.requires_grad_(variant != "lora-fa")

    @torch.no_grad()
    def begin(self, a: Float[Tensor, "rank d_in"], b: Float[Tensor, "d_out rank"]) -> None:
        """Start with this product; the function stays."""
        self.experts.a.copy_(a[None]), self.experts.b.copy_(b[None])
        if self.a0 is None:
            self.a0, self.b0 = torch.empty_like(self.experts.a[0]), torch.empty_like(self.experts.b[0])
        self.a0.copy_(a), self.b0.copy_(b)

    def product(self, x: Tensor) -> Tensor:
        """s B A x."""
        a, b = self.experts.a[0], self.experts.scale[0] * self.experts.b[0]
        return (x @ a.to(x.dtype).T) @ b.to(x.dtype).T

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        y = self.base(x) + self.product(self.dropout(x))
        if self.a0 is not None:
            y = y - (x @ self.a0.to(x.dtype).T) @ (self.experts.scale[0] * self.b0).to(x.dtype).T
        return y if self.moved is None else y + x @ self.moved.to(x.dtype).T

    def fixed_update(self) -> Tensor:
        update = self.experts.delta(0)
        if self.a0 is not None:
            update = update - self.experts.scale[0] * self.b0 @ self.a0
        return update if self.moved is None else update + self.moved


class DoRALinear(ProductLinear):
    """y = m V x / |V| + bias, V = W + s B A, |V| the norms of its rows, through which no gradient goes."""

    def __init__(self, base: nn.Linear, rank: int, scale: float, dropout: float = 0.0):
        super().__init__(base, rank, scale, dropout)
        self.magnitude = nn.Parameter(
            base.weight.detach().norm(dim=1).to(torch.promote_types(base.weight.dtype, torch.float32))
        )

    def ratio(self) -> Float[Tensor, " d_out"]:
        """m / |V|; 1 where a row of V is 0 and has no direction."""
        with torch.no_grad():
            norm = (self.base.weight + self.experts.delta(0)).norm(dim=1)
        return torch.where(norm > 0, self.magnitude / norm.clamp(min=torch.finfo(norm.dtype).tiny), 1.0)

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        y, bias = self.base(x), self.base.bias
        plain = y if bias is None else y - bias.to(y.dtype)
        return y + (self.ratio() - 1).to(y.dtype) * plain + self.ratio().to(y.dtype) * self.product(self.dropout(x))

    def fixed_update(self) -> Tensor:
        return self.ratio()[:, None] * (self.base.weight + self.experts.delta(0)) - self.base.weight


class MatrixLinear(AdaptedLayer):
    """y = W x + delta u: an update that is made as a whole matrix."""

    def __init__(self, base: nn.Linear, rank: int, scale: float, dropout: float = 0.0):
        super().__init__(base)
        self.rank, self.scale, self.dropout = rank, scale, nn.Dropout(dropout)

    def delta(self) -> Float[Tensor, "d_out d_in"]:
        raise NotImplementedError

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        return self.base(x) + F.linear(self.dropout(x), self.delta().to(x.dtype))

    def fixed_update(self) -> Tensor:
        return self.delta()


class HiRALinear(MatrixLinear):
    """delta = W * (s B A), of any rank."""

    def __init__(self, base: nn.Linear, rank: int, scale: float, dropout: float = 0.0):
        super().__init__(base, rank, scale, dropout)
        self.experts = LowRankExperts(1, base.in_features, base.out_features, rank, scale * rank)

    def delta(self) -> Tensor:
        return self.base.weight * self.experts.delta(0)


class VeRALinear(MatrixLinear):
    """delta = diag(b) B diag(d) A; A (r, largest I), B (largest O, r) are cut to the layer."""

    def __init__(self, base: nn.Linear, rank: int, scale: float, dropout: float = 0.0, d: float = 0.1):
        super().__init__(base, rank, scale, dropout)
        self.d, self.b = nn.Parameter(torch.full((rank,), d)), nn.Parameter(torch.zeros(base.out_features))

    def share(self, a: Tensor, b: Tensor) -> None:
        self.register_buffer("shared_a", a), self.register_buffer("shared_b", b)

    def delta(self) -> Tensor:
        a, b = self.shared_a[: self.rank, : self.base.in_features], self.shared_b[: self.base.out_features, : self.rank]
        return self.b[:, None] * ((b * self.d) @ a)


class RandLoRALinear(MatrixLinear):
    """delta = s sum over n of B_n diag(l_n) A diag(g_n), n up to ceil(smaller width / r); A on the smaller width.

    l (r, n) and g (n, smaller width) are trained; A (r, 1, smaller), B (larger, n, r) are shared and cut to the layer.

    Args:
        peft_order: the columns of B are taken as they lie, (n, r), for the rows (r, n) of A, as in peft: random bases
            all the same, but a column meets the row of another base and rank.
    """

    def __init__(self, base: nn.Linear, rank: int, scale: float, dropout: float = 0.0, peft_order: bool = False):
        super().__init__(base, rank, scale, dropout)
        self.peft_order = peft_order
        self.small, self.large = sorted((base.in_features, base.out_features))
        self.bases = math.ceil(self.small / rank)
        self.l = nn.Parameter(torch.zeros(rank, self.bases))
        self.g = nn.Parameter(torch.full((self.bases, self.small), 1 / max(self.bases, self.small)))

    share = VeRALinear.share

    def delta(self) -> Tensor:
        a = self.shared_a[: self.rank, :, : self.small]
        b = self.shared_b[: self.large, : self.bases, : self.rank]
        scaled = (a * self.l[:, :, None] * self.g).flatten(0, 1)  # (r n, smaller)
        update = (b if self.peft_order else b.transpose(1, 2)).flatten(1) @ scaled  # (larger, smaller)
        return self.scale * (update if self.base.in_features == self.small else update.T)


class AdaLoRALinear(MatrixLinear):
    """delta = (alpha / ranks now) P diag(l) Q, with what is remembered of how much each part matters."""

    def __init__(self, base: nn.Linear, rank: int, scale: float, dropout: float = 0.0):
        super().__init__(base, rank, scale, dropout)
        self.p = nn.Parameter(torch.randn(base.out_features, rank) * 0.02)
        self.q = nn.Parameter(torch.randn(rank, base.in_features) * 0.02)
        self.l = nn.Parameter(torch.zeros(rank))
        self.register_buffer("alive", torch.ones(rank, dtype=torch.bool))
        self.register_buffer("steps", torch.tensor(0))
        for name, p in self.factors().items():
            self.register_buffer(f"{name}_mean", torch.zeros_like(p))
            self.register_buffer(f"{name}_spread", torch.zeros_like(p))

    def factors(self) -> dict[str, nn.Parameter]:
        return {"p": self.p, "q": self.q, "l": self.l}

    def delta(self) -> Tensor:
        return self.scale * self.rank / self.alive.sum().clamp(min=1) * (self.p * self.l) @ self.q

    @torch.no_grad()
    def feel(self, gamma: float, beta: float) -> None:
        """Add the gradient of gamma (|P^T P - 1|^2 + |Q Q^T - 1|^2), then take in the sensitivity |w dw|."""
        one = torch.eye(self.rank, dtype=self.p.dtype, device=self.p.device)
        if self.p.grad is None:
            return
        self.p.grad += 4 * gamma * self.p @ (self.p.T @ self.p - one)
        self.q.grad += 4 * gamma * (self.q @ self.q.T - one) @ self.q
        for name, p in self.factors().items():
            mean, spread, now = getattr(self, f"{name}_mean"), getattr(self, f"{name}_spread"), (p * p.grad).abs()
            mean.lerp_(now, 1 - beta)
            spread.lerp_((now - mean).abs(), 1 - beta)

    def scores(self) -> Float[Tensor, " rank"]:
        """How much each part matters: that of its l, and the means over its column of P and its row of Q."""
        of = {name: getattr(self, f"{name}_mean") * getattr(self, f"{name}_spread") for name in ("p", "q", "l")}
        return of["l"] + of["p"].mean(0) + of["q"].mean(1)


def rank_budget(step: int, first: int, last: int, begin: int, end: int) -> int:
    """AdaLoRA's ranks in all layers together after `step` steps: `first` up to `begin`, `last` from `end`, cubic."""
    left = 1 - min(1.0, max(0.0, (step - begin) / max(1, end - begin)))
    return last + int((first - last) * left**3)


@torch.no_grad()
def of_weight(start: str, weight: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """A (r, I) and B (O, r) that a start makes of a weight (O, I)."""
    weight = weight.detach().double()
    if start == "olora":
        q, r = torch.linalg.qr(weight)
        return r[:rank], q[:, :rank]
    u, s, vt = torch.linalg.svd(weight, full_matrices=False)
    part = slice(None, rank) if start == "pissa" else slice(len(s) - rank, None)
    root = (s[part] / scale).sqrt()
    return root[:, None] * vt[part], u[:, part] * root


@torch.no_grad()
def nearest(a: Tensor, b: Tensor, da: Tensor, db: Tensor, scale: float, damping: float) -> tuple[Tensor, Tensor]:
    """LoRA-Pro's gradients: those with the least |s (B dA + dB A) - G|, and among them the nearest to `da` and `db`.

    Args:
        da, db: of plain LoRA, s B^T G and s G A^T: G itself is not needed.
    """
    a64, b64, da64, db64 = (t.double() for t in (a, b, da, db))
    aa, bb = a64 @ a64.T, b64.T @ b64
    eye = torch.eye(len(aa), dtype=aa.dtype, device=aa.device)
    aa, bb = aa + damping * aa.trace() * eye, bb + (damping * bb.trace() + torch.finfo(torch.float32).tiny) * eye
    ga = torch.linalg.solve(bb, da64) / scale**2
    gb = torch.linalg.solve(aa, (db64 - b64 @ torch.linalg.solve(bb, b64.T @ db64)).T).T / scale**2
    # of all (ga + X A, gb - B X) the one nearest to (da, db): B^T B X + X A A^T = (da - ga) A^T - B^T (db - gb)
    right = (da64 - ga) @ a64.T - b64.T @ (db64 - gb)
    (m, u), (n, v) = torch.linalg.eigh(bb), torch.linalg.eigh(aa)
    x = u @ ((u.T @ right @ v) / (m[:, None] + n)) @ v.T
    return (ga + x @ a64).to(a.dtype), (gb - b64 @ x).to(b.dtype)


LAYERS = {
    "dora": DoRALinear,
    "hira": HiRALinear,
    "vera": VeRALinear,
    "randlora": RandLoRALinear,
    "adalora": AdaLoRALinear,
}


class LoRAVariants(Adapter):
    """A variant of LoRA on every wanted layer. It is told nothing beside the input.

    Args:
        variant: one of `OWN`.
        rank: r; default 8, or a layer's smaller width where that is less (lora-ga: half of it).
        alpha: numerator of the scale; default r, so that alpha / r is 1.
        dropout: of the update's input.
        own: settings of the variant's own, see `OWN`. randlora: `peft_order` 1 pairs the bases as peft does, so that
            layers of any widths fit its folder. adalora: `target` ranks a layer has in the mean from step `end` on,
            default (0) two thirds of r. relora: `every` so many steps, a share `prune` of the moments goes, and
            the rate comes back over `warm` steps, where the loop reads "lr_scale" as `train` does.
    """

    slug = "lora-variants"

    def __init__(
        self,
        variant: str = "dora",
        rank: int | None = None,
        alpha: float | None = None,
        dropout: float = 0.0,
        own: dict[str, float] | None = None,
    ):
        if variant not in OWN:
            raise unknown("variant", variant, OWN)
        for name in own or {}:
            if name not in OWN[variant]:
                raise unknown(f"setting of {variant}", name, OWN[variant])
        self.variant, self.rank, self.alpha, self.dropout = variant, rank, alpha, dropout
        self.own = OWN[variant] | (own or {})

    def linear(self, layer: nn.Linear, name: str) -> AdaptedLayer:
        widths = min(layer.in_features, layer.out_features)
        rank, most = fitting_rank(self.rank, layer), widths // 2 if self.variant == "lora-ga" else widths
        if self.rank is None:
            rank = max(1, min(rank, most))
        if not 1 <= rank <= most:
            what = "half the layer's" if self.variant == "lora-ga" else "the layer's"
            raise InputError(f"rank is {rank} but must be between 1 and {what} smaller width, {most}")
        root = self.variant in ("rslora", "lora-ga")
        scale = (rank if self.alpha is None else self.alpha) / (math.sqrt(rank) if root else rank)
        if not scale > 0:
            raise InputError(f"alpha is {self.alpha} but must be above 0")
        if self.variant == "vera":
            return VeRALinear(layer, rank, 1.0, self.dropout, self.own["d"])
        if self.variant == "randlora":
            return RandLoRALinear(layer, rank, scale, self.dropout, bool(self.own["peft_order"]))
        if self.variant in LAYERS:
            return LAYERS[self.variant](layer, rank, scale, self.dropout)
        made = ProductLinear(layer, rank, scale, self.dropout, self.variant)
        if self.variant in STARTS:
            made.begin(*of_weight(self.variant, layer.weight, rank, scale))
        return made

    @torch.no_grad()
    def finish(self, adapted: Adapted) -> None:
        """Give all layers the random matrices that they share: uniform, as `nn.Linear` is."""
        layers = list(adapted.layers.values())
        if self.variant not in ("vera", "randlora"):
            return
        rank, like = max(layer.rank for layer in layers), next(layers[0].parameters(recurse=False))
        widths = [sorted((layer.base.in_features, layer.base.out_features)) for layer in layers]
        if self.variant == "vera":
            shapes = (
                (rank, max(la.base.in_features for la in layers)),
                (max(la.base.out_features for la in layers), rank),
            )
        else:
            bases = max(layer.bases for layer in layers)
            shapes = (rank, 1, max(w[0] for w in widths)), (max(w[1] for w in widths), bases, rank)
        a, b = (like.new_empty(shape).uniform_(-(shape[-1] ** -0.5), shape[-1] ** -0.5) for shape in shapes)
        for layer in layers:
            layer.share(a, b)

    def rate(self, name: str) -> float:
        return self.own["ratio"] if self.variant == "lora+" and name.endswith(".experts.b") else 1.0

    def beside_adamw(self, adapted: Adapted) -> str | None:
        return IN_STEPS.get(self.variant) or super().beside_adamw(adapted)

    def before_step(self, adapted: Adapted, optimizer: torch.optim.Optimizer) -> None:
        for name, layer in adapted.layers.items():
            if getattr(layer, "fitted", None) is not None and not layer.fitted:
                raise InputError(f"{name} has not seen data, from which {self.variant} starts: adapter.fit(...) first")
            if isinstance(layer, AdaLoRALinear):
                layer.feel(self.own["gamma"], self.own["beta"])
            elif self.variant in ("riemannian", "lora-pro") and layer.experts.a.grad is not None:
                self._condition(layer.experts)

    @torch.no_grad()
    def _condition(self, bank: LowRankExperts) -> None:
        a, b, da, db, damping = bank.a[0], bank.b[0], bank.a.grad[0], bank.b.grad[0], self.own["damping"]
        if self.variant == "lora-pro":
            ga, gb = nearest(a, b, da, db, float(bank.scale[0]), damping)
        else:
            eye = damping * torch.eye(len(a), dtype=a.dtype, device=a.device)
            ga, gb = torch.linalg.solve(b.T @ b + eye, da), torch.linalg.solve(a @ a.T + eye, db.T).T
        bank.a.grad.copy_(ga[None]), bank.b.grad.copy_(gb[None])

    @torch.no_grad()
    def after_step(self, adapted: Adapted, optimizer: torch.optim.Optimizer) -> None:
        if self.variant == "relora":
            self._go_on(list(adapted.layers.values()), optimizer)
        elif self.variant == "adalora":
            self._allot([layer for layer in adapted.layers.values() if isinstance(layer, AdaLoRALinear)])

    def _go_on(self, layers: list[ProductLinear], optimizer: torch.optim.Optimizer) -> None:
        """Count a step; every so many begin anew, at a rate that comes back."""
        step, every = int(layers[0].steps) + 1, int(self.own["every"])
        for layer in layers:
            layer.steps.fill_(step)
            if step % every == 0:
                self._restart(layer, optimizer)
        for group in optimizer.param_groups if step >= every else ():
            group["lr_scale"] = min(1.0, (step % every + 1) / max(1.0, self.own["warm"]))

    def _restart(self, layer: ProductLinear, optimizer: torch.optim.Optimizer) -> None:
        """Put the product into the weight and begin anew, with all but the largest moments at 0."""
        bank = layer.experts
        layer.moved += bank.delta(0)
        bank.a.uniform_(-(bank.d_in**-0.5), bank.d_in**-0.5)
        bank.b.zero_()
        for p in (bank.a, bank.b):
            if (mean := optimizer.state[p].get("exp_avg")) is not None:
                kept = max(1, round(mean.numel() * (1 - self.own["prune"])))
                mask = mean.abs() >= mean.abs().flatten().topk(kept).values[-1]
                # both at the same places: a mean that is kept over a square that is not would be a step without end
                mean.mul_(mask), optimizer.state[p]["exp_avg_sq"].mul_(mask)

    def _allot(self, layers: list[AdaLoRALinear]) -> None:
        """Every so many steps set to 0 the l of all parts below one threshold for all layers; they may come back."""
        own, step = self.own, int(layers[0].steps) + 1
        for layer in layers:
            layer.steps.fill_(step)
        if step <= own["begin"] or (step % int(own["every"]) and step < own["end"]):
            return
        first = sum(layer.rank for layer in layers)
        target = own["target"] * len(layers) if own["target"] else 2 * first / 3
        budget = rank_budget(step, first, round(target), int(own["begin"]), int(own["end"]))
        if step <= own["end"]:
            scores = torch.cat([layer.scores() for layer in layers])
            kept = torch.zeros_like(scores, dtype=torch.bool)
            kept[scores.topk(budget).indices] = True
            for layer, alive in zip(layers, kept.split([layer.rank for layer in layers]), strict=True):
                layer.alive.copy_(alive)
        for layer in layers:  # from the end on what is out stays out
            layer.l.mul_(layer.alive)

    def fit(self, adapted: Adapted, batches: Iterable[Any], loss: Callable[[Any], Tensor]) -> None:
        """Let lora-ga and eva start from data: the gradients of all batches, or the layers' inputs on them.

        Args:
            loss: of a batch, with the adapted model; nothing of it is changed but the start.

        Raises:
            InputError: the variant starts from no data, or has started already.
        """
        layers = adapted.layers
        if self.variant not in FITTED or any(layer.fitted for layer in layers.values()):
            raise InputError(f"variant is {self.variant!r} but only {' and '.join(FITTED)} start from data, and once")
        seen = {name: 0.0 for name in layers}

        def look(name: str) -> Callable:
            def hook(layer: ProductLinear, inputs: tuple[Tensor, ...], output: Tensor) -> None:
                x = inputs[0].detach().flatten(0, -2).double()
                if self.variant == "eva":
                    seen[name] = seen[name] + x.T @ x
                else:
                    output.register_hook(lambda g: seen.update({name: seen[name] + g.flatten(0, -2).double().T @ x}))

            return hook

        hooks = [layer.register_forward_hook(look(name)) for name, layer in layers.items()]
        try:
            for batch in batches:
                value = loss(batch)
                if self.variant == "lora-ga":
                    torch.autograd.grad(value, adapted.parameters(), allow_unused=True)
        finally:
            for hook in hooks:
                hook.remove()
        if unseen := [name for name, found in seen.items() if not isinstance(found, Tensor)]:
            raise InputError(f"batches reach no {', '.join(unseen)}")
        for name, layer in layers.items():
            self._start(layer, seen[name])

    @torch.no_grad()
    def _start(self, layer: ProductLinear, seen: Tensor) -> None:
        rank = layer.experts.rank
        if self.variant == "eva":
            layer.experts.a.copy_(torch.linalg.eigh(seen).eigenvectors.flip(1).T[None, :rank])
        else:
            u, _, vt = torch.linalg.svd(seen, full_matrices=False)
            k = layer.experts.d_out**0.25 / math.sqrt(self.own["gamma"])
            layer.begin(k * vt[:rank], k * u[:, rank : 2 * rank])
        layer.fitted.fill_(True)


@torch.no_grad()
def plain_loras(adapted: Adapted) -> dict[str, LowRankExperts]:
    """What the layers add, as plain LoRAs for `core.adapt.peft.write_peft`: of rank 2 r where a start is taken out.

    Raises:
        InputError: the variant is more than a LoRA.
    """
    banks = {}
    for name, layer in adapted.layers.items():
        if not isinstance(layer, ProductLinear) or isinstance(layer, DoRALinear) or layer.moved is not None:
            raise InputError(f"{name} has an update that is no plain LoRA: a {type(layer).__name__}")
        bank, scale = layer.experts, float(layer.experts.scale[0])
        if layer.a0 is None:
            banks[name] = bank
            continue
        a, b = torch.cat([bank.a[0], layer.a0]), torch.cat([bank.b[0], -layer.b0], 1)
        wide = LowRankExperts(1, bank.d_in, bank.d_out, 1)
        wide.a, wide.b = nn.Parameter(a[None]), nn.Parameter(b[None])
        wide.scale, wide.turned = wide.scale.to(a).fill_(scale), bank.turned
        banks[name] = wide
    return banks


ADAPTER = LoRAVariants
