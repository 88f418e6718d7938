"""A training as a run: its record, its commands, and how it ends when things go wrong."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from workbench import sealed
from workbench.errors import InputError
from workbench.lib.core import checkpoint
from workbench.lib.core.task import LanguageModelling
from workbench.lib.core.train import train
from workbench.live.recipe import ROUTERS, Recipe
from workbench.live.store import CHECKPOINTS, Run, RunStopped, RunWriter
from workbench.live.trainer import main, resume, train_run

SMALL = {
    "domains": ["docs", "names"],
    "cap": 8192,
    "seq_len": 16,
    "batch_size": 4,
    "d_model": 16,
    "n_layers": 2,
    "n_heads": 2,
    "n_experts": 4,
    "d_hidden": 8,
    "steps": 24,
    "eval_every": 10,
    "checkpoint_every": 5,
}


def recipe(**values) -> Recipe:
    return Recipe.from_dict(SMALL | values)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    train_run(recipe(), folder)
    return folder


def commanding(folder: Path, asked: dict[int, tuple]):
    """A progress function that sends a command after so many steps; it holds from the next one on."""

    def progress(made: int, total: int, text: str) -> None:
        if made in asked:
            with Run(folder) as run:
                run.send(*asked[made])

    return progress


def test_the_record_of_a_run_is_complete(whole: Path):
    with Run(whole) as run:
        assert run.status.state == "finished" and run.last_step == 23
        meta = run.meta
        assert (meta["kind"], meta["seed"], meta["total_steps"]) == ("train", 0, 24)
        assert meta["recipe"] == recipe().to_dict()
        assert meta["cadence"] == {"routing": 10, "structure": 50, "conflict": 100, "evaluation": 10}
        assert set(meta["data"]) == {"docs", "names"} and all(len(m["sha256"]) == 64 for m in meta["data"].values())
        assert {"torch", "python", "workbench"} <= set(meta["versions"])
        described = meta["model"]
        model = recipe().build()[0]
        idle = 2 * (4 - 2) / 4 * sum(p.numel() for p in model.blocks[0].ffn.experts.parameters())
        assert described["parameters"] == sum(p.numel() for p in model.parameters())
        assert described["active_parameters"] == described["parameters"] - idle
        assert described["flops"] > 6 * 4 * 16 * described["active_parameters"] * 0.5
        assert [layer["name"] for layer in described["layers"]] == ["blocks.0.ffn", "blocks.1.ffn"]

        every = list(range(24))
        for name in ("loss", "aux", "lr", "grad_norm", "step_seconds"):
            assert run.steps(f"train/{name}").tolist() == every
        assert run.steps("valid/bits_per_byte/docs").tolist() == [9, 19, 23]
        assert run.steps("valid/load/blocks.1.ffn").tolist() == [9, 19, 23]
        assert run.steps("load/blocks.0.ffn").tolist() == [0, 10, 20]
        assert run.steps("conflict/blocks.0.ffn.router").tolist() == [0]
        assert run.tensor("load/blocks.0.ffn")[1].sum() == 4 * 16 * 2
        assert len(meta["weights_sha256"]) == 64
    kept = sorted(path.name for path in (whole / CHECKPOINTS).iterdir())
    assert kept == ["step-00000020", "step-00000024"]


def test_a_run_has_the_weights_of_the_plain_loop(whole: Path):
    model, task, config = recipe().build()
    state = train(model, task, config)
    with Run(whole) as run:
        assert run.meta["weights_sha256"] == checkpoint.weights_digest(model)
        assert run.scalars("train/loss")[1][-1] == state.loss
        recorded = {name: float(run.scalars(f"valid/{name}")[1][-1]) for name in state.metrics}
    assert recorded == state.metrics
    copy = recipe().build()[0]
    assert checkpoint.load(whole / CHECKPOINTS, copy).step == 24
    assert checkpoint.weights_digest(copy) == checkpoint.weights_digest(model)


def test_commands_reach_the_next_step(whole: Path, tmp_path: Path):
    asked = {5: ("learning_rate", 0.03), 8: ("balance", 0.0), 9: ("top_k", 1)}
    train_run(recipe(), tmp_path / "run", commanding(tmp_path / "run", asked))
    with Run(tmp_path / "run") as run, Run(whole) as before:
        rates, usual = run.scalars("train/lr")[1], before.scalars("train/lr")[1]
        np.testing.assert_allclose(rates / usual, [1] * 5 + [10] * 19)
        aux = run.scalars("train/aux")[1]
        assert (aux[:8] > 0).all() and (aux[8:] == 0).all()
        assert run.tensors("load/blocks.0.ffn")[1].sum(1).tolist() == [128, 64, 64]
        assert [(e.step, e.text) for e in run.events() if e.kind == "control"] == [
            (5, "learning_rate = 0.03"),
            (8, "balance = 0"),
            (9, "top_k = 1"),
        ]
        assert [answer.step for answer in run.answers()] == [5, 8, 9]


def test_a_paused_run_waits_steps_when_told_and_goes_on(whole: Path, tmp_path: Path, until):
    folder = tmp_path / "run"
    training = threading.Thread(target=train_run, args=(recipe(), folder, commanding(folder, {3: ("pause",)})))
    training.start()
    until(lambda: Run(folder).status.state == "paused")
    with Run(folder) as run:
        assert run.last_step == 2
        time.sleep(0.2)
        assert run.last_step == 2
        for last in (3, 4):
            run.send("step")
            until(lambda last=last: run.last_step == last)
        assert run.status.state == "paused"
        run.send("continue")
        training.join()
        assert run.status.state == "finished"
        with Run(whole) as undisturbed:
            assert run.meta["weights_sha256"] == undisturbed.meta["weights_sha256"]


def test_a_router_without_a_setting_says_so(tmp_path: Path):
    asked = {2: ("balance", 0.5), 3: ("top_k", 1)}
    train_run(recipe(router="hash", steps=5), tmp_path / "run", commanding(tmp_path / "run", asked))
    with Run(tmp_path / "run") as run:
        notes = [(event.step, event.text) for event in run.events() if event.kind == "note"]
        assert notes[0] == (
            2,
            "balance = 0.5 changes nothing in blocks.0.ffn, blocks.1.ffn: the router has no such setting",
        )
        assert notes[1][0] == 3 and notes[1][1].startswith("top_k = 1 changes nothing")


@pytest.mark.parametrize("router", [router for router in ROUTERS if router != "linear"])
def test_a_run_with_any_router_is_recorded_and_resumed(router: str, tmp_path: Path):
    """Shared router parameters, fixed tables and variable numbers of experts go through record and checkpoint."""
    chosen = recipe(router=router, steps=8, d_shared=4, capacity_factor=1.0)
    train_run(chosen, tmp_path / "whole")
    train_run(chosen, tmp_path / "run", commanding(tmp_path / "run", {5: ("stop",)}))
    resume(tmp_path / "run")
    with Run(tmp_path / "run") as run, Run(tmp_path / "whole") as whole:
        assert run.meta["weights_sha256"] == whole.meta["weights_sha256"]
        assert run.names("load/") == ["load/blocks.0.ffn", "load/blocks.1.ffn"]
        assert len(run.names("dropped/")) == 2
        assert sum(run.meta["model"]["groups"].values()) == sum(
            p.numel() for p in chosen.build()[0].parameters() if p.requires_grad
        )


def test_a_folder_that_holds_a_run_is_left_alone(whole: Path):
    with Run(whole) as run:
        before = run.meta
    with pytest.raises(InputError, match="holds a run already"):
        train_run(recipe(seed=1), whole)
    with Run(whole) as run:
        assert run.meta == before and run.last_step == 23


def test_a_loss_that_is_no_number_fails_the_run_and_keeps_what_was_good(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    usual, calls = LanguageModelling.loss, []

    def diverging(self, model, batch):
        loss, context = usual(self, model, batch)
        calls.append(model.training)
        return loss * (float("nan") if sum(calls) == 9 else 1), context

    monkeypatch.setattr(LanguageModelling, "loss", diverging)
    with pytest.raises(FloatingPointError):
        train_run(recipe(eval_every=0), tmp_path / "run")
    with Run(tmp_path / "run") as run:
        assert run.status.state == "failed" and "loss is nan at step 8" in run.status.message
    model = recipe().build()[0]
    assert checkpoint.load(tmp_path / "run" / CHECKPOINTS, model).step == 5
    assert all(p.isfinite().all() for p in model.parameters())


def test_a_full_disk_under_the_store_stops_the_run_with_a_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    long, whole = recipe(steps=96), tmp_path / "whole"  # the first record takes most of the pages, the others some more
    train_run(long, whole)
    create = RunWriter.create.__func__
    needed = (whole / "run.sqlite").stat().st_size // 4096

    def small(cls, folder, meta):
        writer = create(cls, folder, meta)
        writer._db.execute(f"PRAGMA max_page_count = {needed - 2}").fetchall()
        return writer

    monkeypatch.setattr(RunWriter, "create", classmethod(small))
    with pytest.raises(RunStopped, match="no space left"):
        train_run(long, tmp_path / "run")
    monkeypatch.undo()
    with Run(tmp_path / "run") as run:
        assert run.steps("train/loss").tolist() == list(range(run.last_step + 1)) and run.last_step > 0
    resume(tmp_path / "run")
    with Run(tmp_path / "run") as run, Run(whole) as undisturbed:
        assert run.meta["weights_sha256"] == undisturbed.meta["weights_sha256"]
        assert run.scalars("train/loss")[1].tolist() == undisturbed.scalars("train/loss")[1].tolist()


def test_a_full_disk_under_a_checkpoint_stops_the_run_with_a_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    usual = sealed.os.fsync

    def full(descriptor: int) -> None:
        if list((tmp_path / "run" / CHECKPOINTS).glob(".step-00000015.*.unfinished")):
            raise OSError(errno.ENOSPC, "No space left on device")
        usual(descriptor)

    monkeypatch.setattr(sealed.os, "fsync", full)
    with pytest.raises(RunStopped, match=r"its checkpoint after 15 steps cannot be written: .*No space left"):
        train_run(recipe(), tmp_path / "run")
    with Run(tmp_path / "run") as run:
        assert run.status.state == "failed" and "No space left" in run.status.message and run.last_step == 14
    kept = [path.name for path in (tmp_path / "run" / CHECKPOINTS).iterdir()]
    assert kept == ["step-00000010"]  # the older one made room for the message


# -- as a process


def test_a_trainer_whose_run_is_deleted_says_so(tmp_path: Path, until):
    running = process(tmp_path / "run", "--recipe", recipe(steps=100_000, checkpoint_every=0).to_json())
    until(lambda: Run(tmp_path / "run").last_step >= 1)
    shutil.rmtree(tmp_path / "run")
    _, said = running.communicate(timeout=300)
    assert running.returncode == 1 and said.startswith("workbench: error: run run stopped: its folder ")
    assert list(tmp_path.iterdir()) == []


def process(*arguments: object, **options) -> subprocess.Popen:
    command = [sys.executable, "-m", "workbench.live.trainer", *map(str, arguments)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, **options)


def test_a_trainer_stops_on_sigterm_and_with_its_parent(tmp_path: Path, until):
    long = recipe(steps=100_000, checkpoint_every=0).to_json()
    folders = tmp_path / "terminated", tmp_path / "attached"
    first = process(folders[0], "--recipe", long)
    second = process(folders[1], "--recipe", long, "--attached", stdin=subprocess.PIPE)
    for folder, trainer in zip(folders, (first, second), strict=True):
        until(lambda folder=folder, trainer=trainer: trainer.poll() is not None or Run(folder).last_step >= 3)
        assert trainer.poll() is None, trainer.stderr.read()
    # what a page watches gives way to the page; a run nobody waits for does not
    here = os.getpriority(os.PRIO_PROCESS, 0)
    assert [os.getpriority(os.PRIO_PROCESS, each.pid) for each in (first, second)] == [here, min(here + 10, 19)]
    first.send_signal(signal.SIGTERM)
    second.stdin.close()
    for folder, trainer in zip(folders, (first, second), strict=True):
        assert trainer.wait() == 0
        trainer.stderr.close()
        with Run(folder) as run:
            made = run.last_step + 1
            assert tuple(run.status) == ("stopped", f"stopped by SIGTERM after {made} of 100000 steps")
            # the checkpoint is of the very last step: nothing is made again
            assert [path.name for path in (folder / CHECKPOINTS).iterdir()] == [f"step-{made:08d}"]


def test_wrong_input_is_one_line_and_status_2(tmp_path: Path, capsys: pytest.CaptureFixture):
    assert main([str(tmp_path / "run"), "--recipe", '{"top_k": 9}']) == 2
    assert capsys.readouterr().err == "workbench: error: top_k is 9 but must be between 1 and n_experts = 8\n"
    assert not (tmp_path / "run").exists()
    assert main([str(tmp_path / "run")]) == 2
    assert capsys.readouterr().err.startswith("workbench: error: run ")


def test_threads_and_signals_are_put_back(whole: Path, tmp_path: Path):
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    threads = torch.get_num_threads()
    train_run(recipe(steps=1, threads=2), tmp_path / "run")
    assert torch.get_num_threads() == threads
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == handlers
