"""Any study watched live: its arm trained as a run, the same numbers as without, steered, killed and resumed."""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest

from tests.studies.conftest import NEEDS
from workbench import catalogue
from workbench.errors import InputError
from workbench.lib import data
from workbench.lib.core.checkpoint import weights_digest
from workbench.lib.core.train import attended
from workbench.live.arm import Arm, read_recipe
from workbench.live.control import COMMANDS
from workbench.live.records import SPECTRUM
from workbench.live.store import Run
from workbench.live.trainer import resume, train_run
from workbench.live.views import (
    CoactivationView,
    ConflictView,
    DepthView,
    ImbalanceView,
    LossView,
    Overview,
    SpectraView,
)
from workbench.live.views.readings import Nothing, Readings
from workbench.live.views.spectra import history
from workbench.studies.core import load_study

KILLER = Path(__file__).parent / "kill_and_resume.py"
#: One training, two of one model, one that is otherwise kept, one that a hook of its study steers, one that it shrinks.
SAMPLE = ("mixlora", "charluma", "flexmore", "sigma-moe-tiny", "maestro")
READY = [row.slug for row in catalogue.methods(status="ready")]
#: No arm trains.
STILL = {"moa", "sub-moe", "rmm", "lora-lego", "pcb-merging", "parallel-folding", "hecate", "hybrimoe"} | {
    *("moe-lens", "ofdm-isac", "frontier", "fsap"),
}
#: Families and systems that send no token anywhere.
UNROUTED = {"adapters", "low_rank", "merging", "data_mixtures", "features"} | {
    *("shallow-again", "stable-rps", "streaming-diloco", "ascan", "wavemix", "tunable-conv", "semi-parametric"),
}


class Crash(Exception):
    """What ends a training in these tests where a power cut would."""


class Seen(BaseException):
    """The trainings that make the arm are over."""


def at_step(step: int, act):
    def progress(made: int, total: int, text: str) -> None:
        if made == step:
            act()

    return progress


def crash() -> None:
    raise Crash


def plain_digest(arm: Arm) -> str:
    """The weights of the arm where nothing watches but the end."""
    models = []

    @contextmanager
    def look(state) -> Iterator[tuple]:
        yield ()
        models.append(state.model)
        if len(models) == arm.trainings:
            raise Seen

    with suppress(Seen), attended(look):
        arm.train()
    return weights_digest(models[-1])


def digest(folder: Path) -> str:
    with Run(folder) as run:
        assert run.status.state == "finished", run.status
        return run.meta["weights_sha256"]


@pytest.fixture(scope="module", params=SAMPLE)
def whole(request, tmp_path_factory: pytest.TempPathFactory) -> tuple[Arm, Path]:
    arm = Arm(request.param, preset="smoke", checkpoint_every=2)
    folder = tmp_path_factory.mktemp("whole") / "run"
    train_run(arm, folder)
    return arm, folder


def test_a_watched_arm_has_the_weights_of_one_that_nobody_watches(whole):
    arm, folder = whole
    assert digest(folder) == plain_digest(arm)


def test_the_record_says_which_arm_it_is_and_how_to_make_it_again(whole, tmp_path: Path):
    arm, folder = whole
    with Run(folder) as run:
        meta, steps = run.meta, run.steps("train/loss").tolist()
        phases = [event.text for event in run.events() if event.kind == "phase"]
        run.export(tmp_path / "out")
    assert read_recipe(meta["recipe"]) == arm
    assert meta["recipe"]["settings"]["steps"] > 0 and "seeds" not in meta["recipe"]["settings"]
    assert steps == list(range(meta["total_steps"]))
    assert len(phases) == arm.trainings - 1
    exported = json.loads((tmp_path / "out" / "meta.json").read_text())["meta"]
    assert read_recipe(exported["recipe"]) == arm


def test_an_arm_that_crashed_at_any_step_ends_with_the_same_weights(whole, tmp_path: Path):
    arm, folder = whole
    with Run(folder) as run:
        total = run.meta["total_steps"]
    for step in {1, total // 2, total - 1}:
        with pytest.raises(Crash):
            train_run(arm, tmp_path / str(step), at_step(step, crash))
        resume(tmp_path / str(step))
        assert digest(tmp_path / str(step)) == digest(folder)
        with Run(tmp_path / str(step)) as run, Run(folder) as other:
            assert run.scalars("train/loss")[1].tolist() == other.scalars("train/loss")[1].tolist()
            phases, expected = ([e[:3] for e in r.events() if e.kind == "phase"] for r in (run, other))
        assert phases == expected


def test_an_arm_killed_at_any_moment_ends_with_the_same_weights_and_the_same_record(tmp_path: Path):
    recipe = Arm("sigma-moe-tiny", preset="smoke", checkpoint_every=2).to_json()
    done = subprocess.run([sys.executable, KILLER, tmp_path, "3", recipe], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["states"] == ["finished", "finished"]
    assert found["digests"][0] == found["digests"][1]
    assert found["different"] == []
    assert any(step is not None for step in found["kills"])


def test_an_arm_is_stopped_steered_and_goes_on(tmp_path: Path):
    arm, folder = Arm("mixlora", preset="smoke"), tmp_path / "run"

    def act(*commands: tuple) -> None:
        with Run(folder) as run:
            for command in commands:
                run.send(*command)

    train_run(arm, folder, at_step(2, lambda: act(("top_k", 1), ("balance", 0.5), ("stop",))))
    with Run(folder) as run:
        total = run.meta["total_steps"]
        assert tuple(run.status) == ("stopped", f"stopped by command after 2 of {total} steps")
    resume(folder, at_step(3, lambda: act(("top_k", 1), ("balance", 0.0))))
    with Run(folder) as run:
        assert run.status.state == "finished"
        aux = run.scalars("train/aux")[1]
        assert len(aux) == total > 3
        notes = [event.text for event in run.events() if event.kind == "note"]
    assert (aux[:3] > 0).all() and (aux[3:] == 0).all() and notes == []


def test_a_setting_that_the_arm_has_not_is_noted(tmp_path: Path):
    def ask(folder: Path, command: tuple) -> list[str]:
        def act() -> None:
            with Run(folder) as run:
                run.send(*command)

        train_run(Arm(*arm, preset="smoke"), folder, at_step(1, act))
        with Run(folder) as run:
            return [event.text for event in run.events() if event.kind == "note"]

    arm = ("mixlora", "lora-equal")
    assert ask(tmp_path / "a", ("balance", 0.1)) == [
        "balance = 0.1 changes nothing here: this model has no router",
    ]
    arm = ("llava-mole", None)
    (note,) = ask(tmp_path / "b", ("top_k", 2))
    assert "top_k = 2 changes nothing in blocks.0.ffn, blocks.1.ffn: top_k is 2 but this rule always has 1" in note
    assert set(COMMANDS) >= {"balance", "top_k"}


def test_settings_of_another_version_are_refused(tmp_path: Path):
    values = Arm("mixlora", preset="smoke").to_dict()
    values["settings"]["steps"] += 1
    with pytest.raises(InputError, match="mixlora has other settings at 'smoke' now"):
        read_recipe(values)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"study": "mixlra"}, "'mixlra' is unknown; did you mean 'mixlora'"),
        ({"study": "not-yet"}, "'not-yet' is planned"),
        ({"study": "mixlora", "arm": "mixlor"}, "'mixlor' is unknown; did you mean 'mixlora'"),
        ({"study": "mixlora", "preset": "smal"}, "preset 'smal' is unknown; did you mean 'small'"),
        ({"study": "mixlora", "seed": -1}, "seed is -1 but must be"),
        ({"study": "mixlora", "checkpoint_every": True}, "checkpoint_every is True but must be"),
        ({"study": "mixlora", "steps": 5}, "recipe value 'steps' is unknown"),
        ({"study": "moa"}, "trains nothing that could be watched: spans are fitted"),
        ({"study": "mole-diffusion", "arm": "merged"}, "LoRAs that are trained once and kept are added"),
    ],
)
def test_what_cannot_be_watched_says_why(planned, values: dict, said: str):
    with pytest.raises(InputError, match=said):
        read_recipe(values)


# -- every study


@pytest.mark.parametrize("preset", ["smoke", "small", "full"])
@pytest.mark.parametrize("slug", READY)
def test_every_study_names_its_own_method_and_says_which_arms_train(slug: str, preset: str):
    study = load_study(slug)
    settings = study.settings(preset)
    arms = study.arms_of(settings)
    assert study.main_arm(settings) in arms
    trained = [arm for arm in arms if not isinstance(study.trainings(arm), str)]
    assert all(study.trainings(arm) in (1, 2) for arm in trained)
    assert bool(trained) != (slug in STILL)


def filled(run: Run, kind: type) -> dict[str, bool]:
    """The cards of a view, and whether there is anything in them."""
    return {name: not isinstance(card.contents[0], Nothing) for name, card in kind(run).cards.items()}


@pytest.mark.study
@pytest.mark.parametrize("slug", [slug for slug in READY if slug not in STILL])
def test_every_view_that_applies_to_a_study_is_fed(slug: str, tmp_path: Path):
    for name in NEEDS.get(catalogue.method(slug).family, ()):
        data.get(name)
    train_run(Arm(slug, preset="smoke"), tmp_path / "run")
    run = Run(tmp_path / "run")
    described = run.meta["model"]
    routes, domains = described["layers"], described["domains"]
    several = any(layer["top_k"] != 1 for layer in routes)
    always = {
        Overview: ("loss", "rank"),
        SpectraView: ("spectrum", "numbers", "effective_rank", "rms_norm", "update_norm"),
    }
    always[LossView] = ("loss", "valid", "lr", "grad_norm", *(("aux",) if routes else ()))
    wanted = always | {
        ImbalanceView: ("load", "balance", "layers", "support") if routes else (),
        CoactivationView: ("matrix",) if several else (),
        DepthView: ("training", "evaluation", "text") if any(layer.get("recursive") for layer in routes) else (),
        ConflictView: ("groups", "cosine", "self", "rate", "worst") if len(domains) > 1 else (),
    }
    assert bool(routes) == UNROUTED.isdisjoint({slug, catalogue.method(slug).family})
    for kind, names in wanted.items():
        cards = filled(run, kind)
        assert [name for name in names if not cards[name]] == [], kind.title
    readings = Readings(run)
    recorded = {matrix for _, matrix in readings.series(SPECTRUM)}
    ranks = [history(readings, matrix).measure("effective_rank") for matrix in recorded]
    assert any(np.isfinite(values).any() for rank in ranks for _, values in rank.values())
    run.close()


@pytest.mark.study
def test_gates_of_a_mixture_of_crosses_are_watched(tmp_path: Path):
    """The main arm routes nothing; the low-rank mixture has a gate in each layer, to all experts, and views show it."""
    data.get("movielens-100k")
    train_run(Arm("dcn-v2", "mix", preset="smoke"), tmp_path / "run")
    run = Run(tmp_path / "run")
    layers = run.meta["model"]["layers"]
    assert [layer["name"] for layer in layers] == ["cross.layers.0", "cross.layers.1"]
    assert all(layer["n_experts"] == layer["top_k"] == 2 for layer in layers)
    imbalance, together = filled(run, ImbalanceView), filled(run, CoactivationView)
    assert all(imbalance[name] for name in ("load", "balance", "layers", "support")) and together["matrix"]
    run.close()
