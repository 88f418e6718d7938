"""MoLE: frozen LoRAs for parts of an image in a diffusion model, with small gates per token and per image.

"MoLE: Enhancing Human-centric Text-to-image Diffusion via Mixture of Low-rank Experts" (NeurIPS 2024, arXiv:2410.23332;
code: JiePKU/MoLE). A LoRA trained on close-ups of one part, faces or hands, improves that part of a whole scene where
it is applied at the right strength. MoLE learns that strength. In every adapted layer, for the input X (b, m, d) of m
tokens an image:

    R_e = s_e B_e A_e X                          what expert e adds; both always run
    D   = sigmoid(X Phi^T + c)      (b, m, E)    local gate, from the layer's input
    G_e = sigmoid(w_e . mean_m R_e + c_e)  (b)   global gate, from the expert's OWN pooled output
    Y   = W X + sum_e D[:, :, e] G_e R_e

The gates are sigmoids, one an expert: nothing competes, both may be wide open. They start as plain linear layers do, so
that D G is about 1/4 and every expert acts at a quarter of its strength. They are trained on whole scenes with the
ordinary loss of the denoiser and no balance loss, while the base and the experts are frozen.

A 3 x 3 convolution takes the same form: A_e is a convolution of the layer's own kernel, stride and padding to r
channels, B_e one of 1 x 1. Tokens are then pixels, height and width are kept, and the local gate of a strided layer is
the mean of its logits over the input pixels of an output pixel.

For linear layers mean(R_e) = s_e B_e A_e mean(X), so the global gate costs one low-rank product an image. For a padded
convolution the mean of the real outputs is taken, since the borders break that identity.

Three stages: fine-tune the denoiser on scenes (optional); `train_region_expert` on each set of close-ups; `attach_mole`
and training on scenes. `scale_sweep` is the observation that motivates it.

Tensor letters: b images, m tokens an image, d input width, O output width, E experts, r rank.
"""

from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from workbench.catalogue import Method
from workbench.errors import InputError, unknown
from workbench.lib.core.adapt import Adapted, Adapter, RoutedLayer, adapt
from workbench.lib.core.adapt.layer import plain
from workbench.lib.core.adapt.peft import LoRAs
from workbench.lib.core.adapt.sequences import decide, decided
from workbench.lib.core.low_rank import LowRankExperts
from workbench.lib.core.routing import Routing
from workbench.lib.core.task import Task
from workbench.lib.core.train import TrainConfig, train
from workbench.lib.lora_experts.ready_loras import by_layer, fill, highest_ranks, rank_for

METHOD = Method(
    slug="mole-diffusion",
    title="MoLE: Enhancing Human-centric Text-to-image Diffusion via Mixture of Low-rank Experts",
    family="lora_experts",
    year=2024,
    paper="arXiv:2410.23332",
    claim="Frozen LoRAs for face and hand, gated per token and per image, improve these parts beyond what merging the "
    "two does.",
    objects=("MoLE", "attach_mole", "train_region_expert", "scale_sweep", "Gates", "GatedLinear", "GatedConv2d"),
)


def example() -> nn.Module:
    """Two layers with two frozen experts each; only their gates are trained."""
    net = nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 32))
    loras = [{name: (torch.randn(4, 32) / 6, torch.randn(32, 4) / 6, 0.5) for name in ("0", "2")} for _ in range(2)]
    attach_mole(net, loras)
    return net


class Gates(nn.Module):
    """The local and the global gate of one layer. One that is switched off is 1 everywhere.

    Attributes:
        local: Phi and c, a linear layer d -> E; None where it is switched off.
        pooled: the w_e and c_e of all experts as the rows of one linear layer O -> E; None likewise.
        top_k: E, since every token uses all experts.
        coefficients: {}, since there is no auxiliary loss.
    """

    def __init__(self, d_in: int, d_out: int, n_experts: int, local_gate: bool = True, global_gate: bool = True):
        super().__init__()
        self.n_experts = self.top_k = n_experts
        self.coefficients: dict[str, float] = {}
        self.local = nn.Linear(d_in, n_experts) if local_gate else None
        self.pooled = nn.Linear(d_out, n_experts) if global_gate else None

    def logits(self, x: Float[Tensor, "images tokens d_in"]) -> Float[Tensor, "images tokens experts"]:
        """Of the local gate."""
        if self.local is None:
            return x.new_zeros(*x.shape[:2], self.n_experts)
        return self.local(x.to(self.local.weight.dtype))

    def open(
        self, logits: Float[Tensor, "images tokens experts"], outputs: Float[Tensor, "images experts d_out"]
    ) -> tuple[Float[Tensor, "images tokens experts"], Float[Tensor, "images experts"]]:
        """D and G, in float32 or wider.

        Args:
            outputs: mean over the tokens of what each expert adds.
        """
        wide = torch.promote_types(logits.dtype, torch.float32)
        local = torch.ones_like(logits, dtype=wide) if self.local is None else logits.to(wide).sigmoid()
        if self.pooled is None:
            return local, torch.ones_like(outputs[..., 0], dtype=wide)
        return local, ((outputs * self.pooled.weight).sum(-1) + self.pooled.bias).to(wide).sigmoid()


class GatedLayer(RoutedLayer):
    """What the linear and the convolutional layer have in common: E experts that always run, and their gates."""

    def __init__(self, base: nn.Module, router: Gates, experts: nn.Module):
        super().__init__(base)
        self.router, self.experts = router, experts
        self.register_buffer("ranks", torch.full((experts.n_experts,), experts.rank))

    @property
    def n_experts(self) -> int:
        return self.router.n_experts

    @property
    def top_k(self) -> int:
        return self.router.top_k

    def gates(self, x: Tensor) -> tuple[Float[Tensor, "images tokens experts"], Float[Tensor, "images experts"]]:
        """D and G for a layer input."""
        return self.mix(x)[1:]

    def mix(self, x: Tensor, pooled: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """(what the experts add together, D, G).

        Args:
            pooled: G, where it is decided already.
        """
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        call = self.begin(x)
        if not call.repeated:
            call.own["decided"] = decided(self, len(x)) if x.ndim > 2 else None
        added, local, pooled = self.mix(plain(x), *(call.own["decided"] or ()))
        if x.ndim > 2 and not call.repeated:
            decide(self, pooled)
        if self.observed:
            weights = (local * pooled[:, None]).flatten(0, 1)
            everyone = torch.arange(self.n_experts, device=x.device).expand(weights.shape[0], -1)
            self.tell(call, Routing.fixed(everyone, weights, self.n_experts), {})
        return self.base(x) + added

    def fixed_update(self) -> Tensor | None:
        if self.router.local is not None or self.router.pooled is not None:
            return None
        return sum(self.experts.delta(e) for e in range(self.n_experts))


class GatedLinear(GatedLayer):
    """A linear layer on (images, tokens, d), or on (images, ..., d) with the axes between taken as tokens.

    Where the input has two axes (rows, d), each row is an image of one token, so that no row is mixed with another.
    Where a sequence is generated the global gate stays that of its prompt, see `lib.core.adapt.sequences`.
    """

    def mix(self, x: Float[Tensor, "*batch d_in"], pooled: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        bank = self.experts
        tokens = x.reshape(-1, 1, x.shape[-1]) if x.ndim < 3 else x.flatten(1, -2)
        codes = bank.codes(tokens.flatten(0, 1)).unflatten(0, tokens.shape[:2])
        codes, b = (codes * bank.scale[:, None]).to(codes.dtype), bank.b.to(codes.dtype)
        outputs = torch.einsum("ber,eor->beo", codes.mean(1), b)
        local, now = self.router.open(self.router.logits(tokens), outputs)
        pooled = now if pooled is None else pooled
        gated = codes * (local * pooled[:, None]).to(codes.dtype)[..., None]
        return (gated.flatten(2) @ b.transpose(1, 2).flatten(0, 1)).view(*x.shape[:-1], -1), local, pooled


class GatedConv2d(GatedLayer):
    """A convolution on (images, channels, height, width)."""

    def mix(
        self, x: Float[Tensor, "images channels height width"], pooled: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        bank = self.experts
        codes = bank.codes(x)  # (b, E, r, H', W')
        b = bank.b.to(codes.dtype)
        outputs = torch.einsum("ber,eor->beo", codes.mean((-2, -1)), b)
        logits = self.router.logits(x.flatten(2).transpose(1, 2)).transpose(1, 2).unflatten(2, x.shape[-2:])
        logits = F.adaptive_avg_pool2d(logits, codes.shape[-2:])
        local, now = self.router.open(logits.flatten(2).transpose(1, 2), outputs)
        pooled = now if pooled is None else pooled
        maps = local.transpose(1, 2).unflatten(2, codes.shape[-2:]) * pooled[..., None, None]
        return torch.einsum("berhw,behw,eor->bohw", codes, maps.to(codes.dtype), b), local, pooled


class ConvExperts(nn.Module):
    """Low-rank experts of a convolution: s_e B_e (A_e * x), A_e with the layer's kernel, B_e 1 x 1.

    Attributes:
        a: (E, r, C, kernel height, kernel width), initialised as `nn.Conv2d` is.
        b: (E, O, r), zero.
        scale: (E,) alpha / r, a buffer.
    """

    def __init__(self, layer: nn.Conv2d, n_experts: int, rank: int, alpha: float | None = None):
        super().__init__()
        if layer.groups != 1 or layer.padding_mode != "zeros":
            raise InputError(
                f"the convolution has groups {layer.groups} and padding mode {layer.padding_mode!r} but must have 1 "
                "group and be padded with zeros"
            )
        widest = min(layer.out_channels, layer.weight[0].numel())
        if n_experts < 1 or not 1 <= rank <= widest:
            raise InputError(f"experts is {n_experts}, rank {rank} but rank must be 1 to {widest}, experts at least 1")
        self.n_experts, self.rank = n_experts, rank
        self.where = {"stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation}
        bound = layer.weight[0].numel() ** -0.5
        self.a = nn.Parameter(torch.empty(n_experts, rank, *layer.weight.shape[1:]).uniform_(-bound, bound))
        self.b = nn.Parameter(torch.zeros(n_experts, layer.out_channels, rank))
        self.register_buffer("scale", torch.full((n_experts,), (rank if alpha is None else alpha) / rank))

    def codes(self, x: Float[Tensor, "images channels height width"]) -> Float[Tensor, "images experts rank h w"]:
        """s_e (A_e * x) for every expert."""
        codes = F.conv2d(x, self.a.to(x.dtype).flatten(0, 1), **self.where).unflatten(1, self.a.shape[:2])
        return (codes * self.scale.view(-1, 1, 1, 1)).to(codes.dtype)

    def delta(self, expert: int) -> Float[Tensor, "d_out channels kh kw"]:
        """The full update of one expert's kernel."""
        return self.scale[expert] * torch.einsum("or,rchw->ochw", self.b[expert], self.a[expert])


class MoLE(Adapter):
    """Gated experts in every wanted linear layer, and in convolutions too if they are named. Wants no facts.

    `attach_mole` is the paper's use: experts that are there already, frozen. `adapt` alone makes new experts and trains
    them together with the gates, which says nothing about close-ups.

    Args:
        experts: E.
        rank: r; default 8, or a layer's smaller width where that is less; or by the name of the layer.
        alpha: numerator of the scale of new experts; default r, so that the scale is 1.
        local_gate, global_gate: the two gates; without both the experts are added as they are, and merge back.
        convs: glob patterns over the names of convolutions (`nn.Conv2d`) that are adapted beside the linear layers.
        freeze_experts: train the gates alone.
    """

    slug = "mole-diffusion"

    def __init__(
        self,
        experts: int = 2,
        rank: int | dict[str, int] | None = None,
        alpha: float | None = None,
        local_gate: bool = True,
        global_gate: bool = True,
        convs: str | Sequence[str] = (),
        freeze_experts: bool = False,
    ):
        self.experts, self.rank, self.alpha, self.freeze_experts = experts, rank, alpha, freeze_experts
        self.kinds = (local_gate, global_gate)
        self.convs = (convs,) if isinstance(convs, str) else tuple(convs)

    def linear(self, layer: nn.Linear, name: str) -> GatedLinear:
        rank = rank_for(self.rank, layer, name)
        bank = LowRankExperts(self.experts, layer.in_features, layer.out_features, rank, self.alpha)
        bank.requires_grad_(not self.freeze_experts)
        return GatedLinear(layer, Gates(layer.in_features, layer.out_features, self.experts, *self.kinds), bank)

    def convolution(self, layer: nn.Conv2d, name: str) -> GatedConv2d:
        bank = ConvExperts(layer, self.experts, rank_for(self.rank, layer, name), self.alpha)
        bank.requires_grad_(not self.freeze_experts)
        return GatedConv2d(layer, Gates(layer.in_channels, layer.out_channels, self.experts, *self.kinds), bank)

    def finish(self, adapted: Adapted) -> None:
        found = {name: module for name, module in adapted.model.named_modules() if type(module) is nn.Conv2d}
        for pattern in self.convs:
            if not any(fnmatchcase(name, pattern) for name in found):
                raise unknown("convs", pattern, found)
        for name, layer in found.items():
            if any(fnmatchcase(name, pattern) for pattern in self.convs):
                adapted.put(name, layer, self.convolution(layer, name))


ADAPTER = MoLE


def attach_mole(
    denoiser: nn.Module,
    loras: Sequence[LoRAs | str | Path],
    local_gate: bool = True,
    global_gate: bool = True,
) -> Adapted:
    """Put gates on LoRAs that are there already: base and experts are frozen, only the gates are trained.

    Args:
        loras: of each expert the LoRAs by layer name, or a folder of Hugging Face's peft with them. A LoRA of a
            convolution has A (r, C, kh, kw) and B (O, r) or (O, r, 1, 1). Ranks may differ; an expert without a LoRA
            for a layer adds nothing there. At least one linear layer is among them.

    Raises:
        InputError: a folder that cannot be read; layers that the model lacks or that have other widths, all at once.
    """
    parts = by_layer(denoiser, loras, nn.Linear, nn.Conv2d)
    convs = [name for name in parts if isinstance(denoiser.get_submodule(name), nn.Conv2d)]
    linears = [name for name in parts if name not in convs]
    if not linears:
        raise InputError(f"loras are of the convolutions {', '.join(convs)} alone but must have one of a linear layer")
    ranks = highest_ranks(parts)
    options = {"local_gate": local_gate, "global_gate": global_gate, "convs": convs, "freeze_experts": True}
    adapted = adapt(denoiser, "mole-diffusion", linears, experts=len(loras), rank=ranks, **options)
    for name, layer in adapted.layers.items():
        layer.ranks.copy_(fill(layer.experts, parts[name]))
    return adapted


def train_region_expert(
    denoiser: nn.Module,
    closeups: Task,
    config: TrainConfig,
    targets: str | Sequence[str] = "*",
    rank: int | None = None,
    alpha: float | None = None,
    convs: str | Sequence[str] = (),
) -> LoRAs:
    """Stage 2: a LoRA for one part, trained on its close-ups; the denoiser is as it was afterwards.

    Args:
        closeups: the task of denoising them.
        targets, rank, alpha, convs: as for `MoLE`.
    """
    options = {"rank": rank, "alpha": alpha, "convs": convs, "local_gate": False, "global_gate": False}
    adapted = adapt(denoiser, "mole-diffusion", targets, experts=1, **options)
    try:
        train(denoiser, closeups, config, optimizer=adapted.optimizer(config.lr, config.weight_decay))
        banks = {name: layer.experts for name, layer in adapted.layers.items()}
        return {name: (b.a[0].detach(), b.b[0].detach(), float(b.scale[0])) for name, b in banks.items()}
    finally:
        adapted.remove()


def scale_sweep(
    denoiser: nn.Module,
    loras: Sequence[LoRAs],
    scales: Sequence[float],
    metric: Callable[[nn.Module], float],
) -> dict[float, float]:
    """The metric of the denoiser with LoRAs added at each of several fixed scales, a factor on their own."""
    found = {}
    for scale in scales:
        scaled = [{name: (a, b, s * scale) for name, (a, b, s) in lora.items()} for lora in loras]
        adapted = attach_mole(denoiser, scaled, local_gate=False, global_gate=False)
        try:
            found[scale] = metric(denoiser)
        finally:
            adapted.remove()
    return found
