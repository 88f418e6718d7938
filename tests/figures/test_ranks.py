"""Figures of several processes."""

import numpy as np
import pytest

from workbench.figures import ranks


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_lines_have_a_name_a_unit_and_their_null(theme: str):
    steps = np.array([0, 10])
    figure = ranks.rank_lines(
        {"rank 0": (steps, np.array([0.8, 1.1])), "rank <1>": (steps, np.array([1.2, 0.9]))},
        title="Work",
        subtitle="of an even share",
        unit="x even",
        null=(1.0, "even"),
        limits=(0.0, 1.5),
        theme=theme,
        step=10,
    )
    assert [trace.name for trace in figure.data] == ["rank 0", "rank &lt;1&gt;"]
    assert figure.layout.yaxis.title.text == "x even" and figure.layout.yaxis.range == (0.0, 1.5)
    assert 1.0 in {shape.y0 for shape in figure.layout.shapes}


def test_a_step_is_computing_and_waiting_which_add_up_to_it():
    figure = ranks.time_by_rank(np.array([0.05, 0.06]), np.array([0.02, 0.01]), title="Step", ceiling=0.1)
    computing, waiting = (np.array(trace.y) for trace in figure.data)
    np.testing.assert_allclose(computing + waiting, [50, 60])
    np.testing.assert_allclose(waiting, [20, 10])
    assert figure.layout.yaxis.range == (0, 100)


def test_who_computes_is_in_shares_of_all():
    figure = ranks.who_computes(np.array([[3, 1], [2, 2]]), title="Travel")
    np.testing.assert_allclose(figure.data[0].z, [[37.5, 12.5], [25, 25]])
    assert "25 % is even" in figure.layout.title.text
    assert not np.isnan(ranks.who_computes(np.zeros((2, 2)), title="Nothing").data[0].z).any()
