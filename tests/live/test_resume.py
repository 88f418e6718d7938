"""A run that was killed, stopped or failed goes on as if nothing had happened."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from workbench.errors import InputError
from workbench.lib.core.sidecar import SIDECAR
from workbench.live.recipe import Recipe
from workbench.live.store import CHECKPOINTS, Run, RunWriter
from workbench.live.trainer import resume, train_run

KILLER = Path(__file__).parent / "kill_and_resume.py"
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
    "bias_rate": 0.01,
    "steps": 24,
    "eval_every": 10,
    "checkpoint_every": 5,
}


class Crash(Exception):
    """What ends a training in these tests where a power cut would."""


def crash_after(steps: int):
    def progress(made: int, total: int, text: str) -> None:
        if made == steps:
            raise Crash

    return progress


def digest(folder: Path) -> str:
    with Run(folder) as run:
        assert run.status.state == "finished", run.status
        return run.meta["weights_sha256"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    train_run(Recipe.from_dict(SMALL), folder)
    return folder


def test_a_run_killed_at_any_moment_ends_with_the_same_weights_and_the_same_record(tmp_path: Path):
    recipe = json.dumps(SMALL | {"steps": 80, "checkpoint_every": 7})
    done = subprocess.run([sys.executable, KILLER, tmp_path, "6", recipe], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["states"] == ["finished", "finished"]
    assert found["digests"][0] == found["digests"][1]
    assert found["different"] == []
    assert found["resumed"] >= 1 and found["kills"][0] >= 0


def test_a_stopped_run_goes_on(whole: Path, tmp_path: Path):
    def stop(made: int, total: int, text: str) -> None:
        if made == 8:
            with Run(tmp_path / "run") as run:
                run.send("stop")

    state = train_run(Recipe.from_dict(SMALL), tmp_path / "run", stop)
    assert state.step == 8
    with Run(tmp_path / "run") as run:
        assert tuple(run.status) == ("stopped", "stopped by command after 8 of 24 steps")
        assert run.last_step == 7
    seen = []
    resume(tmp_path / "run", lambda made, total, text: seen.append((made, total)))
    assert seen == [(made, 24) for made in range(9, 25)]
    assert digest(tmp_path / "run") == digest(whole)
    with Run(tmp_path / "run") as run:
        assert [(e.step, e.text) for e in run.events() if e.kind == "resume"] == [
            (7, "from the checkpoint after 8 steps")
        ]


def test_a_run_that_crashed_before_its_first_checkpoint_starts_again(whole: Path, tmp_path: Path):
    with pytest.raises(Crash):
        train_run(Recipe.from_dict(SMALL), tmp_path / "run", crash_after(3))
    resume(tmp_path / "run")
    assert digest(tmp_path / "run") == digest(whole)


def test_a_damaged_checkpoint_costs_only_the_steps_since_the_one_before(whole: Path, tmp_path: Path):
    with pytest.raises(Crash):
        train_run(Recipe.from_dict(SMALL), tmp_path / "run", crash_after(12))
    newest = sorted((tmp_path / "run" / CHECKPOINTS).glob("step-*"))[-1]
    assert newest.name == "step-00000010"
    (newest / "model.safetensors").write_bytes(b"")
    resume(tmp_path / "run")
    assert digest(tmp_path / "run") == digest(whole)
    with Run(tmp_path / "run") as run:
        texts = [event.text for event in run.events()]
    assert "from the checkpoint after 5 steps" in texts and any("step-00000010: model.safetensors" in t for t in texts)


def test_commands_in_lost_steps_are_carried_out_again(tmp_path: Path):
    asked = {3: ("balance", 0.5), 7: ("learning_rate", 0.01), 12: ("top_k", 1), 13: ("balance", 0.0)}

    def commands(folder: Path, crash: int | None):
        def progress(made: int, total: int, text: str) -> None:
            if made in asked:
                with Run(folder) as run:
                    run.send(*asked[made])
            if made == crash:
                raise Crash

        return progress

    recipe = Recipe.from_dict(SMALL)
    train_run(recipe, tmp_path / "whole", commands(tmp_path / "whole", None))
    with pytest.raises(Crash):  # after the checkpoint at 10: the commands before it are in it, those after it are not
        train_run(recipe, tmp_path / "run", commands(tmp_path / "run", 14))
    resume(tmp_path / "run")
    assert digest(tmp_path / "run") == digest(tmp_path / "whole")
    with Run(tmp_path / "whole") as a, Run(tmp_path / "run") as b:
        for name in ("train/lr", "train/aux", "train/loss"):
            assert [v.tolist() for v in a.scalars(name)] == [v.tolist() for v in b.scalars(name)]
        events = [(event.step, event.text) for event in b.events() if event.kind == "control"]
        assert events == [(event.step, event.text) for event in a.events() if event.kind == "control"]
        assert events[-1] == (13, "balance = 0")


def test_what_cannot_be_resumed_says_why(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(InputError, match="has finished its 24 steps"):
        resume(whole)
    with pytest.raises(InputError, match="run 'nosuch' is unknown"):
        resume("nosuch")
    with RunWriter.create(tmp_path / "watched", {"kind": "watch"}) as writer:
        writer.status("stopped")
    with pytest.raises(InputError, match="watched model"):
        resume(tmp_path / "watched")

    with pytest.raises(Crash):
        train_run(Recipe.from_dict(SMALL), tmp_path / "run", crash_after(6))
    with RunWriter.open(tmp_path / "run") as writer, pytest.raises(InputError, match="is being written by process"):
        resume(tmp_path / "run")
        del writer


def test_changed_data_are_refused(tmp_path: Path):
    with pytest.raises(Crash):
        train_run(Recipe.from_dict(SMALL), tmp_path / "run", crash_after(6))
    with RunWriter.open(tmp_path / "run") as writer:
        with Run(tmp_path / "run") as run:
            data = run.meta["data"]
        data["docs"]["sha256"] = "0"
        writer.set_meta("data", data)
        writer.status("stopped")
    with pytest.raises(InputError, match="its data 'docs' have changed on this machine"):
        resume(tmp_path / "run")


def test_another_torch_is_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(Crash):
        train_run(Recipe.from_dict(SMALL), tmp_path / "run", crash_after(6))
    monkeypatch.setattr(torch, "__version__", "9.9.0")
    resume(tmp_path / "run")
    with Run(tmp_path / "run") as run:
        assert any("torch is 9.9.0 but was" in event.text for event in run.events())


def test_without_a_good_checkpoint_nothing_is_forgotten(tmp_path: Path):
    with pytest.raises(Crash):
        train_run(Recipe.from_dict(SMALL), tmp_path / "run", crash_after(7))
    (path,) = (tmp_path / "run" / CHECKPOINTS).glob("step-*")
    (path / SIDECAR).unlink()
    with pytest.raises(InputError, match=r"no checkpoint in .* can be used"):
        resume(tmp_path / "run")
    with Run(tmp_path / "run") as run:
        assert run.last_step == 6
    shutil.rmtree(path)  # a decision that only a person can make: start again
    resume(tmp_path / "run")
    assert digest(tmp_path / "run")
