"""The bench of the all-to-alls: it finds a link again in times that were made of it, and times real processes."""

import pytest

from workbench.bench import serving
from workbench.bench.serving import deepspeed_moe as bench
from workbench.errors import InputError
from workbench.lib.core.distributed.processes import run_processes
from workbench.lib.core.simulation.fits import LinkModel
from workbench.lib.serving.all_to_all import all_to_all_seconds
from workbench.studies import measured
from workbench.studies.serving.deepspeed_moe import METHOD


def times(slower: float = 1.0) -> bench.Times:
    """By a link of 1 ms and 80 ns a byte; on eight ranks `slower` times as long."""
    link = LinkModel(1e-3, 8e-8)

    def seconds(form: str, world: int, size: int, block: int, back: bool) -> float:
        whole = all_to_all_seconds(form, block, world, size, link, link, back=back, shared=True)
        return (whole - link.beta * bench.BURST) * (slower if world == 8 else 1)

    return {
        world: {
            form: [tuple(seconds(form, world, size, b, back) for back in (False, True)) for b in bench.BLOCKS]
            for form, size in {"flat": 1, **sizes}.items()
        }
        for world, sizes in bench.WORLDS.items()
    }


def test_a_link_is_found_again_and_predicts_what_it_made():
    record = bench.compared(times(), bench.BLOCKS)
    assert record.calibration["alpha"] == pytest.approx(1e-3) and record.calibration["beta"] == pytest.approx(8e-8)
    assert max(record.errors) < 1e-9 and record.unit == "ms"
    names = [row["configuration"] for row in record.rows]
    assert "flat, 4 ranks, 32 KiB" not in names and "coordinated back, 8 ranks, 128 KiB" in names
    assert len(names) == len(set(names)) == 7 * len(bench.BLOCKS)


def test_what_is_measured_elsewhere_is_no_part_of_the_fit():
    record = bench.compared(times(slower=1.25), bench.BLOCKS)
    on_eight = ["8 ranks" in row["configuration"] for row in record.rows]
    assert record.calibration["alpha"] == pytest.approx(1e-3)
    assert record.errors == pytest.approx([0.2 if eight else 0.0 for eight in on_eight], abs=1e-9)


def test_real_processes_are_timed_in_every_form():
    found = run_processes(bench.ways, 4, {"flat": 1, **bench.WORLDS[4]}, (4096,), 2)[0]
    assert list(found) == ["flat", "hierarchical", "coordinated"]
    assert all(len(ways) == 1 and min(ways[0]) > 0 for ways in found.values())


def test_the_record_that_travels_with_the_package_is_of_these_configurations():
    record, made = measured.read(METHOD), bench.compared(times(), bench.BLOCKS)
    assert [row["configuration"] for row in record.rows] == [row["configuration"] for row in made.rows]
    assert record.median_error < 0.15 and {"cpu", "cores"} <= record.machine.keys()


def test_without_a_shaped_link_the_reason_is_said(monkeypatch: pytest.MonkeyPatch):
    def refused(*_, **__):
        raise InputError("mbit is 100 but a shaped link is not permitted here")

    monkeypatch.setattr(bench, "call_shaped", refused)
    monkeypatch.setattr(serving, "systems", lambda: {"deepspeed-moe": bench.__name__})
    found = serving.tables()
    assert found["records"] == {}
    assert found["accuracy"][0]["median error"].startswith(
        "not measured: mbit is 100 but a shaped link is not permitted"
    )
