"""Rows read themselves: by arm, in the order of the seeds, as values, means and paired differences."""

import pytest
import torch
from torch import nn

from workbench.beds.python_text import python_text
from workbench.errors import InputError
from workbench.lib.core.budget import Budget, measure_budget
from workbench.lib.measures.statistics import paired_interval, tost
from workbench.studies.rows import Row, Rows, trained_row, training_budget

METHOD, BASE = [3.0, 5.0, 4.5], [1.0, 2.0, 2.5]


def made() -> Rows:
    """Seed by seed, as a study runs them."""
    return Rows(
        Row(arm, seed, 10, 5, 100, 3, values[seed], {"load": values[seed] / 10, "name": arm})
        for seed in range(3)
        for arm, values in (("method", METHOD), ("base", BASE))
    )


def test_an_arm_is_its_rows_in_the_order_of_the_seeds():
    rows = made()
    assert rows.arms == ["method", "base"] and len(rows) == 6
    found = rows.arm("base")
    assert isinstance(found, Rows) and [row.seed for row in found] == [0, 1, 2] and found.arms == ["base"]
    with pytest.raises(InputError, match="arm 'bas' is unknown; did you mean 'base'"):
        rows.arm("bas")


def test_what_is_read_is_the_metric_an_extra_or_a_function_of_the_row():
    rows = made()
    assert rows.of("method") == METHOD and rows.of("base", "name") == ["base"] * 3
    assert rows.of("base", lambda row: row.seed) == [0, 1, 2]
    assert rows.mean("base") == pytest.approx(5.5 / 3) and rows.mean("base", "load") == pytest.approx(0.55 / 3)
    assert rows.means() == {"method": pytest.approx(12.5 / 3), "base": pytest.approx(5.5 / 3)}
    assert rows.means("load", ["base"]) == {"base": pytest.approx(0.55 / 3)}
    with pytest.raises(KeyError, match="lod"):
        rows.of("base", "lod")


def test_differences_are_paired_by_seed():
    rows = made()
    assert rows.minus("method", "base") == paired_interval(METHOD, BASE)
    assert rows.minus("method", "base", level=0.9) == paired_interval(METHOD, BASE, 0.9)
    assert rows.minus("method", "base", "load").estimate == pytest.approx(7 / 30)
    assert rows.tost("method", "base", 3.0) == tost(METHOD, BASE, 3.0, paired=True)
    short = Rows(row for row in rows if row.arm == "method" or row.seed)
    with pytest.raises(InputError, match="as many"):
        short.minus("method", "base")


def test_a_trained_row_has_the_operations_of_all_its_steps():
    row = trained_row("method", 2, Budget(10, 5, 100, 4), 7, 0.5, load=0.1)
    assert row == Row("method", 2, 10, 5, 700, 7, 0.5, {"load": 0.1})


def test_the_training_budget_is_that_of_a_batch_of_so_many_rows():
    task, model = python_text({"cap": 16_384, "seq_len": 8}), Bytes()
    found = training_budget(model, task, 4, seed=1)
    assert found.rows == 4 and found == measure_budget(model, task, task.batch("train", 4, torch.Generator()))
    assert training_budget(model, task, 8).flops == 2 * found.flops


class Bytes(nn.Module):
    """The next byte from the present one."""

    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(256, 4), nn.Linear(4, 256)

    def forward(self, tokens, context=None):
        return self.head(self.embedding(tokens))
