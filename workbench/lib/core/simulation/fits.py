"""Times that were measured, made into functions: a line for a link, a table for the rates of products.

link = LinkModel.fit(bytes_sent, seconds)
link.all_reduce(4e6, ranks=4, shared=True)
table = RateTable.measure(lambda n: torch.mm(x[:n], w), [1, 16, 256])
table.seconds(100)
"""

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from workbench.errors import InputError


@dataclass(frozen=True)
class LinkModel:
    """alpha + beta n: the seconds of one message of n bytes (or of anything else whose cost is a line in a count).

    Attributes:
        alpha: seconds a message, whatever its size.
        beta: seconds a byte; 1 / beta is the bandwidth.
    """

    alpha: float
    beta: float

    def __post_init__(self):
        for name in ("alpha", "beta"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise InputError(f"{name} is {value} but must be a finite number of at least 0")

    @classmethod
    def fit(cls, sizes: Sequence[float], seconds: Sequence[float]) -> "LinkModel":
        """Least squares of the *relative* errors, neither number negative: sizes that span decades count alike.

        Raises:
            InputError: fewer than two sizes, not as many seconds, or a number that is not finite and above 0.
        """
        x, y = _measured(sizes, seconds)
        if len(np.unique(x)) < 2:
            raise InputError(f"sizes has {len(np.unique(x))} different values but a line needs at least 2")
        return cls(*fitted(np.stack([np.ones_like(x), x], axis=1), y))

    def seconds(self, n: float) -> float:
        """One message of n bytes; nothing is sent, and no time taken, for 0."""
        return 0.0 if n <= 0 else self.alpha + self.beta * n

    def all_reduce(self, n: float, ranks: int, shared: bool = False) -> float:
        """A ring's: 2 (ranks - 1) steps of n / ranks bytes from each rank.

        `n` bytes are what each rank holds. On a `shared` medium (one link that all messages go through, as the
        loopback) a step takes as long as the messages of all ranks after one another.
        """
        return 2 * self._steps(ranks, n / max(ranks, 1), shared)

    def reduce_scatter(self, n: float, ranks: int, shared: bool = False) -> float:
        """A ring's, of n bytes on each rank before it; an all-gather to n bytes on each rank after it takes as long."""
        return self._steps(ranks, n / max(ranks, 1), shared)

    all_gather = reduce_scatter

    def all_to_all(self, n: float, ranks: int, shared: bool = False) -> float:
        """Each rank holds n bytes and sends an equal part to every other, one after the other."""
        return self._steps(ranks, n / max(ranks, 1), shared)

    def _steps(self, ranks: int, n: float, shared: bool) -> float:
        if ranks < 1:
            raise InputError(f"ranks is {ranks} but must be at least 1")
        return (ranks - 1) * self.seconds(n * (ranks if shared else 1))


@dataclass(frozen=True)
class RateTable:
    """Seconds of one kind of work by its size, as measured, never less for more.

    Between two sizes the seconds are a straight line. Below the least size they are those of the least: what is small
    costs its overhead. Above the largest the rate stays that of the largest.
    """

    sizes: tuple[float, ...]
    times: tuple[float, ...]

    def __post_init__(self):
        sizes, times = _measured(self.sizes, self.times)
        order = np.argsort(sizes)
        if len(np.unique(sizes)) < len(sizes):
            raise InputError(f"sizes is {self.sizes} but must have each size once")
        object.__setattr__(self, "sizes", tuple(map(float, sizes[order])))
        object.__setattr__(self, "times", tuple(map(float, _isotonic(times[order]))))

    @classmethod
    def measure(
        cls,
        call: Callable[[int], object],
        sizes: Sequence[int],
        repeats: int = 5,
        before: Callable[[], object] = lambda: None,
    ) -> "RateTable":
        """The medians of `call(size)`, which is warmed up once for each size; the sizes take turns.

        `before` comes before each call and is not timed: what the machine does in between where the work is done.

        Raises:
            InputError: fewer than 5 repeats.
        """
        if repeats < 5:
            raise InputError(f"repeats is {repeats} but must be at least 5")
        spent: dict[int, list[float]] = {size: [] for size in sizes}
        for turn in range(-1, repeats):
            for size in sizes:
                before()
                start = time.perf_counter()
                call(size)
                if turn >= 0:
                    spent[size].append(time.perf_counter() - start)
        return cls(tuple(sizes), tuple(statistics.median(spent[size]) for size in sizes))

    def seconds(self, n: float) -> float:
        """Seconds of work of size n; none for 0."""
        if n <= 0:
            return 0.0
        if n > self.sizes[-1]:
            return self.times[-1] * n / self.sizes[-1]
        return float(np.interp(n, self.sizes, self.times))

    def rate(self, n: float) -> float:
        """n per second at size n."""
        return n / self.seconds(n)

    def to_dict(self) -> dict[str, Any]:
        return {"sizes": list(self.sizes), "times": list(self.times)}

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> "RateTable":
        """The inverse of `to_dict`."""
        return cls(tuple(found["sizes"]), tuple(found["times"]))


def fitted(counts: Float[np.ndarray, "times terms"], seconds: Float[np.ndarray, " times"]) -> list[float]:
    """Seconds of one of each term, none negative, by least squares of the relative errors of the sums."""
    from scipy.optimize import nnls  # slow to import, and few fit

    scale = counts.max(0)  # so that all columns are of one size
    found, _ = nnls(counts / scale / seconds[:, None], np.ones_like(seconds))
    return (found / scale).tolist()


def relative_errors(predicted: Sequence[float], measured: Sequence[float]) -> list[float]:
    """|predicted - measured| / measured, one by one."""
    predicted, measured = _measured(predicted, measured)
    return (np.abs(predicted - measured) / measured).tolist()


def _measured(a: Sequence[float], b: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    x, y = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    if x.shape != y.shape or x.ndim != 1 or not len(x):
        raise InputError(f"shapes are {x.shape} and {y.shape} but must be one and the same number of values")
    if not (np.isfinite(x).all() and np.isfinite(y).all() and (x > 0).all() and (y > 0).all()):
        raise InputError("sizes and seconds must all be finite numbers above 0")
    return x, y


def _isotonic(y: np.ndarray) -> np.ndarray:
    """The nearest sequence that never falls: neighbours that fall are replaced by their mean."""
    blocks: list[list[float]] = []
    for value in y:
        blocks.append([value, 1])
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            (a, n), (b, m) = blocks[-2:]
            blocks[-2:] = [[(a * n + b * m) / (n + m), n + m]]
    return np.repeat([mean for mean, _ in blocks], [n for _, n in blocks])
