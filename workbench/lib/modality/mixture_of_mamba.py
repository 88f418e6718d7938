"""Mixture-of-Mamba: the projections of a Mamba block once for each modality, and one state for all.

Liang et al. 2025, "Mixture-of-Mamba: Enhancing Multi-Modal State-Space Models with Modality-Aware Sparsity"
(arXiv:2501.16295). In a Mamba block (`lib.core.mamba`) each token is taken through the four projections "in", "x", "dt"
(its bias too) and "out" of its own modality. What runs along the sequence stays one: the short convolution, the rates
A, the skip D, and above all the state, through which a token of text reaches the image after it. Nothing is learned
about where a token goes, and it costs what it costs in the dense block.

Not as the release does it: there the shared projection of the step loses its bias where "dt" is not split, so that the
ablation changes more than the split; its block has no single step; and masks that leave a token out leave its output
undefined. Here the bias enters once in either case, `prefill` and `step` hand the state over, whatever the modalities
on both sides, and ids out of range are refused.

Tensor letters: B batch, T time, N tokens, D model width, I channels, M modalities.
"""

from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from workbench.catalogue import Method
from workbench.errors import InputError, unknown
from workbench.lib.core.mamba import MambaBlock, MambaCache, Projection
from workbench.lib.core.modality import ByModality, InTurns, ModalityLinear
from workbench.lib.core.models import DecoderLM
from workbench.lib.core.observe import Announcing, outputs
from workbench.lib.core.recompute import recomputing
from workbench.lib.core.routing import Context, Routing

METHOD = Method(
    slug="mixture-of-mamba",
    title="Mixture-of-Mamba: Enhancing Multi-Modal State-Space Models with Modality-Aware Sparsity",
    family="modality",
    year=2025,
    paper="arXiv:2501.16295",
    claim="Projections of a Mamba block kept per modality, with one shared state, reach the dense loss with a fraction "
    "of the training FLOPs.",
    objects=("MixtureOfMambaBlock", "mamba_decoder", "step_sizes"),
)

PROJECTIONS = ("in", "x", "dt", "out")


def example() -> nn.Module:
    """A block for text and images, on tokens that are four of the one and four of the other in turns."""
    return InTurns(MixtureOfMambaBlock(32, n_modalities=2, d_state=4), n_modalities=2)


class ModalityProjection(ModalityLinear):
    """The projection of each token's modality, as the context tells it."""

    def forward(self, x: Float[Tensor, "*batch d_in"], context: Context | None) -> Float[Tensor, "*batch d_out"]:
        return super().forward(x, ByModality.told(context or Context(), len(self.parts)))


class MixtureOfMambaBlock(MambaBlock, Announcing):
    """A `MambaBlock` in which projections are split by `Context.modality`, (B T,) ids 0 to M - 1.

    Where something is split, it announces the modalities as its routing: the load of the live views is then that by
    modality, and a token counts as using one M-th of what is split.

    Args:
        n_modalities: M.
        split: which of `PROJECTIONS` there is one of for each modality; with none of them it is the dense block.
        d_state, d_conv, expand, dt_rank: as in `MambaBlock`.

    Raises:
        InputError: a size is below 1, or `split` names something else; in a forward, see `ByModality.of`.
    """

    top_k = 1

    def __init__(
        self,
        d_model: int,
        n_modalities: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        dt_rank: int | None = None,
        split: Collection[str] = PROJECTIONS,
    ):
        if n_modalities < 1:
            raise InputError(f"n_modalities is {n_modalities} but must be at least 1")
        for name in split:
            if name not in PROJECTIONS:
                raise unknown("projection", name, PROJECTIONS)

        def projection(name: str, d_in: int, d_out: int, bias: bool) -> nn.Module:
            if name in split:
                return ModalityProjection(d_in, d_out, n_modalities, bias)
            return Projection(d_in, d_out, bias)

        super().__init__(d_model, d_state, d_conv, expand, dt_rank, projection)
        self.n_experts = n_modalities
        self.split = tuple(name for name in PROJECTIONS if name in split)

    @property
    def experts(self) -> nn.ModuleList:
        """What is split, one part in M of it for each modality."""
        return nn.ModuleList(getattr(self, f"{name}_proj") for name in self.split)

    def prefill(
        self, u: Float[Tensor, "*batch time dim"], context: Context | None = None, cache: MambaCache | None = None
    ) -> tuple[Float[Tensor, "*batch time dim"], MambaCache]:
        """As in `MambaBlock`; `context.modality` is of the tokens u alone, not of those of the cache."""
        out = super().prefill(u, context, cache)
        if self.split and self.observed and not recomputing():
            modality = context.modality[:, None]
            self.announce(Routing.fixed(modality, torch.ones_like(modality, dtype=u.dtype), self.n_experts), context)
        return out

    def form_now(self) -> Mapping[str, Tensor]:
        """step at rest: (M,) the median over the channels of softplus(bias), for each modality that has its own."""
        parts = self.dt_proj.parts if "dt" in self.split else [self.dt_proj]
        return {"step at rest": torch.stack([F.softplus(part.bias.detach()).median() for part in parts])}


def mamba_decoder(vocab: int, d_model: int, n_layers: int, seq_len: int, block: Callable[[], nn.Module]) -> DecoderLM:
    """A decoder of Mamba blocks alone: in every layer one for the attention and one for the feed-forward part.

    A block has about 3 expand D^2 parameters, so that two of them stand for one transformer layer. They know the order
    of the tokens without learned positions.
    """
    return DecoderLM(
        vocab,
        d_model,
        n_layers,
        1,
        lambda layer: block(),
        seq_len,
        attention=lambda layer: block(),
        learned_positions=False,
    )


@torch.no_grad()
def step_sizes(model: nn.Module, forward: Callable[[], object]) -> dict[str, Float[Tensor, "tokens channels"]]:
    """Delta (N, I) of every Mamba block of a model, by its name, in what `forward()` lets the model do.

    A state keeps exp(-n Delta) of itself from one token to the next, n = 1 to d_state: a small step remembers.
    """
    blocks = {name: module for name, module in model.named_modules() if isinstance(module, MambaBlock)}
    with ExitStack() as stack:
        seen = {name: stack.enter_context(outputs(block.dt_proj)) for name, block in blocks.items()}
        forward()
    return {name: F.softplus(torch.cat([delta.flatten(0, -2) for delta in found])) for name, found in seen.items()}
