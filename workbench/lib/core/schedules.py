"""How many experts each layer gets: schedules over depth at a given total.

The shapes are those of DynaMoE (2603.01697), which names five of them; the sixth is taken to be the valley, and all
formulas are inferred from the names.
"""

import math

from workbench.errors import InputError, unknown

SCHEDULES = ("uniform", "descending", "ascending", "pyramid", "valley", "wave")


def expert_schedule(
    kind: str, n_layers: int, n_min: int, n_max: int, total: int | None = None, cycles: float = 1
) -> list[int]:
    """E_l for l = 0..L-1 with u = l / (L - 1) (0 for a single layer) and R = n_max - n_min >= 0, n_min >= 2, rounded.

    uniform: the mean; descending: n_max - R u; ascending: n_min + R u; pyramid: n_min + R (1 - |2u - 1|); valley:
    n_max - R (1 - |2u - 1|); wave: n_min + R (1 + sin(2 pi cycles u)) / 2.

    Args:
        total: rescale the shape such that the sum is exactly this, by largest remainders, with at least 2 in every
            layer; default: no rescaling, and the kinds differ in their sums. Pyramid and valley stay symmetric (an odd
            total over an even number of layers cannot be: one layer is then off by one).
    """
    if kind not in SCHEDULES:
        raise unknown("kind", kind, SCHEDULES)
    if n_layers < 1:
        raise InputError(f"n_layers is {n_layers} but must be at least 1")
    if not 2 <= n_min <= n_max:
        raise InputError(f"n_min and n_max are {n_min} and {n_max} but must satisfy 2 <= n_min <= n_max")
    if total is not None and total < 2 * n_layers:
        raise InputError(f"total is {total} but must be at least 2 for each of the {n_layers} layers")
    if kind == "ascending":
        return expert_schedule("descending", n_layers, n_min, n_max, total)[::-1]
    depth = [layer / max(1, n_layers - 1) for layer in range(n_layers)]
    shape = [round(_shape(kind, u, n_min, n_max, cycles), 9) for u in depth]  # equal where they are equal on paper
    if total is None:
        return [math.floor(value + 0.5) for value in shape]
    return _apportion(shape, total, symmetric=kind in ("pyramid", "valley"))


def _shape(kind: str, u: float, low: int, high: int, cycles: float) -> float:
    span, tent = high - low, 1 - abs(2 * u - 1)
    return {
        "uniform": (low + high) / 2,
        "descending": high - span * u,
        "pyramid": low + span * tent,
        "valley": high - span * tent,
        "wave": low + span * (1 + math.sin(2 * math.pi * cycles * u)) / 2,
    }[kind]


def _apportion(shape: list[float], total: int, symmetric: bool) -> list[int]:
    """Integers of at least 2 in proportion to `shape` with sum `total`: the largest remainders are rounded up."""
    counts = [2] * len(shape)
    free = list(range(len(shape)))
    while True:  # a layer that would fall below 2 stays there, and the others share what is left
        left = total - 2 * (len(shape) - len(free))
        quota = {i: shape[i] * left / sum(shape[j] for j in free) for i in free}
        small = [i for i in free if quota[i] < 2 - 1e-9]
        if not small:
            break
        free = [i for i in free if i not in small]
    for i in free:
        counts[i] = math.floor(quota[i] + 1e-9)
    spare = total - sum(counts)
    middle = len(shape) // 2
    if symmetric and len(shape) % 2 and spare % 2:
        counts[middle] += 1
        spare -= 1
    # The two layers of a mirror pair have the same remainder and follow one another in this order.
    mirror = [min(i, len(shape) - 1 - i) for i in range(len(shape))] if symmetric else list(range(len(shape)))
    eligible = [i for i in free if not (symmetric and len(shape) % 2 and i == middle)]
    eligible.sort(key=lambda i: (-round(quota[i] - counts[i], 9), mirror[i]))
    for i in eligible[:spare]:
        counts[i] += 1
    return counts
