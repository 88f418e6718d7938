"""MoMa: experts in groups, one group a modality, and learned expert choice inside each.

Lin et al. 2024 (2407.21770), on one causal transformer over text tokens and image codes in one sequence. Attention is
shared. Every feed-forward part has E_M experts for each modality M, and two levels of routing:

    1  fixed       a token goes to the group of its own modality
    2  learned     s = sigmoid(x W_M); expert j takes the C = ceil(N_M / E_M) tokens of its group with the largest s_j,
                   over the whole batch; y(x) = sum over the experts j that took x of s_j(x) SwiGLU_j(x)

So all experts of a group have one load, a token has 0, 1 or more experts and 1 on average, as many operations as a
dense layer of the same width, and there is no balance loss. The weights are not normalised: a token nobody took gets 0.
One expert a modality (1t1i) is no choice, and y = s(x) SwiGLU_M(x).

Which tokens an expert takes depends on later tokens; `lib.core.expert_choice` has the causal mode and the auxiliary
routers for it. `MixtureOfDepths` chooses likewise which tokens pass a whole block. `upcycle` starts a model of many
experts a modality from a trained one of one.

Where the paper has Swin's norm after the residual branch, models here are pre-norm (`lib.core.models.Block`).

Tensor letters: B batch, T time, N tokens, D model width, E experts of all groups, S packed places of a row.
"""

import copy
from collections.abc import Mapping
from dataclasses import replace

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from workbench.catalogue import Method
from workbench.errors import InputError
from workbench.lib.core.attention import Attention
from workbench.lib.core.expert_choice import ExpertChoiceRouter
from workbench.lib.core.experts import GLUExperts
from workbench.lib.core.modality import ByModality
from workbench.lib.core.models import Block
from workbench.lib.core.moe import MoELayer
from workbench.lib.core.routers import check_mask, check_tokens
from workbench.lib.core.routing import Context, Routing

METHOD = Method(
    slug="moma",
    title="MoMa: Efficient Early-Fusion Pre-training with Mixture of Modality-Aware Experts",
    family="modality",
    year=2024,
    paper="arXiv:2407.21770",
    claim="Expert groups per modality with learned routing inside each reach the same loss with fewer training FLOPs "
    "than one mixed group.",
    objects=("ModalityExpertFFN", "ModalityRouter", "MixtureOfDepths", "upcycle"),
)

IDS = ("token_ids", "domain", "modality")
"""What a context says of each token, its mask aside."""


def example() -> nn.Module:
    """Two experts for text and two for images, over tokens of text and image in turn."""
    return InTurn(ModalityExpertFFN(32, 32, {"text": 2, "image": 2}))


class ModalityRouter(nn.Module):
    """Routers of the groups as one router over all experts, the groups one behind the other.

    It needs `context.modality`. Tokens outside `context.mask` are taken by nobody.

    Args:
        experts: modality -> experts of its group; the modality with id 0 first.
        gumbel: as in `ExpertChoiceRouter`.

    Attributes:
        groups: an `ExpertChoiceRouter` for each modality.
    """

    top_k = None

    def __init__(self, d_model: int, experts: Mapping[str, int], gumbel: bool = False):
        super().__init__()
        if not experts:
            raise InputError("experts is empty but must give the number of experts of at least one modality")
        self.experts = dict(experts)
        self.n_experts = sum(experts.values())
        self.coefficients: dict[str, float] = {}
        self.groups = nn.ModuleDict(
            {
                name: ExpertChoiceRouter(d_model, count, capacity=1.0, score="sigmoid", gumbel=gumbel)
                for name, count in experts.items()
            }
        )

    def forward(self, x: Float[Tensor, "tokens dim"], context: Context | None = None) -> Routing:
        check_tokens(x)
        context = context or Context()
        check_mask(context.mask, len(x))
        sorted_ = ByModality.of(context.modality, len(self.groups))
        if sorted_.order.numel() != len(x):
            raise InputError(f"context.modality has {sorted_.order.numel()} ids but must have one for each of {len(x)}")
        shape = len(x), self.n_experts
        dtype = torch.promote_types(x.dtype, torch.float32)
        weights, probs = (torch.zeros(shape, dtype=dtype, device=x.device) for _ in range(2))
        chosen = torch.zeros(shape, dtype=torch.bool, device=x.device)
        tokens, first = sorted_.order.split(sorted_.counts), 0
        for modality, router in enumerate(self.groups.values()):
            columns = torch.arange(first, first + router.n_experts, device=x.device)
            first += router.n_experts
            if modality not in sorted_.present:
                continue
            mine = tokens[modality]
            mask = None if context.mask is None else context.mask[mine]
            routing = router(x[mine], Context(mask=mask))
            cells = mine[:, None], columns
            weights = weights.index_put(cells, routing.dense())
            probs = probs.index_put(cells, routing.probs)
            chosen[cells] = routing.mask()
        return Routing.ragged(chosen, weights, probs=probs)


class ModalityExpertFFN(MoELayer):
    """A feed-forward part with E_M SwiGLU experts for each modality M: (B, T, D) -> (B, T, D), or (N, D) alike.

    3 D H E + D E parameters, E the sum over the modalities. Called with a context that has the modality (N,) of each
    token and, where there is padding, its mask.

    Args:
        d_hidden: H, of an expert.
        experts, gumbel: as in `ModalityRouter`.
    """

    def __init__(self, d_model: int, d_hidden: int, experts: Mapping[str, int], gumbel: bool = False):
        router = ModalityRouter(d_model, experts, gumbel)
        super().__init__(router, GLUExperts(router.n_experts, d_model, d_hidden))


class MixtureOfDepths(nn.Module):
    """A block that only some tokens pass: x + r block'(x), r = sigmoid(x w), for the C = ceil(c N) of largest r.

    block'(x) is what the block adds to x, its attention included: attention goes among the tokens of a row that pass.
    They are chosen over the whole batch, before any choice inside the block, and keep the positions that they had. All
    others are unchanged. Raposo et al. 2024 (2404.02258); in MoMa at every second layer, the first included.

    Args:
        block: with causal attention that knows no positions of its own: learned ones are in x already.
        capacity: c, the share of the tokens that pass.
    """

    def __init__(self, block: Block, capacity: float = 0.25):
        super().__init__()
        if not isinstance(block.attention, Attention) or not block.attention.causal or block.attention.rope:
            raise InputError("block.attention must be a causal Attention without rope: its tokens are packed together")
        self.router = ExpertChoiceRouter(block.attention.out.out_features, 1, capacity, score="sigmoid")
        self.block = block

    def forward(self, x: Float[Tensor, "batch time dim"], context: Context) -> Float[Tensor, "batch time dim"]:
        """Raises `InputError` for a prefix, whose places are lost as the tokens are packed, and for ids that are not
        one for each token."""
        self._check(x, context)
        routing = self.router(x.flatten(0, 1), context)
        chosen = routing.mask().view(x.shape[:2])
        if not chosen.any():
            return x
        row, time = chosen.nonzero(as_tuple=True)
        place = (chosen.cumsum(1) - 1)[row, time]
        # in the order of the row from the left: what is causal never sees the empty places behind
        shape = len(x), int(chosen.sum(1).max())
        packed = x.new_zeros(*shape, x.shape[-1]).index_put((row, place), x[row, time])
        ids = {name: getattr(context, name) for name in IDS}
        own = {name: values.reshape(chosen.shape) for name, values in ids.items() if values is not None}
        own = {name: _packed(values, shape, row, place, time) for name, values in (own | {"mask": chosen}).items()}
        inside = replace(context, state=None, **own)
        added = (self.block(packed, inside) - packed)[row, place]
        context.aux = inside.aux
        return x.index_put((row, time), routing.weight[:, None].to(x.dtype) * added, accumulate=True)

    def _check(self, x: Tensor, context: Context) -> None:
        if x.ndim != 3:
            raise InputError(f"x has shape {tuple(x.shape)} but must be (batch, time, dim)")
        if context.prefix is not None:
            raise InputError("context.prefix is given but tokens that are packed together have no prefix")
        tokens = x.shape[:2].numel()
        for name in IDS:
            values = getattr(context, name)
            if values is not None and values.numel() != tokens:
                raise InputError(f"context.{name} has {values.numel()} ids but must have one for each of {tokens}")


def _packed(
    values: Int64[Tensor, "batch time"] | Bool[Tensor, "batch time"],
    shape: tuple[int, int],
    row: Tensor,
    place: Tensor,
    time: Tensor,
) -> Tensor:
    """(B * S,) the values of the tokens that pass, 0 in empty places."""
    return values.new_zeros(shape).index_put((row, place), values[row, time]).flatten()


def upcycle(seed: nn.Module, experts: Mapping[str, int], gumbel: bool = True) -> nn.Module:
    """A copy of a trained model of one expert a modality, with copies of that one for all experts of its group.

    The routers are new, drawn from torch's generator. With one learning rate schedule behind it, the model wants
    another from the start, and data that the first training has not seen.

    Args:
        seed: a model with `ModalityExpertFFN`s of one expert a modality.
        experts: modality -> experts of its group from now on; the same modalities in the same order.
        gumbel: noise in training, without which copies that start alike are told apart by their routers alone.
    """
    model = copy.deepcopy(seed)
    named = model.named_modules(remove_duplicate=False)  # a layer that is used twice has two names
    grown = {name: layer for name, layer in named if isinstance(layer, ModalityExpertFFN)}
    if not grown:
        raise InputError(f"seed is a {type(seed).__name__} without a ModalityExpertFFN, so nothing can be upcycled")
    made = {}
    for name, layer in grown.items():
        if layer in made:
            model.set_submodule(name, made[layer])
            continue
        had = layer.router.experts
        if list(had) != list(experts) or set(had.values()) != {1}:
            raise InputError(f"experts is {dict(experts)} but {name or 'seed'} has {had}, not one each of the same")
        _, d_model, d_hidden = layer.experts.down.shape
        new = ModalityExpertFFN(d_model, d_hidden, experts, gumbel).to(layer.experts.down)
        times = torch.tensor([*experts.values()], device=layer.experts.down.device)
        with torch.no_grad():
            for own, copied in zip(new.experts.parameters(), layer.experts.parameters(), strict=True):
                own.copy_(copied.repeat_interleave(times, dim=0))
        new.train(layer.training)
        if not name:
            return new
        made[layer] = new
        model.set_submodule(name, new)
    return model


class InTurn(nn.Module):
    """A layer over tokens (N, D) whose modalities are 0, 1, 0, 1, ...: for a try without a stream."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: Float[Tensor, "tokens dim"]) -> Float[Tensor, "tokens dim"]:
        return self.layer(x, Context(modality=torch.arange(len(x), device=x.device) % 2))
