"""`watch` in a training script of one's own: what is recorded, when, and that it can be taken off again."""

import copy
import os
import re
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import workbench
from workbench.errors import InputError
from workbench.lib.core.checkpoint import weights_digest
from workbench.lib.core.experts import GLUExperts
from workbench.lib.core.models import DecoderLM
from workbench.lib.core.moe import MoELayer, moe_layers
from workbench.lib.core.routers import LinearRouter
from workbench.lib.core.task import LanguageModelling
from workbench.lib.data.types import TextDomains
from workbench.live.store import Run, RunStopped, RunWriter
from workbench.live.views.load import balance
from workbench.live.views.loss import losses, named
from workbench.live.views.readings import Readings
from workbench.live.watch import Cadence, watch

CADENCE = {"routing": 2, "structure": 4, "conflict": 6}


@pytest.fixture(scope="module")
def task() -> LanguageModelling:
    generator = torch.Generator().manual_seed(0)
    splits = {
        split: {name: torch.randint(97, 105, (500,), generator=generator).to(torch.uint8) for name in ("a", "b")}
        for split in ("train", "validation", "test")
    }
    return LanguageModelling(TextDomains("letters", ("a", "b"), splits, {"a": {"sha256": "0"}}), seq_len=8)


def language_model() -> DecoderLM:
    torch.manual_seed(0)

    def ffn(layer: int) -> MoELayer:
        return MoELayer(LinearRouter(8, 4, 2, coefficients={"lbl": 0.01}), GLUExperts(4, 8, 4))

    return DecoderLM(256, 8, 2, 2, ffn, seq_len=8)


def script(model: DecoderLM, task: LanguageModelling, steps: int, watching=None, zero_first: bool = False) -> None:
    """A training loop as somebody else would write it."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(steps):
        loss, context = task.loss(model, task.batch("train", 4, torch.Generator().manual_seed(step)))
        (loss + context.aux).backward()
        optimizer.step()
        if zero_first:
            optimizer.zero_grad()
        if watching:
            watching.step(loss=loss.item(), lr=1e-2)
        optimizer.zero_grad()


def test_a_watched_script_records_every_name_at_its_cadence(task, home):
    model = language_model()
    with workbench.watch(model, "mine", task=task, total_steps=9, cadence=CADENCE) as watching:
        script(model, task, 9, watching)
        watching.evaluation(task.evaluate(model))
    with Run(home / "runs" / "mine") as run:
        assert run.status.state == "finished" and run.last_step == 8
        meta = run.meta
        assert (meta["kind"], meta["total_steps"], meta["cadence"]) == ("watch", 9, CADENCE)
        assert meta["versions"]["torch"] == torch.__version__ and meta["data"] == task.manifest
        described = meta["model"]
        layers = ["blocks.0.ffn", "blocks.1.ffn"]
        assert described["layers"] == [{"name": name, "n_experts": 4, "top_k": 2} for name in layers]
        assert described["domains"] == ["a", "b"] and described["vocabulary"] == "bytes"
        assert sum(described["groups"].values()) == described["parameters"]

        steps = {name: run.steps(name).tolist() for name in run.names()}
        every, two, four, six = list(range(9)), [0, 2, 4, 6, 8], [0, 4, 8], [0, 6]
        expected = dict.fromkeys(["train/loss", "train/lr", "train/step_seconds"], every)
        expected |= dict.fromkeys(["cost/probe_seconds", "cost/store_seconds"], every)
        measured = ("confidence", "entropy", "support", "probability_support")
        for name in layers:
            expected |= {f"{what}/{name}": two for what in ("load", "importance", "load_by_domain")}
            expected |= {f"router/{name}/{what}": two for what in measured}
            expected |= {f"coactivation/{name}": four, f"coactivation_by_domain/{name}": four, f"tokens/{name}": six}
            expected |= {f"valid/{what}/{name}": [8] for what in ("load", "importance", "load_by_domain")}
        expected["transition/blocks.0.ffn"] = four
        for matrix in described["matrices"]:
            expected |= {f"spectrum/{what}/{matrix}": four for what in ("weight", "update", "gradient")}
            expected[f"gradients_by_domain/{matrix}"] = six
        expected |= {f"conflict/{group}": six for group in described["groups"]}
        expected |= {f"valid/{name}": [8] for name in ("bits_per_byte", "bits_per_byte/a", "bits_per_byte/b")}
        assert steps == expected

        for name, shape in described["matrices"].items():
            assert run.tensor(f"spectrum/update/{name}")[1].shape == (min(shape),)
        assert run.tensor("conflict/trunk")[1].shape == (3, 2, 2)
        # the batches of the steps 2, 4 and 6
        assert run.tensor("tokens/blocks.0.ffn")[1].sum() == 3 * 4 * 8 * 2
        assert (run.scalars("cost/probe_seconds")[1] >= 0).all() and (run.scalars("train/step_seconds")[1] > 0).all()
        validation = sum(len(b) for b in task.batches("validation", 64)) * 8 * 2
        assert run.tensor("valid/load/blocks.1.ffn")[1].sum() == validation


def test_watching_changes_nothing_and_leaves_nothing(task, tmp_path: Path):
    plain, model = language_model(), language_model()
    script(plain, task, 8)
    with watch(model, tmp_path / "run", task=task, cadence=CADENCE) as watching:
        script(model, task, 8, watching)
    assert weights_digest(model) == weights_digest(plain)
    assert not any(layer._observers for layer in moe_layers(model).values())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    with pytest.raises(InputError, match="closed"):
        watching.step(loss=1.0)


def test_gradients_are_those_the_optimizer_used_whatever_comes_before_the_record(task, tmp_path: Path):
    for zero_first in (False, True):
        model = language_model()
        with watch(model, tmp_path / str(zero_first), cadence={"structure": 2}) as watching:
            script(model, task, 5, watching, zero_first=zero_first)
    with Run(tmp_path / "False") as late, Run(tmp_path / "True") as early:
        names = late.names("spectrum/gradient/")
        assert names and early.names("spectrum/") == late.names("spectrum/")
        for name in names:
            np.testing.assert_array_equal(early.tensors(name)[1], late.tensors(name)[1])
        # without a task there are no domains to compare
        assert early.names("conflict/") == early.names("gradients_by_domain/") == []
        assert early.meta["model"]["domains"] == [] and "load_by_domain/blocks.0.ffn" not in early.names()


def test_a_plain_network_is_watched_too(tmp_path: Path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = model[0].weight.detach().clone()
    with watch(model, tmp_path / "run", cadence={"structure": 1}) as watching:
        model(torch.randn(8, 6)).square().mean().backward()
        optimizer.step()
        watching.step()
    update = torch.linalg.svdvals(model[0].weight.detach() - before)
    with Run(tmp_path / "run") as run:
        np.testing.assert_allclose(run.tensor("spectrum/update/0")[1], update, rtol=1e-3, atol=1e-6)
        assert run.names("load/") == [] and "train/loss" not in run.names()
        assert run.meta["model"]["layers"] == []


def test_a_script_that_fails_leaves_a_failed_run(task, tmp_path: Path):
    model = language_model()
    with pytest.raises(RuntimeError), watch(model, tmp_path / "run") as watching:
        script(model, task, 2, watching)
        raise RuntimeError("out of patience")
    with Run(tmp_path / "run") as run:
        assert tuple(run.status) == ("failed", "RuntimeError: out of patience") and run.last_step == 1
    assert not any(layer._observers for layer in moe_layers(model).values())


def test_a_writer_of_ones_own_is_continued_and_left_open(task, tmp_path: Path):
    model = language_model()
    with RunWriter.create(tmp_path / "run", {"kind": "watch"}) as writer:
        for _ in range(2):
            with watch(model, writer, cadence={"conflict": 0}) as watching:
                script(model, task, 3, watching)
        writer.event(5, "note", "still open")
        assert writer.last_step == 5
    with Run(tmp_path / "run") as run:
        assert run.steps("load/blocks.0.ffn").tolist() == [0]
        assert run.names("tokens/") == []


def test_runs_are_named(home, task):
    model = language_model()
    watch(model, "one").close()
    with pytest.raises(InputError, match=r"run 'one' is there already .*resume=True .*overwrite=True"):
        watch(model, "one")
    assert not any(layer._observers for layer in moe_layers(model).values())
    with watch(model) as watching:
        assert watching.writer.folder.parent == home / "runs" and "watch" in watching.writer.name
    for name in ("", "..", " "):
        with pytest.raises(InputError, match="run is"):
            watch(model, name)


# -- the same script again


SCRIPT = """
import sys, torch, workbench
from torch import nn
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3))
with workbench.watch(model, "my-run", total_steps=8, **{how: True for how in sys.argv[1:]}) as watched:
    for step in range(4):
        model(torch.randn(8, 6)).square().mean().backward()
        watched.step(loss=float(watched.next_step))
    print(watched)
"""


def test_a_script_that_is_run_twice_is_told_what_it_can_say(home: Path, tmp_path: Path):
    (tmp_path / "script.py").write_text(SCRIPT)
    environment = {name: value for name, value in os.environ.items() if name != "WORKBENCH_QUIET"}

    def again(*how: str) -> subprocess.CompletedProcess:
        command = [sys.executable, str(tmp_path / "script.py"), *how]
        return subprocess.run(command, capture_output=True, text=True, env=environment)

    folder = home / "runs" / "my-run"
    where = f"run my-run, kept at {folder}; look with: workbench view my-run"
    first = again()
    found = "no mixture of experts, 2 matrices"
    assert first.returncode == 0 and first.stderr == f"workbench: watching {where}\nworkbench: found {found}\n"
    assert first.stdout == f"<Watch, open after 4 steps: {found}; {where}>\n"
    second = again()
    said = "run 'my-run' is there already (finished after 4 steps): pass resume=True to go on with it, "
    assert second.returncode == 1 and said + "overwrite=True to replace it" in second.stderr
    assert again("resume").returncode == 0
    with Run(folder) as run:
        created, losses = run.created, run.scalars("train/loss")[1].tolist()
        assert losses == [0, 1, 2, 3, 4, 5, 6, 7] and run.status.state == "finished"
        assert [(event.step, event.kind) for event in run.events()] == [(3, "resume")]
    assert again("overwrite").returncode == 0
    with Run(folder) as run:
        assert run.scalars("train/loss")[1].tolist() == [0, 1, 2, 3]
        assert run.created > created and run.status.state == "finished" and run.meta["total_steps"] == 8
    assert [path.name for path in folder.parent.iterdir()] == ["my-run"]


def test_a_first_run_may_say_either(home: Path):
    for how in ("resume", "overwrite"):
        with watch(nn.Linear(2, 2), how, **{how: True}) as watching:
            assert watching.next_step == 0


def test_a_resumed_run_keeps_what_is_not_said_anew(home: Path):
    watch(nn.Linear(2, 2), "run", total_steps=5, meta={"who": "me"}).close()
    watch(nn.Linear(2, 2), "run", seed=3, meta={"why": "again"}, resume=True).close()
    with Run(home / "runs" / "run") as run:
        meta = run.meta
    assert (meta["total_steps"], meta["seed"], meta["who"], meta["why"]) == (5, 3, "me", "again")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Sequential(nn.Linear(4, 3)), r"matrix '0' is \[3, 4\] but was \[4, 4\]"),
        (nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), "matrix '1' is .* but was not there"),
        (nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)), "group '1' is 8 but was not there"),
    ],
)
def test_a_run_does_not_go_on_with_another_model(model: nn.Module, message: str, home: Path):
    watch(nn.Sequential(nn.Linear(4, 4)), "run").close()
    with pytest.raises(InputError, match=f"run 'run' cannot go on with this model: {message}; overwrite=True"):
        watch(model, "run", resume=True)
    with watch(model, "run", overwrite=True) as watching:
        assert watching.next_step == 0


def test_other_layers_or_domains_are_another_model(task, home: Path):
    watch(language_model(), "run", task=task).close()
    with pytest.raises(InputError, match="domain 'a' is not there but was there"):
        watch(language_model(), "run", resume=True)
    other = language_model()
    other.blocks[1].ffn.router.set_top_k(1)
    with pytest.raises(InputError, match=r"layer 'blocks.1.ffn' is .*'top_k': 1.* but was .*'top_k': 2"):
        watch(other, "run", task=task, resume=True)


def test_what_cannot_be_resumed_or_replaced_is_left_alone(home: Path, tmp_path: Path):
    model = nn.Linear(2, 2)
    for how in ({"resume": True}, {"overwrite": True}):
        with pytest.raises(InputError, match="needs the name or the folder of a run"):
            watch(model, **how)
    with pytest.raises(InputError, match="both True"):
        watch(model, "run", resume=True, overwrite=True)
    RunWriter.create(home / "runs" / "trained", {"kind": "train"}).close()
    for how in ({}, {"resume": True}, {"overwrite": True}):
        with pytest.raises(InputError, match="'trained' is there already and no watched model's"):
            watch(model, "trained", **how)
    with watch(model, "busy"):
        for how in ("resume", "overwrite"):
            with pytest.raises(InputError, match="is being written by process"):
                watch(model, "busy", **{how: True})
    watch(model, tmp_path / "mine").close()
    (tmp_path / "mine" / "weights.pt").write_text("precious")
    with pytest.raises(InputError, match=r"holds weights.pt; move that"):
        watch(model, tmp_path / "mine", overwrite=True)
    assert (tmp_path / "mine" / "weights.pt").read_text() == "precious"


def test_the_old_run_stays_where_the_new_one_cannot_come(home: Path, monkeypatch: pytest.MonkeyPatch):
    model = nn.Linear(2, 2)
    with watch(model, "run") as watching:
        watching.step(loss=1.0)

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("workbench.live.writer._make", full)
    with pytest.raises((InputError, RunStopped), match="No space left"):
        watch(model, "run", overwrite=True)
    monkeypatch.undo()
    with Run(home / "runs" / "run") as run:
        assert run.last_step == 0 and run.status.state == "finished"
    assert [path.name for path in (home / "runs").iterdir()] == ["run"]


def test_a_damaged_run_is_replaced_and_not_resumed(home: Path):
    watch(nn.Linear(2, 2), "run").close()
    (home / "runs" / "run" / "run.sqlite").write_bytes(b"rubbish" * 1000)
    for how in ({}, {"resume": True}):
        with pytest.raises(InputError, match=r"damaged.*; overwrite=True replaces it"):
            watch(nn.Linear(2, 2), "run", **how)
    watch(nn.Linear(2, 2), "run", overwrite=True).close()
    with Run(home / "runs" / "run") as run:
        assert run.status.state == "finished"


def test_a_page_shows_the_run_that_replaced_the_one_it_showed(home: Path):
    from workbench.live.views import Workbench

    model = nn.Linear(2, 2)
    with watch(model, "run") as watching:
        for loss in (1.0, 2.0):
            watching.step(loss=loss)
    page = Workbench("run")
    page.list_runs()
    with watch(model, "run", overwrite=True) as watching:
        watching.step(loss=5.0)
        page.list_runs()
        page.poll()
        assert page.selection.run.scalars("train/loss")[1].tolist() == [5.0]
        watching.step(loss=6.0)  # closing the old file has taken nothing from the new one
        page.poll()
        assert page.selection.run.scalars("train/loss")[1].tolist() == [5.0, 6.0]
    page.selection.close()


@pytest.mark.parametrize(
    ("cadence", "message"),
    [
        ({"routng": 1}, "cadence 'routng' is unknown; did you mean 'routing'"),
        ({"routing": -1}, "cadence routing is -1 but must be"),
        ({"conflict": 1.5}, "cadence conflict is 1.5 but must be"),
    ],
)
def test_a_wrong_cadence_is_refused(cadence: dict, message: str, tmp_path: Path):
    with pytest.raises(InputError, match=message):
        watch(nn.Linear(2, 2), tmp_path / "run", cadence=cadence)
    assert not (tmp_path / "run").exists()


def test_every_kind_is_recorded_at_the_first_step():
    assert all(Cadence().due(kind, 0) for kind in ("routing", "structure", "conflict"))
    assert not Cadence(conflict=0).due("conflict", 0)


# -- models of other libraries


def test_a_mixtral_of_transformers_is_watched(tmp_path: Path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=16,
    )
    model = transformers.MixtralForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    ids = torch.randint(50, (3, 7))
    mask = torch.ones_like(ids)
    mask[0, 4:] = 0
    with watch(model, tmp_path / "run") as watching:
        loss = model(input_ids=ids, attention_mask=mask, labels=ids).loss
        loss.backward()
        optimizer.step()
        watching.step(loss=loss.item())
    with Run(tmp_path / "run") as run:
        layers = run.meta["model"]["layers"]
        assert [(layer["n_experts"], layer["top_k"]) for layer in layers] == [(4, 2)] * 2
        first = layers[0]["name"]
        assert first.startswith("model.layers.0.")
        assert run.tensor(f"load/{first}")[1].sum() == mask.sum() * 2
        assert run.tensor(f"importance/{first}")[1].sum() == pytest.approx(1)
        assert run.tensor(f"transition/{first}")[1].sum() == mask.sum() * 4
        assert {f"{first}.router", f"{first}.experts", "model.layers.1.attention", "trunk"} <= set(
            run.meta["model"]["groups"]
        )
        assert "spectrum/gradient/model.layers.1.self_attn.q_proj" in run.names()
        assert run.tensor(f"spectrum/weight/{first}.experts.0.gate")[1].shape == (8,)


def test_an_adapter_of_peft_is_watched(tmp_path: Path):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 12))
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, lora_alpha=8, target_modules=["0", "1"]))
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=1.0)
    with watch(model, tmp_path / "run", cadence={"structure": 1}) as watching:
        for _ in range(2):
            optimizer.zero_grad()
            model(torch.randn(8, 12)).square().mean().backward()
            optimizer.step()
            watching.step()
    layer = model.base_model.model[0]
    product = layer.get_delta_weight("default").detach()
    with Run(tmp_path / "run") as run:
        matrices = run.meta["model"]["matrices"]
        assert len(matrices) == 2 and all(shape == [12, 12] for shape in matrices.values())
        (name,) = [name for name in matrices if ".0." in name]
        step, values = run.tensor(f"spectrum/weight/{name}")
        assert step == 1
        np.testing.assert_allclose(values, torch.linalg.svdvals(product)[:2], rtol=1e-4, atol=1e-6)


# -- what is not seen is said


class Router(nn.Module):
    """The shape of a router in transformers 5, or what it should not be."""

    def __init__(self, kind: str):
        super().__init__()
        self.num_experts, self.top_k, self.kind = 4, 2, kind
        self.weight = nn.Parameter(torch.randn(4, 8))

    def forward(self, x):
        logits = x @ self.weight.T
        weights, indices = logits.softmax(-1).topk(2, -1)
        return (logits.sum(1),) if self.kind == "unreadable" else (logits, weights, indices)


class Mixture(nn.Module):
    def __init__(self, kind: str = ""):
        super().__init__()
        self.gate, self.out = Router(kind), nn.Linear(8, 8)

    def forward(self, x):
        first = self.gate(x)[0]
        return self.out(x) * first.sum()


def steps(watching, call: nn.Module, model: nn.Module, n: int = 1, step: bool = True) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for _ in range(n):
        call(torch.ones(6, 8)).sum().backward()
        if step:
            optimizer.step()
        optimizer.zero_grad()
        watching.step(loss=1.0)


UNSEEN = {
    "a decision of another shape": r"moe: its decision cannot be read from float32 \(6,\); .*routers=",
    "evaluation mode": "no decision of moe was seen: it is in evaluation mode.*model.train",
    "a copy is trained": "no decision of moe was seen: its router was not called.*torch.compiler.reset",
    "no optimizer of torch": "no gradient was seen: call step after an optimizer",
    "a replaced block": "moe, moe.gate, moe.out: replaced in the model.*resume=True",
}


@pytest.mark.parametrize("how", UNSEEN)
def test_what_an_armed_probe_does_not_see_is_said_once_with_the_remedy(how: str, tmp_path: Path):
    torch.manual_seed(0)
    model = nn.Sequential(OrderedDict(moe=Mixture("unreadable" if "shape" in how else "")))
    with watch(model, tmp_path / "run", cadence={"structure": 1}) as watching:
        trained = copy.deepcopy(model) if "copy" in how else model.train("evaluation" not in how)
        if "replaced" in how:
            steps(watching, trained, model)
            model.moe = Mixture()
        with pytest.warns(UserWarning, match=UNSEEN[how]) as caught:
            steps(watching, trained, trained, 2, step="optimizer" not in how)
        assert caught[0].filename == __file__
    with Run(tmp_path / "run") as run:
        said = [event.text for event in run.events() if event.kind == "note"]
        assert any(re.search(UNSEEN[how], text) for text in said) and len(said) == len(set(said))
        if "replaced" in how:
            recorded = [run.steps(name).tolist() for name in (*run.names("load/"), *run.names("spectrum/weight/"))]
            assert recorded and set(map(tuple, recorded)) == {(0,)}


@pytest.mark.parametrize("how", ["the model", "in place", "a layer"])
def test_a_model_that_was_compiled_and_called_before_is_watched(how: str, tmp_path: Path):
    torch.manual_seed(0)
    model = call = nn.Sequential(OrderedDict(moe=Mixture(), head=nn.Linear(8, 8)))
    if how == "the model":
        call = torch.compile(model, backend="eager")
    elif how == "in place":
        model.compile(backend="eager")
    else:
        model.moe = torch.compile(model.moe, backend="eager")
    call(torch.ones(6, 8)).sum().backward()
    with watch(call, tmp_path / "run", cadence={"routing": 2}) as watching:
        steps(watching, call, model, 3)
    call(torch.ones(6, 8))
    with Run(tmp_path / "run") as run:
        assert run.steps("load/moe").tolist() == [0, 2] and run.tensor("load/moe")[1].sum() == 12
        assert list(run.meta["model"]["matrices"]) == ["moe.gate", "moe.out", "head"]


def test_what_is_found_is_said_at_the_start(tmp_path: Path, capsys, monkeypatch):
    monkeypatch.delenv("WORKBENCH_QUIET", raising=False)
    model = nn.ModuleDict(
        {"layers": nn.ModuleList([Mixture(), Mixture()]), "moe": nn.ModuleDict({"experts": nn.Linear(2, 2)})}
    )
    watch(model, tmp_path / "run").close()
    found = "2 mixtures of experts (layers.0 to layers.1; 4 experts, top 2), 5 matrices; not read: moe, say how with "
    assert f"workbench: found {found}watch(..., routers={{...}})\n" in capsys.readouterr().err


def test_units_of_losses_are_those_that_are_named(tmp_path: Path):
    for units in ({}, {"loss": "mm", "aux": "mm²"}):
        with watch(nn.Linear(2, 2), tmp_path / str(len(units)), units=units, cadence={"structure": 0}) as watching:
            watching.step(loss=1.0, aux=0.5)
        with Run(tmp_path / str(len(units))) as run:
            readings = Readings(run)
            assert losses(readings).unit == units.get("loss", "loss")
            assert named(readings, "aux") == units.get("aux", "loss")
    with pytest.raises(InputError, match=r"units\['loss'\] is 3 but must be a unit in words"):
        watch(nn.Linear(2, 2), tmp_path / "wrong", units={"loss": 3})


def test_a_layer_that_is_the_whole_model_is_watched_and_shown(tmp_path: Path):
    torch.manual_seed(0)
    layer = MoELayer(LinearRouter(8, 4, 2), GLUExperts(4, 8, 4))
    with watch(layer, tmp_path / "run") as watching:
        layer(torch.randn(10, 8)).sum().backward()
        watching.step(loss=1.0)
    with Run(tmp_path / "run") as run:
        assert run.tensor("load/model")[1].sum() == 20
        assert balance(Readings(run), 0).values["max_vio"].shape == (1, 1)
