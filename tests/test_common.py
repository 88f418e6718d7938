"""Behaviour that systems of a kind share, for each ready row of the catalogue: a new method is a tested method."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.kinds import CHECKS, Build
from workbench.catalogue import KINDS, Method, methods

ROWS = [row for row in methods(status="ready") if row.example is not None]
CASES = [pytest.param(row, check, id=f"{row.slug}-{check.__name__}") for row in ROWS for check in CHECKS[row.kind]]


@pytest.mark.parametrize(("row", "check"), CASES)
def test_an_example_keeps_the_contract_of_its_kind(row: Method, check: Callable[[Build], None]):
    def build(seed: int) -> Any:
        torch.manual_seed(seed)
        return row.build_example()

    check(build)


def test_every_kind_has_checks():
    assert tuple(CHECKS) == KINDS
    assert all(CHECKS.values())
