"""`workbench simulate`: a machine and a trace in; a table, JSON and a picture out; one line for what is wrong."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from workbench import catalogue
from workbench.cli import main
from workbench.lib.core.simulation import traces
from workbench.lib.core.simulation.timeline import Timeline
from workbench.lib.core.simulation.traces import zipf_markov

MACHINE = {
    "name": "mine",
    "basis": "measured",
    "source": "a test",
    "device": {"flops": 1e13, "memory_bytes": 2e7, "memory_bandwidth": 1e11},
    "host": {"flops": 1e11, "memory_bytes": 1e10, "memory_bandwidth": 1e10},
    "link": {"bandwidth": 1e9, "latency_seconds": 0},
    "disk": {"bandwidth": 1e9, "latency_seconds": 1e-4},
}
CLUSTER = MACHINE | {
    "device": {"flops": 2e14, "memory_bytes": 6.4e10, "memory_bandwidth": 1.6e12},
    "node": {"bandwidth": 5e10, "latency_seconds": 5e-6},
    "network": {"bandwidth": 1e10, "latency_seconds": 1e-5},
    "devices_per_node": 8,
}
SYSTEMS = [row.slug for row in catalogue.methods() if row.simulates]
DENSE = ["frontier"]
"""Those of them that train a dense model."""


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """A machine and a trace."""
    made = {"hardware": tmp_path / "mine.json", "trace": tmp_path / "trace.safetensors"}
    made["hardware"].write_text(json.dumps(MACHINE))
    zipf_markov(prompts=2, prompt=4, generated=4, layers=3, experts=8, top_k=2).write(made["trace"])
    return made


@pytest.fixture
def shell(capsys: pytest.CaptureFixture, files: dict[str, Path]):
    """Call the command: (exit status, stdout, stderr). Later flags win, so that one of them can be put wrong. Routers
    and experts are given to those that have some; see `DENSE`."""

    def call(slug: str, *argv: object) -> tuple[int, str, str]:
        given = ["--hardware", files["hardware"]]
        if slug not in DENSE:
            given += ["--trace", files["trace"], "--expert-bytes", "1e6"]
        given += argv
        status = main(["simulate", slug, *map(str, given)])
        return status, *capsys.readouterr()

    return call


@pytest.mark.parametrize("slug", SYSTEMS)
def test_every_system_that_can_says_what_it_rests_on(shell, files, slug: str):
    given = ["--json"] if slug in DENSE else ["--budget", "2e7", "--json"]
    if slug in DENSE:
        files["hardware"].write_text(json.dumps(CLUSTER))
    status, out, err = shell(slug, *given)
    assert status == 0, err
    found = json.loads(out)
    assert found["slug"] == slug
    assert found["basis"] == found["timeline"]["basis"] == "simulated, calibrated by mine (measured)"
    timeline = Timeline.from_dict(found["timeline"])
    assert timeline.events and timeline.overlaps() == []
    assert len({tuple(row) for row in found["rows"]}) == 1 and found["rows"]
    assert shell(slug, *given)[1] == out


def test_the_table_and_the_picture_are_labelled_as_simulated(shell, tmp_path: Path):
    status, out, _ = shell("hybrimoe", "--html", tmp_path / "a.html")
    lines = out.splitlines()
    assert status == 0 and lines[0].split()[:3] == ["policy", "token", "ms"] and lines[1].startswith("hybrimoe ")
    assert lines[-1].startswith("hybrimoe, simulated, calibrated by mine (measured): 2 prompts of 4 tokens")
    page = (tmp_path / "a.html").read_text()
    assert "simulated, calibrated by mine (measured)" in page and "HybriMoE" in page
    status, _, err = shell("hybrimoe", "--html", tmp_path / "a.html")
    assert status == 2 and "must be a new file" in err


def test_the_default_budget_is_half_of_the_experts_or_the_memory_if_that_is_less(shell, files):
    assert "4 of a layer's experts" in shell("hybrimoe")[1]  # 24 MB of experts, 20 MB of memory
    files["hardware"].write_text(json.dumps(MACHINE | {"device": MACHINE["device"] | {"memory_bytes": 7e6}}))
    assert "2 of a layer's experts" in shell("hybrimoe")[1]
    files["hardware"].write_text(json.dumps(MACHINE | {"device": MACHINE["device"] | {"memory_bytes": 1e9}}))
    assert "8 of a layer's experts" in shell("hybrimoe", "--budget", "1e9")[1]


def test_a_machine_by_its_public_name_and_a_synthetic_trace(shell, monkeypatch):
    monkeypatch.setattr(traces, "zipf_markov", partial(zipf_markov, prompts=1, prompt=2, generated=2))
    status, out, _ = shell("hybrimoe", "--hardware", "a40-pcie4", "--trace", "synthetic")
    assert status == 0 and "simulated, calibrated by a40-pcie4 (specified)" in out and "synthetic" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("hybrimo", "slug 'hybrimo' is unknown; did you mean 'hybrimoe'"),
        ("rmoe", f"slug 'rmoe' cannot be simulated; these can: {', '.join(SYSTEMS)}"),
        ("hybrimoe --hardware a40", "--hardware 'a40' is unknown; did you mean 'a40-pcie4'"),
        ("hybrimoe --hardware none.json", "hardware 'none.json' cannot be read"),
        ("hybrimoe --trace trainde", "--trace 'trainde' is unknown; did you mean 'trained'"),
        ("hybrimoe --trace none.safetensors", "trace 'none.safetensors' cannot be read"),
        (
            "hybrimoe --budget 2999999",
            "budget is 2,999,999 bytes but must hold one expert of each of 3 layers, 3,000,000",
        ),
        ("hybrimoe --budget -1", "--budget is '-1' but must be a number of bytes from 1 to 1e24"),
        ("hybrimoe --expert-bytes much", "--expert-bytes is 'much' but must be a number of bytes from 1 to 1e24"),
        (
            "hybrimoe --budget 20000001",
            "--budget is '20000001' but must be at most the device's memory, 20,000,000 bytes",
        ),
        ("hybrimoe --expert-bytes 1e300", "--expert-bytes is '1e300' but must be"),
        ("d2moe --expert-bytes 1", "expert_bytes is 1 but must be at least"),
        ("hybrimoe --hardware=", "--hardware '' is unknown"),
        ("hybrimoe --html a.txt", "--html is 'a.txt' but must be a new file in a folder, ending in .html"),
    ],
)
def test_what_is_wrong_is_one_line(shell, words: str, message: str):
    status, out, err = shell(*words.split())
    assert status == 2 and out == "" and err.count("\n") == 1 and message in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "frontier --world 12",
            "world is 12 but must be 1, 2, 4, 8, or a multiple of 8: whole nodes, or an equal part",
        ),
        ("frontier --model 1T --world 8", "world is 8 but no plan of '1T' fits on so few; on 512 one does"),
        ("frontier --world -8", "--world is '-8' but must be a whole number of devices, at least 1"),
        ("frontier --world 0", "world is 0 but must be a whole number of ranks, at least 1"),
        ("frontier --model 23B", "model '23B' is unknown; did you mean '22B'"),
        ("frontier --model=", "model '' is unknown"),
        ("frontier --trace synthetic", "--trace is not for 'frontier', which takes --model, --world"),
        ("hybrimoe --world 8", "--world is not for 'hybrimoe', which takes --trace, --budget, --expert-bytes"),
    ],
)
def test_devices_and_models_that_do_not_fit_are_refused_with_those_that_do(shell, files, words: str, message: str):
    files["hardware"].write_text(json.dumps(CLUSTER))
    status, out, err = shell(*words.split())
    assert status == 2 and out == "" and err.count("\n") == 1 and message in err


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"node": CLUSTER["node"] | {"bandwidth": -1}}, "node: bandwidth is -1 but must be from 1 to 1e+24"),
        ({"network": {"bandwidth": 1e10}}, "network: key 'latency_seconds' is missing"),
        ({"devices_per_node": 0}, "devices_per_node is 0 but must be from 1"),
        ({"devices_per_node": 2.5}, "devices_per_node is 2.5 but must be a whole number"),
        ({"device": CLUSTER["device"] | {"memory_bytes": 1e3}}, "model is '22B' but no plan of it fits in"),
    ],
)
def test_a_cluster_of_bad_numbers_is_refused(shell, files, part: dict, message: str, monkeypatch):
    monkeypatch.setattr("workbench.lib.distributed.frontier.MOST_NODES", 2)
    files["hardware"].write_text(json.dumps(CLUSTER | part))
    status, _, err = shell("frontier")
    assert status == 2 and err.count("\n") == 1 and message in err


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"flops": -1}, "device: flops is -1 but must be from 1 to 1e+24"),
        ({"flops": None}, "device: flops is None but must be a number"),
        ({"speed": 1}, "device: key 'speed' is unknown"),
    ],
)
def test_a_machine_of_bad_numbers_is_refused(shell, files, part: dict, message: str):
    files["hardware"].write_text(json.dumps(MACHINE | {"device": MACHINE["device"] | part}))
    status, _, err = shell("hybrimoe")
    assert status == 2 and message in err


@pytest.mark.parametrize("slug", ["hybrimoe", "moe-lens"])
def test_the_most_unequal_machine_that_is_allowed_has_an_answer(shell, files, slug: str):
    parts = {name: {"flops": 1e24, "memory_bytes": 1e24, "memory_bandwidth": 1e24} for name in ("device", "host")}
    link = {"bandwidth": 1, "latency_seconds": 0}
    files["hardware"].write_text(json.dumps(MACHINE | parts | {"link": link}))
    status, out, err = shell(slug, "--budget", "1e9", "--json")
    assert status == 0, err
    shares = [row[key] for row in json.loads(out)["rows"] for key in row if key.endswith("_busy") and row[key] != ""]
    assert all(0 <= share <= 1 + 1e-9 for share in shares)


def test_a_host_that_cannot_hold_the_experts_is_refused(shell, files):
    files["hardware"].write_text(json.dumps(MACHINE | {"host": MACHINE["host"] | {"memory_bytes": 23e6}}))
    for slug in ("hybrimoe", "moe-lens"):
        status, _, err = shell(slug, "--budget", "2e7")
        assert status == 2 and "memory_bytes is " in err


def test_a_machine_without_a_part_and_a_trace_of_nothing_are_refused(shell, files):
    without = {key: value for key, value in MACHINE.items() if key != "link"}
    files["hardware"].write_text(json.dumps(without))
    status, _, err = shell("hybrimoe")
    assert status == 2 and "hardware 'mine' must have link but says nothing of it" in err
    about = {"trace": json.dumps({"source": "x", "top_k": 1, "prompt": 0})}
    save_file({"probs": torch.zeros(0, 4, 2, 4)}, str(files["trace"]), about)
    status, _, err = shell("hybrimoe")
    assert status == 2 and "probs has shape (0, 4, 2, 4) but must be" in err
