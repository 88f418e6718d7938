"""The one run of each study at its smoke preset, which all tests of the study read."""

from collections.abc import Callable
from functools import cache

import pytest

from workbench.lib import data
from workbench.studies.core import StudyResult, load_study

NEEDS = {
    "merging": ("mnist-5k",),
    "modality": ("mnist-5k", "speech"),
    "features": ("movielens-100k",),
    "imaging": ("photos",),
}
"""Family -> data sets of its studies that come through pip's index."""


@pytest.fixture(scope="session")
def smoke() -> Callable[[str], StudyResult]:
    """smoke(slug): the result of a study at its smoke preset and seed 0, run by the first test that asks for it."""

    def run(slug: str) -> StudyResult:
        study = load_study(slug)
        for name in NEEDS.get(study.system.family, ()):
            data.get(name)
        return study.execute("smoke")

    return cache(run)
