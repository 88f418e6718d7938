"""CharLuMA: a low-rank update of the projector, its columns picked from a pool by one router per programming language.

"Aligned Multi-View Scripts for Universal Chart-to-Code Generation" 2026 (arXiv:2604.24559); public code:
Zhihan72/CharLuMA. For the tokens h of an image and the language g its script is wanted in:

    z = A h                          A (r, I) random and never trained
    logits = Wq[g] mean(h) / T       one matrix (N, I) per language, one decision per image
    idx = the r largest, in descending order,   w = softmax over these r logits
    y = MLP(h) + (alpha / r) sum_{j = 1..r} w_j z_j B[:, idx_j]         the pool B (O, N) is 0 at first

The j-th coordinate of z, a fixed row of A, meets the column ranked j-th: `pairing="rank"`, as printed and released. So
the update depends on the order of the chosen scores and not only on their set. With `pairing="index"` column n owns row
n mod r, and order plays no part. The MLP is frozen, the paper's text being of two minds: the released code freezes it
by default. There is no balance loss. While B is 0 the routers have no gradient; the pool has one from the first step.

Here N = r is allowed, which the released code refuses: all columns are used then. The coefficients w_j z_j are put
into N columns and multiplied by the whole pool, N / r times the r columns' operations and no gathered copy of them.

Tensor letters: B images, L tokens of an image, I input width, O output width, N columns, r rank, G languages.
"""

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from workbench.catalogue import Method
from workbench.errors import InputError, unknown
from workbench.lib.core.adapt import Adapter, RoutedLayer, adapt
from workbench.lib.core.adapt.feed_forward import FeedForward
from workbench.lib.core.adapt.layer import plain
from workbench.lib.core.adapt.sequences import decide, decided
from workbench.lib.core.routers import check_finite, check_tokens
from workbench.lib.core.routing import Context, Routing

METHOD = Method(
    slug="charluma",
    title="CharLuMA / Chart2NCode: Aligned Multi-View Scripts for Universal Chart-to-Code Generation",
    family="lora_experts",
    year=2026,
    paper="arXiv:2604.24559",
    claim="A low-rank projector with one router per programming language writes more correct chart code than a shared "
    "projector.",
    objects=("CharLuMA", "LanguageSubspaceProjector", "LanguageRouter", "PoolLayer"),
)

PAIRINGS = ("rank", "index")


def example() -> nn.Module:
    """A projector of two layers with a pool beside it, as in the paper: adapted whole."""
    net = nn.Sequential(nn.Sequential(nn.Linear(32, 48), nn.GELU(), nn.Linear(48, 32)))
    return adapt(net, "charluma", rank=4).model


class LanguageRouter(nn.Module):
    """The r highest of N scores in descending order, weighed by a softmax over these r; a score matrix per language.

    Without a language the matrix is the mean over the languages'.

    Attributes:
        n_experts: N, the columns.
        top_k: r; a coordinate of z each, so it cannot be changed.
        weight: (G, N, I), initialised as `nn.Linear` is.
        temperature: T, above 0.
    """

    def __init__(self, d_in: int, pool: int, rank: int, languages: int, temperature: float = 1.0):
        super().__init__()
        if not 1 <= rank <= pool:
            raise InputError(f"pool is {pool} but must be at least the rank, {rank}")
        if languages < 1:
            raise InputError(f"languages is {languages} but must be at least 1")
        if not temperature > 0:
            raise InputError(f"temperature is {temperature} but must be above 0")
        self.n_experts, self.top_k, self.temperature = pool, rank, temperature
        self.coefficients: dict[str, float] = {}
        self.weight = nn.Parameter(torch.empty(languages, pool, d_in).uniform_(-(d_in**-0.5), d_in**-0.5))

    def set_top_k(self, top_k: int) -> None:
        """K is the number of rows of A."""
        if top_k != self.top_k:
            raise InputError(f"top_k is {top_k} but this rule always has as many columns as the rank, {self.top_k}")

    def forward(self, x: Float[Tensor, "images d_in"], context: Context) -> Routing:
        """Choose for the mean token x of each image; `context.domain` is its language (B,), or None."""
        check_tokens(x)
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        weight = self.weight.to(x.dtype)
        if context.domain is None:
            logits = x @ weight.mean(0).T
        else:
            language = self._checked(context.domain)
            every = torch.einsum("bi,gni->bgn", x, weight)
            logits = every[torch.arange(len(x), device=x.device), language]
        logits = (logits / self.temperature).to(x.dtype)  # a half under autocast
        check_finite(logits)
        best, columns = logits.sort(dim=-1, descending=True, stable=True)
        weights = best[:, : self.top_k].softmax(-1)
        return Routing.fixed(columns[:, : self.top_k], weights, self.n_experts, probs=logits.softmax(-1), logits=logits)

    def _checked(self, language: Tensor) -> Tensor:
        low, high = int(language.min()), int(language.max())
        if low < 0 or high >= self.weight.shape[0]:
            wrong = low if low < 0 else high
            raise InputError(f"language holds {wrong} but must be between 0 and languages - 1 = {len(self.weight) - 1}")
        return language.long()


class ColumnPool(nn.Module):
    """B: N columns of the output width, 0 at first; the experts of this system, of rank 1 each.

    Attributes:
        columns: (N, O).
        scale: alpha / r.
    """

    rank = 1

    def __init__(self, pool: int, d_out: int, scale: float, pairing: str = "rank"):
        super().__init__()
        if pairing not in PAIRINGS:
            raise unknown("pairing", pairing, PAIRINGS)
        self.columns, self.scale, self.pairing = nn.Parameter(torch.zeros(pool, d_out)), scale, pairing

    @property
    def n_experts(self) -> int:
        return self.columns.shape[0]

    def forward(self, z: Float[Tensor, "images length rank"], routing: Routing) -> Float[Tensor, "images length d_out"]:
        """scale sum_j w_j z_j B[:, idx_j] for each token."""
        index, rank = routing.indices[:, None].expand(-1, z.shape[1], -1), z.shape[-1]
        if self.pairing == "index":
            z = z.gather(-1, index % rank)
        coefficients = z * (self.scale * routing.weights)[:, None].to(z.dtype)
        return z.new_zeros(*z.shape[:2], self.n_experts).scatter(-1, index, coefficients) @ self.columns.to(z.dtype)


class PoolLayer(RoutedLayer):
    """y = base(h) + pool(A h): beside one linear layer, or beside a whole projector.

    An image is a row of a batch (B, ..., I), and its tokens all that lies between. A layer that is handed (N, I) rows
    sees N images of one token each, and decides for each of them. Where a sequence is generated the columns stay those
    of its prompt, see `lib.core.adapt.sequences`.

    Attributes:
        a: (r, I), initialised as `nn.Linear` is; not trained unless `train_a`.
        router, experts: see `LanguageRouter` and `ColumnPool`.
        selection: (index (B, r), weight (B, r)) of the last forward, without gradients; None before.
    """

    selection: tuple[Int64[Tensor, "images rank"], Float[Tensor, "images rank"]] | None = None

    def __init__(
        self,
        base: nn.Module,
        d_in: int,
        d_out: int,
        rank: int,
        pool: int,
        languages: int = 3,
        alpha: float | None = None,
        temperature: float = 1.0,
        pairing: str = "rank",
        train_a: bool = False,
    ):
        super().__init__(base)
        if not 1 <= rank <= min(d_in, d_out):
            raise InputError(f"rank is {rank} but must be between 1 and the layer's smaller width, {min(d_in, d_out)}")
        self.router = LanguageRouter(d_in, pool, rank, languages, temperature)
        self.experts = ColumnPool(pool, d_out, (rank if alpha is None else alpha) / rank, pairing)
        start = torch.empty(rank, d_in).uniform_(-(d_in**-0.5), d_in**-0.5)
        self.a = nn.Parameter(start, requires_grad=train_a)

    @property
    def n_experts(self) -> int:
        return self.router.n_experts

    @property
    def top_k(self) -> int:
        return self.router.top_k

    def forward(self, h: Float[Tensor, "images *length d_in"], *rest, **keywords) -> Float[Tensor, "..."]:
        return self.base(h, *rest, **keywords) + self.update(h)

    def update(
        self, h: Float[Tensor, "images *length d_in"], language: Int64[Tensor, " images"] | None = None
    ) -> Float[Tensor, "images *length d_out"]:
        """What is added to the frozen part; without a language it is the one that was told."""
        call, tokens = self.begin(h), plain(h).reshape(len(h), -1, h.shape[-1])
        if not call.repeated:
            told = self._by_image(self.side.rows("language", h), len(h)) if language is None else language
            call.own |= {"language": told, "decided": decided(self, len(h)) if h.ndim > 2 else None}
        if call.own["decided"] is None:
            routing = self.router(tokens.mean(1), Context(domain=call.own["language"]))
        else:
            indices, weights, probs, logits = call.own["decided"]
            routing = Routing.fixed(indices, weights, self.n_experts, probs=probs, logits=logits)
        if h.ndim > 2 and not call.repeated:  # rows alone are no sequences that could go on
            decide(self, routing.indices, routing.weights, routing.probs, routing.logits)
            self.selection = routing.indices.detach(), routing.weights.detach()
            if self.observed:
                self.announce(_by_token(routing, tokens.shape[1]), call.context)
        return self.experts(tokens @ self.a.to(tokens.dtype).T, routing).view(*h.shape[:-1], -1)

    def context(self, x: Tensor) -> Context:
        """What is known of the rows of x; where nobody tells the task, that is the language."""
        context = super().context(x)
        if context.domain is None:
            context.domain = self.side.rows("language", x)
        return context

    @staticmethod
    def _by_image(language: Tensor | None, images: int) -> Tensor | None:
        if language is None:
            return None
        language = language.view(images, -1)
        if (language != language[:, :1]).any():
            raise InputError("language differs within an image but must be one for each row of the batch")
        return language[:, 0]


class LanguageSubspaceProjector(PoolLayer):
    """The paper's projector, for use outside an adapted model: MLP (Linear, GELU, Linear) and pool.

    Args:
        d_in, d_out: widths of the image tokens and of the language model.
        languages: G.
        freeze_mlp: False trains the MLP as well.
    """

    def __init__(
        self,
        d_in: int,
        d_out: int,
        rank: int = 16,
        pool: int = 32,
        languages: int = 3,
        alpha: float = 16.0,
        temperature: float = 1.0,
        pairing: str = "rank",
        freeze_mlp: bool = True,
        train_a: bool = False,
    ):
        mlp = nn.Sequential(nn.Linear(d_in, d_out), nn.GELU(), nn.Linear(d_out, d_out))
        super().__init__(mlp, d_in, d_out, rank, pool, languages, alpha, temperature, pairing, train_a)
        mlp.requires_grad_(not freeze_mlp)

    def forward(
        self, h: Float[Tensor, "images length d_in"], language: Int64[Tensor, " images"] | None = None
    ) -> Float[Tensor, "images length d_out"]:
        return self.base(h) + self.update(h, language)


class CharLuMA(Adapter):
    """A pool beside every block of two linear layers whose layers are all wanted, and beside each other wanted layer.

    The language is one of 0..languages-1 for each row of a batch: `with adapted.given(language=...)`. Without it the
    router is the mean of the languages' routers. A decision looks at all tokens of a row, so a causal model that is
    adapted beyond its image tokens sees its own future.

    Args:
        rank: r; default 16, or a layer's smaller width where that is less.
        pool: N, at least r; default 2 r.
        languages: G; 1 is one router for all.
        alpha: numerator of the scale; default r, so that the scale is 1 (the paper: 16 of 16).
        temperature: of the scores.
        pairing: "rank" as in the paper, or "index", see the module.
        train_a: train A as well (an ablation of the paper).
    """

    slug = "charluma"
    facts = ("language",)

    def __init__(
        self,
        rank: int | None = None,
        pool: int | None = None,
        languages: int = 3,
        alpha: float | None = None,
        temperature: float = 1.0,
        pairing: str = "rank",
        train_a: bool = False,
    ):
        if pairing not in PAIRINGS:
            raise unknown("pairing", pairing, PAIRINGS)
        self.rank, self.pool = rank, pool
        self.options = (languages, alpha, temperature, pairing, train_a)

    def linear(self, layer: nn.Linear, name: str) -> PoolLayer:
        return self._beside(layer, layer.in_features, layer.out_features)

    def feed_forward(self, block: FeedForward, name: str) -> PoolLayer:
        return self._beside(block.module, block.d_model, block.linears[block.down].out_features)

    def _beside(self, module: nn.Module, d_in: int, d_out: int) -> PoolLayer:
        rank = min(16, d_in, d_out) if self.rank is None else self.rank
        return PoolLayer(module, d_in, d_out, rank, 2 * rank if self.pool is None else self.pool, *self.options)


def _by_token(routing: Routing, length: int) -> Routing:
    """The decision of each image, once for each of its tokens: for those who watch."""

    def each(rows: Tensor) -> Tensor:
        return rows.repeat_interleave(length, 0)

    parts = {"probs": each(routing.probs), "logits": each(routing.logits)}
    return Routing.fixed(each(routing.indices), each(routing.weights), routing.n_experts, **parts)


ADAPTER = CharLuMA
