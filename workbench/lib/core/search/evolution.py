"""Evolution of genomes whose ratings somebody else makes: parents are the best so far, children cross and mutate them.

It is a generator, so that who rates decides where, for how long, and what is known already:

    asked = evolve(draw, cross, mutate, seed=0, generations=20)
    genome = next(asked)
    while True:
        genome = asked.send(rate(genome))   # StopIteration holds every genome and its rating

The same seed and ratings ask for the same genomes. A search that is told kept ratings goes on where it was.
"""

from collections.abc import Callable, Generator, Hashable
from itertools import count
from typing import TypeVar

import torch

from workbench.errors import InputError

Genome = TypeVar("Genome", bound=Hashable)
TRIES = 50
"""Children in a row that are known already, after which a generation ends, or its rest is drawn."""


def evolve(
    draw: Callable[[torch.Generator], Genome],
    cross: Callable[[Genome, Genome, torch.Generator], Genome],
    mutate: Callable[[Genome, torch.Generator], Genome],
    *,
    seed: int = 0,
    population: int = 50,
    parents: int = 10,
    generations: int | None = 20,
) -> Generator[Genome, float, dict[Genome, float]]:
    """Yield genomes to rate, each one once; higher is better. Returns genome -> rating.

    The first generation is drawn. Of each further one every other child is a cross of two of the `parents` best so far,
    mutated, and every other one such a genome mutated alone. A generation whose parents have no new children left ends;
    in a search without an end the rest of it is drawn, like the first.

    Args:
        draw, cross, mutate: make genomes that are allowed, with the generator as all their randomness.
        population: genomes of a generation.
        generations: None goes on until nothing new is drawn.
    """
    if not 1 <= parents <= population:
        raise InputError(f"parents is {parents} but must be from 1 to population, {population}")
    if generations is not None and generations < 1:
        raise InputError(f"generations is {generations} but must be at least 1, or None for no end")
    generator = torch.Generator().manual_seed(seed)
    rated: dict[Genome, float] = {}
    for generation in count() if generations is None else range(generations):
        best = top(rated, parents)
        before, known, most = len(rated), 0, TRIES if generations is not None else 2 * TRIES
        while len(rated) - before < population and known < most:
            if generation == 0 or known >= TRIES:
                child = draw(generator)
            else:
                a, b = (best[int(torch.randint(len(best), (), generator=generator))] for _ in range(2))
                child = mutate(cross(a, b, generator) if (len(rated) - before) % 2 == 0 else a, generator)
            if child in rated:
                known += 1
                continue
            known = TRIES if known >= TRIES else 0  # once drawing, to the end of the generation
            rated[child] = yield child
        if len(rated) == before:
            break
    return rated


def exhaust(asked: Generator[Genome, float, dict[Genome, float]], rate: Callable[[Genome], float]) -> dict:
    """Rate all that an evolution asks for; genome -> rating."""
    try:
        genome = next(asked)
        while True:
            genome = asked.send(rate(genome))
    except StopIteration as end:
        return end.value


def top(rated: dict[Genome, float], n: int) -> list[Genome]:
    """The n genomes of the highest ratings, best first; of equal ones those that were rated earlier."""
    return sorted(rated, key=rated.__getitem__, reverse=True)[:n]


def front(points: dict[Genome, tuple[float, float]]) -> list[Genome]:
    """The genomes for which (cost, rating) no other one is as cheap and better, or cheaper and as good; cheapest first.

    Of equal points the first is kept.
    """
    found: list[Genome] = []
    for genome in sorted(points, key=lambda one: (points[one][0], -points[one][1])):
        if not found or points[genome][1] > points[found[-1]][1]:
            found.append(genome)
    return found
