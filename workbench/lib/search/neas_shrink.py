"""NEAS's second half: which operators are dropped, and which ensemble is taken.

Operators are scored by ensembles e drawn from the space, on one batch. With z standardisation over the operators of a
layer,

    potential  u(e) = -CE(mean_k logits_k, y)
    diversity  d_l(e) = mean over pairs of paths of 1 - cos(f_l(x; i), f_l(x; j)) + JS(p_i, p_j), mean over the batch
    S_l(o) = z(mean of u(e) where a path takes o at l) + lam z(mean of d_l(e) where one path takes o at l, another not)

f_l is the pooled output of layer l, p the softmax of the logits. The paper scores operators by potential and diversity;
this formula is ours, because its own was not to be had. lam = 0 is potential alone.
"""

import math
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from workbench.errors import InputError, unknown
from workbench.lib.core.cells.inverted_residual import recalibrate
from workbench.lib.core.modes import evaluating
from workbench.lib.core.observe import quiet
from workbench.lib.core.routing import Context
from workbench.lib.core.search.evolution import evolve
from workbench.lib.core.search.genomes import EnsembleGenome, Kept, PathSpace, sample_genome
from workbench.lib.core.train import Hook, State, step_seed
from workbench.lib.search.neas import KPathSupernet

MODES = ("diversity", "potential", "random", "none")
MUTATED = 0.1
TRIES = 20

Scores = dict[tuple[int, int], tuple[float, float, float]]
"""(layer, operator) -> (potential, diversity, score); NaN where no ensemble says anything, which is 0 in the score."""


@dataclass(frozen=True)
class Seen:
    """What one ensemble says: its genome, its potential, and the diversity at each layer."""

    genome: EnsembleGenome
    potential: float
    diversity: tuple[float, ...]


def path_diversity(features: Float[Tensor, "paths batch dim"], logits: Float[Tensor, "batch paths classes"]) -> float:
    """1 - cos of the features plus the Jensen-Shannon divergence of the answers, mean over pairs; exactly 0 if equal.

    The first is from 0 to 2 and the second from 0 to ln 2. Of a single path it is 0.
    """
    pairs = list(combinations(range(len(features)), 2))
    return sum(cosine_distance(*features[[i, j]]) + jensen_shannon(*logits[:, [i, j]].unbind(1)) for i, j in pairs) / (
        len(pairs) or 1
    )


def cosine_distance(a: Float[Tensor, "batch dim"], b: Float[Tensor, "batch dim"]) -> float:
    """1 - cos, from 0 to 2, mean over the rows; by the distance of unit vectors, so that equal ones have exactly 0."""
    a, b = (F.normalize(x.double(), dim=-1) for x in (a, b))
    return float((a - b).square().sum(-1).mean() / 2)


def jensen_shannon(a: Float[Tensor, "batch classes"], b: Float[Tensor, "batch classes"]) -> float:
    """Of the softmax of two sets of logits, in nats, mean over the rows."""
    p, q = (F.log_softmax(x.double(), -1) for x in (a, b))
    middle = torch.logaddexp(p, q) - math.log(2)
    both = sum((x.exp() * (x - middle)).sum(-1).mean() for x in (p, q)) / 2
    return 0.0 if torch.equal(p, q) else min(max(float(both), 0.0), math.log(2))


def rate(
    supernet: KPathSupernet, genome: EnsembleGenome, calibration: Tensor, inputs: Tensor, targets: Int64[Tensor, " b"]
) -> float:
    """Accuracy of an ensemble with the supernet's weights, the statistics of its norms those of `calibration`."""
    logits = answers(supernet, genome, calibration, inputs)
    return float((logits.mean(1).argmax(-1) == targets).double().mean())


def answers(
    supernet: KPathSupernet,
    genome: EnsembleGenome,
    calibration: Tensor,
    inputs: Tensor,
    features: list[Tensor] | None = None,
) -> Float[Tensor, "batch paths classes"]:
    """Logits of an ensemble of a supernet in evaluation mode, behind a recalibration; no observer sees the passes."""
    with quiet(supernet), torch.no_grad():
        recalibrate(supernet, calibration, Context(), genome)
        with evaluating(supernet):
            return supernet(inputs, Context(), genome, features)


def score_operators(
    supernet: KPathSupernet,
    calibration: Tensor,
    inputs: Tensor,
    targets: Int64[Tensor, " batch"],
    n: int = 32,
    lam: float = 1.0,
    generator: torch.Generator | None = None,
) -> Scores:
    """Score the kept operators of a supernet by n ensembles drawn from them; see the head of the file."""
    if n < 1:
        raise InputError(f"n is {n} but must be at least 1")
    seen = []
    for _ in range(n):
        genome, features = sample_genome(supernet.kept, supernet.k, generator, supernet.splits), []
        logits = answers(supernet, genome, calibration, inputs, features)
        potential = -float(F.cross_entropy(logits.mean(1), targets))
        seen.append(Seen(genome, potential, tuple(path_diversity(one, logits) for one in features)))
    return scores_of(seen, supernet.kept, lam)


def scores_of(seen: Sequence[Seen], kept: Kept, lam: float = 1.0) -> Scores:
    """The scores of operators by what ensembles said."""
    found: Scores = {}
    for layer, ops in enumerate(kept):
        potential, diversity = {}, {}
        for op in ops:
            used = [{path[layer] for path in one.genome.paths} for one in seen]
            potential[op] = _mean([one.potential for one, its in zip(seen, used, strict=True) if op in its])
            apart = [one.diversity[layer] for one, its in zip(seen, used, strict=True) if op in its and len(its) > 1]
            diversity[op] = _mean(apart)
        u, d = _standardised(potential), _standardised(diversity)
        found |= {(layer, op): (potential[op], diversity[op], u[op] + lam * d[op]) for op in ops}
    return found


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def _standardised(values: Mapping[int, float]) -> dict[int, float]:
    known = torch.tensor([value for value in values.values() if not math.isnan(value)], dtype=torch.float64)
    if len(known) < 2 or not (sd := float(known.std(correction=0))) > 0:
        return dict.fromkeys(values, 0.0)
    mean = float(known.mean())
    return {op: 0.0 if math.isnan(value) else (value - mean) / sd for op, value in values.items()}


def shrink(kept: Kept, scores: Mapping[tuple[int, int], float], n_drop: int = 1, floor: int = 2) -> Kept:
    """Without the `n_drop` operators of the lowest scores of each layer, of which `floor` stay in any case.

    Of equal scores the operator of the lower number goes.
    """
    if n_drop < 0 or floor < 1:
        raise InputError(f"n_drop is {n_drop} and floor {floor} but they must be at least 0 and 1")
    left = []
    for layer, ops in enumerate(kept):
        gone = sorted(ops, key=lambda op, layer=layer: (scores[layer, op], op))
        gone = set(gone[: max(0, min(n_drop, len(ops) - floor))])
        left.append(tuple(op for op in ops if op not in gone))
    return tuple(left)


class Shrinking(Hook):
    """Drops operators of a supernet while it trains, behind the steps given; a hook of `lib.core.train`.

    Args:
        mode: one of `MODES`: by potential and diversity, by potential alone, at random, or not at all.
        at: numbers of steps made.
        calibration, inputs, targets: what operators are scored with.
        n: ensembles a round.
    """

    def __init__(self, mode: str, at: Sequence[int], calibration: Tensor, inputs: Tensor, targets: Tensor, n: int = 32):
        if mode not in MODES:
            raise unknown("mode", mode, MODES)
        self.mode, self.at, self.n, self.scores = mode, tuple(at), n, {}
        self.batch = calibration, inputs, targets

    def after_step(self, state: State) -> None:
        if self.mode == "none" or state.step + 1 not in self.at:
            return
        supernet = state.model
        generator = torch.Generator().manual_seed(step_seed(state.config.seed, state.step))
        if self.mode == "random":
            pairs = [(layer, op) for layer, ops in enumerate(supernet.kept) for op in ops]
            drawn = torch.rand(len(pairs), generator=generator).tolist()
            self.scores = {pair: (math.nan, math.nan, score) for pair, score in zip(pairs, drawn, strict=True)}
        else:
            lam = 1.0 if self.mode == "diversity" else 0.0
            self.scores = score_operators(supernet, *self.batch, self.n, lam, generator)
        supernet.kept = shrink(supernet.kept, {pair: score for pair, (_, _, score) in self.scores.items()})


def cheapest(kept: Kept, k: int, space: PathSpace, splits: Sequence[int] | None = None) -> EnsembleGenome:
    """The ensemble of the fewest multiplications: the cheapest operator everywhere, shared as far as is allowed."""
    path = tuple(min(ops, key=lambda op, layer=layer: space.macs(layer, op)) for layer, ops in enumerate(kept))
    return EnsembleGenome(len(kept) if splits is None or k == 1 else max(splits), (path,) * k)


def candidates(
    kept: Kept,
    k: int,
    space: PathSpace,
    max_macs: int | None,
    *,
    splits: Sequence[int] | None = None,
    seed: int = 0,
    population: int = 50,
    parents: int = 10,
    generations: int | None = 20,
) -> Generator[EnsembleGenome, float, dict[EnsembleGenome, float]]:
    """K-path evolution: yields ensembles of at most `max_macs` multiplications to be rated; see `lib.core.search`.

    A cross takes each gene of each path, and the split, from one of its parents; a mutation draws a tenth of them anew.
    What is above the limit is drawn again, and after twenty times made cheaper gene by gene.

    Raises:
        InputError: no ensemble of the kept operators meets the limit.
    """
    least = cheapest(kept, k, space, splits)
    if max_macs is not None and (needed := least.macs(space)) > max_macs:
        raise InputError(
            f"max_macs is {max_macs} but no ensemble of {k} paths meets it: the cheapest has {needed} multiplications"
        )
    allowed = [len(kept)] if k == 1 else list(range(len(kept) + 1)) if splits is None else list(splits)

    def within(make: Callable[[], EnsembleGenome], generator: torch.Generator) -> EnsembleGenome:
        for _ in range(TRIES):
            genome = make()
            if max_macs is None or genome.macs(space) <= max_macs:
                return genome
        paths = [list(path) for path in genome.paths]
        for place in torch.randperm(k * len(kept), generator=generator).tolist():
            path, layer = divmod(place, len(kept))
            for one in paths if layer < genome.split else [paths[path]]:
                one[layer] = least.paths[0][layer]
            lighter = EnsembleGenome(genome.split, tuple(map(tuple, paths)))
            if lighter.macs(space) <= max_macs:
                return lighter
        return least

    def draw(generator: torch.Generator) -> EnsembleGenome:
        return within(lambda: sample_genome(kept, k, generator, splits), generator)

    def cross(a: EnsembleGenome, b: EnsembleGenome, generator: torch.Generator) -> EnsembleGenome:
        def make() -> EnsembleGenome:
            coins = iter((torch.rand(k * len(kept) + 1, generator=generator) < 0.5).tolist())
            split = a.split if next(coins) else b.split
            return _joined(split, _mixed(a, b, coins))

        return within(make, generator)

    def mutate(a: EnsembleGenome, generator: torch.Generator) -> EnsembleGenome:
        def make() -> EnsembleGenome:
            coins = iter((torch.rand(k * len(kept) + 1, generator=generator) < MUTATED).tolist())
            new = sample_genome(kept, k, generator, [0]) if k > 1 else sample_genome(kept, k, generator)
            drawn = allowed[int(torch.randint(len(allowed), (), generator=generator))]
            split = drawn if next(coins) else a.split
            return _joined(split, _mixed(new, a, coins))

        return within(make, generator)

    sizes = {"population": population, "parents": parents, "generations": generations}
    return evolve(draw, cross, mutate, seed=seed, **sizes)


def _mixed(a: EnsembleGenome, b: EnsembleGenome, coins: Iterator[bool]) -> list[list[int]]:
    """Gene by gene of every path, a's where the coin says so and else b's."""
    pairs = zip(a.paths, b.paths, strict=True)
    return [[x if next(coins) else y for x, y in zip(one, other, strict=True)] for one, other in pairs]


def _joined(split: int, genes: Sequence[Sequence[int]]) -> EnsembleGenome:
    """The genes before the split are the first path's."""
    return EnsembleGenome(split, tuple((*genes[0][:split], *path[split:]) for path in genes))


def disagreement(logits: Float[Tensor, "batch paths classes"]) -> float:
    """The share of inputs for which two paths answer differently, mean over the pairs; 0 of a single path."""
    said = logits.argmax(-1)
    pairs = list(combinations(range(said.shape[1]), 2))
    return sum(float((said[:, i] != said[:, j]).double().mean()) for i, j in pairs) / (len(pairs) or 1)


def of_networks(nets: Sequence[nn.Module], inputs: Tensor) -> Float[Tensor, "batch paths classes"]:
    """The logits of all paths of several networks, in evaluation mode: an ensemble of ensembles."""
    found = []
    for net in nets:
        with quiet(net), evaluating(net):
            found.append(net(inputs))
    return torch.cat(found, 1)
