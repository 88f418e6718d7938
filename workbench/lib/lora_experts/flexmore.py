"""FlexMoRE: feed-forward experts trained apart, and afterwards cut to low rank, each to a rank of its own.

2026, "FlexMoRE: A Flexible Mixture of Rank-heterogeneous Experts for Efficient Federatedly-trained Large Language
Models" (arXiv:2602.08818); public code: schneiderkamplab/FlexMoRE, on top of FlexOlmo. Expert 0 is the frozen public
block with the matrices W, and for the tokens x:

    p = softmax(x R^T) over all experts;   y = sum_e p_e FFN_e(x) over the K likeliest, p_e as it is

1. Apart (`adapt` with its defaults): the owner of a domain trains one whole block, which starts as the public one, and
   its row of R against the public row, on the own text alone. All else is frozen. Two of two experts are active, so the
   weights sum to 1. A learned handicap min(b, 0) on the new expert's logit, and a router z-loss of 0.001.
   Rows start as the mean of what the layer is given for text of the domain (`domain_rows`).
2. Merge (`merge_experts`): the experts side by side, without the handicaps. What has to be equal in all of them is
   compared bit by bit. Nothing is trained any more, or the rows alone (`tune="router"`).
3. Cut, on the way: per matrix D_e = W_e - W = U S V^T becomes B_e A_e with A_e = sqrt(S_r) V_r^T, B_e = U_r sqrt(S_r).
   Ranks may differ, and 0 leaves an expert full. FFN_e then is the block with W + B_e A_e: the non-linearity is inside.

The weights are not renormalised, so with K below E the output is scaled down, by design of the paper; the sum of the
weights is 1 only for K = E or with `renormalize`. A rank above the smaller width of a matrix is refused: it would be
the same function with more parameters, and beyond d f / (d + f) an expert of low rank is larger than a full one.

Apart from the public code: rows are standardised mean inputs of each layer, where the paper embeds documents with
another model; a layer that holds gate and up in one matrix is cut as one; the loss on the model's last logits (1e-5)
is the trainer's. Linear layers outside blocks, which the paper leaves alone (name only blocks in `targets` to do the
same), become mixtures of whole matrices, with a router each: nothing is shared by experts, so merging stays exact.

Tensor letters: N tokens, D model width, E experts with the public one, K active experts, I inputs, O outputs, r rank.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor, nn

from workbench.catalogue import Method
from workbench.errors import InputError, unknown
from workbench.lib.core.adapt import Adapted, Adapter, RoutedLayer, RoutedLinear, adapt
from workbench.lib.core.adapt.expert_ffn import RoutedFeedForward
from workbench.lib.core.adapt.feed_forward import FeedForward
from workbench.lib.core.adapt.files import base_digest
from workbench.lib.core.adapt.layer import plain
from workbench.lib.core.low_rank import LowRankExperts
from workbench.lib.core.routers import TopKRouter
from workbench.lib.core.routing import Context, Routing

METHOD = Method(
    slug="flexmore",
    title="FlexMoRE: A Flexible Mixture of Rank-heterogeneous Experts for Federatedly-trained Large Language Models",
    family="lora_experts",
    year=2026,
    paper="arXiv:2602.08818",
    claim="Experts trained apart and cut to low rank afterwards keep or improve the quality of full experts with a "
    "third of the parameters.",
    objects=("FlexMoRE", "Expert", "take_expert", "merge_experts", "domain_rows", "rank_for_energy", "break_even_rank"),
)

TUNE = ("all", "router")


def example() -> nn.Module:
    """Two linear layers with an activation, as public expert, beside one full expert."""
    return adapt(nn.Sequential(nn.Sequential(nn.Linear(32, 48), nn.GELU(), nn.Linear(48, 32))), "flexmore").model


class FlexRouter(TopKRouter):
    """logits = x R^T + min(b, 0), row 0 of R and its logit those of the public expert; weights p as they are.

    Attributes:
        public: (D,) row 0, frozen.
        rows: (E - 1, D) the other rows.
        handicap: (E - 1,) b; None without it.
    """

    def __init__(self, d_model: int, n_experts: int, top_k: int, *, handicap: bool = True, **options):
        super().__init__(n_experts, top_k, **options)
        self.register_buffer("public", torch.empty(d_model).normal_(std=0.02))
        self.rows = nn.Parameter(torch.empty(n_experts - 1, d_model).normal_(std=0.02))
        self.handicap = nn.Parameter(torch.zeros(n_experts - 1)) if handicap else None

    def scores(self, x: Float[Tensor, "tokens dim"], context: Context) -> Float[Tensor, "tokens experts"]:
        dtype = torch.promote_types(x.dtype, torch.float32)
        logits = x.to(dtype) @ torch.cat([self.public[None], self.rows]).to(dtype).T
        if self.handicap is None:
            return logits
        return logits + nn.functional.pad(self.handicap.to(dtype).clamp(max=0), (1, 0))


class FullExperts(LowRankExperts):
    """A bank whose updates are whole matrices, all but the public expert's, which has none. (N, I) -> (N, O).

    Training an update that starts at zero is training the matrix itself.

    Attributes:
        updates: E - 1 linear layers without bias, zero at first.
        a, b: one factorisation of the updates, the identity on their smaller side.
    """

    def __init__(self, n_experts: int, d_in: int, d_out: int):
        nn.Module.__init__(self)
        self.updates = nn.ModuleList(nn.Linear(d_in, d_out, bias=False) for _ in range(n_experts - 1))
        for layer in self.updates:
            nn.init.zeros_(layer.weight)
        self.register_buffer("scale", torch.ones(n_experts))

    @property
    def a(self) -> Float[Tensor, "experts rank d_in"]:
        full = self._stacked()
        return full if full.shape[1] < full.shape[2] else _identity(full, full.shape[2])

    @property
    def b(self) -> Float[Tensor, "experts d_out rank"]:
        full = self._stacked()
        return _identity(full, full.shape[1]) if full.shape[1] < full.shape[2] else full

    def forward(
        self, x: Float[Tensor, "tokens d_in"], routing: Routing, path: str | None = None
    ) -> Float[Tensor, "tokens d_out"]:
        """The update of each token: each pair alone, whatever the path."""
        routing = routing.served()
        order = torch.argsort(routing.expert, stable=True)
        counts = routing.counts.tolist()
        token, weight = routing.token[order][counts[0] :], routing.weight[order][counts[0] :, None].to(x.dtype)
        parts = zip(x[token].split(counts[1:]), self.updates, strict=True)
        y = torch.cat([nn.functional.linear(rows, layer.weight.to(rows.dtype)) for rows, layer in parts]) * weight
        return y.new_zeros(len(x), y.shape[1]).index_add(0, token, y)

    def _stacked(self) -> Float[Tensor, "experts d_out d_in"]:
        first = self.updates[0].weight
        return torch.stack([torch.zeros_like(first), *(layer.weight for layer in self.updates)])


class RoutedMatrix(RoutedLinear):
    """The one-matrix case: y = sum_e p_e (W x + D_e x), the frozen layer inside every expert."""

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        call, tokens = self.begin(x), plain(x).reshape(-1, x.shape[-1])
        routing = self.router(tokens, call.context)
        self.tell(call, routing, self.router.coefficients)
        total = routing.weight.new_zeros(len(tokens)).index_add(0, routing.token, routing.weight)
        y = self.base(tokens) * total.to(tokens.dtype)[:, None] + self.experts(self.dropout(tokens), routing)
        return call.carry(y.view(*x.shape[:-1], -1))


class FlexMoRE(Adapter):
    """Whole blocks beside the public one; the defaults are those of an owner of a domain, who trains one full expert.

    Trained: the matrices of E - 1 experts, full or r (I + O) each, and (E - 1) D of each router, with the handicap
    (E - 1) more. Nothing is told.

    Args:
        experts: E, with the public one; at least 2.
        rank: of the experts beside the public one, a number for all or one for each; 0 for full. What is trained at a
            rank is a LoRA from the start, not a cut: that is what `merge_experts` does.
        top_k: K; default 2, or for `merge_experts` all.
        renormalize: divide the K weights by their sum.
        handicap: see `FlexRouter`.
        z: coefficient of the router's z-loss.
        tune: "all", or after a merge "router".
    """

    slug = "flexmore"

    def __init__(
        self,
        experts: int = 2,
        rank: int | Sequence[int] = 0,
        top_k: int = 2,
        renormalize: bool = False,
        handicap: bool = True,
        z: float = 0.001,
        tune: str = "all",
    ):
        if experts < 2:
            raise InputError(f"experts is {experts} but must be at least 2: the public one and another")
        self.experts, self.top_k, self.renormalize, self.handicap = experts, top_k, renormalize, handicap
        self.ranks = [rank] * (experts - 1) if isinstance(rank, int) else list(rank)
        if len(self.ranks) != experts - 1:
            raise InputError(f"rank has {len(self.ranks)} entries but must have one for each of {experts - 1} experts")
        if tune not in TUNE:
            raise unknown("tune", tune, TUNE)
        self.tune, self.coefficients = tune, {"z": z} if z else None

    def linear(self, layer: nn.Linear, name: str) -> RoutedMatrix:
        return RoutedMatrix(layer, self._router(layer.in_features), self._bank(layer))

    def feed_forward(self, block: FeedForward, name: str) -> RoutedFeedForward:
        banks = {key: self._bank(layer) for key, layer in block.linears.items()}
        return RoutedFeedForward(block, self._router(block.d_model), banks)

    def finish(self, adapted: Adapted) -> None:
        for layer in adapted.layers.values():
            for p in layer.experts.parameters():
                p.requires_grad_(self.tune == "all")

    def _router(self, width: int) -> FlexRouter:
        options = {"renormalize": self.renormalize, "coefficients": self.coefficients}
        return FlexRouter(width, self.experts, self.top_k, handicap=self.handicap, **options)

    def _bank(self, layer: nn.Linear) -> LowRankExperts:
        """The experts of one matrix: lower ranks, and the public expert, are padded with zeros that stay zero."""
        d_in, d_out = layer.in_features, layer.out_features
        check_ranks(self.ranks, (d_out, d_in))
        if not any(self.ranks):
            return FullExperts(self.experts, d_in, d_out)
        widths = [0, *(rank or min(d_in, d_out) for rank in self.ranks)]
        bank = LowRankExperts(self.experts, d_in, d_out, max(widths))
        with torch.no_grad():
            for e, width in enumerate(widths):
                bank.a[e, width:] = 0
        return bank


@dataclass(frozen=True, eq=False)
class Expert:
    """What the owner of a domain hands over: one expert of an adaptation, without the text it has seen.

    Attributes:
        updates: layer -> matrix -> (O, I) W_e - W.
        rows: layer -> (D,) its row of the router.
        public: layer -> (D,) the public expert's row.
        targets: the patterns that chose the layers.
        digest: of the public weights in these layers.
    """

    updates: dict[str, dict[str, Tensor]]
    rows: dict[str, Tensor]
    public: dict[str, Tensor]
    targets: tuple[str, ...]
    digest: str

    @cached_property
    def factors(self) -> dict[str, dict[str, tuple[Tensor, Tensor, Tensor]]]:
        """U, S, V^T of every update, computed once for all ranks."""
        return {
            layer: {key: torch.linalg.svd(update.double(), full_matrices=False) for key, update in updates.items()}
            for layer, updates in self.updates.items()
        }

    def cut(self, layer: str, matrix: str, rank: int) -> tuple[Tensor, Tensor]:
        """(A (r, I), B (O, r)) of one matrix, the nearest of that rank; 0 is the full rank."""
        u, s, v = self.factors[layer][matrix]
        update = self.updates[layer][matrix]
        check_ranks([rank], tuple(update.shape))
        root = s[: rank or len(s)].sqrt()
        return (root[:, None] * v[: len(root)]).to(update.dtype), (u[:, : len(root)] * root).to(update.dtype)

    def energy(self, rank: int) -> float:
        """The share of the squared norm of all updates that a cut to `rank` keeps."""
        spectra = [s.square() for factors in self.factors.values() for _, s, _ in factors.values()]
        return float(sum(s[:rank].sum() for s in spectra) / sum(s.sum() for s in spectra))


def take_expert(adapted: Adapted, expert: int = 1) -> Expert:
    """One expert beside the public one, numbered from 1."""
    check_flexmore(adapted)
    if not 1 <= expert < adapted.adapter.experts:
        raise InputError(f"expert is {expert} but must be from 1 to {adapted.adapter.experts - 1}")
    routers = {name: layer.router for name, layer in adapted.layers.items()}
    updates = {
        name: {key: bank.delta(expert).detach().clone() for key, bank in _banks(layer).items()}
        for name, layer in adapted.layers.items()
    }
    rows = {name: router.rows[expert - 1].detach().clone() for name, router in routers.items()}
    public = {name: router.public.clone() for name, router in routers.items()}
    return Expert(updates, rows, public, adapted.targets, base_digest(adapted.layers))


def merge_experts(
    model: nn.Module,
    experts: Sequence[Expert],
    rank: int | Sequence[int] = 0,
    top_k: int | None = None,
    renormalize: bool = False,
    tune: str = "all",
) -> Adapted:
    """One mixture of the public model and the experts of several owners, each cut to its rank.

    Args:
        model: the public model, changed in place.
        rank: a number for all or one for each expert; 0 for full.
        top_k: default all.
        tune: what can be trained afterwards.

    Raises:
        InputError: the experts do not belong to each other or to this model, which is unchanged then.
    """
    if not experts:
        raise InputError("experts is empty but must hold at least one")
    first = experts[0]
    for e, expert in enumerate(experts):
        same = expert.digest == first.digest and expert.public.keys() == first.public.keys()
        if not same or not all(torch.equal(row, first.public[name]) for name, row in expert.public.items()):
            raise InputError(f"experts[{e}] has other layers, public weights or public rows than experts[0]")
    total = len(experts) + 1
    options = {"rank": rank, "top_k": total if top_k is None else top_k, "renormalize": renormalize, "tune": tune}
    adapted = adapt(model, "flexmore", first.targets, experts=total, handicap=False, z=0.0, **options)
    if base_digest(adapted.layers) != first.digest or adapted.layers.keys() != first.updates.keys():
        adapted.remove()
        raise InputError("experts were made on other layers or other public weights than this model's")
    ranks = adapted.adapter.ranks
    with torch.no_grad():
        for name, layer in adapted.layers.items():
            layer.router.public.copy_(first.public[name])
            for e, expert in enumerate(experts):
                layer.router.rows[e] = expert.rows[name]
            for key, bank in _banks(layer).items():
                if isinstance(bank, FullExperts):
                    for update, expert in zip(bank.updates, experts, strict=True):
                        update.weight.copy_(expert.updates[name][key])
                    continue
                bank.a.zero_(), bank.b.zero_()
                for e, (expert, r) in enumerate(zip(experts, ranks, strict=True), start=1):
                    a, b = expert.cut(name, key, r)
                    bank.a[e, : len(a)], bank.b[e, :, : len(a)] = a, b
    return adapted


@torch.no_grad()
def domain_rows(adapted: Adapted, run: Callable[[nn.Module], object]) -> dict[str, Tensor]:
    """The mean of what each layer's router is given while `run(model)` shows the public model text of a domain.

    Standardised: mean 0 and length 1 over the D entries, so that a row says a direction.

    Raises:
        InputError: the adaptation does not compute the public model any more.
    """
    check_flexmore(adapted)
    banks = [bank for layer in adapted.layers.values() for bank in _banks(layer).values()]
    moved = any(bank.delta(e).any() for bank in banks for e in range(bank.n_experts))
    if moved or not (adapted.adapter.top_k == adapted.adapter.experts or adapted.adapter.renormalize):
        raise InputError("adapted is trained, or its weights do not sum to 1, but must still be the public model")
    sums: dict[str, Tensor] = {}

    def add(name: str) -> Callable:
        def hook(layer: RoutedLayer, inputs: tuple) -> None:
            sums[name] = sums.get(name, 0.0) + inputs[0].flatten(0, -2).double().sum(0)

        return hook

    hooks = [layer.register_forward_pre_hook(add(name)) for name, layer in adapted.layers.items()]
    try:
        run(adapted.model)
    finally:
        for hook in hooks:
            hook.remove()
    centred = {name: total - total.mean() for name, total in sums.items()}
    return {name: (row / row.norm().clamp(min=1e-12)).float() for name, row in centred.items()}


def set_rows(adapted: Adapted, public: Mapping[str, Tensor], *rows: Mapping[str, Tensor]) -> None:
    """Start the routers from rows such as those of `domain_rows`, one for each expert."""
    check_flexmore(adapted)
    if len(rows) != adapted.adapter.experts - 1:
        raise InputError(f"rows has {len(rows)} entries but must have one for each of {adapted.adapter.experts - 1}")
    with torch.no_grad():
        for name, layer in adapted.layers.items():
            layer.router.public.copy_(public[name])
            for e, row in enumerate(rows):
                layer.router.rows[e] = row[name]


def check_flexmore(adapted: Adapted) -> None:
    """Raise `InputError` unless it is an adaptation with this system."""
    if not isinstance(adapted.adapter, FlexMoRE):
        raise InputError(f"adapted is an adaptation with {adapted.adapter.slug!r} but must be one with 'flexmore'")


def check_ranks(ranks: Sequence[int], shape: tuple[int, int]) -> None:
    """Raise `InputError` unless every rank is 0, for full, or fits a matrix of this shape."""
    for rank in ranks:
        if not 0 <= rank <= min(shape):
            allowed = f"0, for a full expert, or between 1 and the layer's smaller width, {min(shape)}"
            raise InputError(f"rank is {rank} but must be {allowed}")


def rank_for_energy(singular: Float[Tensor, " values"], share: float) -> int:
    """The smallest rank that keeps `share` of the squared norm of an update, from its singular values in order."""
    if not 0 < share <= 1:
        raise InputError(f"share is {share} but must be above 0 and at most 1")
    kept = singular.double().square().cumsum(0)
    return int((kept < share * kept[-1]).sum()) + 1


def count_parameters(shapes: Sequence[tuple[int, int]], ranks: Sequence[int]) -> int:
    """Of experts beside the public one, with matrices of these shapes (O, I): r (I + O) of each, or I O for rank 0."""
    return sum(rank * (o + i) if rank else o * i for rank in ranks for o, i in shapes)


def break_even_rank(d_model: int, d_hidden: int) -> float:
    """The rank at which an expert of low rank has as many parameters as a full one: d f / (d + f)."""
    return d_model * d_hidden / (d_model + d_hidden)


def _banks(layer: RoutedLayer) -> dict[str, LowRankExperts]:
    """The banks of a layer by the names of its matrices; "" for a linear layer by itself."""
    return dict(layer.experts.items()) if isinstance(layer.experts, nn.ModuleDict) else {"": layer.experts}


def _identity(like: Float[Tensor, "experts d_out d_in"], width: int) -> Float[Tensor, "experts width width"]:
    return torch.eye(width, dtype=like.dtype, device=like.device).expand(len(like), -1, -1)


ADAPTER = FlexMoRE
