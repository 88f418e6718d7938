"""The record of a validation: what was measured stays, and errors are computed from it."""

import json

import pytest

from workbench.errors import InputError
from workbench.lib.core.simulation.validation import Validation, machine

ROWS = [{"configuration": f"c{i}", "predicted": 1 + 0.1 * i, "measured": 1.0, "bound": "link"} for i in range(4)]


def test_a_record_is_written_and_read_as_it_was(tmp_path):
    made = Validation.made("a-system", {"alpha": 1e-4}, ROWS, "s")
    made.write(tmp_path / "deep" / "a.json")
    assert Validation.read(tmp_path / "deep" / "a.json") == made
    found = json.loads((tmp_path / "deep" / "a.json").read_text())
    assert found["median_error"] == pytest.approx(0.15) and found["accuracy"] == pytest.approx(0.85)
    assert [row["error"] for row in found["rows"]] == pytest.approx([0, 0.1, 0.2, 0.3])
    assert set(made.machine) == {"cpu", "cores", "system", "torch"} and made.machine["cpu"]
    assert made.label.startswith("simulated, calibrated by ") and made.machine["cpu"] in made.label


def test_the_table_says_the_error_of_each():
    row = Validation("a", machine(), "2026-01-01", {}, ROWS, "tokens/s").table()[2]
    assert row == {
        "configuration": "c2", "predicted, tokens/s": 1.2, "measured, tokens/s": 1.0, "error": "20.0%"
    }  # fmt: skip


def test_too_few_configurations_and_a_file_that_is_none_are_refused(tmp_path):
    with pytest.raises(InputError, match="rows has 3 configurations"):
        Validation.made("a", {}, ROWS[:3], "s")
    for text in (None, "{", "{}", "[]"):
        file = tmp_path / "x.json"
        if text is not None:
            file.write_text(text)
        with pytest.raises(InputError, match="cannot be read"):
            Validation.read(file)
