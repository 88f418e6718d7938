"""The numerics of every Triton kernel, by Triton's interpreter, in a process of its own."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from interpret import CASES, run_interpreted

from workbench.kernels.static import OPERATORS

pytest.importorskip("triton")


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", CASES)
def test_the_kernels_are_right_under_the_interpreter(name: str):
    outcome = run_interpreted()[name]
    assert not outcome.wrong, "\n\n".join(outcome.wrong)
    assert outcome.passed >= 3


def test_every_operator_with_a_triton_path_has_its_cases():
    assert {f"interp_{operator}.py" for operator in OPERATORS} <= set(CASES)
