"""The square of redundancies says which half is which, and leaves the diagonal undefined."""

import numpy as np
import pytest

from workbench.errors import InputError
from workbench.figures.redundancy import redundancy_square

TEXT = np.array([[1, 0.5, 0.1], [0.5, 1, 0.3], [0.1, 0.3, 1]])


def test_one_kind_is_below_the_diagonal_and_the_other_above():
    figure = redundancy_square(TEXT, -TEXT)
    (heat,) = figure.data
    np.testing.assert_allclose(heat.z, [[np.nan, -0.5, -0.1], [0.5, np.nan, -0.3], [0.1, 0.3, np.nan]])
    assert heat.customdata.tolist()[2] == ["text", "text", "image"] and heat.customdata.tolist()[0][2] == "image"
    assert "◣ text: mean 0.30 · ◥ image: mean -0.30" in figure.layout.title.text
    assert heat.text[0][0] == "" and heat.text[1][0] == "0.50"


def test_values_are_written_in_where_there_is_room_and_undefined_pairs_stay_empty():
    undefined = TEXT.copy()
    undefined[0, 1] = np.nan
    assert redundancy_square(TEXT, undefined).data[0].text[0][1] == ""
    assert redundancy_square(np.eye(13), np.eye(13)).data[0].texttemplate is None
    assert np.isnan(redundancy_square(np.eye(1), np.eye(1)).data[0].z).all()


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_it_has_a_title_and_the_theme_it_was_asked_for(theme: str):
    figure = redundancy_square(TEXT, TEXT, theme=theme, title="Layer 1")
    assert figure.layout.title.text.startswith("<b>Layer 1")


def test_what_is_no_pair_of_squares_is_refused():
    with pytest.raises(InputError, match=r"below and above have shapes \(3, 3\) and \(2, 2\)"):
        redundancy_square(TEXT, np.eye(2))
