"""Mutual information of a table of counts, and what chance alone would give."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations

import torch
from jaxtyping import Float64, Num
from torch import Tensor

from workbench.errors import InputError, unknown

NULLS = ("exact", "first_order")
TABLE_UP_TO = 2**22  # tokens
TINY = torch.finfo(torch.float64).tiny


@dataclass(frozen=True)
class Information:
    """Mutual information I(row; column) in nats, with the value expected from chance.

    A finite sample of independent variables has positive information; `null` is its expectation when the tokens of one
    side are shuffled, so `corrected` is 0 on average where there is no dependence (and may then be negative).

    Attributes:
        value: I(row; column), 0 .. min(H(row), H(column)).
        null: expected value under shuffling.
        row_entropy: H(row).
        column_entropy: H(column).
    """

    value: Float64[Tensor, "*batch"]
    null: Float64[Tensor, "*batch"]
    row_entropy: Float64[Tensor, "*batch"]
    column_entropy: Float64[Tensor, "*batch"]

    @property
    def corrected(self) -> Float64[Tensor, "*batch"]:
        """I - null."""
        return self.value - self.null

    @property
    def normalised(self) -> Float64[Tensor, "*batch"]:
        """I / H(row), 0 .. 1; NaN where the row never varies."""
        return self.value / self._row_entropy_or_nan()

    def _row_entropy_or_nan(self) -> Float64[Tensor, "*batch"]:
        # a single used row has entropy 0 up to rounding, so the test is on rounding, not on exact zero
        return self.row_entropy.where(self.row_entropy > 1e-12, torch.nan)


def entropy(weights: Num[Tensor, "*batch n"]) -> Float64[Tensor, "*batch"]:
    """-sum_i f_i ln f_i in nats, f = weights / sum(weights) (Shannon 1948); 0 .. ln n; NaN if all weights are zero."""
    weights = weights.double()
    share = weights / weights.sum(-1, keepdim=True)
    # 0 ln 0 = 0 by the clamp: a third of the time of torch.special.entr, which is not vectorised
    return (share * -share.clamp(min=TINY).log()).sum(-1)


def jensen_shannon(counts: Num[Tensor, "*batch classes n"]) -> Float64[Tensor, "*batch"]:
    """Mean Jensen-Shannon distance between the rows of tables, over their pairs; base 2, so 0 (alike) .. 1 (apart).

    The root of the divergence, which is a metric (Endres and Schindelin 2003).
    """
    share = counts.double() / counts.sum(-1, keepdim=True)
    pairs = [
        (
            entropy((share[..., a, :] + share[..., b, :]) / 2)
            - (entropy(share[..., a, :]) + entropy(share[..., b, :])) / 2
        )
        for a, b in combinations(range(counts.shape[-2]), 2)
    ]
    return (torch.stack(pairs).clamp(min=0) / math.log(2)).sqrt().mean(0)


def mutual_information(
    counts: Num[Tensor, "*batch rows columns"], row_k: float = 1, column_k: float = 1, null: str = "exact"
) -> Information:
    """I(row; column) of a table of pairs, in nats, with its null.

    Every token puts `row_k` rows times `column_k` columns into the table (1 and K for class against expert, K and K'
    for two layers). Shuffling the tokens of one side keeps both margins of tokens, and every cell then follows a
    hypergeometric law, which gives the null without simulation:

    - "exact": the expectation itself (for row_k = column_k = 1 that of Vinh, Epps and Bailey 2010, eq. 24a).
    - "first_order": (R - row_k)(C - column_k) / (2 row_k column_k (N - 1)) with R, C the rows and columns in use and N
      tokens: the expectation of the chi-square term, for K = 1 the bias of Miller 1955. Cheap, and the choice for
      routers whose number of experts per token varies (give the mean); wrong where cells hold few tokens.

    Raises:
        InputError: unknown `null`; a k below 0; margins that `row_k` and `column_k` do not divide ("exact").
    """
    if null not in NULLS:
        raise unknown("null", null, NULLS)
    for name, value in (("row_k", row_k), ("column_k", column_k)):
        if not value > 0:
            raise InputError(f"{name} is {value} but must be above 0")
    counts = counts.double()
    rows, columns = counts.sum(-1), counts.sum(-2)
    row_entropy, column_entropy = entropy(rows), entropy(columns)
    value = row_entropy + column_entropy - entropy(counts.flatten(-2))
    if null == "exact":
        row_tokens, column_tokens = _tokens(rows, column_k, "column_k"), _tokens(columns, row_k, "row_k")
        log_factorial = _log_factorials(row_tokens.sum(-1) / row_k)
        tables = zip(row_tokens, column_tokens, strict=True)
        expected = [_expected(*table, column_k, log_factorial) for table in tables]
        expected = value.new_tensor(expected).view(value.shape)
        return Information(value, expected, row_entropy, column_entropy)
    n_tokens = rows.sum(-1) / (row_k * column_k)
    freedom = ((rows > 0).sum(-1) - row_k) * ((columns > 0).sum(-1) - column_k)
    return Information(value, freedom / (2 * row_k * column_k * (n_tokens - 1)), row_entropy, column_entropy)


def _tokens(pairs: Float64[Tensor, "*batch n"], k: float, name: str) -> Float64[Tensor, "tables n"]:
    """Tokens behind the margins of pairs, where every token counts k times in them; one row per table."""
    tokens = pairs / k
    if not torch.equal(tokens, tokens.round()):
        raise InputError(
            f"{name} is {k} but must divide every margin of the counts; for a variable number of experts per token "
            "give its mean and null='first_order'"
        )
    return tokens.reshape(-1, tokens.shape[-1])


def _expected(
    rows: Float64[Tensor, " rows"],
    columns: Float64[Tensor, " columns"],
    column_k: float,
    log_factorial: Callable[[Tensor], Tensor],
) -> float:
    """Expected information of one shuffled table, from the tokens of its rows and columns."""
    n = columns.sum() / column_k
    pairs = rows.sum() * column_k
    if pairs == 0:
        return torch.nan
    a, b = torch.meshgrid(rows[rows > 0], columns[columns > 0], indexing="ij")
    (a, b), times = torch.stack([a.flatten(), b.flatten()]).unique(dim=1, return_counts=True)
    mean = a * b / n
    # by Chernoff's bound what lies further than this from the mean has probability below 1e-13
    reach = 8 * mean.sqrt() + 40
    low = torch.maximum((a + b - n).clamp(min=1), (mean - reach).floor())
    high = torch.minimum(torch.minimum(a, b), (mean + reach).ceil())
    size = (high - low + 1).clamp(min=0).long()
    cell = torch.repeat_interleave(size)
    first = size.cumsum(0) - size
    x = low[cell] + (torch.arange(cell.numel(), device=cell.device) - first[cell])
    # hypergeometric probabilities C(a, x) C(n - a, b - x) / C(n, b); what does not depend on x is taken once per cell
    margins = sum(log_factorial(y) for y in (a, b, n - a, n - b)) - log_factorial(n)
    a, b, margins, times = a[cell], b[cell], margins[cell], times[cell]
    inner = sum(log_factorial(y) for y in (x, a - x, b - x, n - a - b + x))
    return float((times * (margins - inner).exp() * (x / pairs) * (n * x / (a * b)).log()).sum())


def _log_factorials(n_tokens: Tensor) -> Callable[[Tensor], Tensor]:
    """ln x! of tensors of whole numbers up to the largest N: from a table, unless that would be large itself."""
    largest = int(n_tokens.max()) if n_tokens.numel() else 0
    if largest > TABLE_UP_TO:
        return lambda x: torch.lgamma(x + 1)
    table = torch.lgamma(torch.arange(1, largest + 2, dtype=torch.float64, device=n_tokens.device))
    return lambda x: table[x.long()]
