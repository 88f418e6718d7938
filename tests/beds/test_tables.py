"""Likes and late flights: ids by training, splits by time, and a plain model between chance and perfect."""

import pytest
import torch
from sklearn.metrics import log_loss, roc_auc_score
from torch import nn

from workbench.beds import tables
from workbench.lib.core.train import TrainConfig, train
from workbench.lib.data.types import Table


@pytest.fixture(scope="module")
def ratings(fetched):
    fetched("movielens-100k")
    return tables.ratings()


def test_the_ratings_are_those_that_are_published(ratings):
    assert ratings.table.fields == ("user", "item", "age", "gender", "occupation", "zip", "year", "genre")
    assert sum(len(y) for _, y in ratings.table.splits.values()) == 72_855
    likes = torch.cat([y for _, y in ratings.table.splits.values()]).mean()
    assert float(likes) == pytest.approx(0.760, abs=5e-4)
    users = {int(user) for ids, _ in ratings.table.splits.values() for user in ids[:, 0]}
    assert len(users) == 943 or 0 in users
    ids, _ = ratings.table.splits["train"]
    for field, size in enumerate(ratings.table.sizes):
        assert ids[:, field].max() == size - 1
    known = ids[:, (0, 1, 2, 3, 4, 5)]
    assert known.min() == 1  # what training sees has an id
    assert 0 < (ids[:, 6] == 0).double().mean() < 1e-3  # but for the two films without a year


def test_no_rating_is_in_two_splits(ratings):
    pairs = {
        split: {tuple(row) for row in ids[:, :2].tolist() if all(row)}
        for split, (ids, _) in ratings.table.splits.items()
    }
    assert pairs["train"].isdisjoint(pairs["test"]) and pairs["train"].isdisjoint(pairs["validation"])


def test_later_ratings_are_of_new_users(ratings):
    unknown = [(ids[:, 0] == 0).double().mean() for ids, _ in tables.ratings("time").table.splits.values()]
    assert unknown[0] == 0 and min(unknown[1:]) > 0.5


def test_a_plain_model_learns_something(ratings):
    torch.manual_seed(0)
    model = tables.FieldsMLP(ratings.table.sizes, 4, (16,))
    train(model, ratings, TrainConfig(150, 256, lr=1e-2, weight_decay=0.0, warmup=5, eval_batches=1))
    found = ratings.evaluate(model, "test")
    assert 0.72 < found["auc"] < 0.9 and 0.3 < found["log_loss"] < 0.55
    assert ratings.evaluate(model, "test") == found


def test_flights_are_in_the_order_of_the_months(fetched):
    fetched("flights")
    task = tables.flights()
    assert {split: len(y) for split, (_, y) in task.table.splits.items()} == {
        "train": 244_737,
        "validation": 28_618,
        "test": 53_991,
    }
    assert task.table.splits["test"][1].double().mean() == pytest.approx(0.2499, abs=1e-4)
    torch.manual_seed(0)
    model = tables.FieldsMLP(task.table.sizes, 4, (16,))
    train(model, task, TrainConfig(60, 512, lr=1e-2, weight_decay=0.0, warmup=5, eval_batches=1))
    assert 0.55 < task.evaluate(model, "test")["auc"] < 0.7


class First(nn.Module):
    """The first field as the logit."""

    def forward(self, ids, context=None):
        return ids[:, 0].float()


def test_the_area_under_the_curve_is_over_the_whole_split():
    ids, y = torch.arange(10_000)[:, None], (torch.arange(10_000) >= 5000).float()
    table = Table("steps", ("at",), (10_000,), dict.fromkeys(("train", "validation", "test"), (ids, y)), {})
    task = tables.YesOrNo(table)
    assert task.evaluate(First())["auc"] == 1  # in batches of 4,096 one alone has no no, and another no yes
    flipped = tables.YesOrNo(Table("steps", ("at",), (10_000,), {s: (ids, 1 - y) for s in table.splits}, {}))
    assert flipped.evaluate(First())["auc"] == 0


class Scores(nn.Module):
    """A logit for each id of the first field."""

    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, ids, context=None):
        return self.logits[ids[:, 0]]


@pytest.mark.parametrize("kind", ["drawn", "many equal", "all equal"])
def test_scikit_learn_measures_the_same(kind):
    """Area and log-loss, of probabilities; ties count half, as the share of pairs that are in order says too."""
    draw, n = torch.Generator().manual_seed(0), 5000
    logits = {
        "drawn": 2 * torch.randn(n, generator=draw, dtype=torch.float64),
        "many equal": torch.randint(-3, 4, (n,), generator=draw).double(),
        "all equal": torch.full((n,), -1.0, dtype=torch.float64),
    }[kind]
    y = (torch.rand(n, generator=draw, dtype=torch.float64) < logits.sigmoid()).float()
    ids = torch.arange(n)[:, None]
    task = tables.YesOrNo(Table("scores", ("at",), (n,), dict.fromkeys(("train", "validation", "test"), (ids, y)), {}))
    found, probabilities = task.evaluate(Scores(logits)), logits.sigmoid().numpy()
    assert found["auc"] == pytest.approx(roc_auc_score(y.numpy(), probabilities), abs=1e-12)
    assert found["log_loss"] == pytest.approx(log_loss(y.numpy(), probabilities), rel=1e-6)
    ahead = logits[y == 1][:, None] - logits[y == 0]
    assert found["auc"] == pytest.approx(float((ahead.sign() + 1).mean() / 2), abs=1e-9)
