"""Which library merges by which convention, in the options that have it here: a table, each line of it held by a test.

    {"peer": "mergekit", "call": "ties", "method": "ties", "options": {"scope": "tensor", "elect": "weighted", ...}}

`merge(base, experts, method, **options, weights=..., density=...)` is what the peer's call makes of the same weights
and density. The tests (tests/lib/core/merge/test_conventions.py) run the peers at the versions in `VERSIONS`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

VERSIONS = {"peft": "0.21.2", "mergekit": "0.1.5", "fusion_bench": "0.2.33"}


@dataclass(frozen=True)
class Convention:
    """One call of a peer.

    Attributes:
        peer, call: what is called, of a key of `VERSIONS`.
        method, options: the same of `workbench.merge`.
        copies: what two copies of one expert with weights [1, 1] become, in parts of its change.
        tie: what two opposite changes of one size become where signs are elected: "plus", or "either", by the sign that
            more of the other weights elect, minus where none is; None where no sign is elected.
        tiny: how many weights stay where density x size is below 1; None where nothing is trimmed by size.
        weighted: whether it takes weights.
        more: by how many weights more than density x size a trim keeps.
        note: what else there is to know.
    """

    peer: str
    call: str
    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    copies: float = 1.0
    tie: str | None = None
    tiny: int | None = None
    weighted: bool = True
    more: int = 0
    note: str = ""

    def as_dict(self) -> dict[str, Any]:
        """The row as plain values, for a table."""
        options = ", ".join(f"{name}={value!r}" for name, value in self.options.items())
        return {
            "peer": f"{self.peer} {VERSIONS[self.peer]}",
            "call": self.call,
            "here": f"merge(..., {self.method!r}{', ' if options else ''}{options})",
            "copies at [1, 1]": f"{self.copies:g} x",
            "a tie of signs": self.tie or "",
            "kept where density x size < 1": "" if self.tiny is None else self.tiny,
            "note": self.note,
        }


PEFT_TIES = {"scope": "tensor", "elect": "values", "divide": "count", "least": 0}
MERGEKIT_TIES = {"scope": "tensor", "elect": "weighted", "divide": "weights", "least": 1}
FUSION_TIES = {"scope": "global", "elect": "values", "tie": "majority"}
FACTORS = "add_weighted_adapter applies it to A and to B, each by itself; with _svd to the update B A"

CONVENTIONS = (
    Convention("peft", "task_arithmetic", "task-arithmetic", copies=2.0, note=FACTORS),
    Convention(
        "peft",
        "magnitude_prune",
        "ties",
        {"scope": "tensor", "elect": None, "divide": None, "least": 0},
        copies=2.0,
        tiny=0,
        note=FACTORS,
    ),
    Convention("peft", "ties", "ties", PEFT_TIES, tie="plus", tiny=0, note=FACTORS),
    Convention("peft", "ties, frequency", "ties", PEFT_TIES | {"elect": "signs"}, tie="plus", tiny=0, note=FACTORS),
    Convention("peft", "dare_linear", "dare", {"rescale": "density"}, copies=2.0, note=FACTORS),
    Convention(
        "peft",
        "dare_ties",
        "dare-ties",
        {"rescale": "density", "elect": "values", "divide": "count"},
        tie="plus",
        note=FACTORS,
    ),
    Convention("mergekit", "linear", "average"),
    Convention("mergekit", "task_arithmetic", "task-arithmetic", copies=2.0),
    Convention("mergekit", "ties", "ties", MERGEKIT_TIES, tie="plus", tiny=1),
    Convention("mergekit", "dare_linear", "dare", {"rescale": "l1"}, copies=2.0),
    Convention(
        "mergekit",
        "dare_ties",
        "dare-ties",
        {"rescale": "l1", "elect": "weighted", "divide": None},
        copies=2.0,
        tie="plus",
    ),
    Convention("fusion_bench", "simple_average", "average", weighted=False),
    Convention(
        "fusion_bench",
        "task_arithmetic_merge",
        "task-arithmetic",
        copies=2.0,
        weighted=False,
        note="a TypeError for modules with parameters; its configuration has a scale of 0.3",
    ),
    Convention(
        "fusion_bench",
        "ties_merging, mean",
        "ties",
        FUSION_TIES | {"divide": "count"},
        tie="either",
        tiny=1,
        weighted=False,
        more=1,
    ),
    Convention(
        "fusion_bench",
        "ties_merging, sum",
        "ties",
        FUSION_TIES | {"divide": None},
        copies=2.0,
        tie="either",
        tiny=1,
        weighted=False,
        more=1,
        note="the default, with a scale of 0.3; a density above 1 is read as per cent",
    ),
    Convention("fusion_bench", "param_random_drop_", "dare", {"rescale": "density"}, copies=2.0, weighted=False),
    Convention("fusion_bench", "merging_with_fisher_weights", "fisher", {"balance": True, "floor": 1e-6}),
    Convention(
        "fusion_bench",
        "merging_with_regmean_weights",
        "regmean",
        {"ridge": 0.0},
        weighted=False,
        note="by an inverse in float32, and off_diagonal as given",
    ),
    Convention(
        "fusion_bench",
        "compute_and_sum_svd_mem_reduction",
        "tsv-m",
        weighted=False,
        note="in float32; every task has an equal part of the directions",
    ),
)


def table() -> list[dict[str, Any]]:
    """All lines, as plain values."""
    return [row.as_dict() for row in CONVENTIONS]
