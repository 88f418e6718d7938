"""The picture of a ranking."""

import pytest

from workbench.errors import InputError
from workbench.figures.ranking import ranking

TITLES = {"title": "ranks", "x_title": "rating", "y_title": "accuracy"}


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_every_candidate_is_a_point_of_its_group(theme: str):
    figure = ranking([1, 2, 3], [0.1, 0.3, 0.2], ["a", "<b>", "c"], groups=["x", "y", "x"], theme=theme, **TITLES)
    first, second = figure.data
    assert (list(first.x), list(first.y), first.name) == ([1, 3], [0.1, 0.2], "x") and list(second.x) == [2]
    assert second.hovertext == ("&lt;b&gt;",) and figure.layout.showlegend
    assert figure.layout.xaxis.title.text == "rating" and figure.layout.yaxis.title.text == "accuracy"
    assert not ranking([1], [2], ["a"], **TITLES).layout.showlegend


def test_one_number_each():
    with pytest.raises(InputError, match="have 1, 2, 1 and 1 entries"):
        ranking([1], [1, 2], ["a"], **TITLES)
