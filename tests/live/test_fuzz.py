"""A share of the stores, rows and notebook files that are not as they should be; `python -m tests.fuzz` tries all."""

from importlib import import_module
from itertools import islice
from pathlib import Path

import pytest

from tests.fuzz.harness import try_all


@pytest.mark.parametrize(("kind", "share"), [("stores", 4), ("rows", 4), ("notebooks", 30)])
def test_what_is_not_as_it_should_be_is_refused_in_words(kind: str, share: int, tmp_path: Path):
    tally = try_all(islice(import_module(f"tests.fuzz.{kind}").cases(tmp_path, 1), share))
    assert tally.faults == []
