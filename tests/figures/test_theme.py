"""The shared parts of all figures: colours, scales centred at the null, marks, names."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from workbench.errors import InputError
from workbench.figures import theme


@pytest.mark.parametrize("name", ["light", "dark"])
def test_a_figure_has_title_subtitle_and_named_axes(name):
    figure = theme.blank(name, "Load", "tokens per expert", x="step", y="tokens")
    assert "<b>Load</b>" in figure.layout.title.text
    assert "tokens per expert" in figure.layout.title.text
    assert (figure.layout.xaxis.title.text, figure.layout.yaxis.title.text) == ("step", "tokens")
    assert figure.layout.template.layout.paper_bgcolor == theme.THEMES[name].card


def test_axis_settings_keep_the_axis_title():
    figure = theme.blank("light", "t", x="step", xaxis={"range": [0, 4]})
    assert figure.layout.xaxis.title.text == "step"
    assert figure.layout.xaxis.range == (0, 4)


def test_an_unknown_theme_is_an_input_error_with_the_near_name():
    with pytest.raises(InputError, match="theme 'drak' is unknown; did you mean 'dark'"):
        theme.blank("drak", "t")


@given(low=st.floats(-5, 0), up=st.floats(0.1, 5), high=st.floats(0.1, 5))
def test_a_diverging_scale_has_its_neutral_colour_at_the_centre(low, up, high):
    centre, top = low + up, low + up + high
    stops = theme.diverging("light", low, centre, top)
    assert [stop for stop, _ in stops] == sorted(stop for stop, _ in stops)
    assert stops[0][0] == 0 and stops[-1][0] == 1
    neutral = [stop for stop, colour in stops if colour == theme.LIGHT.diverging[2]]
    assert neutral == [pytest.approx((centre - low) / (top - low))]


def luminance(colour: str) -> float:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("name", ["light", "dark"])
def test_text_and_lines_stand_out_from_the_card(name):
    colours = theme.THEMES[name]

    def contrast(colour: str) -> float:
        light, dark = sorted((luminance(colour), luminance(colours.card)), reverse=True)
        return (light + 0.05) / (dark + 0.05)

    assert contrast(colours.ink) > 7  # WCAG AAA for text
    assert contrast(colours.muted) > 4.5  # AA
    assert min(map(contrast, colours.cycle)) > 2.9  # graphical objects


def test_ordered_colours_are_distinct_and_a_single_one_is_allowed():
    assert len(set(theme.LIGHT.ordered(12))) == 12
    assert len(theme.LIGHT.ordered(1)) == 1


def test_the_step_mark_is_hidden_without_a_step():
    figure = theme.blank("light", "t")
    theme.mark_step(figure, "light", None)
    theme.mark_step(figure, "light", 40)
    hidden, shown = figure.layout.shapes
    assert (hidden.name, hidden.visible) == (theme.STEP_MARK, False)
    assert (shown.x0, shown.x1, shown.visible) == (40, 40, True)


def test_a_null_line_carries_its_name():
    figure = theme.blank("light", "t")
    theme.null_line(figure, "light", 0.5, "random signs")
    assert figure.layout.shapes[0].y0 == figure.layout.shapes[0].y1 == 0.5
    assert (figure.layout.annotations[0].text, figure.layout.annotations[0].y) == ("random signs", 0.5)


@pytest.mark.parametrize(
    ("names", "short"),
    [
        (["blocks.0.ffn", "blocks.1.ffn"], ["0", "1"]),
        (["blocks.0.ffn", "blocks.10.ffn", "head"], ["blocks.0.ffn", "blocks.10.ffn", "head"]),
        (["a.x", "a.y"], ["x", "y"]),
        (["a", "a.b"], ["a", "a.b"]),  # one would be left without a name
        (["only.one"], ["only.one"]),
        ([], []),
    ],
)
def test_short_names_leave_out_what_all_share(names, short):
    assert theme.short_names(names) == short


@given(st.lists(st.text("ab.", min_size=1, max_size=6), max_size=5))
def test_short_names_stay_as_distinct_as_the_names(names):
    short = theme.short_names(names)
    assert len(short) == len(names)
    assert len(set(short)) == len(set(names))
    assert all(short)


@pytest.mark.parametrize(("n", "ticks"), [(1, [0]), (8, list(range(8))), (16, list(range(0, 16, 2)))])
def test_expert_ticks_number_from_zero(n, ticks):
    assert theme.expert_ticks(n)["tickvals"] == ticks


def test_expert_ticks_stay_few():
    assert all(len(theme.expert_ticks(n)["tickvals"]) <= 9 for n in range(1, 9 * 1024))


def test_rgba_takes_both_notations():
    assert theme.rgba("#0a3d7c", 0.5) == "rgba(10,61,124,0.5)"
    assert theme.rgba("rgb(10, 61, 124)", 0.5) == "rgba(10,61,124,0.5)"


def test_colour_bar_labels_the_given_values():
    bar = theme.colour_bar({0: "0 dead", 1: "1 uniform"})
    assert (bar["tickvals"], bar["ticktext"]) == ([0, 1], ["0 dead", "1 uniform"])
    assert np.isfinite(bar["thickness"])


def test_a_long_title_has_several_lines_and_room_for_them():
    short, long = theme.blank("light", "word"), theme.blank("light", "word & " * 40)
    assert long.layout.title.text.count("<br>") == short.layout.title.text.count("<br>") + 2
    assert "&amp;" in long.layout.title.text and "...<" not in long.layout.title.text
    assert long.layout.margin.t == 60 + 2 * theme.LINE and short.layout.margin.t is None
    assert theme.blank("light", "word " * 40, margin={"t": 70}).layout.margin.t == 70 + 2 * theme.LINE
