"""The one run of each study at its smoke preset, which all tests of the study read."""

from collections.abc import Callable
from functools import cache

import pytest

from workbench.studies.core import StudyResult, load_study


@pytest.fixture(scope="session")
def smoke() -> Callable[[str], StudyResult]:
    """smoke(slug): the result of a study at its smoke preset and seed 0, run by the first test that asks for it."""
    return cache(lambda slug: load_study(slug).execute("smoke"))
