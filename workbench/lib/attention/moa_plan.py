"""Which span for which head: the rules, what a head loses by each, and the integer programme that chooses (see `moa`).

Tensor letters: L layers, H heads, N tokens of a profiled length, nb = N / block blocks of it, C rules.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array, vstack
from torch import Tensor

from workbench.errors import InputError

INTERVALS = 4
"""Into so many parts the range of each objective is cut for the Pareto set."""
TIE = 1e-4
"""Weight of the other objectives, in their ranges, beside the one that is minimised: it only decides among equals."""


@dataclass(frozen=True)
class SpanRule:
    """A head's span as a function of the length: alpha + beta N tokens, and the first `sink` tokens always."""

    alpha: float
    beta: float
    sink: int = 64

    def __post_init__(self):
        if not 0 <= self.beta <= 1:
            raise InputError(f"beta is {self.beta} but must be between 0 and 1")
        if self.sink < 0:
            raise InputError(f"sink is {self.sink} but must be at least 0")

    def span(self, length: int) -> int:
        """Tokens back from the newest one, itself counted; at least 1."""
        return max(int(self.alpha + self.beta * length), 1)

    def blocks(self, length: int, block: int) -> int:
        """Blocks of keys that a block of queries keeps back from the diagonal, its own counted; at least 1."""
        return max(int((self.alpha + self.beta * length) // block), 1)

    def layout(self, length: int, block: int) -> Bool[Tensor, "nb nb"]:
        """The blocks that are kept at a length: a band below the diagonal, and the columns that hold the sink.

        For a span that is a multiple of the block, `MoA` keeps these and, in the oldest block of the band, a triangle
        more: its band is one of tokens.
        """
        count = block_count(length, block)
        row, column = torch.arange(count)[:, None], torch.arange(count)
        return (column <= row) & ((row - column < self.blocks(length, block)) | (column * block < self.sink))

    def kept(self, length: int) -> int:
        """Keys that the last query sees and the cache keeps, min(N, sink + span): the cost of the rule.

        Where span and sink are whole blocks this is the largest number of kept blocks in a row of the layout.
        """
        return min(length, self.sink + self.span(length))


@dataclass(frozen=True)
class Plan:
    """A rule for every head.

    Attributes:
        rules: (L, H).
        losses: profiled length -> predicted loss, the influence of all that is left out.
        density: length -> kept keys as a fraction of N, the mean over heads.
    """

    rules: tuple[tuple[SpanRule, ...], ...]
    losses: dict[int, float]
    density: dict[int, float]

    def spans(self, length: int) -> list[list[int]]:
        """(L, H) spans at a length."""
        return [[rule.span(length) for rule in layer] for layer in self.rules]

    def to_dict(self) -> dict:
        """Plain values, for JSON."""
        return asdict(self)

    @classmethod
    def of(
        cls, rules: Sequence[Sequence[SpanRule]], importance: Mapping[int, Tensor], block: int, *more: int
    ) -> "Plan":
        """A plan of given rules, with its losses at the profiled lengths and its density there and at `more`."""
        rules = tuple(tuple(layer) for layer in rules)
        losses = {}
        for length, values in importance.items():
            count = block_count(length, block)
            if tuple(values.shape) != (len(rules), len(rules[0]), count, count):
                raise InputError(
                    f"importance[{length}] has shape {tuple(values.shape)} but must be "
                    f"{(len(rules), len(rules[0]), count, count)}, (layers, heads, blocks, blocks)"
                )
            kept = torch.stack([torch.stack([rule.layout(length, block) for rule in layer]) for layer in rules])
            losses[length] = float(values.masked_fill(kept.to(values.device), 0).sum())
        flat = [rule for layer in rules for rule in layer]
        density = {n: sum(r.kept(n) for r in flat) / len(flat) / n for n in (*importance, *more)}
        return cls(rules, losses, density)


def span_rules(
    lengths: Sequence[int], *, alpha_step: int, betas: Sequence[float] = (), sink: int = 64
) -> list[SpanRule]:
    """The rules to choose from: alpha from -min(lengths) to max(lengths) in steps, beta in nine steps from 0 to 1.

    Kept are those with alpha + beta N at most N at the largest length and above 0 at the smallest; of rules with the
    same cost at every length, one. `betas` replaces the nine, `(0,)` for spans that do not grow.
    """
    if alpha_step < 1:
        raise InputError(f"alpha_step is {alpha_step} but must be at least 1")
    low, high, rules = min(lengths), max(lengths), {}
    for beta in betas or [i / 8 for i in range(9)]:
        for alpha in range(-low, high + 1, alpha_step):
            if alpha + beta * high <= high and alpha + beta * low > 0:
                rule = SpanRule(alpha, beta, sink)
                rules.setdefault(tuple(rule.kept(n) for n in lengths), rule)
    return [rules[cost] for cost in sorted(rules)]


def solve_spans(
    importance: Mapping[int, Float[Tensor, "layers heads nb nb"]],
    rules: Sequence[SpanRule],
    density: Mapping[int, float],
    block: int,
    max_rules_per_layer: int = 2,
    *,
    least: float = 0.9,
    uniform: bool = False,
    gap: float = 1e-6,
) -> list[Plan]:
    """The Pareto set of plans within a budget of kept keys, by mixed integer programming (HiGHS).

    One rule a head; at every length of `density` the kept keys lie between `least` and 1 times density * N, as a mean
    over heads. The objectives are the predicted losses at the profiled lengths, by the epsilon-constraint method: each
    is minimised in turn, with the others held below the ends of the quarters of their ranges. (The public code also
    holds them above the starts of the quarters; that only shuts out plans that are better.)

    Args:
        importance: profiled length -> influence summed in blocks, see `attention_influence`.
        rules: to choose from, see `span_rules`.
        density: length -> share of the keys that may be kept; may name lengths beyond the profiled ones.
        block: tokens a block.
        max_rules_per_layer: different rules in a layer, for the sake of the kernels.
        least: lower bound, as a part of the upper one.
        uniform: one rule for the whole model.
        gap: each programme stops once its objective is proved this near the best, as a fraction; larger is faster.

    Returns:
        Plans of which none is at least as good as another at all lengths, best first at the largest profiled length.

    Raises:
        InputError: no choice of rules meets the densities, or the arguments do not fit each other.
    """
    _check(importance, rules, density, block, max_rules_per_layer, least)
    lengths = list(importance)
    n_layers, n_heads = importance[lengths[0]].shape[:2]
    loss = np.stack([span_losses(importance[n], rules, n, block).flatten(0, 1).numpy() for n in lengths])
    programme = _Programme(loss, rules, density, block, n_layers, max_rules_per_layer, least, uniform, gap)
    optima = [programme.solve(i) for i in range(len(lengths))]
    if any(choice is None for choice in optima):
        bounds = ", ".join(f"{least * rho:.3g} to {rho:.3g} at {n}" for n, rho in density.items())
        costs = "; ".join(
            f"{min(r.kept(n) for r in rules) / n:.3g} to {max(r.kept(n) for r in rules) / n:.3g} at {n}"
            for n in density
        )
        raise InputError(f"density asks for {bounds}, which no choice of the rules gives; alone they give {costs}")
    values = np.stack([programme.values(choice) for choice in optima])
    found = {tuple(choice): programme.values(choice) for choice in optima}
    ends = np.linspace(values.min(0), values.max(0), INTERVALS + 1)[1:]
    for primary in range(len(lengths)):
        others = [i for i in range(len(lengths)) if i != primary]
        for cell in itertools.product(range(INTERVALS), repeat=len(others)):
            choice = programme.solve(primary, {i: ends[c, i] for i, c in zip(others, cell, strict=True)})
            if choice is not None:
                found[tuple(choice)] = programme.values(choice)
    best = sorted((c for c in found if not _dominated(found[c], found.values())), key=lambda c: found[c][-1])
    more = [n for n in density if n not in importance]
    return [
        Plan.of([[rules[c] for c in row] for row in np.reshape(choice, (n_layers, n_heads))], importance, block, *more)
        for choice in best
    ]


def span_losses(
    importance: Float[Tensor, "layers heads nb nb"], rules: Sequence[SpanRule], length: int, block: int
) -> Float[Tensor, "layers heads rules"]:
    """What each head loses by each rule: the importance outside its layout, float64."""
    left_out = torch.stack([~rule.layout(length, block).tril() for rule in rules]).double()
    return torch.einsum("lhij,cij->lhc", importance.detach().cpu().double(), left_out)


def per_key_head(importance: Float[Tensor, "layers heads nb nb"], n_kv_heads: int) -> Float[Tensor, "layers kv nb nb"]:
    """Of query heads that share a key head, the largest: what the shared cache has to keep for one of them."""
    heads = importance.shape[1]
    if n_kv_heads < 1 or heads % n_kv_heads:
        raise InputError(f"n_kv_heads is {n_kv_heads} but must divide the {heads} heads")
    return importance.unflatten(1, (n_kv_heads, -1)).amax(2)


def block_count(length: int, block: int) -> int:
    """Blocks of a length, which they must fill."""
    if block < 1 or length < block or length % block:
        raise InputError(f"length is {length} but must be a multiple of block = {block}, at least one block")
    return length // block


class _Programme:
    """x[h, c] = 1 where head h takes rule c, then y[g, c] = 1 where a head of group g does (a layer, or the model)."""

    def __init__(self, loss, rules, density, block, n_layers, max_rules, least, uniform, gap):
        self.gap, self.loss, (heads, count) = gap, loss, loss.shape[1:]  # (objectives, heads, rules)
        self.heads, self.count = heads, count
        groups, limit = (1, 1) if uniform else (n_layers, max_rules)
        self.size, picks = heads * count + groups * count, heads * count
        head, rule = np.divmod(np.arange(picks), count)
        used = picks + head * groups // heads * count + rule
        one = np.ones(picks)
        each = csr_array((one, (head, np.arange(picks))), shape=(heads, self.size))
        linked = csr_array((np.r_[one, -one], (np.r_[:picks, :picks], np.r_[:picks, used])), shape=(picks, self.size))
        limits = csr_array(
            (np.ones(groups * count), (np.arange(groups * count) // count, np.arange(picks, self.size))),
            shape=(groups, self.size),
        )
        self.constraints = [
            LinearConstraint(each, 1, 1),
            LinearConstraint(linked, -np.inf, 0),
            LinearConstraint(limits, -np.inf, limit),
        ]
        for length, rho in density.items():
            cost = np.array([r.kept(length) for r in rules], dtype=float) / length / heads
            row = csr_array(self._row(np.tile(cost, heads)))
            self.constraints.append(LinearConstraint(row, least * rho - 1e-9, rho + 1e-9))
        spread = loss.max(2).sum(1) - loss.min(2).sum(1)
        self.scale = np.where(spread > 0, spread, 1.0)  # the widest range each objective can have

    def _row(self, values):
        return np.r_[values, np.zeros(self.size - len(values))][None]

    def solve(self, primary: int, bounds: Mapping[int, float] | None = None) -> list[int] | None:
        """The rule of each head that minimises one objective with others at most at `bounds`; None if there is none."""
        weight = np.full(len(self.loss), TIE / max(len(self.loss) - 1, 1))
        weight[primary] = 1
        scaled = self.loss.reshape(len(self.loss), -1) / self.scale[:, None]
        constraints = list(self.constraints)
        if bounds:
            rows = vstack([csr_array(self._row(scaled[i])) for i in bounds])
            upper = np.array([bound / self.scale[i] for i, bound in bounds.items()])
            constraints.append(LinearConstraint(rows, -np.inf, upper + 1e-9))
        result = milp(
            self._row(weight @ scaled)[0],
            integrality=np.ones(self.size),
            bounds=Bounds(0, 1),
            constraints=constraints,
            options={"mip_rel_gap": self.gap},
        )
        if result.x is None:
            return None
        return result.x[: self.heads * self.count].reshape(self.heads, self.count).argmax(1).tolist()

    def values(self, choice: Sequence[int]) -> np.ndarray:
        return self.loss[:, np.arange(self.heads), list(choice)].sum(1)


def _dominated(values: np.ndarray, others) -> bool:
    return any((other <= values).all() and (other < values).any() for other in others)


def _check(importance, rules, density, block, max_rules_per_layer, least) -> None:
    if not importance or not rules or not density:
        raise InputError("importance, rules and density must each hold at least one entry")
    shapes = {tuple(values.shape[:2]) for values in importance.values()}
    if len(shapes) > 1:
        raise InputError(f"importance has (layers, heads) {sorted(shapes)} but must have the same at every length")
    for length, values in importance.items():
        count = block_count(length, block)
        if values.ndim != 4 or values.shape[2:] != (count, count):
            raise InputError(
                f"importance[{length}] has shape {tuple(values.shape)} but must be (layers, heads, {count}, {count})"
            )
        if not values.isfinite().all() or (values < 0).any():
            raise InputError(f"importance[{length}] must be finite and at least 0")
    for length, rho in density.items():
        if length < 1:
            raise InputError(f"density names the length {length} but lengths are at least 1")
        if not 0 < rho <= 1:
            raise InputError(f"density[{length}] is {rho} but must be above 0 and at most 1")
    if max_rules_per_layer < 1:
        raise InputError(f"max_rules_per_layer is {max_rules_per_layer} but must be at least 1")
    if not 0 <= least <= 1:
        raise InputError(f"least is {least} but must be between 0 and 1")
