"""The machinery of a study: every arm at every seed, in order, one rule, the same in any number of processes."""

import json
from dataclasses import replace

import pytest
import torch

from workbench.catalogue import Method, method
from workbench.engines import Workers
from workbench.errors import InputError
from workbench.studies.core import Study, load_study
from workbench.studies.rows import Row
from workbench.studies.verdicts import REPRODUCED, Judgement


def run(arm, seed, settings):
    torch.manual_seed(seed)
    value = float(torch.rand(())) + (1.0 if arm == "method" else 0.0)
    return Row(
        arm, seed, 10, 5, 100, settings["steps"], value, {"threads": torch.get_num_threads(), "nan": float("nan")}
    )


def judge(rows, settings):
    effect = rows.mean("method") - rows.mean("baseline")
    return Judgement(REPRODUCED, effect, (float("-inf"), float("inf")), "The method is higher.", {"n": len(rows)})


pytestmark = pytest.mark.usefixtures("home")  # rows of other tests are not theirs

TOY = Method("toy", "Toy", "routing", 2020, "arXiv:0000.00000", "One is more than zero.", ())
STUDY = Study(
    TOY,
    metric="score",
    unit="points",
    higher_is_better=True,
    rule="Reproduced if the method is higher.",
    presets={"smoke": {"seeds": 2, "steps": 3}, "small": {"seeds": 3, "steps": 3}},
    arms=("method", "baseline"),
    run=run,
    judge=judge,
)


def without_seconds(value):
    if isinstance(value, dict):
        return {k: without_seconds(v) for k, v in value.items() if k != "seconds"}
    return [without_seconds(v) for v in value] if isinstance(value, list) else value


def test_rows_come_seed_by_seed_with_one_thread_each():
    seen = []
    result = STUDY.execute("smoke", seed=4, progress=lambda *event: seen.append(event))
    assert [(r.arm, r.seed) for r in result.rows] == [
        ("method", 4), ("baseline", 4), ("method", 5), ("baseline", 5)
    ]  # fmt: skip
    assert result.rows.arms == ["method", "baseline"] and result.seeds == [4, 5]
    assert all(row.extra["threads"] == 1 for row in result.rows)
    assert [e[:2] for e in seen] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert all(row.seconds > 0 for row in result.rows)


def test_the_dictionary_is_json_and_the_same_in_one_process_and_in_two():
    one, two = (STUDY.execute("smoke", workers=Workers(jobs), fresh=True).to_dict() for jobs in (1, 2))
    assert json.dumps(without_seconds(one)) == json.dumps(without_seconds(two))
    fields = {"slug", "preset", "seeds", "arms", "effect", "ci", "verdict", "rule"}
    assert fields <= set(one) and one["ci"] == ["-inf", "inf"]
    assert {"params", "active_params", "flops", "steps", "metric"} <= set(one["arms"][0])
    assert json.loads(json.dumps(one, allow_nan=False))["arms"][0]["extra"]["nan"] == "nan"


def test_the_result_prints_itself_with_the_verdict_and_the_rule():
    result = STUDY.execute("smoke")
    assert "reproduced: The method is higher." in str(result) and "2 seeds" in str(result)
    assert "**reproduced**" in result._repr_markdown_() and STUDY.rule in result._repr_markdown_()
    assert str(result).startswith("toy: One is more than zero.\n") and "Tested" not in str(result)
    assert "Seconds a run: method " in str(result) and "Seconds" not in repr(result) + result._repr_markdown_()


def test_title_and_claim_are_the_catalogue_s_and_what_is_tested_of_it_is_shown():
    narrow = replace(STUDY, tested="Two is more than one.")
    found = narrow.execute("smoke")
    plain = found.to_dict()
    assert (plain["slug"], plain["title"], plain["claim"]) == ("toy", "Toy", TOY.claim)
    assert plain["tested"] == "Two is more than one." and STUDY.execute("smoke").to_dict()["tested"] is None
    assert "Tested here: Two is more than one." in str(found)
    assert found._repr_markdown_().startswith("*Tested here:* Two is more than one.\n\n| arm |")
    assert load_study("rmoe").system == method("rmoe")


def test_arms_may_depend_on_the_settings():
    study = replace(STUDY, arms=lambda settings: [f"method at {settings['steps']}"] * 2)
    assert study.arms_of({"steps": 3}) == ["method at 3"] * 2 and STUDY.arms_of({}) == ["method", "baseline"]


def test_wrong_input_is_named(planned):
    with pytest.raises(InputError, match="preset 'smal' is unknown; did you mean 'small'"):
        STUDY.execute("smal")
    with pytest.raises(InputError, match="seed is -1"):
        STUDY.execute("smoke", seed=-1)
    with pytest.raises(InputError, match="jobs is 0"):
        STUDY.execute("smoke", workers=Workers(0))
    with pytest.raises(InputError, match="no study yet"):
        load_study(planned.slug)
