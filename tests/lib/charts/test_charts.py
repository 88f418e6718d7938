"""Charts as metadata and as scripts in three languages: what is written is read back, and what is broken is refused."""

import random
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from workbench.errors import InputError
from workbench.lib.charts import (
    COLOURS,
    KINDS,
    LANGUAGES,
    LEGENDS,
    ChartSpec,
    Series,
    parse,
    render,
    renderers,
    run_python,
    sample_specs,
    score,
    verify,
)
from workbench.lib.charts import verdict as verifying
from workbench.lib.charts.dataset import build_aligned_dataset
from workbench.lib.charts.grammar import ScriptError
from workbench.lib.charts.sample import tables
from workbench.lib.charts.spec import PIE_TOTAL, TOP
from workbench.lib.charts.worker import refuse

BAR = ChartSpec("bar", "iris", "class", "petal width", ("a", "b"), (Series("w", "red", (3, 7)),), "upper left", True)
EVERY = list({spec.kind: spec for spec in sample_specs(60, seed=3)}.values())


def odd_specs(n: int) -> list[ChartSpec]:
    """Charts of every kind with labels that each language has to escape."""
    rng = random.Random(0)

    def label(i: int) -> str:
        text = "".join(rng.choice("ab_%&#$()/.+- ") for _ in range(rng.randint(0, 6))).strip()
        return f"{i}{text}"

    found = []
    for i in range(n):
        kind, count = KINDS[i % len(KINDS)], rng.randint(1, 5)
        colours = rng.sample(list(COLOURS), 6)
        if kind == "pie":
            cuts = sorted(rng.sample(range(1, PIE_TOTAL), max(count - 1, 1)))
            shares = [b - a for a, b in zip([0, *cuts], [*cuts, PIE_TOTAL], strict=True)]
            slices = [Series(label(j), colours[j], (v,)) for j, v in enumerate(shares)]
            found.append(ChartSpec(kind, label(9), "", "", (), tuple(slices)))
            continue
        two = kind == "grouped" or (kind in ("line", "scatter") and rng.random() < 0.5)
        legend = rng.choice(LEGENDS) if two or rng.random() < 0.5 else ""
        steps = [[rng.randint(0, TOP) for _ in range(count)] for _ in range(4)]
        series = tuple(
            Series(label(j) if legend else "", colours[j], tuple(steps[j]), tuple(steps[j + 2] * (kind == "scatter")))
            for j in range(2 if two else 1)
        )
        categories = () if kind == "scatter" else tuple(label(j) for j in range(count))
        found.append(ChartSpec(kind, label(1), label(2), label(3), categories, series, legend, rng.random() < 0.5))
    return found


@pytest.mark.parametrize("language", LANGUAGES)
def test_charts_a_thousand_are_read_back_from_their_scripts(language):
    for spec in [*sample_specs(500, seed=1), *odd_specs(500)]:
        assert parse(render(spec, language), language) == spec


def test_charts_figures_that_scripts_draw_say_the_same():
    specs = [*EVERY, *odd_specs(60)]
    assert {spec.kind for spec in EVERY} == set(KINDS)
    for spec, drawing in zip(specs, run_python([render(spec, "python") for spec in specs], size=64), strict=True):
        assert drawing.error == "" and drawing.spec == spec
        assert drawing.image.shape == (64, 64, 3) and np.ptp(drawing.image) > 100


def test_charts_three_scripts_of_a_row_say_one_chart(tmp_path, monkeypatch):
    monkeypatch.setenv("WORKBENCH_HOME", str(tmp_path))
    data = build_aligned_dataset(20, seed=5)
    assert data.images.shape == (20, 3, 64, 64) and data.images.dtype == torch.uint8
    for i, spec in enumerate(data.specs):
        assert {parse(script, language) for language, script in data.scripts(i).items()} == {spec}
    monkeypatch.setattr("workbench.lib.charts.dataset.run_python", None)  # the second time nothing is drawn
    again = build_aligned_dataset(20, seed=5)
    assert torch.equal(again.images, data.images) and again.specs == data.specs
    assert data.manifest["verified"] == renderers()


def test_charts_rendering_in_another_order_gives_the_same_pixels():
    scripts = [render(spec, "python") for spec in EVERY]
    one, other = run_python(scripts, 64), run_python(scripts[::-1], 64)[::-1]
    assert all(np.array_equal(a.image, b.image) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("language", LANGUAGES)
def test_charts_broken_scripts_are_refused(kind, language):
    spec = next(s for s in EVERY if s.kind == kind)
    script = render(spec, language)
    closing = {"python": ")", "r": ")", "latex": "}"}[language]
    at = script.rindex(closing, 0, script.rindex(spec.title) + len(spec.title) + 3)
    for broken in (script[:at] + script[at + 1 :], script[: len(script) // 2], "", script + "x"):
        with pytest.raises(ScriptError):
            parse(broken, language)
    if language != "python":
        assert not verify(spec, script[:at] + script[at + 1 :], language).ok


@pytest.mark.parametrize(
    ("old", "new"),
    [("color=", "alpha=0.0, color="), ("color=", 'hatch="x", color='), ("legend(loc", 'legend(title="x", loc')],
)
def test_charts_same_data_in_another_style_is_refused(old, new):
    """A figure can hold the right numbers and not show them."""
    script = render(BAR, "python").replace(old, new)
    assert script != render(BAR, "python")
    verdict = verify(BAR, script, "python")
    assert not verdict.ok and verdict.found == BAR and "style" in verdict.reason
    assert verify(BAR, render(BAR, "python") + "ax.set_ylim(0, 10)\n", "python").ok


@pytest.mark.parametrize("language", LANGUAGES)
def test_charts_swapped_attributes_are_noticed(language):
    """Every style that a spec has is in the script and is compared: none is dropped on both sides."""
    other = {
        "kind": "barh",
        "title": "wine",
        "x_label": "group",
        "y_label": "length",
        "categories": ("a", "c"),
        "legend": "lower right",
        "grid": False,
    }
    changed = [ChartSpec(**{**BAR.__dict__, name: value}) for name, value in other.items()]
    for series in (Series("w", "blue", (3, 7)), Series("v", "red", (3, 7)), Series("w", "red", (3, 8))):
        changed.append(ChartSpec(**{**BAR.__dict__, "series": (series,)}))
    scripts = [render(spec, language) for spec in changed]
    assert len({render(BAR, language), *scripts}) == len(changed) + 1
    if language == "python":
        for drawing, spec in zip(run_python(scripts), changed, strict=True):
            assert drawing.spec == spec != BAR
    verdict = verify(BAR, scripts[7], language)
    assert not verdict.ok and "another series" in verdict.reason and verdict.found == changed[7]
    assert verify(BAR, render(BAR, language), language).ok


def test_charts_verdict_says_how_it_was_reached(tmp_path, monkeypatch):
    assert verify(BAR, render(BAR, "python"), "python").how == "executed"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert renderers() == {"python": "executed", "r": "parsed", "latex": "parsed"}
    assert verify(BAR, render(BAR, "r"), "r").how == "parsed"
    for body, ok in (
        ("/usr/bin/touch chart.png chart.pdf; exit 0", True),
        ("echo oops; exit 3", False),
        ("exit 0", False),
    ):
        for name in ("Rscript", "pdflatex"):
            (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
            (tmp_path / name).chmod(0o755)
        for language in ("r", "latex"):
            verdict = verify(BAR, render(BAR, language), language)
            assert (verdict.ok, verdict.how) == (ok, "rendered and parsed")
            assert ok or "ended with" in verdict.reason


@pytest.mark.parametrize(
    "line",
    [
        "import os",
        "ax.figure.savefig('x')",
        "ax.set_title(open('/etc/passwd').read())",
        "ax.remove()",
        "print(1)",
        "x = ax.bar([1], [2])",
        "ax.bar(*[[1], [2]])",
        "while True: pass",
    ],
)
def test_charts_other_code_is_not_run(line):
    head = "import matplotlib.pyplot as plt\nfig, ax = plt.subplots()\n"
    assert refuse(head + line + "\n") and refuse(line)
    assert refuse(render(BAR, "python")) is None


def test_charts_wrong_scripts_do_not_end_the_others():
    good = render(BAR, "python")
    bad = [
        good.replace("[3, 7]", "[3, 7, 1]"),
        good.replace("tab:red", "tab:reed"),
        good + ")",
        good.replace("10", "9"),
    ]
    found = run_python([bad[0], good, *bad[1:], good])
    assert [d.error == "" for d in found] == [False, True, False, False, False, True]
    assert "SyntaxError" in found[4].error or "no Python" in found[4].error or "9" in found[4].error


def test_charts_a_script_that_never_ends_fails_alone(monkeypatch):
    good, calls = render(BAR, "python"), []
    real = verifying._process

    def process(scripts, size, timeout):
        calls.append(len(scripts))
        return ([], "takes longer than 1.0 s") if len(calls) == 1 else real(scripts, size, 60.0)

    monkeypatch.setattr(verifying, "_process", process)
    found = run_python([good, good], timeout=1.0)
    assert [d.error for d in found] == ["takes longer than 1.0 s", ""] and calls == [2, 1]


def test_charts_a_process_is_ended_when_time_is_over():
    results, reason = verifying._process([render(BAR, "python")], 0, 0.001)
    assert results == [] and reason == "takes longer than 0.001 s"


def test_charts_hold_real_numbers_and_come_again():
    specs = sample_specs(40, seed=2)
    assert specs == sample_specs(40, seed=2) and specs[:10] == sample_specs(10, seed=2)
    assert len(set(specs)) == 40 and specs != sample_specs(40, seed=3)
    assert {spec.title for spec in specs} <= set(tables())
    assert all(spec.kind == "pie" for spec in sample_specs(5, kinds=("pie",)))
    names = {name for _, features, _, _ in tables().values() for name in features}
    assert all(spec.x_label in names and spec.y_label in names for spec in specs if spec.kind == "scatter")
    assert tables()["iris"][0].shape == (150, 4) and tables()["diabetes"][0].shape == (442, 11)


def test_charts_score_counts_facts():
    assert score(BAR, BAR) == 1 and score(BAR, None) == 0
    one_off = ChartSpec(**{**BAR.__dict__, "series": (Series("w", "red", (3, 8)),)})
    assert score(BAR, one_off, "value") == 0.5 and score(BAR, one_off, "colour") == 1
    n = BAR.facts().total()
    assert n == 12 and score(BAR, one_off) == pytest.approx((n - 1) / n)
    lying = ChartSpec(**{**BAR.__dict__, "kind": "barh"})
    assert score(BAR, lying, "value") == 0 and score(BAR, lying) == pytest.approx((n - 3) / n)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "bars"}, "kind 'bars' is unknown; did you mean 'bar'"),
        ({"legend": "upper"}, "legend 'upper' is unknown"),
        ({"legend": ""}, "no legend to show it in"),
        ({"title": 'a"b'}, "title holds"),
        ({"title": ""}, "title holds ''"),
        ({"categories": ("a", "a")}, "must differ"),
        ({"categories": ("a", "b", "c")}, "one value for each"),
        ({"series": (Series("w", "pink", (3, 7)),)}, "colour 'pink' is unknown"),
        ({"series": (Series("w", "red", (3, 11)),)}, "whole numbers 0..10"),
        ({"series": (Series("w", "red", (3, -1)),)}, "whole numbers 0..10"),
        ({"series": ()}, "series has 0 entries"),
        ({"kind": "scatter"}, "points have as many x"),
        ({"kind": "pie"}, "a pie has"),
    ],
)
def test_charts_wrong_metadata_is_named(change, message):
    with pytest.raises(InputError, match=re.escape(message)):
        ChartSpec(**{**BAR.__dict__, **change})


def test_charts_wrong_input_is_named():
    with pytest.raises(InputError, match="language 'latx' is unknown; did you mean 'latex'"):
        render(BAR, "latx")
    for call in (lambda: parse("", "java"), lambda: verify(BAR, "", "java")):
        with pytest.raises(InputError, match="language 'java' is unknown"):
            call()
    with pytest.raises(InputError, match="n is 0"):
        sample_specs(0)
    with pytest.raises(InputError, match="kind 'lines' is unknown"):
        sample_specs(3, kinds=("lines",))
    with pytest.raises(InputError, match="size is 40 but must be a multiple of 32"):
        run_python([""], size=40)


def test_charts_are_known_without_matplotlib_or_torch():
    root = Path(__file__).parents[3]
    code = (
        "import sys, workbench.lib.charts; print([m for m in ('matplotlib', 'torch', 'sklearn') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
