"""The study of FSAP: a rule that reads a record and exact shares, and rows that say nothing of a language model."""

import json
import random

import pytest

from workbench.lib.search.fsap import OfflineGenerator, corpus, source_problem
from workbench.lib.search.fsap_duplicates import KEYS
from workbench.lib.search.fsap_programs import PLANS, read, write
from workbench.studies.rows import Row, Rows
from workbench.studies.search.fsap import LABEL, STUDY, judge, measured
from workbench.studies.search.fsap_rewritten import OTHER, SAME, found_again
from workbench.studies.verdicts import NOT_REPRODUCED, NOT_RESOLVED, REPRODUCED


def ratio(mean: float) -> dict:
    return {"mean": mean, "ci95": (mean - 5, mean + 5), "sd": 12.0}


def record(**change) -> dict:
    seconds = {"whitespace": 1e-4, "tree": 2e-2}
    found = {
        "seconds": seconds, "tree_ratio": ratio(200), "parse_ratio": ratio(120), "tree_again": ratio(250),
        "parse_again": ratio(130), "sized": [seconds | {"lines": 50}],
        "methods": {"codes": 1000, "tree": 200, "both": 198, "merged": 0},
    }  # fmt: skip
    return found | change


def judged(shares: dict | None = None, **change):
    again = {f"{kind}/{key}": float(kind in SAME) for kind in (*SAME, *OTHER) for key in KEYS} | (shares or {})
    draw = random.Random(0)
    rows = Rows(
        Row(f"n{n}", seed, 1, 1, 1, 1, 0.5, again | {
            "requested": 4, "valid": 3, "kinds": ["ok"] * 3 + ["duplicate"],
            "sets": ["digit"] * 3, "accuracies": [draw.random() for _ in range(3)],
        })
        for seed in range(3)
        for n in (1, 3)
    )  # fmt: skip
    return judge(rows, {}, record(**change))


def test_reproduced_if_it_is_fast_enough_by_either_reading_and_finds_what_the_trees_find():
    result = judged()
    assert result.verdict == REPRODUCED and result.effect == 200 and result.ci == (195, 205)
    assert "not testable here" in result.reason and result.details["examples"] == LABEL
    assert result.details["success"] == {"n1": 0.75, "n3": 0.75}
    assert result.details["kinds"]["n1"] == {"duplicate": 3, "ok": 9}
    assert [one["n"] for one in result.details["against_one"]] == [3]
    json.dumps(result.details)


@pytest.mark.parametrize(
    "change",
    [
        {"seconds": {"whitespace": 1e-3}, "sized": []},
        {"tree_ratio": ratio(90), "parse_ratio": ratio(60)},
        {"methods": {"codes": 1000, "tree": 200, "both": 189, "merged": 0}},
        {"shares": {"layout/whitespace": 0.99}},
        {"shares": {"changed/whitespace": 0.01}},
    ],
)
def test_not_reproduced_if_it_is_slow_or_finds_less_or_too_much(change: dict):
    assert judged(**change).verdict == NOT_REPRODUCED


def test_not_resolved_where_it_depends_on_what_was_timed():
    assert judged(parse_ratio=ratio(60)).verdict == NOT_RESOLVED
    assert judged(tree_ratio=ratio(100)).verdict == NOT_RESOLVED
    assert judged({"moved/whitespace": 1.0, "renamed/whitespace": 0.0}).verdict == REPRODUCED  # told, and not judged


def test_programs_that_are_written_again_are_what_they_are_called():
    draw, code = random.Random(0), write(PLANS["deep"])
    for kind, rewrite in (SAME | OTHER).items():
        other = rewrite(code, draw)
        assert other != code and source_problem(other) is None, kind
        assert (KEYS["names"](other) == KEYS["names"](code)) == (kind in SAME), kind
    assert read(OTHER["changed"](code, draw)) not in (None, PLANS["deep"])


def test_what_each_key_finds_again():
    again = found_again(OfflineGenerator(0), corpus("digit"), 3, 6, 0)
    shares = {kind: {key for key in KEYS if again[kind, key]} for kind in (*SAME, *OTHER)}
    assert shares == {
        "layout": {"whitespace", "tokens", "tree", "names"} | ({"text"} if again["layout", "text"] else set()),
        "comments": {"tree", "names"},
        "spelled": {"tree", "names"},
        "renamed": {"names"},
        "changed": set(),
        "moved": {"whitespace"},
    }
    assert {again[kind, "whitespace"] for kind in ("layout", "moved")} == {1.0}


def test_the_record_that_is_read_has_what_the_rule_reads():
    found = measured()
    assert found["files"] == 30 and 0 < found["seconds"]["whitespace"] <= found["slowest"]
    for name in ("tree_ratio", "parse_ratio"):
        low, high = found[name]["ci95"]
        assert 1 < low < found[name]["mean"] < high
    known = found["methods"]
    assert known["both"] + known["missed"] == known["tree"] <= known["names"] <= known["codes"]
    assert known["both"] + known["merged"] == known["whitespace"] >= known["text"]
    assert [one["lines"] for one in found["sized"]] == sorted(one["lines"] for one in found["sized"])


def test_the_rows_have_settings_that_differ_in_n_alone():
    for settings in STUDY.presets.values():
        assert STUDY.arms_of(settings) == [f"n{n}" for n in settings["ns"]]
    assert STUDY.main == "n3" and "language models" in STUDY.tested
