"""Measures of one router's decisions: load, its null, drops, confidence, information and change over time.

N tokens, E experts, K active per token; n_i is the number of pairs of expert i before any capacity limit, f_i its share
n_i / sum(n), P_i its mean probability. State the window with every value (one batch, or a whole evaluation): a batch
has a noise floor, which is why the null stands beside the measure. Measures are per layer: a mean of f over layers
hides imbalance.
"""

import math
from dataclasses import dataclass, fields

import torch
from jaxtyping import Bool, Float, Float64, Int, Int64, Num
from torch import Tensor

from workbench.errors import InputError
from workbench.lib.measures.information import Information, entropy, mutual_information


@dataclass(frozen=True)
class LoadStats:
    """How evenly the pairs fall on the experts; NaN throughout where there are none.

    They are not interchangeable: `cv` sees the whole distribution, `max_vio` the straggler that sets the step time,
    `min_ratio` and `dead` the waste; `entropy` is flat near balance.

    Attributes:
        cv: std(n) / mean(n), population std; 0 .. sqrt(E/K - 1) (its square is the loss of Shazeer et al. 2017).
        max_vio: max(n) / mean(n) - 1; 0 .. E/K - 1 (Wang et al. 2024, 2408.15664). The largest relative deviation.
        min_ratio: min(n) / mean(n); 0 .. 1. The smallest relative deviation is `min_deviation`.
        dead: number of experts without a pair.
        starved: number of experts with less than a tenth of their fair share, the dead included.
        entropy: H(f) / ln E; ln K / ln E .. 1; NaN for a single expert.
        effective_experts: exp(H(f)); K .. E.
        gini: sum_ij |f_i - f_j| / (2 E); 0 .. (E - 1)/E (Gini 1912).
        jain: 1 / (E sum f^2) = 1 / (1 + cv^2); 1/E .. 1 (Jain et al. 1984).
        null_cv: sqrt((E - K) / (K N)), root mean square of cv under uniform random routing.
        drop_rate: share of pairs above the capacity; None where no capacity was given.
    """

    cv: Float64[Tensor, "*batch"]
    max_vio: Float64[Tensor, "*batch"]
    min_ratio: Float64[Tensor, "*batch"]
    dead: Float64[Tensor, "*batch"]
    starved: Float64[Tensor, "*batch"]
    entropy: Float64[Tensor, "*batch"]
    effective_experts: Float64[Tensor, "*batch"]
    gini: Float64[Tensor, "*batch"]
    jain: Float64[Tensor, "*batch"]
    null_cv: Float64[Tensor, "*batch"]
    drop_rate: Float64[Tensor, "*batch"] | None = None

    @property
    def min_deviation(self) -> Float64[Tensor, "*batch"]:
        """min(n) / mean(n) - 1; -1 .. 0."""
        return self.min_ratio - 1


def load_stats(
    counts: Num[Tensor, "*batch experts"],
    top_k: float = 1,
    n_tokens: Num[Tensor, "*#batch"] | int | None = None,
    capacity: float | None = None,
) -> LoadStats:
    """Load statistics of pairs per expert, counted before capacity dropping, without padding.

    Args:
        counts: n, non-negative.
        top_k: K, or its mean where the number of experts per token varies; used by the null only.
        n_tokens: N; sum(n) / K where not given.
        capacity: pairs each expert can serve, to add the drop rate sum_i max(0, n_i - capacity) / sum(n).

    Raises:
        InputError: `top_k` outside (0, E], a negative count or capacity.
    """
    counts = counts.double()
    n_experts = counts.shape[-1]
    _check_top_k(top_k, n_experts)
    if (counts < 0).any():
        raise InputError(f"counts holds {float(counts.min())} but must not be negative")
    if capacity is not None and not capacity >= 0:
        raise InputError(f"capacity is {capacity} but must be at least 0 pairs per expert")
    total = counts.sum(-1)
    ratio = counts * n_experts / total.unsqueeze(-1)  # n_i / mean(n); NaN where there are no pairs
    cv_squared = (ratio - 1).square().mean(-1)
    h = entropy(counts)
    rank = torch.arange(1, n_experts + 1, dtype=torch.float64, device=counts.device)
    gini = 2 * (rank * ratio.sort(-1).values).sum(-1) / n_experts**2 - (n_experts + 1) / n_experts
    tokens = total / top_k if n_tokens is None else torch.as_tensor(n_tokens, device=counts.device).double()
    over = None if capacity is None else (counts - capacity).clamp(min=0).sum(-1) / total
    return LoadStats(
        cv=cv_squared.sqrt(),
        max_vio=ratio.amax(-1) - 1,
        min_ratio=ratio.amin(-1),
        dead=_where_any((counts == 0).sum(-1), total),
        starved=_where_any((ratio < 0.1).sum(-1), total),
        entropy=h / _max_entropy(n_experts),
        effective_experts=h.exp(),
        gini=gini,
        jain=1 / (1 + cv_squared),
        null_cv=_where_any(((n_experts - top_k) / (top_k * tokens)).sqrt(), total),
        drop_rate=over,
    )


def uniform_counts(
    n_tokens: int, n_experts: int, top_k: float = 1, samples: int = 1000, generator: torch.Generator | None = None
) -> Float64[Tensor, "samples experts"]:
    """Pairs per expert when every token picks K distinct experts uniformly at random: exact draws, at a cost free of N.

    The experts are filled in turn: of the tokens that still have k picks for the e experts left, Binomial(., k/e) pick
    the next one. A fractional `top_k` is a mean: tokens have its floor or its ceiling.
    """
    _check_top_k(top_k, n_experts)
    if n_tokens < 1 or samples < 1:
        raise InputError(f"n_tokens is {n_tokens} and samples is {samples} but both must be at least 1")
    floor = int(top_k)
    more = round((top_k - floor) * n_tokens)
    left = torch.zeros(samples, floor + 2, dtype=torch.float64)  # left[:, k]: tokens with k picks left
    left[:, floor] = n_tokens - more
    left[:, floor + 1] = more
    counts = torch.zeros(samples, n_experts, dtype=torch.float64)
    for expert in range(n_experts):
        for k in range(1, floor + 2):  # upwards: those moved down to k - 1 have had their turn for this expert
            chance = torch.full((samples,), min(k / (n_experts - expert), 1.0), dtype=torch.float64)
            picked = torch.binomial(left[:, k].clone(), chance, generator=generator)
            left[:, k] -= picked
            left[:, k - 1] += picked
            counts[:, expert] += picked
    return counts


def null_load_stats(
    n_tokens: int,
    n_experts: int,
    top_k: float = 1,
    quantiles: tuple[float, ...] = (0.05, 0.5, 0.95),
    samples: int = 1000,
    generator: torch.Generator | None = None,
) -> LoadStats:
    """Quantiles (leading dimension) of every load measure under uniform random routing: the band of the null."""
    counts = uniform_counts(n_tokens, n_experts, top_k, samples, generator)
    stats = load_stats(counts, top_k, n_tokens)
    at = counts.new_tensor(quantiles)
    values = {f.name: getattr(stats, f.name) for f in fields(stats)}
    return LoadStats(**{name: value if value is None else value.quantile(at) for name, value in values.items()})


def null_max_vio(
    n_tokens: int,
    n_experts: int,
    top_k: float = 1,
    quantiles: tuple[float, ...] = (0.05, 0.5, 0.95),
    samples: int = 1000,
    generator: torch.Generator | None = None,
) -> Float64[Tensor, " quantiles"]:
    """Quantiles of MaxVio under uniform random routing of N tokens: below them a batch is not balanced by skill."""
    return null_load_stats(n_tokens, n_experts, top_k, quantiles, samples, generator).max_vio


def load_balance_value(
    load: Num[Tensor, "*batch experts"], probability: Num[Tensor, "*batch experts"]
) -> Float64[Tensor, "*batch"]:
    """E * sum_i f_i P_i, the value of the Switch balance loss (Fedus et al. 2021); both inputs on any scale.

    1 at balance, but also 1 whenever P is uniform, whatever the load, so it proves nothing alone: show it with `cv` and
    `probability_load_gap` (Sigma-MoE-Tiny, 2512.16248). For its top-1 form see `workbench.lib.core.balance.top1_lbl`.
    """
    return load.shape[-1] * (_shares(load) * _shares(probability)).sum(-1)


def total_variation(
    share: Num[Tensor, "*batch n"], reference: Num[Tensor, "*#batch n"] | None = None
) -> Float64[Tensor, "*batch"]:
    """0.5 * sum_i |a_i - b_i| of two distributions on any scale; 0 .. 1. From uniform, the default: 0 .. 1 - 1/n."""
    other = 1 / share.shape[-1] if reference is None else _shares(reference)
    return 0.5 * (_shares(share) - other).abs().sum(-1)


def probability_load_gap(
    load: Num[Tensor, "*batch experts"], probability: Num[Tensor, "*batch experts"]
) -> Float64[Tensor, "*batch"]:
    """TV(f, uniform) - TV(P, uniform): about 0 if the load follows P, above 0 if even P hides an uneven load."""
    return total_variation(load) - total_variation(probability)


def drop_rates(
    kept: Bool[Tensor, " pairs"], token: Int[Tensor, " pairs"]
) -> tuple[Float64[Tensor, ""], Float64[Tensor, ""]]:
    """(share of pairs dropped, share of tokens with ALL their pairs dropped) at a capacity limit; 0 .. 1.

    The two differ for K > 1. Tokens without any pair are not counted; NaN if there are none.
    """
    pairs = torch.bincount(token)
    lost = torch.bincount(token[~kept], minlength=pairs.numel())
    used = pairs > 0
    return (~kept).double().mean(), ((lost == pairs) & used).sum().double() / used.sum()


def router_confidence(
    probs: Float[Tensor, "*batch tokens experts"], mask: Bool[Tensor, "*batch tokens"] | None = None
) -> Float64[Tensor, "*batch"]:
    """mean_t max_i p_ti over the tokens where `mask` holds; 1/E .. 1."""
    return _token_mean(_shares(probs).amax(-1), mask)


def token_entropy(
    probs: Float[Tensor, "*batch tokens experts"], mask: Bool[Tensor, "*batch tokens"] | None = None
) -> Float64[Tensor, "*batch"]:
    """mean_t H(p_t) / ln E over the tokens where `mask` holds; 0 (decided) .. 1 (undecided); NaN for one expert."""
    return _token_mean(entropy(probs), mask) / _max_entropy(probs.shape[-1])


def effective_support(
    probs: Float[Tensor, "*batch tokens experts"], mask: Bool[Tensor, "*batch tokens"] | None = None
) -> Float64[Tensor, "*batch"]:
    """mean_t exp(H(p_t)): over how many experts a token spreads its probability; 1 .. E."""
    return _token_mean(entropy(probs).exp(), mask)


def effective_support_size(weights: Float[Tensor, "*batch experts"]) -> Float64[Tensor, "*batch"]:
    """(sum w)^2 / sum w^2 of the non-negative weights of a token, over the experts or over its chosen ones alone.

    1 if one weight is all, K if K are equal; NaN where all are zero. ReMix (2603.10160) counts by it how many of the
    chosen LoRAs act. Of probabilities it is another number than `effective_support`.
    """
    weights = weights.double()
    return weights.sum(-1).square() / weights.square().sum(-1)


def counts_by_class(
    expert: Int[Tensor, " pairs"], label: Int[Tensor, " pairs"], n_classes: int, n_experts: int
) -> Int64[Tensor, "classes experts"]:
    """Pairs of each class (token id, domain, task) on each expert, from the expert and the class of every pair."""
    flat = torch.bincount(label.long() * n_experts + expert.long(), minlength=n_classes * n_experts)
    if flat.numel() > n_classes * n_experts:
        raise InputError(f"label holds {int(label.max())} but must be below n_classes = {n_classes}")
    return flat.view(n_classes, n_experts)


def routing_information(
    counts_by_class: Num[Tensor, "*batch classes experts"], top_k: float = 1, null: str = "exact"
) -> Information:
    """I(expert; class) in nats from pairs, with its value under shuffled classes; see `mutual_information`.

    0 .. min(H(class), H(f)); `normalised` divides by H(class). For a variable number of experts per token give the mean
    as `top_k` and null="first_order".
    """
    return mutual_information(counts_by_class, row_k=1, column_k=top_k, null=null)


def saturation(now: Int[Tensor, "*batch tokens k"], then: Int[Tensor, "..."]) -> Float64[Tensor, "*batch"]:
    """Mean over tokens of |A and B| / K for the expert sets of two checkpoints on the same probe tokens; 0 .. 1.

    The router saturation of OLMoE (Muennighoff et al. 2024, 2409.02060); K/E for unrelated uniform routers.
    """
    if now.shape != then.shape:
        raise InputError(f"now has shape {tuple(now.shape)} but must have that of then, {tuple(then.shape)}")
    shared = (now.unsqueeze(-1) == then.unsqueeze(-2)).any(-1)
    return shared.double().mean((-2, -1))


def churn(now: Int[Tensor, "*batch tokens k"], then: Int[Tensor, "..."]) -> Float64[Tensor, "*batch"]:
    """1 - saturation: the share of a token's experts that have been replaced; 0 .. 1, null 1 - K/E."""
    return 1 - saturation(now, then)


def _check_top_k(top_k: float, n_experts: int) -> None:
    if not 0 < top_k <= n_experts:
        raise InputError(f"top_k is {top_k} but must be above 0 and at most n_experts = {n_experts}")


def _max_entropy(n_experts: int) -> float:
    return math.log(n_experts) if n_experts > 1 else math.nan


def _shares(weights: Num[Tensor, "*batch n"]) -> Float64[Tensor, "*batch n"]:
    weights = weights.double()
    return weights / weights.sum(-1, keepdim=True)


def _where_any(value: Tensor, total: Tensor) -> Float64[Tensor, "*batch"]:
    """NaN where nothing was counted: an empty window says nothing about an expert."""
    return value.double().where(total > 0, torch.nan)


def _token_mean(values: Float64[Tensor, "*batch tokens"], mask: Tensor | None) -> Float64[Tensor, "*batch"]:
    if mask is None:
        return values.mean(-1)
    return values.where(mask, 0.0).sum(-1) / mask.sum(-1)
