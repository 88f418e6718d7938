"""RDM: a small diffusion model and a database whose nearest items it is shown (Blattmann et al., NeurIPS 2022).

Of each training image x the k nearest items of a database D are looked up once, by a frozen embedder phi and the cosine
(`lib.core.retrieval`). The denoiser sees their raw embeddings r (k, E) as a set: they are the keys and values of its
cross-attention, without a code of their place. What an image is made of comes from D, how from the weights; so D can be
exchanged after training.

    loss       E |e - e_theta(x_t, t, r(x))|^2, with r replaced by one trained null vector with probability p_uncond
    guidance   e_null + w (e_r - e_null)
    drawing    an item q of D from `TopMProposal`, r = the k nearest of q in D, q first; then DDIM

The null vector is trained, where the paper's code has a fixed random one and trains without it; a model that never saw
it (p_uncond = 0) refuses guidance. The paper's denoiser is a U-Net on latents of an autoencoder; this one is a residual
perceptron on pixels, whose one query an image attends to the neighbours in every block. The autoregressive sibling
(RARM) and conditions that come from text are not here.

Tensor letters: B batch, C channels, H height, W width, N items of D, k neighbours, E width of an embedding, D width.
"""

import math

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from workbench.catalogue import Method
from workbench.errors import InputError
from workbench.lib.core import diffusion
from workbench.lib.core.diffusion import Schedule, guided
from workbench.lib.core.modes import evaluating
from workbench.lib.core.retrieval import RetrievalDatabase

__all__ = ["NeighborConditionedDenoiser", "RetrievalDatabase", "TopMProposal", "neighbours", "sample"]

METHOD = Method(
    slug="semi-parametric",
    title="Semi-Parametric Neural Image Synthesis (retrieval-augmented diffusion)",
    family="imaging",
    year=2022,
    paper="NeurIPS 2022",
    claim="A small generator with retrieved neighbours rivals larger models, and swapping the database changes the "
    "domain without training.",
    objects=("NeighborConditionedDenoiser", "RetrievalDatabase", "TopMProposal", "neighbours", "sample"),
    example=None,
    kind=None,
)

WAVES = 32


class CrossAttention(nn.Module):
    """One query an image, keys and values from a set: (B, D), (B, k, E) -> (B, D)."""

    def __init__(self, dim: int, d_embedding: int, n_heads: int):
        super().__init__()
        self.n_heads = n_heads
        self.query, self.out = (nn.Linear(dim, dim, bias=False) for _ in range(2))
        self.key_value = nn.Linear(d_embedding, 2 * dim, bias=False)

    def forward(self, x: Tensor, shown: Tensor, mask: Tensor) -> Tensor:
        q = self.query(x).unflatten(-1, (self.n_heads, 1, -1))  # (B, heads, 1, d)
        k, v = self.key_value(shown).unflatten(-1, (2, self.n_heads, -1)).permute(2, 0, 3, 1, 4)  # (B, heads, k, d)
        return self.out(F.scaled_dot_product_attention(q, k, v, mask[:, None, None]).flatten(1))


class Block(nn.Module):
    """Cross-attention, then a perceptron, each on a norm to which the embedding of the level is added."""

    def __init__(self, dim: int, d_embedding: int, n_heads: int):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(2))
        self.attention = CrossAttention(dim, d_embedding, n_heads)
        self.ffn = nn.Sequential(nn.Linear(dim, 2 * dim), nn.SiLU(), nn.Linear(2 * dim, dim))

    def forward(self, x: Tensor, level: Tensor, shown: Tensor, mask: Tensor) -> Tensor:
        x = x + self.attention(self.norms[0](x) + level, shown, mask)
        return x + self.ffn(self.norms[1](x) + level)


class NeighborConditionedDenoiser(nn.Module):
    """The noise in images, seen beside a set of embeddings.

    Args:
        shape: (C, H, W) of an image.
        d_embedding: E.
        dim: D, a multiple of `n_heads`.
        depth: blocks.
        p_uncond: the share of training images that are shown the null vector instead of their neighbours. Whoever
            trains the model draws them (`dropped`); 0 says that it never saw one.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        d_embedding: int,
        dim: int = 64,
        depth: int = 2,
        n_heads: int = 4,
        p_uncond: float = 0.1,
    ):
        super().__init__()
        if len(shape) != 3 or min(*shape, d_embedding, dim, depth, n_heads) < 1 or dim % n_heads:
            raise InputError(
                f"shape, d_embedding, dim, depth, n_heads are {tuple(shape)}, {d_embedding}, {dim}, {depth}, {n_heads} "
                "but must be (channels, height, width) and numbers of at least 1, n_heads a divisor of dim"
            )
        if not 0 <= p_uncond <= 1:
            raise InputError(f"p_uncond is {p_uncond} but must be 0 to 1")
        self.shape, self.d_embedding, self.p_uncond = tuple(shape), d_embedding, p_uncond
        pixels = math.prod(shape)
        self.null = nn.Parameter(torch.randn(d_embedding))
        self.stem = nn.Linear(pixels, dim)
        self.level = nn.Sequential(nn.Linear(WAVES, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.blocks = nn.ModuleList(Block(dim, d_embedding, n_heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)
        self.out = nn.Linear(dim, pixels)

    def forward(
        self,
        x: Float[Tensor, "batch channels height width"],
        t: Tensor,
        shown: Float[Tensor, "batch k embedding"] | None,
        mask: Bool[Tensor, "batch k"] | None = None,
        dropped: Bool[Tensor, " batch"] | None = None,
    ) -> Float[Tensor, "batch channels height width"]:
        """The noise.

        Args:
            t: (B,) levels of noise.
            shown: raw embeddings of the neighbours, in any order and of any number; None for the null vector.
            mask: False where a slot is not there; at least one must be.
            dropped: True where the null vector takes the place of all neighbours.
        """
        if x.shape[1:] != self.shape:
            raise InputError(f"x has images of {tuple(x.shape[1:])} but must have {self.shape}")
        shown, mask = self._set(len(x), shown, mask, dropped)
        h, level = self.stem(x.flatten(1)), self.level(_waves(t))
        for block in self.blocks:
            h = block(h, level, shown, mask)
        return self.out(self.norm(h)).view_as(x)

    def _set(self, n: int, shown: Tensor | None, mask: Tensor | None, dropped: Tensor | None) -> tuple[Tensor, Tensor]:
        """Keys and values (n, k, E) and which of them are there (n, k)."""
        if shown is None:
            if mask is not None or dropped is not None:
                raise InputError("mask and dropped say something of neighbours but shown is None")
            return self.null.expand(n, 1, -1), torch.ones(n, 1, dtype=torch.bool, device=self.null.device)
        shown = shown.detach()  # what is looked up is never trained
        if shown.ndim != 3 or shown.shape[0] != n or not shown.shape[1] or shown.shape[2] != self.d_embedding:
            raise InputError(f"shown is {tuple(shown.shape)} but must be ({n}, at least 1, {self.d_embedding})")
        if not shown.isfinite().all():
            raise InputError("shown has values that are not finite")
        if mask is None:
            mask = torch.ones(shown.shape[:2], dtype=torch.bool, device=shown.device)
        if mask.shape != shown.shape[:2] or not mask.any(1).all():
            raise InputError(f"mask must be {tuple(shown.shape[:2])} and leave at least one slot of each image")
        if dropped is not None:
            shown = torch.where(dropped[:, None, None], self.null, shown)
            mask = mask | dropped[:, None]
        return shown, mask


def _waves(t: Tensor) -> Tensor:
    """(B, WAVES) sines and cosines of the level."""
    rates = torch.exp(torch.linspace(0, -math.log(1000), WAVES // 2, device=t.device))
    angles = t.float()[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], 1)


def neighbours(
    database: RetrievalDatabase, items: Int64[Tensor, " batch"], k: int
) -> tuple[Int64[Tensor, "batch k"], Float[Tensor, "batch k embedding"]]:
    """What is shown to draw "like" items of the database: each of them and its k - 1 nearest, ids and embeddings."""
    if k == 1:
        ids = items[:, None]
    else:
        near, _ = database.search(database.embeddings(items), k - 1, exclude_ids=items[:, None])
        ids = torch.cat([items[:, None], near], 1)
    return ids, database.embeddings(ids)


class TopMProposal:
    """Which items of the database to draw from: those that training images had among their neighbours, by how often.

    Build it by `fit`.
    """

    def __init__(self, counts: Int64[Tensor, " items"]):
        self.counts = counts
        self.order = counts.sort(descending=True, stable=True).indices  # of equal counts the lower id comes first

    @classmethod
    def fit(cls, neighbour_ids: Int64[Tensor, "images k"], n_db: int) -> "TopMProposal":
        """Count how often each of the `n_db` items occurs."""
        if not neighbour_ids.numel():
            raise InputError(f"neighbour_ids is {tuple(neighbour_ids.shape)} but must have at least one id")
        if int(neighbour_ids.min()) < 0 or int(neighbour_ids.max()) >= n_db:
            ends = f"{int(neighbour_ids.min())} to {int(neighbour_ids.max())}"
            raise InputError(f"neighbour_ids are {ends} but must be 0 to {n_db - 1}")
        return cls(neighbour_ids.flatten().bincount(minlength=n_db))

    def weights(self, m: float = 0.01, weighted: bool = True) -> Float[Tensor, " items"]:
        """The probability of each item; float64.

        Args:
            m: the share of the items that can be drawn, those of the highest counts; rounded up.
            weighted: in proportion to the counts; otherwise each alike.
        """
        if not 0 < m <= 1:
            raise InputError(f"m is {m} but must be above 0 and at most 1")
        top = self.order[: math.ceil(m * len(self.order) - 1e-9)]
        found = torch.zeros(len(self.order), dtype=torch.float64)
        found[top] = self.counts[top].double() if weighted else 1.0
        return found / found.sum()

    def sample(
        self, n: int, generator: torch.Generator, m: float = 0.01, weighted: bool = True
    ) -> Int64[Tensor, " drawn"]:
        """n items, with replacement."""
        if n < 1:
            raise InputError(f"n is {n} but must be at least 1")
        return torch.multinomial(self.weights(m, weighted), n, replacement=True, generator=generator)


def sample(
    model: NeighborConditionedDenoiser,
    shown: Float[Tensor, "batch k embedding"] | None,
    schedule: Schedule,
    generator: torch.Generator,
    weight: float = 2.0,
    steps: int = 50,
    eta: float = 0.0,
    clip: float | None = 1.0,
    n: int | None = None,
) -> Float[Tensor, "batch channels height width"]:
    """Images drawn beside their neighbours. The neighbours are looked up once, not at every step.

    Args:
        shown: embeddings of the neighbours of each image; None: n images beside the null vector.
        weight: of guidance; 1 is the conditional model alone.
        steps, eta, clip: see `lib.core.diffusion.sample`.
    """
    if (shown is None) == (n is None):
        raise InputError("shown or n must be given, and not both: n is how many images are drawn without neighbours")
    if shown is not None and weight != 1 and model.p_uncond == 0:
        raise InputError(f"weight is {weight} but must be 1 for a model that never saw the null vector (p_uncond = 0)")

    def predict(x: Tensor, t: Tensor) -> Tensor:
        if shown is None:
            return model(x, t, None)
        if weight == 1:
            return model(x, t, shown)
        return guided(model(x, t, None), model(x, t, shown), weight)

    size = n if shown is None else len(shown)
    with evaluating(model):
        return diffusion.sample(predict, (size, *model.shape), schedule, steps, generator, eta, clip)
