"""`workbench bench serving`: it finds its systems, and a record has what the study reads."""

from workbench.bench import run, serving
from workbench.bench.serving import moe_lens
from workbench.lib.core.simulation.validation import Validation
from workbench.lib.serving.costs import MeasuredCosts


def test_a_quick_run_predicts_and_measures_every_setting():
    record = moe_lens.measure(quick=True)
    assert [row["variant"] for row in record.rows[:4]] == ["full"] * 4 and record.unit == "tokens per second"
    assert {row["variant"] for row in record.rows[4:]} == {"separate", "one group"}
    for row in record.rows:
        assert min(row["predicted"], row["measured"], row["woven"], row["without_memory"], row["lead"]) > 0
        assert set(row["busy_shares"]) == {"link", "device", "cpu"} and row["max_tokens"] >= 1
    assert MeasuredCosts.from_dict(record.calibration).layers == 4


def test_the_grid_has_settings_of_each_kind_and_none_twice():
    assert len(moe_lens.GRID) >= 12 and len(set(moe_lens.GRID)) == len(moe_lens.GRID)
    assert {row[5] for row in moe_lens.GRID} == {True, False} and len({row[4] for row in moe_lens.GRID}) > 2
    assert all(at < len(moe_lens.GRID) for at in moe_lens.VARIED)


def test_the_bench_has_a_table_a_system_and_keeps_all(tmp_path, monkeypatch):
    """With a measurement that was made before: the real ones take half a minute each."""
    monkeypatch.setenv("WORKBENCH_HOME", str(tmp_path))
    rows = [{"configuration": str(i), "predicted": 1.1, "measured": 1.0} for i in range(4)]
    monkeypatch.setattr(serving, "measure", lambda slug, quick: Validation.made(slug, {}, rows, "tokens per second"))
    found = run("serving", threads=(1,), quick=True)
    assert "moe-lens" in serving.systems() and found["rows"] == []
    assert found["moe-lens"][0]["error"] == "10.0%" and found["accuracy"][0]["median error"] == "10.0%"
    assert Validation.from_dict(found["records"]["moe-lens"]).accuracy > 0.89
    assert list((tmp_path / "bench").glob("serving-*.json"))
