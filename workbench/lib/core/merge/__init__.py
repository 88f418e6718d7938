"""One model of several that were fine-tuned from one base."""

from workbench.lib.core.merge.merger import (
    Flat,
    Matrices,
    Merger,
    Pieces,
    make_merger,
    merged_pieces,
    merged_state,
    merger_class,
    mergers,
)
from workbench.lib.core.merge.models import merge
from workbench.lib.core.merge.vectors import Place, TaskVectors

__all__ = [
    "Flat",
    "Matrices",
    "Merger",
    "Pieces",
    "Place",
    "TaskVectors",
    "make_merger",
    "merge",
    "merged_pieces",
    "merged_state",
    "merger_class",
    "mergers",
]
