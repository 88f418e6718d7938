"""A table of one's own: categories, vocabularies of the training rows, splits, and what is refused."""

import datetime

import pyarrow as pa
import pytest
import torch

from workbench.errors import InputError
from workbench.lib.data.tables import own_table

N = 200


def columns(**changes):
    return {
        "colour": ["red", "blue", None, "green"] * (N // 4),
        "size": [i % 7 for i in range(N)],
        "day": [datetime.date(2020, 1, 1) + datetime.timedelta(days=(37 * i) % N) for i in range(N)],
        "liked": [i % 3 == 0 for i in range(N)],
    } | changes


def test_ids_are_of_the_training_rows_and_what_is_missing_is_zero():
    made = own_table(pa.table(columns()), "liked", ["colour", "size"])
    assert made.fields == ("colour", "size") and made.sizes == (4, 8)
    ids = torch.cat([ids for ids, _ in made.splits.values()])
    assert len(ids) == N and int((ids[:, 0] == 0).sum()) == N // 4
    assert all(int(ids[:, f].max()) < size for f, size in enumerate(made.sizes))
    assert sum(float(y.sum()) for _, y in made.splits.values()) == sum(i % 3 == 0 for i in range(N))
    again = own_table(pa.table(columns()), "liked", ["colour", "size"])
    assert all(torch.equal(a[0], b[0]) for a, b in zip(made.splits.values(), again.splits.values(), strict=True))


def test_in_time_training_comes_before_the_test_and_what_is_new_is_unknown():
    rare = ["late" if (37 * i) % N >= 0.95 * N else "early" for i in range(N)]
    made = own_table(pa.table(columns(colour=rare)), "liked", ["colour"], time="day")
    assert [len(y) for _, y in made.splits.values()] == [160, 20, 20]
    assert made.sizes == (2,) and int((made.splits["test"][0] == 0).sum()) == 10  # "late" was not there to be learned


def test_a_dataframe_will_do():
    pandas = pytest.importorskip("pandas")
    made = own_table(pandas.DataFrame(columns()), "liked", ["colour", "size"])
    assert made.sizes == (4, 8)


@pytest.mark.parametrize(
    ("changes", "arguments", "said"),
    [
        ({}, {"fields": ["shape"]}, "shape"),
        ({}, {"fields": ["liked"]}, "no column twice"),
        ({}, {"fields": ["size", "day"], "time": "day"}, "no column twice"),
        ({}, {"fields": ["size"], "time": "liked"}, "no column twice"),
        ({"liked": [1] * N}, {"fields": ["size"]}, "the same in all rows of train, validation, test"),
        ({}, {"fields": ["day"]}, "'day' is date32"),
        ({}, {"fields": ["size"], "time": "colour"}, "'colour' is string but must be dates or numbers"),
        ({"size": [-1] * N}, {"fields": ["size"]}, "'size' has -1"),
        ({"size": [0.5] * N}, {"fields": ["size"]}, "'size' is double"),
        ({"liked": [2] * N}, {"fields": ["size"]}, "'liked' has 2"),
        ({"liked": [None] * N}, {"fields": ["size"]}, "'liked' has None"),
        ({"day": [None] * N}, {"fields": ["size"], "time": "day"}, "'day' is null"),
        ({"day": [float("nan")] * N}, {"fields": ["size"], "time": "day"}, "'day' lacks values"),
    ],
)
def test_what_is_no_table_of_categories_is_refused(changes, arguments, said):
    with pytest.raises(InputError, match=said):
        own_table(pa.table(columns(**changes)), "liked", **arguments)


def test_whole_numbers_of_which_some_are_missing_are_whole_numbers():
    missing = [None if i % 7 == 3 else float(i % 7) for i in range(N)]
    made = own_table(pa.table(columns(size=missing)), "liked", ["size"])
    assert made.sizes == (7,)


def test_few_rows_and_names_that_are_there_twice_are_refused():
    with pytest.raises(InputError, match="or there are none"):
        own_table(pa.table(columns()).slice(0, 5), "liked", ["size"])
    twice = pa.Table.from_arrays([pa.array([1, 2]), pa.array([1, 0]), pa.array([1, 2])], ["a", "liked", "a"])
    with pytest.raises(InputError, match="'a' more than once"):
        own_table(twice, "liked")


def test_what_is_no_table_at_all_is_refused():
    with pytest.raises(InputError, match="table is list"):
        own_table([1, 2], "liked")
