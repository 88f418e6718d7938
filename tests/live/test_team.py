"""Runs that several processes train: one record, the numbers of one process, commands, and how they end."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from tests.live.team_lives import recipe
from tests.processes import below, running
from workbench.errors import InputError
from workbench.live import team
from workbench.live.arm import Arm
from workbench.live.attendant import _stop_signals
from workbench.live.control import Controller
from workbench.live.recipe import Recipe
from workbench.live.records import RANK_LOAD, RANK_SECONDS, RANK_SENT, RANK_WAITING
from workbench.live.store import Run
from workbench.live.trainer import main

LIVES = Path(__file__).parent / "team_lives.py"
LAYOUTS = ("data", "sharded", "experts")
SCENARIOS = ("whole", "killed", "stops", "numbers", "commands")
TIMED = ("train/step_seconds", "cost/probe_seconds", "cost/store_seconds")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("team")


@pytest.fixture(scope="module")
def found(folder: Path) -> dict:
    done = subprocess.run([sys.executable, LIVES, folder, *SCENARIOS], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_record_is_that_of_one_process_with_the_processes_own_beside_it(found: dict, folder: Path, layout: str):
    assert found["whole"][layout] == [0, 0]
    with Run(folder / "one") as one, Run(folder / layout) as run:
        assert run.meta["processes"] == {"world": 2, "layout": layout, "device": "cpu"}
        assert one.meta["processes"] is None and run.meta["model"] == one.meta["model"]
        assert run.status.state == "finished" and run.last_step == 23
        own = set(run.names()) - set(one.names())
        assert set(one.names()) <= set(run.names()) and all(name.startswith("rank/") for name in own)
        for name in set(one.names()) - set(TIMED):
            read = Run.scalars if one.dtype(name) is None else Run.tensors
            (steps, expected), (at, values) = read(one, name), read(run, name)
            assert at.tolist() == steps.tolist(), name
            scale = np.abs(expected.astype(float)).max() + 1e-12
            assert np.abs(values.astype(float) - expected.astype(float)).max() <= 1e-5 * scale, name
        sent = {"data": {"all_reduce"}, "sharded": {"all_reduce", "all_gather", "reduce_scatter"}}
        sent["experts"] = {"all_reduce", "all_to_all"}
        for rank in ("0", "1"):
            assert (
                {kind for kind in sent[layout]} == {RANK_SENT.of(n)[1] for n in own if RANK_SENT.of(n)} == sent[layout]
            )
            assert all((run.scalars(RANK_SENT.name(rank, kind))[1] > 0).all() for kind in sent[layout])
            steps, seconds = run.scalars(RANK_SECONDS.name(rank))
            waiting = run.scalars(RANK_WAITING.name(rank))[1]
            assert steps.tolist() == [0, 10, 20] and ((waiting > 0) & (waiting < seconds)).all()
        for layer in ("blocks.0.ffn", "blocks.1.ffn"):
            shares = [run.tensors(RANK_LOAD.name(rank, layer))[1] for rank in ("0", "1")]
            assert (shares[0].sum(1) == 4 * 16 * 2 / 2).all()
            assert (shares[0] + shares[1] == run.tensors(f"load/{layer}")[1]).all()


@pytest.mark.parametrize(("layout", "who"), [("experts", 1), ("data", 0)])
def test_a_killed_rank_ends_the_run_which_then_goes_on_bit_for_bit(found: dict, folder: Path, layout: str, who: int):
    seen = found["killed"][layout]
    assert seen["ends"][who] == -signal.SIGKILL and seen["ends"][1 - who] == 1 and seen["seconds"] < 10
    state, message = seen["then"]["status"]
    if who:
        assert state == "failed" and message.startswith("rank 1 of 2 died; the run goes on from its last checkpoint")
    else:
        assert state == "died"
    with Run(folder / layout) as whole:
        assert seen["resumed"] == [0, 0] and seen["now"]["status"] == ["finished", ""]
        assert seen["now"]["digest"] == whole.meta["weights_sha256"]
    assert [9, "resume", "from the checkpoint after 10 steps"] in seen["now"]["events"]


def test_a_signal_to_any_rank_stops_all_after_the_same_step_with_a_checkpoint(found: dict, folder: Path):
    for who, words in ((0, "stopped by SIGTERM after "), (1, "stopped by a signal to rank 1 after ")):
        seen = found["stops"][f"stopped {who}"]
        assert seen["ends"] == [0, 0]
        state, message = seen["then"]["status"]
        assert state == "stopped" and message.startswith(words)
        made = seen["then"]["last"] + 1
        kept = [path.name for path in (folder / f"stopped-{who}" / "checkpoints").iterdir()]
        assert kept == [f"step-{made:08d}"]


def test_a_rank_that_hangs_or_never_comes_is_named_within_the_patience(found: dict):
    hangs, missing = found["stops"]["hangs"], found["stops"]["missing"]
    assert hangs["ends"] == [1] and hangs["seconds"] < 4 + 10
    assert hangs["then"]["status"][1].startswith("rank 1 of 2 did not answer within 4 seconds")
    assert missing["ends"] == [1, 1] and missing["seconds"] < 2 + 10 and not missing["run"]


def test_two_processes_stop_four_go_on_and_one_ends_it(found: dict, folder: Path):
    seen = found["numbers"]
    assert seen["two"] == [0, 0] and seen["four"] == [0] * 4
    assert [seen[f"after {who}"]["status"][0] for who in ("two", "four", "one")] == ["stopped", "stopped", "finished"]
    assert seen["after four"]["status"][1].startswith("stopped by a signal to rank 3")
    with Run(folder / "experts") as whole, Run(folder / "numbers") as run:
        assert run.meta["processes"] is None
        (steps, losses), (_, expected) = run.scalars("train/loss"), whole.scalars("train/loss")
        assert steps.tolist() == list(range(24))
        np.testing.assert_allclose(losses, expected, rtol=1e-5)
        assert len(run.names("rank/3/")) == len(run.names("rank/0/")) > 0


def test_commands_reach_all_processes_at_the_same_step(found: dict):
    seen = found["commands"]
    assert seen["ends"] == [0, 0] and seen["then"]["status"] == ["finished", ""]  # paused longer than its patience
    at = seen["steps"]
    assert at["learning_rate"] <= at["balance"] <= at["top_k"] <= at["pause"] and at["continue"] == at["step"] + 1
    aux, loads = seen["aux"], {int(step): load for step, load in seen["loads"].items()}
    assert all(value > 0 for value in aux[: at["balance"]]) and not any(aux[at["balance"] :])
    assert all(load == (64 if step >= at["top_k"] else 128) for step, load in loads.items())


def test_the_trainer_starts_processes_of_its_own_and_leaves_none(tmp_path: Path, until):
    chosen = recipe("experts", steps=10**6, eval_every=0, checkpoint_every=0)
    command = [sys.executable, "-m", "workbench.live.trainer", str(tmp_path / "run"), "--recipe", chosen.to_json()]
    trainer = subprocess.Popen([*command, "--processes", "2", "--attached"], stdin=subprocess.PIPE)
    try:
        until(lambda: trainer.poll() is not None or Run(tmp_path / "run").last_step >= 3)
        started = below(trainer.pid)
        assert len(started) >= 2
        trainer.send_signal(signal.SIGTERM)
        assert trainer.wait(60) == 0
        until(lambda: not any(map(running, started)))
    finally:
        trainer.kill()
        trainer.communicate()  # what it has started ends when its standard input does
    with Run(tmp_path / "run") as run:
        assert run.status.state == "stopped" and "SIGTERM" in run.status.message


def test_what_cannot_be_shared_out_is_refused_before_anything_starts():
    with pytest.raises(InputError, match=r"processes is 3 but must share batch_size = 16 evenly: 1, 2, 4, 8, 16 can"):
        Recipe().check_processes(3)
    with pytest.raises(InputError, match=r"batch_size = 16 and n_experts = 12 evenly: 1, 2, 4 can"):
        Recipe(layout="experts", n_experts=12).check_processes(8)
    with pytest.raises(InputError, match="router is 'expert-choice', which decides over the whole batch"):
        Recipe(router="expert-choice").check_processes(2)
    with pytest.raises(InputError, match="the arms of a study train in one process"):
        Arm("rmoe", preset="smoke").check_processes(2)
    with pytest.raises(InputError, match="layout 'pipeline' is unknown"):
        Recipe(layout="pipeline")
    Recipe(router="expert-choice", capacity_factor=1.0).check_processes(1)


def test_an_environment_that_is_none_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_PORT", "1")
    new = [str(tmp_path / "run"), "--recipe", recipe("data").to_json()]
    for rank, words in (("x", "RANK is 'x' but must be a whole number"), ("2", "RANK is 2 but must be 0 to 1")):
        monkeypatch.setenv("RANK", rank)
        assert main(new) == 2
        assert words in capsys.readouterr().err
    assert main([*new, "--processes", "2"]) == 2
    assert "--processes is 2 but torchrun has started 2 already" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "0")
    assert main(new) == 2
    assert "WORLD_SIZE is 0 but must be at least 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--processes", "0"], "--processes is 0 but must be at least 1"),
        (["--processes", "-2"], "--processes is -2 but must be at least 1"),
        (["--patience", "0"], "--patience is 0 but must be above 0 and at most 86400 seconds"),
        (["--patience", "nan"], "--patience is nan but must be above 0"),
        (["--processes", "2", "--patience", "inf"], "--patience is inf but must be above 0"),
    ],
)
def test_numbers_that_are_none_are_refused(given: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture):
    assert main([str(tmp_path / "run"), "--recipe", recipe("data").to_json(), *given]) == 2
    assert words in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_what_each_of_several_is_told_never_starts_several_again(monkeypatch: pytest.MonkeyPatch):
    told = []
    monkeypatch.setattr(team, "launch", lambda processes, module, arguments: told.append((processes, arguments)) or 0)
    chosen = recipe("data").to_json()
    for given in (["--processes", "2"], ["--processes=2"]):
        assert main([*given, "--recipe", chosen, "--attached", "--", "-run"]) == 0
        assert told.pop() == (2, ["--recipe", chosen, "--attached", "--patience", "300.0", "--", "-run"])
    assert main(["run", "--processes", "2", "--patience", "7"]) == 0
    assert told.pop() == (2, ["--patience", "7.0", "--", "run"])
    with pytest.raises(SystemExit):  # an option that is cut short would be handed on
        main(["run", "--proc", "2"])
    assert not told


@pytest.mark.parametrize(
    ("ends", "status", "said"),
    [
        (("SIGKILL", "SIGTERM"), 1, "rank 0 of 2 was ended by SIGKILL"),
        (("2", "2"), 2, ""),
        (("2", "waits"), 2, ""),  # as it is where the launcher ends the other before it has ended itself
    ],
)
def test_of_a_rank_0_that_cannot_say_so_itself_the_launcher_says_how_it_ended(
    ends: tuple[str, str], status: int, said: str, capfd: pytest.CaptureFixture
):
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        assert team.launch(2, "tests.live.launched", ends) == status
    finally:  # torch's launcher leaves its own
        for number, handler in before.items():
            signal.signal(number, handler)
    seen = capfd.readouterr().err
    assert said in seen and seen.count("\n") == bool(said)


def test_one_that_ends_by_an_error_waits_until_rank_0_has_said_why():
    store = dist.HashStore()
    store.set("came/0", f"{os.getpid()} {socket.gethostname()}")
    other = team.Team(1, 2, store, 1.0, torch.device("cpu"))
    late = threading.Timer(0.3, team.Team(0, 2, store, 1.0, torch.device("cpu")).hear_out)
    late.start()
    began = time.monotonic()
    other.hear_out()
    assert 0.25 < time.monotonic() - began < 5
    gone = dist.HashStore()
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        ended.wait()
    gone.set("came/0", f"{ended.pid} {socket.gethostname()}")
    began = time.monotonic()
    team.Team(1, 2, gone, 1.0, torch.device("cpu")).hear_out()
    assert time.monotonic() - began < 5


def test_what_another_raised_is_told_and_what_is_ones_own_is_left_to_the_others():
    store = dist.HashStore()
    first, second = (team.Team(rank, 2, store, 1.0, torch.device("cpu")) for rank in (0, 1))
    assert second.lost(InputError("data set 'docs' is not on this machine")) is None
    told = first.lost(RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer"))
    assert "rank 1: data set 'docs' is not on this machine" in str(told)
    assert second.lost(team.RunStopped("its checkpoint cannot be written, says gloo")) is None


def test_a_signal_that_comes_when_a_shared_run_has_ended_ends_nothing_before_its_time():
    controller = Controller(team.Silent(Path()))
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with _stop_signals(controller, for_good=True) as reason:
            pass
        os.kill(os.getpid(), signal.SIGTERM)
        assert controller.stopping and reason[-1] == "stopped by SIGTERM"
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    with _stop_signals(controller):
        assert signal.getsignal(signal.SIGTERM) != before[signal.SIGTERM]
    assert signal.getsignal(signal.SIGTERM) == before[signal.SIGTERM]
