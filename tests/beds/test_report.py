"""The table of the beds: made in an empty home, and what is asked for wrongly."""

import math
import os

import pytest

from workbench.beds import __main__ as beds
from workbench.beds import dynamics
from workbench.beds.baseline import Measured


def test_a_bed_is_made_twice_in_a_home_of_its_own(empty_home):
    first, again, rows = beds.report(dynamics, "smoke")
    assert 0 < again < first
    assert [row.metric for row in rows] == ["nmse"] * 4
    assert os.environ["WORKBENCH_HOME"] == str(empty_home) and not empty_home.exists()


def test_every_bed_says_what_the_table_needs():
    for name in beds.BEDS:
        bed = beds.import_module(f"workbench.beds.{name}")
        assert set(bed.NEEDS) <= set(beds.SETS)
        assert set(bed.SMOKE) == set(bed.SMALL) == set(bed.FULL)
        assert callable(bed.prepare) and callable(bed.measure) and len(bed.__doc__) > 200


def test_the_table_is_markdown_and_an_unknown_bed_one_line(capsys, monkeypatch):
    row = Measured("case", "9 rows", "perceptron", "accuracy", 0.1, 0.51234, math.nan)
    monkeypatch.setattr(beds, "report", lambda bed, preset: (1.23, 0.04, [row, row]))
    beds.main(["dynamics", "--preset", "smoke"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[2] == "| dynamics | 1.2 | 0.0 | case | 9 rows | perceptron | accuracy | 0.1 | 0.512 |  |"
    assert len(lines) == 4 and len({line.count("|") for line in lines}) == 1
    with pytest.raises(SystemExit) as stop:
        beds.main(["dynamic"])
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("bed 'dynamic' is unknown; did you mean 'dynamics'")
