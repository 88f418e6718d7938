"""Rows read themselves: by arm, in the order of the seeds, as values, means and paired differences."""

import ast
import pickle
from pathlib import Path

import pytest
import torch
from torch import nn

from workbench.beds.python_text import python_text
from workbench.errors import InputError
from workbench.imports import PACKAGE
from workbench.lib.core.budget import Budget, measure_budget
from workbench.lib.measures import sequential, statistics
from workbench.lib.measures.statistics import mean_interval, paired_interval, paired_p, tost
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


# -- seeds that grow


def test_growing_rows_have_the_intervals_that_hold_at_every_look():
    rows = Rows(
        (
            Row(arm, seed, 10, 5, 100, 3, values[seed] + seed, {"load": values[seed]})
            for seed in range(6)
            for arm, values in (("method", [*METHOD, 4.0, 3.5, 4.2]), ("base", [*BASE, 2.0, 1.5, 1.0]))
        ),
        growing=True,
    )
    a, b = rows.of("method"), rows.of("base")
    assert rows.arm("base").growing and not made().growing
    assert rows.minus("method", "base") == sequential.paired_interval(a, b) != paired_interval(a, b)
    assert rows.minus("method", "base", "load", 0.9).level == 0.9
    assert rows.interval(a) == sequential.mean_interval(a) and made().interval(METHOD) == mean_interval(METHOD)
    assert rows.tost("method", "base", 9.0) == sequential.paired_tost(a, b, 9.0) != tost(a, b, 9.0, paired=True)
    assert rows.p_value("method", "base") == sequential.paired_p(a, b) != paired_p(a, b)
    assert made().p_value("method", "base") == paired_p(METHOD, BASE)
    assert pickle.loads(pickle.dumps(rows)).growing


#: What has an interval, or decides, over seeds. `spearman` and `holm` do not: they are of one row, or of p-values.
OVER_SEEDS = {name for name in dir(statistics) if name.endswith(("_interval", "tost", "_p", "_effect", "_g"))}


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("studies/*/*.py")), ids=lambda path: path.stem)
def test_no_rule_asks_for_an_interval_past_its_rows(path: Path):
    """A rule gets intervals from `Rows`, which knows how the seeds were chosen, and hands on how to rows it makes."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = [alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names]
    names += [node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and "stat" in ast.unparse(node)]
    assert not OVER_SEEDS & {*names} and not {"ttest_rel", "ttest_1samp", "ttest_ind", "sem", "wilcoxon"} & {*names}
    made = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == "Rows"]
    assert all("growing" in ast.unparse(node) for node in made)


def test_what_is_looked_for_in_rules_is_there():
    assert {"paired_interval", "mean_interval", "welch_interval", "tost", "paired_tost", "paired_p"} <= OVER_SEEDS
