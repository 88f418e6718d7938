"""Uni-MoE: a frozen language model that sees and hears, whose experts are first trained apart, a modality each.

Li et al. 2024, "Uni-MoE: Scaling Unified Multimodal LLMs with Mixture of Experts" (arXiv:2405.11273); public code:
HITsz-TMG/UMOE-Scaling-Unified-Multimodal-LLMs. An encoder's states become soft tokens by a connector, and the decoder
reads them before its text: [soft tokens | question and answer]. Three stages, in each of which all else is frozen:

1. `align`: a connector learns to be read by the frozen decoder.
2. `train_expert`: from there, for each modality alone, the connector's projection and a LoRA on the decoder's
   feed-forward layers, which is then merged, W + (alpha / r) B A. The blocks of all layers are the expert, and the
   decoder is as before: all experts are updates of ONE base, or mixing them would mean nothing (it is checked).
3. `assemble` puts experts side by side, the untouched base's blocks among them, behind a fresh router; `tune` trains
   on the mix of all modalities: LoRA on the experts and the attention, the routers and the projections in full.

The router, for a token x with the logits z = Wg x of E experts, takes the K largest:

    normalize="topk"   w = softmax over these K logits: the weights sum to 1                        (the released code)
    normalize="all"    w = their part of the softmax over all E: they sum to less than 1            (as printed)

With "topk" and K = 1 the weight is the constant 1, and the task gives the router no gradient: it takes "all" or the
balance loss E sum_e F_e P_e, F_e the share of tokens whose likeliest expert is e, P_e the mean probability (GShard); it
is off by default, as in the paper, which finds that it helps copies and not experts of their own.

Nothing routes by modality: the router sees the token, and text tokens choose by what they have read. A projection goes
from stage to stage with its connector. Connectors are neither adapted nor put into the mixture.

Tensor letters: B rows, S states of an encoder, F their width, T bytes of text, D model width, V bytes, N tokens, E
experts, K active ones.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from workbench.catalogue import Method
from workbench.errors import InputError, unknown
from workbench.lib.core.adapt import Adapted, adapt
from workbench.lib.core.adapt.expert_ffn import combine
from workbench.lib.core.balance import switch_lbl
from workbench.lib.core.checkpoint import weights_digest
from workbench.lib.core.experts import GLU
from workbench.lib.core.models import DecoderLM
from workbench.lib.core.moe import MoELayer, moe_layers
from workbench.lib.core.routers import LinearRouter
from workbench.lib.core.routing import Context, Routing
from workbench.lib.modality.connectors import LinearConnector, QFormerConnector

__all__ = [
    "BlockExperts",
    "Expert",
    "LinearConnector",
    "MultimodalLM",
    "QFormerConnector",
    "Signal",
    "UniMoERouter",
    "align",
    "assemble",
    "base_expert",
    "gshard_loss",
    "topk_moe",
    "train_expert",
    "tune",
]

METHOD = Method(
    slug="uni-moe",
    title="Uni-MoE: Scaling Unified Multimodal LLMs with Mixture of Experts",
    family="modality",
    year=2024,
    paper="arXiv:2405.11273",
    claim="Experts trained on their own modality first and mixed afterwards beat a mixture that starts from identical "
    "copies.",
    objects=(
        "MultimodalLM",
        "QFormerConnector",
        "LinearConnector",
        "align",
        "train_expert",
        "base_expert",
        "assemble",
        "tune",
        "topk_moe",
    ),
)

NORMALIZE = ("topk", "all")
LAYERS = ("all", "interval")
PAD = 0
"""The byte that fills up text; it is in no text, and counts in no load and no loss of a router."""

Learn = Callable[[nn.Module], object]
"""Trains what is trainable of a model, in whatever loop."""


def example() -> nn.Module:
    """Two of four experts for a token: one base block, and three updates of it."""
    base = GLU(32, 48)
    blocks = [deepcopy(base) for _ in range(4)]
    with torch.no_grad():
        for block in blocks[1:]:
            block.down.weight += 0.1 * torch.randn(32, 4) @ torch.randn(4, 48) / 48**0.5
    return topk_moe(blocks, 32)


# -- the model


@dataclass(frozen=True)
class Signal:
    """What an encoder says of some rows of a batch.

    Attributes:
        rows: (R,) which rows they are.
        states: (R, S, F).
        mask: (R, S) False where a state is padding; None: all are there.
    """

    rows: Int64[Tensor, " rows"]
    states: Float[Tensor, "rows states d_enc"]
    mask: Bool[Tensor, "rows states"] | None = None

    def to(self, device: torch.device) -> "Signal":
        mask = None if self.mask is None else self.mask.to(device)
        return Signal(self.rows.to(device), self.states.to(device), mask)


class MultimodalLM(nn.Module):
    """A decoder that reads the soft tokens of a row's signal, and then its text.

    Frozen when it is made; the stages say what is trained.

    Attributes:
        lm: of bytes. Soft tokens take the places of its first bytes, positions included.
        connectors: one for each modality, by its name.
        modalities: what the numbers of `Context.modality` stand for: "text", then the connectors.
    """

    def __init__(self, lm: DecoderLM, connectors: Mapping[str, nn.Module]):
        super().__init__()
        if not connectors or "text" in connectors:
            raise InputError(f"connectors are for {list(connectors)} but must be for at least one modality but text")
        self.lm, self.connectors = lm, nn.ModuleDict(connectors)
        self.modalities = ("text", *connectors)
        self.requires_grad_(False)

    def forward(
        self, text: Int64[Tensor, "batch time"], signals: Mapping[str, Signal], context: Context | None = None
    ) -> Float[Tensor, "batch time vocab"]:
        """What comes after each byte of the text.

        Rows of one batch may have any modality, and each as many soft tokens as its connector makes: what is too short
        is filled up at its end, where nothing that counts can see it.

        Args:
            text: filled up with `PAD`.
            signals: by modality; every row is in exactly one.
            context: its `domain`, if it has one, is that of each row (B,). It is told of each token the domain, which
                without one is the row's modality counted from 0; the modality, 0 for text; and whether it is there.

        Raises:
            InputError: no text, what is no byte, a modality without a connector, rows without a signal or with two, or
                more tokens than the decoder has positions.
        """
        context = context if context is not None else Context()
        rows = self._rows(text, signals)
        embedded, parts, lengths, connector = self.lm.embedding(text), [], [], []
        for name, signal in signals.items():
            soft = self.connectors[name](signal.states, signal.mask)
            parts.append(torch.cat([soft, embedded[signal.rows]], 1))
            lengths += [soft.shape[1]] * len(soft)
            connector += [self.modalities.index(name) - 1] * len(soft)
        length = max(part.shape[1] for part in parts)
        if length > self.lm.seq_len:
            raise InputError(
                f"soft tokens and text are {length} tokens but must be at most seq_len = {self.lm.seq_len}"
            )
        back = rows.argsort()
        x = torch.cat([F.pad(part, (0, 0, 0, length - part.shape[1])) for part in parts])[back]
        n_soft, connector = (torch.tensor(values, device=text.device)[back] for values in (lengths, connector))
        self._tell(context, text, length, n_soft, connector)
        if self.lm.position is not None:
            x = x + self.lm.position[:length]
        for block in self.lm.blocks:
            x = block(x, context)
        said = n_soft[:, None] + torch.arange(text.shape[1], device=text.device)
        return self.lm.norm(x[torch.arange(len(x), device=x.device)[:, None], said]) @ self.lm.embedding.weight.T

    def _rows(self, text: Tensor, signals: Mapping[str, Signal]) -> Tensor:
        if text.ndim != 2 or 0 in text.shape:
            raise InputError(f"text has shape {tuple(text.shape)} but must be (batch, time) with at least one of each")
        (low, high), size = (int(end) for end in text.aminmax()), self.lm.embedding.num_embeddings
        if text.is_floating_point() or low < 0 or high >= size:
            raise InputError(f"text is {text.dtype} of {low} to {high} but must hold ids 0 to {size - 1}")
        for name, signal in signals.items():
            if name not in self.connectors:
                raise unknown("modality", name, self.connectors)
            if len(signal.rows) != len(signal.states):
                raise InputError(
                    f"signals[{name!r}] has states of {len(signal.states)} rows but says of {len(signal.rows)} which "
                    "they are"
                )
        rows = torch.cat([signal.rows for signal in signals.values()]) if signals else text.new_empty(0)
        if not torch.equal(rows.sort().values, torch.arange(len(text), device=text.device)):
            raise InputError(f"signals are of the rows {rows.tolist()} but must be of each of {len(text)} rows once")
        return rows

    def _tell(self, context: Context, text: Tensor, length: int, n_soft: Tensor, connector: Tensor) -> None:
        domain = connector if context.domain is None else context.domain
        if domain.shape != text.shape[:1]:
            raise InputError(f"context.domain has shape {tuple(domain.shape)} but must be that of {len(text)} rows")
        place = torch.arange(length, device=text.device)
        soft = place < n_soft[:, None]
        context.modality = torch.where(soft, connector[:, None] + 1, 0).flatten()
        context.domain = domain.repeat_interleave(length)
        at = (place - n_soft[:, None]).clamp(0, text.shape[1] - 1)
        inside = place < n_soft[:, None] + text.shape[1]
        context.mask = (soft | (inside & (text.gather(1, at) != PAD))).flatten()


# -- the mixture


class UniMoERouter(LinearRouter):
    """The K largest logits, weighted as the module's docstring says; no bias.

    Args:
        top_k: K.
        normalize: of `NORMALIZE`.
        balance: coefficient of the GShard loss; 0 for none.
    """

    def __init__(self, d_model: int, n_experts: int, top_k: int = 2, normalize: str = "topk", balance: float = 0.0):
        if normalize not in NORMALIZE:
            raise unknown("normalize", normalize, NORMALIZE)
        coefficients = {"lbl": balance} if balance else None
        super().__init__(d_model, n_experts, top_k, renormalize=normalize == "topk", coefficients=coefficients)

    def balanced(self, routing: Routing, mask: Bool[Tensor, " tokens"] | None) -> Routing:
        if self.coefficients:
            counted = routing.only(mask)
            routing.losses = {"lbl": gshard_loss(counted.probs) if counted.n_tokens else counted.probs.sum()}
        return routing


def gshard_loss(probs: Float[Tensor, "tokens experts"]) -> Float[Tensor, ""]:
    """E sum_e F_e P_e, F_e the share of tokens whose likeliest expert is e (no gradient), P_e the mean probability.

    1 for uniform probabilities, E where all tokens are sure of one expert. (Lepikhin et al. 2020, 2006.16668.)
    """
    return switch_lbl(probs, torch.bincount(probs.argmax(-1), minlength=probs.shape[-1]))


class BlockExperts(nn.ModuleList):
    """Experts that are whole blocks, such as merged ones: each computes the tokens that are sent to it, and no others.

    Their linear layers are plain ones, so that adapters can be put on them.
    """

    @property
    def n_experts(self) -> int:
        return len(self)

    def forward(self, x: Float[Tensor, "tokens dim"], routing: Routing) -> Float[Tensor, "tokens dim"]:
        order = torch.argsort(routing.expert, stable=True)
        parts = x[routing.token[order]].split(routing.counts.tolist())
        y = torch.cat([block(rows) for block, rows in zip(self, parts, strict=True)])
        return combine(y[order.argsort()], routing)


def topk_moe(
    blocks: Sequence[nn.Module], d_model: int, top_k: int = 2, normalize: str = "topk", balance: float = 0.0
) -> MoELayer:
    """K of these blocks (N, D) -> (N, D) for each token, behind a fresh router; see `UniMoERouter`."""
    router = UniMoERouter(d_model, len(blocks), top_k, normalize, balance)
    return MoELayer(router, BlockExperts(blocks))


# -- the three stages


@dataclass(frozen=True, eq=False)
class Expert:
    """The feed-forward blocks of a decoder after a training of their own.

    Attributes:
        name: of the modality.
        blocks: one for each layer.
        base: digest of the blocks that they started from.
    """

    name: str
    blocks: tuple[nn.Module, ...]
    base: str


def align(model: MultimodalLM, modality: str, learn: Learn) -> None:
    """Stage 1: train a connector, and nothing else."""
    with _trained(_connector(model, modality).parameters()):
        learn(model)


def train_expert(
    model: MultimodalLM, modality: str, learn: Learn, rank: int | None = None, alpha: float | None = None
) -> Expert:
    """Stage 2: train the projection of a connector, and LoRA on the feed-forward blocks; hand these over, merged.

    The decoder is afterwards what it was before, bit for bit; the projection has learned.

    Args:
        rank, alpha: of the LoRA, see `lib.core.adapt.LoRA`.
    """
    if moe_layers(model):
        raise InputError("model is a mixture already; experts are trained in the model before `assemble`")
    projection, base = _connector(model, modality).projection, base_expert(model)
    adapted = adapt(model, "lora", "lm.blocks.*.ffn.*", rank=rank, alpha=alpha)
    try:
        with _trained(projection.parameters()):
            learn(model)
        adapted.merge_back()
        blocks = tuple(deepcopy(block.ffn) for block in model.lm.blocks)
    finally:
        if adapted.layers:
            adapted.remove()
        for block, before in zip(model.lm.blocks, base.blocks, strict=True):
            block.ffn.load_state_dict(before.state_dict())
    return Expert(modality, blocks, base.base)


def base_expert(model: MultimodalLM, name: str = "base") -> Expert:
    """The untouched blocks of the decoder, as an expert.

    Raises:
        InputError: a layer of the decoder has none, such as a Mamba block.
    """
    for layer, block in enumerate(model.lm.blocks):
        if not hasattr(block, "ffn"):
            raise InputError(f"layer {layer} of the decoder is a {type(block).__name__}, without a feed-forward block")
    blocks = tuple(deepcopy(block.ffn) for block in model.lm.blocks)
    return Expert(name, blocks, weights_digest(nn.ModuleList(blocks)))


def assemble(
    model: MultimodalLM,
    experts: Sequence[Expert],
    layers: str = "all",
    top_k: int = 2,
    normalize: str = "topk",
    balance: float = 0.0,
) -> MultimodalLM:
    """A copy of the model whose feed-forward blocks are mixtures of the experts, with routers drawn now.

    Args:
        experts: E of them; the same one several times makes copies.
        layers: "all", or "interval": layers 0, 2, 4, ...; the others keep the base's block.
        top_k, normalize, balance: see `UniMoERouter`.

    Raises:
        InputError: an expert started from other blocks than the model's, or has another number of layers.
    """
    if layers not in LAYERS:
        raise unknown("layers", layers, LAYERS)
    if moe_layers(model):
        raise InputError("model is a mixture already; assemble takes the model that the experts were trained in")
    here = base_expert(model).base
    if foreign := [expert.name for expert in experts if expert.base != here]:
        raise InputError(
            f"experts {', '.join(foreign)} started from other feed-forward blocks than the model's: all must come from "
            "one base"
        )
    made = deepcopy(model)
    for layer in range(0, len(made.lm.blocks), 1 if layers == "all" else 2):
        blocks = [deepcopy(expert.blocks[layer]) for expert in experts]
        made.lm.blocks[layer].ffn = topk_moe(blocks, made.lm.embedding.embedding_dim, top_k, normalize, balance)
    return made.requires_grad_(False)


def tune(model: MultimodalLM, learn: Learn, rank: int | None = None, alpha: float | None = None) -> Adapted:
    """Stage 3: LoRA on every linear layer of the decoder but the routers; these and the projections in full.

    Returns:
        The adaptation, for `merge_back`; nothing is trainable any more. Of a model that is no mixture: one dense LoRA.
    """
    routers = [f"{name}.router." for name in moe_layers(model)]
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.startswith("lm.") and not name.startswith(tuple(routers))
    ]
    adapted = adapt(model, "lora", names, rank=rank, alpha=alpha)
    whole = [layer.router for layer in moe_layers(model).values()]
    whole += [connector.projection for connector in model.connectors.values()]
    lora = adapted.parameters()
    with _trained(p for module in whole for p in module.parameters()):
        learn(model)
    for p in lora:
        p.requires_grad_(False)
    return adapted


def _connector(model: MultimodalLM, modality: str) -> nn.Module:
    if modality not in model.connectors:
        raise unknown("modality", modality, model.connectors)
    return model.connectors[modality]


@contextmanager
def _trained(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Trainable inside."""
    parameters = list(parameters)
    for p in parameters:
        p.requires_grad_(True)
    try:
        yield
    finally:
        for p in parameters:
            p.requires_grad_(False)
