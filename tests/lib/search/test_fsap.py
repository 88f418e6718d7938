"""FSAP: its prompts, what reading shows, the table, and the whole of it in the sandbox."""

import math
import random
import statistics
from dataclasses import replace

import pytest
from scipy.stats import ttest_ind

from workbench.beds import programs
from workbench.errors import InputError
from workbench.lib.search.fsap import (
    OfflineGenerator,
    build_prompt,
    corpus,
    evaluate,
    fsap_run,
    source_problem,
)
from workbench.lib.search.fsap_generators import CORRUPTIONS, Info
from workbench.lib.search.fsap_programs import PLANS, write
from workbench.lib.search.fsap_table import OK, Trial, balanced_mean, cohens_d, compare, diversity

CODE = write(PLANS["deep"])


@pytest.fixture(scope="module")
def images():
    return programs.images("digit", 0, train=40, asked=20)


class Echo:
    """Returns the main program."""

    info = Info("echo", "main", False)

    def __call__(self, prompt: str) -> str:
        return prompt[prompt.index("```python") :]


@pytest.mark.parametrize("n", [1, 3, 6])
def test_a_prompt_has_n_examples_and_never_the_main_one(n: int):
    examples = corpus("rotation")
    made = build_prompt(examples[2], examples, n, 5)
    assert made.text.count("Supporting Model") == len(made.support) == n and not made.clipped
    assert examples[2].name not in {example.name for example in made.support} and made.text.count(examples[2].code) == 1
    assert len({example.name for example in made.support}) == n
    assert made == build_prompt(examples[2], examples, n, 5) and made != build_prompt(examples[2], examples, n, 6)
    assert build_prompt(examples[2], examples, n + 1, 5).support[:n] == made.support
    assert all(f"{example.accuracy:.4f}" in made.text for example in made.support)


def test_more_examples_than_there_are_is_clipped_and_said():
    examples = corpus("digit")
    made = build_prompt(examples[0], examples, 50, 0)
    assert made.clipped and made.wanted == 50 and len(made.support) == len(examples) - 1
    with pytest.raises(InputError, match="n is 0"):
        build_prompt(examples[0], examples, 0, 0)
    with pytest.raises(InputError, match="dataset is 'cifar' but"):
        corpus("cifar")


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("class Net", "class Network", "lacks Net"),
        ("def supported_hyperparameters", "def hyperparameters", "lacks supported_hyperparameters"),
        ("def learn", "def teach", "Net lacks learn"),
        ('"dropout"}', '"dropout", "decay"}', "declares the hyper-parameters decay, dropout, lr, momentum and reads"),
        ('prm["momentum"]', "0.9", "and reads dropout, lr"),
        ('prm["momentum"]', 'prm.get("momentum")', None),
        ('prm["momentum"]', 'self.prm["momentum"]', None),
        ('return {"lr"', '"""The names."""\n    return {"lr"', None),
    ],
)
def test_what_reading_shows_of_the_contract(old: str, new: str, said: str | None):
    problem = source_problem(CODE.replace(old, new))
    assert problem is None if said is None else said in problem
    with pytest.raises(InputError, match="does not parse"):
        source_problem("(")


def test_what_is_broken_is_named_by_kind_and_what_is_not_is_tried(images):
    kinds = {
        "unclosed": "syntax", "import": "import", "lacks a method": "contract", "unused hyper-parameter": "contract",
        "wrong width": "shape", "wrong channels": "error", "loops": "time",
    }  # fmt: skip
    sandbox = programs.own_sandbox()
    before, found = sandbox.limits, {}
    for what, corrupt in CORRUPTIONS.items():
        sandbox.limits = replace(before, seconds=1.0) if what == "loops" else before
        outcome, accuracy = evaluate(corrupt(CODE), images, sandbox)
        assert math.isnan(accuracy)
        found[what] = outcome.kind
    sandbox.limits = before
    assert found == kinds
    assert evaluate(CODE, images, sandbox, most_params=100)[0].kind == "parameters"
    assert evaluate(CODE, images, sandbox, most_macs=100)[0].kind == "macs"
    outcome, accuracy = evaluate(CODE, images, sandbox)
    assert outcome.ok and 0 <= accuracy <= 1 and (outcome, accuracy)[1] == evaluate(CODE, images, sandbox)[1]
    with pytest.raises(InputError, match="epochs is 0"):
        evaluate(CODE, images, sandbox, epochs=0)


def test_of_a_generator_that_returns_the_main_program_nothing_is_accepted(images):
    trials = fsap_run(Echo(), [images], programs.own_sandbox(), (1, 3), 3)
    assert [trial.kind for trial in trials] == ["duplicate"] * 6
    with pytest.raises(InputError, match="no data set with a valid program"):
        balanced_mean(trials)
    assert diversity(trials)["copied"] == 1


def test_two_runs_with_one_seed_are_the_same_table(images):
    sandbox = programs.own_sandbox()
    first, again = (fsap_run(OfflineGenerator(1), [images], sandbox, (1, 3), 2) for _ in range(2))
    assert [replace(t, accuracy=0.0) for t in first] == [replace(t, accuracy=0.0) for t in again]
    assert all(a.accuracy == b.accuracy or a.kind != OK for a, b in zip(first, again, strict=True))
    assert [t.main for t in first[:2]] == [t.main for t in first[2:]], "the main programs are the same for every n"
    assert all(len(t.shown) == t.n + 1 for t in first) and OK in {t.kind for t in first}
    with pytest.raises(InputError, match="per_n is 0"):
        fsap_run(OfflineGenerator(1), [images], sandbox, per_n=0)


def trials_of(table: dict[int, dict[str, list[float]]]) -> list[Trial]:
    return [
        Trial(n, name, "main", OK, accuracy=value)
        for n, sets in table.items()
        for name, values in sets.items()
        for value in values
    ]


def test_the_balanced_mean_is_the_pooled_one_where_counts_are_equal_and_no_other_one_elsewhere():
    table = {1: {"easy": [0.9, 0.8], "hard": [0.3, 0.2]}, 3: {"easy": [0.9, 0.9], "hard": [0.5, 0.1]}}
    for setting in balanced_mean(trials_of(table)).values():
        assert setting.mean == pytest.approx(setting.pooled) and setting.low < setting.mean < setting.high
    twice = {n: sets | {"easy": sets["easy"] * 2} for n, sets in table.items()}
    for n, setting in balanced_mean(trials_of(twice)).items():
        assert setting.mean == pytest.approx(balanced_mean(trials_of(table))[n].mean) and setting.mean < setting.pooled


def test_the_pooled_mean_is_led_astray_where_the_balanced_one_is_not():
    """Simpson: better on both sets, and worse in the pool, for most of its programs are of the hard one."""
    simpson = {1: {"easy": [0.90] * 8, "hard": [0.30] * 2}, 3: {"easy": [0.92] * 2, "hard": [0.32] * 8}}
    one, three = (balanced_mean(trials_of(simpson))[n] for n in (1, 3))
    assert three.mean == pytest.approx(one.mean + 0.02) and three.pooled < one.pooled - 0.2


def test_only_sets_that_all_settings_have_count_and_failures_stay_in_sight():
    table = {1: {"easy": [0.9], "hard": [0.3]}, 6: {"easy": [0.8]}}
    trials = [*trials_of(table), *(Trial(6, "hard", "main", "shape") for _ in range(3))]
    found = balanced_mean(trials)
    assert found[1].by_dataset == {"easy": 0.9} and found[6].success == 0.25 and found[6].kinds == {"ok": 1, "shape": 3}
    assert math.isinf(found[1].high)


def test_comparisons_are_welchs_and_cohens_and_holms():
    draw = random.Random(0)
    sets = {"easy": 0.8, "hard": 0.3}
    table = {n: {name: [draw.gauss(mean, 0.05) for _ in range(6)] for name, mean in sets.items()} for n in (1, 3, 6)}
    found = {(one.n, one.dataset): one for one in compare(trials_of(table))}
    assert set(found) == {(3, "easy"), (3, "hard"), (6, "easy"), (6, "hard")}
    for (n, name), one in found.items():
        a, b = table[n][name], table[1][name]
        test = ttest_ind(a, b, equal_var=False)
        assert (one.t, one.p) == pytest.approx((test.statistic, test.pvalue)) and one.adjusted >= one.p
        pooled = math.sqrt((statistics.variance(a) + statistics.variance(b)) / 2)
        assert one.d == pytest.approx((statistics.fmean(a) - statistics.fmean(b)) / pooled) == cohens_d(a, b)
    assert compare(trials_of({1: {"easy": [0.5, 0.5]}, 3: {"easy": [0.6, 0.6]}})) == []


def test_diversity_counts_hashes_plans_and_copies():
    one, other = write(PLANS["plain"]), write(PLANS["wide"])
    trials = [Trial(1, "digit", "plain", OK, code=code, shown=(one,)) for code in (one, one + "\n", other)]
    found = diversity(trials)
    assert found["hashes"] == found["plans"] == found["copied"] == pytest.approx(2 / 3) and 0 < found["overlap"] <= 1
    assert all(math.isnan(value) for value in diversity([]).values())
