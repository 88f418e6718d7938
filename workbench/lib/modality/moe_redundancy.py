"""MoE-redundancy: a frozen language model of text learns to draw, in adapters that only image tokens pass.

2025, "Exploiting Mixture-of-Experts Redundancy Unlocks Multimodal Generative Abilities"; no public code was found. Here
from its abstract and summaries; what they leave open is our choice, and marked [ours]. A model of text, whose
feed-forward blocks are split into experts (`lib.core.split`) and trained on, is frozen. K image codes become tokens:

    rows         K + 2 new ones of the tied embedding, two for the ends of an image; text rows stay frozen
    PLoRA        y_t = W x_t + m_t s B A x_t,  m_t = 1 at image tokens; in attention, experts and router [ours: router]
    start        rows by a Gromov-Wasserstein coupling P (K, n) of distances in the codebook and among text rows:
                 min over P of sum (D_I[k,l] - D_T[i,j])^2 P[k,i] P[l,j],   e_k = K sum_i P[k,i] text_i, lengthened

PLoRA is that of InternLM-XComposer2 (2401.16420). With no image token it is not evaluated, so text alone gives the same
bits as the frozen model, whatever was learned; and so does every position before the first image token. A text token
after an image sees changed keys and values. The image rows share one softmax with the text rows, so text is decoded
with the logits of the text rows alone, `text_only`.

The problem of the coupling is not convex: several starts, the lowest value is kept. Its rows are means of text rows,
hence the length: theirs is that of text rows on average. Of the two forms that the summaries allow, learning rows by
the gradient of an entropic value is left out.

Tensor letters: B batch, T time, N tokens, D model width, V text tokens, K codes, n text rows of a coupling, E experts.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from fnmatch import fnmatchcase

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from workbench.catalogue import Method
from workbench.errors import InputError, unknown
from workbench.kernels.moe_mlp import moe_mlp
from workbench.lib.core.experts import GLU, ExpertWeights, GLUExperts, expert_outputs, plan_of, score_of
from workbench.lib.core.low_rank import LowRankExperts
from workbench.lib.core.models import DecoderLM
from workbench.lib.core.modes import evaluating
from workbench.lib.core.moe import moe_layers
from workbench.lib.core.recompute import recomputing
from workbench.lib.core.routing import Context, Routing
from workbench.lib.core.split import split_glu
from workbench.lib.measures.redundancy import output_cosine

METHOD = Method(
    slug="moe-redundancy",
    title="Exploiting Mixture-of-Experts Redundancy Unlocks Multimodal Generative Abilities",
    family="modality",
    year=2025,
    paper="arXiv, March 2025",
    claim="The spare capacity of redundant experts learns to generate images with few new parameters and no loss of "
    "language ability.",
    objects=(
        "apply_partial_lora",
        "PartialLoRALinear",
        "PartialLoRAExperts",
        "ExtendedLM",
        "gromov_wasserstein_embeddings",
        "start_rows",
        "expert_redundancy",
    ),
)

STARTS = ("gw", "permuted", "random", "mean", "linear")
KINDS = ("text", "image")


def example() -> nn.Module:
    """A split block with an adapter that takes every token for one of an image."""
    layer = split_glu(GLU(32, 64), n_experts=4, top_k=2)
    apply_partial_lora(layer, {"experts": 4, "router.*": 2}, everywhere=True)
    return layer


_told: ContextVar[tuple[tuple["ImageTokens", Tensor], ...]] = ContextVar("told", default=())
"""Masks that are told now, of whom: of one thread each, so that threads may share a model."""


class ImageTokens:
    """Which tokens of a pass are of an image: told once a forward, read by every adapted layer.

    Attributes:
        everywhere: take all tokens for such ones: ordinary LoRA.
    """

    def __init__(self, everywhere: bool = False):
        self.everywhere = everywhere

    @property
    def mask(self) -> Tensor | None:
        """(N,) inside `told`; None outside and in other threads, where no token is one."""
        return next((mask for images, mask in reversed(_told.get()) if images is self), None)

    @contextmanager
    def told(self, mask: Bool[Tensor, "*batch"]) -> Iterator[None]:
        """The tokens that layers are given inside."""
        _check_mask(mask)
        token = _told.set((*_told.get(), (self, mask.reshape(-1))))
        try:
            yield
        finally:
            _told.reset(token)

    def of(self, x: Tensor) -> Bool[Tensor, " tokens"] | None:
        """(N,) of the N rows of x (..., I); None where none is of an image."""
        rows = x.shape[:-1].numel()
        if self.everywhere:
            return x.new_ones(rows, dtype=torch.bool)
        if recomputing():
            raise InputError("a checkpoint repeats a layer whose image tokens are not known any more: use none here")
        mask = self.mask
        if mask is None:
            return None
        if mask.numel() != rows:
            raise InputError(f"mask has {mask.numel()} tokens but a layer sees {rows}")
        return mask if mask.any() else None


def _check_mask(mask: Tensor) -> None:
    if mask.dtype != torch.bool:
        raise InputError(f"mask is {mask.dtype} but must be torch.bool, True at tokens of an image")


class PartialLoRALinear(nn.Module):
    """y = W x, and at image tokens W x + s B A x, s = alpha / r: (..., I) -> (..., O). B is 0 at the start.

    Args:
        base: the frozen layer.
        alpha: default r, so that s is 1.
        images: whose `told` says which tokens they are; or `forward` is given a mask.
    """

    def __init__(self, base: nn.Linear, rank: int, alpha: float | None = None, images: ImageTokens | None = None):
        super().__init__()
        self.base, self.images = base.requires_grad_(False), images or ImageTokens()
        self.update = LowRankExperts(1, base.in_features, base.out_features, rank, alpha).to(base.weight)

    def forward(
        self, x: Float[Tensor, "*batch d_in"], mask: Bool[Tensor, "*tokens"] | None = None
    ) -> Float[Tensor, "*batch d_out"]:
        y = self.base(x)
        if mask is not None:
            _check_mask(mask)
        if mask is not None and mask.shape != x.shape[:-1]:
            raise InputError(
                f"mask has shape {tuple(mask.shape)} but must be that of the tokens, {tuple(x.shape[:-1])}"
            )
        mask = self.images.of(x) if mask is None else mask.reshape(-1)
        if mask is None or not mask.any():
            return y
        where = mask.nonzero().squeeze(1)
        a, b = self.update.a[0], self.update.scale[0] * self.update.b[0]
        update = x.reshape(-1, x.shape[-1]).index_select(0, where) @ a.T @ b.T
        return y.reshape(-1, y.shape[-1]).index_add(0, where, update).view_as(y)


class PartialLoRAExperts(nn.Module):
    """A frozen bank, in which image tokens meet every expert with W + s B A in place of W, for both of its matrices.

    Text and image tokens are computed apart, so that no text token's bits depend on where image tokens are sent. The
    sums W + s B A are made once a pass, all E of them.
    """

    def __init__(self, base: GLUExperts, rank: int, alpha: float | None = None, images: ImageTokens | None = None):
        super().__init__()
        self.base, self.images, self.n_experts = base.requires_grad_(False), images or ImageTokens(), base.n_experts
        self.gate_up, self.down = (
            LowRankExperts(len(weight), weight.shape[2], weight.shape[1], rank, alpha).to(weight)
            for weight in (base.gate_up, base.down)
        )

    def adapted(self) -> ExpertWeights:
        """What image tokens meet."""
        return ExpertWeights(
            *(
                weight + bank.scale[:, None, None] * bank.b @ bank.a
                for weight, bank in ((self.base.gate_up, self.gate_up), (self.base.down, self.down))
            )
        )

    def forward(self, x: Float[Tensor, "tokens dim"], routing: Routing) -> Float[Tensor, "tokens dim"]:
        mask = self.images.of(x)
        if mask is None:
            return self.base(x, routing)
        now, own = self.adapted(), routing.only(mask)
        image = moe_mlp(x[mask], now.gate_up, now.down, plan_of(own), score_of(own, x))
        if mask.all():
            return image
        y = self.base(x[~mask], routing.only(~mask))
        return x.new_empty(len(x), y.shape[1]).index_put((~mask,), y).index_put((mask,), image)


def apply_partial_lora(
    model: nn.Module, ranks: Mapping[str, int] | int, *, alpha: float | None = None, everywhere: bool = False
) -> ImageTokens:
    """Freeze a model of the workbench and put PLoRA on its linear layers and banks of experts.

    >>> images = apply_partial_lora(model, {"*.attention.*": 8, "*.experts": 4})
    >>> with images.told(tokens >= first_code): model(tokens)

    Args:
        ranks: pattern over names of `nn.Linear` and `GLUExperts` -> r, the first that matches; what none matches stays
            as it is. A number: r of all of them. Trained are then r (I + O) a layer, for each expert in a bank.
        everywhere: on all tokens: ordinary LoRA, the control.

    Returns:
        What to tell, once a forward, which tokens are of an image.

    Raises:
        InputError: a pattern is the first match of no layer, a rank is above a layer's width, or a layer has PLoRA
            already; nothing is changed.
    """
    for name, module in model.named_modules():
        if isinstance(module, PartialLoRALinear | PartialLoRAExperts):
            raise InputError(
                f"model has PLoRA already, as {name or 'itself'}: a second one would not be told its tokens"
            )
    ranks = {"*": ranks} if isinstance(ranks, int) else dict(ranks)
    found: dict[str, str] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | GLUExperts) and name:
            pattern = next((pattern for pattern in ranks if fnmatchcase(name, pattern)), None)
            found |= {} if pattern is None else {name: pattern}
    for pattern in ranks:
        if pattern not in found.values():
            raise unknown("ranks", pattern, found or [name for name, _ in model.named_modules()])
    images, put, trained = ImageTokens(everywhere), {}, [p for p in model.parameters() if p.requires_grad]
    try:
        for name, pattern in found.items():
            module = model.get_submodule(name)
            kind = PartialLoRAExperts if isinstance(module, GLUExperts) else PartialLoRALinear
            put[name] = kind(module, ranks[pattern], alpha, images)
    except InputError:
        for p in trained:
            p.requires_grad_(True)
        raise
    model.requires_grad_(False)
    for name, layer in put.items():
        parent, _, key = name.rpartition(".")
        setattr(model.get_submodule(parent), key, layer)
    return images


class ExtendedLM(nn.Module):
    """A model of V text tokens with further ones, which are of images: (B, T) -> (B, T, V + their number).

    The embedding and the output matrix of the new rows are one, as they are in `DecoderLM`.

    Args:
        base: its text rows are its own parameters, which stay frozen if they are.
        rows: (K + 2, D) of the new tokens at the start, ids V and up.
        images: of the adapters in `base`; they are told which tokens are new.

    Attributes:
        vocab: V.
        new: the new rows.
    """

    def __init__(self, base: DecoderLM, rows: Float[Tensor, "new dim"], images: ImageTokens | None = None):
        super().__init__()
        vocab, width = base.embedding.weight.shape
        if rows.ndim != 2 or rows.shape[1] != width or not len(rows):
            raise InputError(f"rows has shape {tuple(rows.shape)} but must be (new tokens, {width}) with at least one")
        self.base, self.vocab, self.seq_len = base, vocab, base.seq_len
        self.images = ImageTokens() if images is None else images
        self.new = nn.Embedding.from_pretrained(rows.detach().clone().to(base.embedding.weight), freeze=False)

    def forward(
        self, tokens: Int64[Tensor, "batch time"], context: Context | None = None, text_only: bool = False
    ) -> Float[Tensor, "batch time all"]:
        """Logits of the text rows and then of the new ones; `text_only`: of the text rows alone, to decode text."""
        size = self.vocab + len(self.new.weight)
        if tokens.ndim != 2 or not len(tokens) or not 1 <= tokens.shape[1] <= self.seq_len:
            raise InputError(f"tokens has shape {tuple(tokens.shape)} but must be (batch, 1 to {self.seq_len})")
        low, high = (int(end) for end in tokens.aminmax())
        if tokens.is_floating_point() or low < 0 or high >= size:
            raise InputError(f"tokens is {tokens.dtype} of {low} to {high} but must hold ids 0 to {size - 1}")
        context = context if context is not None else Context()
        if context.token_ids is None:
            context.token_ids = tokens.flatten()
        new = tokens >= self.vocab
        x = self.base.embedding(tokens.masked_fill(new, 0))
        if new.any():
            x = x.masked_scatter(new[..., None], self.new(tokens[new] - self.vocab))
        if self.base.position is not None:
            x = x + self.base.position[: tokens.shape[1]]
        with self.images.told(new):
            for block in self.base.blocks:
                x = block(x, context)
        x = self.base.norm(x)
        text = x @ self.base.embedding.weight.T
        return text if text_only else torch.cat([text, x @ self.new.weight.T], -1)


class TextView(nn.Module):
    """The model as one of text: `text_only`, in the place of a `DecoderLM`."""

    def __init__(self, model: ExtendedLM):
        super().__init__()
        self.model = model

    def forward(
        self, tokens: Int64[Tensor, "batch time"], context: Context | None = None
    ) -> Float[Tensor, "batch time vocab"]:
        return self.model(tokens, context, text_only=True)


# -- where the image rows start


@dataclass(frozen=True)
class GWInfo:
    """What was found.

    Attributes:
        coupling: (K, n) P of the lowest value; rows sum to 1/K, columns to 1/n.
        value: its Gromov-Wasserstein discrepancy, of distances whose mean is 1.
        values: of every start, the first from the independent coupling.
    """

    coupling: Float[Tensor, "codes n"]
    value: float
    values: tuple[float, ...]


def gromov_wasserstein_embeddings(
    codes: Float[Tensor, "codes d_code"], text: Float[Tensor, "n dim"], starts: int = 4, seed: int = 0
) -> tuple[Float[Tensor, "codes dim"], GWInfo]:
    """Rows for the codes among text rows, such that distances between codes are like those between their rows.

    The two spaces need nothing in common: only distances within each are compared, Euclidean, over their mean.

    Args:
        codes: vectors of the codebook.
        text: n rows of the embedding, of frequent tokens.
        starts: the independent coupling, and `starts` - 1 vertices of the polytope of couplings, from `seed`.

    Raises:
        InputError: POT is not installed; or all points of a space are the same.
    """
    if starts < 1:
        raise InputError(f"starts is {starts} but must be at least 1")
    _check_points(codes=codes, text=text)
    ot = _pot()
    inside, across = distances(codes), distances(text)
    p, q = np.full(len(codes), 1 / len(codes)), np.full(len(text), 1 / len(text))
    generator = np.random.default_rng(seed)
    first = [np.outer(p, q)] + [ot.emd(p, q, generator.random((len(p), len(q)))) for _ in range(starts - 1)]
    found = []
    for start in first:
        coupling, log = ot.gromov.gromov_wasserstein(inside, across, p, q, G0=start, symmetric=True, log=True)
        found.append((float(log["gw_dist"]), coupling))
    value, coupling = min(found, key=lambda pair: pair[0])
    coupling = torch.from_numpy(coupling)
    rows = len(codes) * coupling @ text.detach().double().cpu()
    return _lengthened(rows, text), GWInfo(coupling, value, tuple(value for value, _ in found))


def start_rows(
    how: str, codes: Float[Tensor, "codes d_code"], text: Float[Tensor, "n dim"], seed: int = 0
) -> Float[Tensor, "codes dim"]:
    """Rows of the image codes at the start, by one of `STARTS`.

    Args:
        how: "gw"; "permuted", the same rows given to other codes: all of it but the geometry; "random", normal as
            the text rows are; "mean", their mean and a tenth of that noise; "linear", a random linear map of the
            codes, of the text rows' length.
    """
    if how not in STARTS:
        raise unknown("how", how, STARTS)
    _check_points(codes=codes, text=text)
    generator = torch.Generator().manual_seed(seed)
    if how in ("gw", "permuted"):
        rows = gromov_wasserstein_embeddings(codes, text, seed=seed)[0]
        return rows if how == "gw" else rows[torch.randperm(len(rows), generator=generator)]
    noise = torch.randn(len(codes), text.shape[1], generator=generator).to(text) * text.detach().std()
    if how == "random":
        return noise
    if how == "mean":
        return text.detach().mean(0) + noise / 10
    centred = codes.double() - codes.double().mean(0)
    return _lengthened(centred @ torch.randn(codes.shape[1], text.shape[1], generator=generator).double(), text)


def distances(points: Float[Tensor, "n dim"]) -> np.ndarray:
    """Euclidean distances (n, n) in float64, over their mean."""
    points = points.detach().double().cpu()
    found = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist").numpy()
    if not found.mean() > 0:
        raise InputError(f"the {len(points)} points are all the same, or NaN, and have no geometry to compare")
    return found / found.mean()


def _check_points(**clouds: Tensor) -> None:
    for name, points in clouds.items():
        if points.ndim != 2 or not points.isfinite().all():
            raise InputError(f"{name} has shape {tuple(points.shape)} but must be (n, dim) of finite numbers")


def _lengthened(rows: Tensor, text: Tensor) -> Tensor:
    """Rows of the text rows' mean length; one of length 0 stays."""
    length = text.detach().double().norm(dim=1).mean()
    return (rows * length.to(rows) / rows.norm(dim=1, keepdim=True).clamp(min=1e-12)).to(text)


def _pot():
    try:
        import ot  # a second; only where a coupling is asked for
    except ImportError as error:
        raise InputError("a Gromov-Wasserstein coupling needs POT: pip install 'workbench[modality]'") from error
    return ot


# -- how redundant the experts are


def expert_redundancy(
    model: ExtendedLM,
    tokens: Int64[Tensor, "batch time"],
    kind: str = "image",
    measure: Callable[[Tensor], Tensor] = output_cosine,
) -> Float[Tensor, "layers experts experts"]:
    """How alike the experts of every layer are on the text or the image tokens of a batch, routed to them or not.

    Args:
        kind: of `KINDS`; image tokens meet the experts with their adapters.
        measure: outputs (E, N, D) -> (E, E), as those of `measures.redundancy`.
    """
    if kind not in KINDS:
        raise unknown("kind", kind, KINDS)
    new = (tokens >= model.vocab).flatten()
    wanted = new if kind == "image" else ~new
    if not wanted.any():
        raise InputError(f"tokens has none of kind {kind!r}")
    layers, inputs, handles = moe_layers(model), {}, []
    for layer in layers.values():
        handles.append(
            layer.register_forward_pre_hook(lambda layer, given: inputs.__setitem__(layer, given[0].flatten(0, -2)))
        )
    try:
        with evaluating(model):
            model(tokens)
            found = []
            for layer, x in inputs.items():
                bank = layer.experts
                if isinstance(bank, PartialLoRAExperts):
                    bank = bank.adapted() if kind == "image" or bank.images.everywhere else bank.base
                found.append(measure(expert_outputs(bank, x[wanted])))
    finally:
        for handle in handles:
            handle.remove()
    if not found:
        raise InputError("model has no layer with experts")
    return torch.stack(found)
