"""Figures of mixtures: every mixture is where its weights are, and says all its numbers where one points at it."""

import numpy as np
import pytest

from workbench.errors import InputError
from workbench.figures import mixtures
from workbench.figures.theme import LIGHT

DOMAINS = ["python", "<b>docs", "names"]
WEIGHTS = np.array([[0.5, 0.25, 0.25], [0.25, 0.5, 0.25], [0.25, 0.25, 0.5]])
LOSSES = {"proxy": [2.5, 2.25, 2.75], "true": [2.0, 2.125, 2.375]}


def said(trace):
    return [line.replace("<br>", "\n") for line in trace.hovertext]


def test_a_triangle_for_each_loss_with_the_best_of_both_in_each():
    figure = mixtures.ternary(WEIGHTS, LOSSES, DOMAINS, unit="bits/byte")
    dots = [trace for trace in figure.data if trace.hovertext is not None and len(trace.a)]
    assert [trace.subplot for trace in dots] == ["ternary", "ternary2"]
    for trace, values in zip(dots, LOSSES.values(), strict=True):
        np.testing.assert_allclose(np.stack([trace.a, trace.b, trace.c], 1), WEIGHTS)
        np.testing.assert_allclose(trace.marker.color, values)
        assert (trace.marker.cmin, trace.marker.cmax) == (min(values), max(values))
        assert trace.marker.colorbar.title.text == "bits/byte"
        assert trace.marker.colorscale[0][1] == LIGHT.sequential[-1]  # the lowest is the darkest
    rings = [trace for trace in figure.data if trace.hovertext is None]
    assert [(ring.subplot, ring.name, *ring.a) for ring in rings] == [
        ("ternary", "best by proxy", 0.25),
        ("ternary", "best by true", 0.5),
        ("ternary2", "best by proxy", 0.25),
        ("ternary2", "best by true", 0.5),
    ]
    assert [ring.showlegend for ring in rings] == [True, True, False, False]
    first, second = figure.layout.ternary, figure.layout.ternary2
    assert first.domain.x[1] < second.domain.x[0] and second.domain.x[1] < 1
    assert [getattr(first, f"{side}axis").title.text for side in "abc"] == ["python", "&lt;b&gt;docs", "names"]
    assert [note.text for note in figure.layout.annotations] == ["<b>proxy</b>", "<b>true</b>"]


def test_a_mixture_says_its_weights_its_losses_and_their_ranks():
    line = said(mixtures.ternary(WEIGHTS, LOSSES, DOMAINS, unit="bits/byte").data[0])[1]
    assert line.split("\n") == [
        "python 0.250 · &lt;b&gt;docs 0.500 · names 0.250",
        "proxy <b>2.25</b> bits/byte (rank 1 of 3)",
        "true <b>2.125</b> bits/byte (rank 2 of 3)",
    ]


def test_what_was_not_measured_is_grey_and_says_so():
    figure = mixtures.ternary(WEIGHTS, {"true": [2.0, np.nan, 1.0]}, DOMAINS)
    measured, missing, ring = figure.data
    assert list(measured.a) == [0.5, 0.25] and list(measured.marker.color) == [2.0, 1.0]
    assert missing.marker.color == LIGHT.undefined and said(missing)[0].endswith("true not measured")
    assert list(ring.c) == [0.5] and "rank 2 of 2" in said(measured)[0]


def test_nothing_measured_has_no_best():
    for values in ([], [np.nan] * 3):
        weights = WEIGHTS[: len(values)]
        assert all(trace.hovertext is not None for trace in mixtures.ternary(weights, {"true": values}, DOMAINS).data)
        lines = mixtures.parallel(weights, {"true": values}, DOMAINS).data
        assert len(lines) == len(values) and not any(line.showlegend for line in lines)


def test_two_domains_are_a_line_over_the_share_of_the_first():
    weights = np.array([[0.75, 0.25], [0.25, 0.75], [0.5, 0.5]])
    figure = mixtures.segment(weights, LOSSES, DOMAINS[:2], unit="bits/byte")
    proxy, true = figure.data
    assert list(proxy.x) == [0.25, 0.5, 0.75] and list(proxy.y) == [2.25, 2.75, 2.5]
    assert list(true.marker.symbol) == ["circle", "circle", "star"]
    assert "python 0.250" in said(true)[0]
    assert (figure.layout.xaxis.title.text, figure.layout.yaxis.title.text) == ("share of python", "loss, bits/byte")


def test_many_domains_are_parallel_coordinates_with_each_loss_on_its_own_scale():
    weights = np.array([[0.4, 0.3, 0.2, 0.1], [0.1, 0.2, 0.3, 0.4], [0.25] * 4])
    figure = mixtures.parallel(weights, LOSSES, [*DOMAINS, "abc"], unit="bits")
    worst, middle, best = figure.data
    np.testing.assert_allclose(best.y, [0.1, 0.2, 0.3, 0.4, 0.0, 0.4 / 3])
    np.testing.assert_allclose(worst.y, [0.25, 0.25, 0.25, 0.25, 0.4, 0.4])
    assert [line.showlegend for line in figure.data] == [False, False, True]
    assert best.line.width > middle.line.width and best.line.color == LIGHT.accent
    assert list(figure.layout.xaxis.ticktext) == [
        "python",
        "&lt;b&gt;docs",
        "names",
        "abc",
        "<b>proxy</b>",
        "<b>true</b>",
    ]
    assert [note.text for note in figure.layout.annotations] == ["2.25 bits", "2.75 bits", "2 bits", "2.375 bits"]


def test_losses_that_are_all_the_same_lie_in_the_middle():
    figure = mixtures.parallel(WEIGHTS, {"proxy": [1.0, 1.0, 1.0]}, DOMAINS)
    assert {line.y[-1] for line in figure.data} == {0.25}
    dots = mixtures.ternary(WEIGHTS, {"proxy": [1.0, 1.0, 1.0]}, DOMAINS).data[0].marker
    assert (dots.cmin, dots.cmax) == (1, 2)


@pytest.mark.parametrize(("k", "kind"), [(2, "scatter"), (3, "scatterternary"), (4, "scatter")])
def test_the_map_is_by_the_number_of_domains(k, kind):
    figure = mixtures.mixture_map(np.full((2, k), 1 / k), {"true": [1.0, 2.0]}, list("abcd")[:k])
    assert figure.data[0].type == kind


def test_the_regret_is_that_of_the_mixture_the_proxy_chooses():
    figure = mixtures.against_truth(*LOSSES.values(), WEIGHTS, DOMAINS, unit="bits/byte", subtitle="ρ = 0.50")
    every, chosen, best = figure.data
    assert list(every.x) == LOSSES["proxy"] and list(every.y) == LOSSES["true"]
    assert (list(chosen.x), list(best.x)) == ([2.25], [2.5])
    assert "ρ = 0.50 · regret 0.125 bits/byte</span>" in figure.layout.title.text
    assert said(chosen)[0].startswith("python 0.250")


@pytest.mark.parametrize(
    ("weights", "losses", "domains", "message"),
    [
        (WEIGHTS, LOSSES, DOMAINS[:2], "domains has 2 names but must have 3"),
        (WEIGHTS[:, :2], LOSSES, DOMAINS, r"weights has shape \(3, 2\) but must be \(mixtures, 3\)"),
        (WEIGHTS, {"true": [1.0]}, DOMAINS, r"losses\['true'\] has shape \(1,\) but must be \(3,\)"),
    ],
)
def test_what_does_not_fit_is_refused(weights, losses, domains, message):
    with pytest.raises(InputError, match=message):
        mixtures.ternary(weights, losses, domains)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_every_figure_has_a_title_and_the_theme_it_was_asked_for(theme):
    figures = [
        mixtures.segment(WEIGHTS[:, :2], LOSSES, DOMAINS[:2], theme=theme),
        mixtures.ternary(WEIGHTS, LOSSES, DOMAINS, theme=theme),
        mixtures.parallel(WEIGHTS, LOSSES, DOMAINS, theme=theme),
        mixtures.against_truth(*LOSSES.values(), WEIGHTS, DOMAINS, theme=theme),
    ]
    cards = {figure.layout.template.layout.paper_bgcolor for figure in figures}
    assert len(cards) == 1 and all(figure.layout.title.text.startswith("<b>") for figure in figures)
