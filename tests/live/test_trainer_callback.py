"""A training by transformers' `Trainer`: watched, a mixture's losses in it, and what is said of the model's own."""

import re
import shutil

import pytest
import torch
from torch import nn

from workbench.errors import InputError
from workbench.lib.core.adapt import adapt, load_adapter
from workbench.lib.core.adapt.files import own_state
from workbench.live.records import LOAD
from workbench.live.store import Run

SIZES = {"vocab_size": 31, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1, "pad_token_id": 0, "eos_token_id": None}
ROWS = torch.randint(1, 31, (6, 8), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True, scope="module")
def _transformers():
    """Only the process that runs these tests pays for the import."""
    global transformers, WatchCallback
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    from workbench.live.trainer_callback import WatchCallback


def olmo() -> nn.Module:
    torch.manual_seed(0)
    return transformers.Olmo2ForCausalLM(transformers.Olmo2Config(**SIZES, **HEADS))


def mixtral(coefficient: float = 0.02) -> nn.Module:
    torch.manual_seed(0)
    more = {"num_local_experts": 4, "output_router_logits": True, "router_aux_loss_coef": coefficient}
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**SIZES, **HEADS, **more))


def data(rows) -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": row, "labels": row} for row in rows]


def train(
    model, folder, rows=ROWS, adapted=None, batch=1, parts=1, eval_rows=None, loss=None, optimizer=None, **arguments
):
    """Train one epoch by gradient descent, in steps of `parts` batches, watched; the trainer."""
    quiet = {"report_to": [], "save_strategy": "no", "disable_tqdm": True, "logging_strategy": "no", "use_cpu": True}
    plain = {"optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant", "max_grad_norm": 0}
    size = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": parts, "num_train_epochs": 1}
    order = {"train_sampling_strategy": "sequential", "eval_strategy": "no" if eval_rows is None else "epoch"}
    args = transformers.TrainingArguments(str(folder / "trainer"), **quiet, **size, **order, **plain | arguments)
    evaluated = {} if eval_rows is None else {"eval_dataset": data(eval_rows)}
    evaluated |= {} if optimizer is None else {"optimizers": (optimizer, None)}
    trainer = transformers.Trainer(model, args, train_dataset=data(rows), compute_loss_func=loss, **evaluated)
    trainer.add_callback(WatchCallback(trainer, folder / "run", adapted=adapted, overwrite=True))
    trainer.train()
    return trainer


def test_a_mixture_is_trained_watched_saved_loaded_and_generated_from(tmp_path):
    model = olmo()
    adapted = adapt(model, "mixlora", targets="*.mlp.*", experts=4, rank=2, balance=0.5)
    before = [p.clone() for p in adapted.parameters()]
    trainer = train(model, tmp_path, adapted=adapted, parts=2, eval_rows=ROWS[:2])
    assert trainer.state.global_step == 3
    assert any((p != q).any() for p, q in zip(adapted.parameters(), before, strict=True))
    with Run(tmp_path / "run") as run:
        assert run.last_step == 2 and run.status.state == "finished" and run.meta["total_steps"] == 3
        found = {name: run.scalars(f"train/{name}") for name in ("loss", "aux", "lr")}
        for steps, values in found.values():
            assert list(steps) == [0, 1, 2] and all(values > 0)
        # what the trainer logs has both losses in it
        logged = (found["loss"][1] + found["aux"][1]).mean()
        assert logged == pytest.approx(trainer.state.log_history[-1]["train_loss"], rel=1e-4)
        assert run.scalars("valid/loss")[1][0] == pytest.approx(trainer.state.log_history[0]["eval_loss"])
        assert run.tensor(LOAD.name("model.layers.0.mlp"))[1].shape == (4,)
    assert trainer.compute_loss.__func__ is transformers.Trainer.compute_loss  # as it was
    adapted.save(tmp_path / "adapter")
    again = olmo()
    load_adapter(again, tmp_path / "adapter")
    model.eval(), again.eval()
    assert torch.equal(again(ROWS).logits, model(ROWS).logits)
    assert not torch.equal(olmo().eval()(ROWS).logits, model(ROWS).logits)
    made = [m.generate(ROWS[:2], max_new_tokens=5, do_sample=False) for m in (model, again)]
    assert made[0].shape == (2, 13) and torch.equal(*made)


def cross_entropy(outputs, labels, num_items_in_batch):
    logits = outputs.logits[:, :-1].flatten(0, 1)
    return nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum") / num_items_in_batch


@pytest.mark.parametrize(
    ("slug", "options", "rows", "how"),
    [
        # a mean over tokens, in batches of two rows and of one
        ("flexmore", {"z": 20.0}, ROWS[:3], {}),
        ("flexmore", {"z": 20.0}, ROWS[:3], {"label_smoothing_factor": 0.1}),
        ("flexmore", {"z": 20.0}, ROWS[:3], {"loss": cross_entropy}),
        # a product of two means, which are the same in each batch
        ("mixlora", {"balance": 5.0, "experts": 4, "rank": 2}, ROWS[:1].expand(4, -1), {}),
    ],
    ids=["plain", "label smoothing", "a loss of one's own", "balance"],
)
def test_a_step_of_several_batches_is_that_of_one_batch_of_the_same_rows(tmp_path, slug, options, rows, how):
    """The trained numbers after one step; without the mixture's losses they are others."""

    def stepped(batch: int, parts: int, **changed) -> list[torch.Tensor]:
        adapted = adapt(model := olmo(), slug, targets="*.mlp.*", **options | changed)
        train(model, tmp_path, rows, adapted, batch, parts, **how)
        return [p.detach() for p in adapted.parameters()]

    one, parts = stepped(len(rows), 1), stepped(2, 2)
    for a, b in zip(one, parts, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)
    without = stepped(2, 2, **{next(iter(options)): 0.0})
    assert max(float((a - b).abs().max()) for a, b in zip(parts, without, strict=True)) > 1e-3


def test_processes_weigh_by_their_tokens(tmp_path, monkeypatch):
    """Two processes with two rows and one: the mean of their gradients is that of one batch."""
    adapted = adapt(model := olmo().train(), "flexmore", targets="*.mlp.*", z=20.0)
    args = transformers.TrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    trainer = transformers.Trainer(model, args)
    callback = WatchCallback(trainer, adapted=adapted)
    trainer.current_gradient_accumulation_steps = 1

    def compute(model, inputs, return_outputs, **_):
        outputs = model(**inputs)
        return outputs.loss * 0, outputs

    def gradients(parts) -> list[torch.Tensor]:
        monkeypatch.setattr(type(trainer.accelerator), "num_processes", len(parts))
        everywhere = torch.tensor([float(part.numel()) for part in parts])
        monkeypatch.setattr(trainer.accelerator, "gather", lambda count: everywhere)
        model.zero_grad()
        for part in parts:
            inputs = {"input_ids": part, "labels": part}
            callback._count(([inputs], None))
            (callback._compute_loss(compute, model, inputs) / len(parts)).backward()
        return [p.grad.clone() for p in adapted.parameters() if p.grad is not None]

    for a, b in zip(gradients([ROWS[:3]]), gradients([ROWS[:2], ROWS[2:3]]), strict=True):
        torch.testing.assert_close(a, b, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize(
    ("how", "times", "said"),
    [
        ({"batch": 4}, 1, None),
        ({"parts": 4}, 4, "counts 4 times"),
        ({"batch": 4, "label_smoothing_factor": 0.1}, 0, "is not trained: with label smoothing"),
    ],
    ids=["one batch", "four batches", "smoothed"],
)
def test_what_the_trainer_does_with_a_model_s_own_balance_loss_is_said(tmp_path, capsys, how, times, said):
    """And it is what happens: transformers 5.24, the balance loss's part of a step, as a multiple of its own."""
    rows = ROWS[:1].expand(4, -1)  # the same in each batch, so that parts do not differ from the whole

    def router(coefficient: float) -> torch.Tensor:
        train(model := mixtral(coefficient), tmp_path, rows, **how)
        return model.model.layers[0].mlp.gate.weight.detach()

    own = mixtral()
    own(rows).aux_loss.backward()
    expected = -0.1 * own.model.layers[0].mlp.gate.weight.grad
    plain, capture = router(0.0), capsys.readouterr()
    assert "balance loss" not in capture.err
    torch.testing.assert_close(router(1.0) - plain, times * expected, atol=2e-6, rtol=1e-3)
    with Run(tmp_path / "run") as run:
        notes = [event.text for event in run.events() if event.kind == "note"]
    assert len(notes) == (said is not None) and all(said in note for note in notes)
    assert (said is None) or said in capsys.readouterr().err


VARIANTS = {
    "lora+": ({}, r"lora\+ has learning rates of 1, 16 times"),
    "riemannian": ({}, "riemannian has gradients divided by"),
    "lora-pro": ({}, "lora-pro has gradients whose step"),
    "relora": ({"every": 2}, "relora has the product put into"),
    "adalora": ({"begin": 1, "end": 4, "every": 1, "target": 1}, "adalora has ranks that move"),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_a_variant_does_in_its_optimizer_s_steps_it_does_under_the_trainer_or_it_is_said(
    tmp_path, capsys, variant
):
    """As in a loop of one's own, with the adapted model's optimizer; with the trainer's otherwise, and it is said."""
    own, said = VARIANTS[variant]

    def begun():
        torch.manual_seed(1)
        return adapt(olmo().train(), "lora-variants", targets="*.mlp.*", variant=variant, rank=2, own=own)

    def trained(optimizer: bool):
        adapted = begun()
        torch.manual_seed(5)
        how = {"optimizer": adapted.optimizer(0.02)} if optimizer else {"optim": "adamw_torch"}
        train(adapted.model, tmp_path, adapted=adapted, learning_rate=0.02, seed=5, **how)
        return own_state(adapted.layers), capsys.readouterr().err

    loop = begun()
    optimizer = loop.optimizer(0.02)
    torch.manual_seed(5)
    for row in ROWS:
        optimizer.zero_grad()
        loop.model(input_ids=row[None], labels=row[None]).loss.backward()
        optimizer.step()
    given, quiet = trained(True)
    assert "adapted.optimizer()" not in quiet
    if variant != "relora":  # which draws, and the trainer draws otherwise
        for name, value in own_state(loop.layers).items():
            torch.testing.assert_close(given[name], value, atol=1e-5, rtol=1e-4)
    alone, told = trained(False)
    assert re.search(rf"{said}.* in the steps of adapted\.optimizer\(\) alone", told)
    moved = "moved" if variant == "relora" else "alive" if variant == "adalora" else ""
    pairs = [(given[name], alone[name]) for name in given if moved in name]
    assert pairs and any(not torch.allclose(a.float(), b.float(), atol=1e-4) for a, b in pairs)
    with Run(tmp_path / "run") as run:
        assert [event.text for event in run.events() if event.kind == "note" and "adapted.optimizer" in event.text]


def test_an_adapter_that_adamw_alone_trains_says_nothing_of_optimizers(tmp_path, capsys):
    adapted = adapt(model := olmo(), "lora-variants", targets="*.mlp.*", variant="dora", rank=2)
    train(model, tmp_path, ROWS[:1], adapted)
    assert "adapted.optimizer" not in capsys.readouterr().err
    adapted = adapt(model := olmo(), "remix", targets="*.mlp.*")
    train(model, tmp_path, ROWS[:1], adapted)
    assert "remix has learning rates of 1, 4 times in the steps of adapted.optimizer()" in capsys.readouterr().err


def test_what_does_not_fit_is_an_error(tmp_path):
    args = transformers.TrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    adapted = adapt(olmo())
    with pytest.raises(InputError, match="adapted is of another model than the trainer's"):
        WatchCallback(transformers.Trainer(olmo(), args), adapted=adapted)
    args._n_gpu = 2
    with pytest.raises(InputError, match="n_gpu is 2"):
        WatchCallback(transformers.Trainer(adapted.model, args), adapted=adapted)


class Plain(nn.Module):
    """A model that is none of transformers, whose checkpoints the trainer makes of its `state_dict`."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.mlp, self.head = nn.Embedding(31, 16), nn.Linear(16, 16), nn.Linear(16, 31)

    def forward(self, input_ids, labels):
        logits = self.head(torch.tanh(self.mlp(self.embed(input_ids))))
        return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}


def trainer_of(folder, adapted, callback=True, rows=ROWS, **arguments):
    """A trainer of six steps by AdamW with a schedule and shuffled rows, which saves after each."""
    quiet = {"report_to": [], "disable_tqdm": True, "logging_strategy": "no", "use_cpu": True}
    steps = {"per_device_train_batch_size": 1, "num_train_epochs": 1, "learning_rate": 0.05}
    steps |= {"save_strategy": "steps", "save_steps": 1}
    args = transformers.TrainingArguments(str(folder / "trainer"), **quiet, **steps | arguments)
    evaluated = {"eval_dataset": data(rows[:2])} if "eval_strategy" in arguments else {}
    trainer = transformers.Trainer(adapted.model, args, train_dataset=data(rows), **evaluated)
    if callback:
        trainer.add_callback(WatchCallback(trainer, folder / "run", adapted=adapted, resume=True))
    return trainer


RESUMED = [
    (olmo, "lora", {"rank": 2, "dropout": 0.3}, "*"),
    (olmo, "mixlora", {"experts": 4, "rank": 2, "balance": 0.5}, "*.mlp.*"),
    (olmo, "dynamic-dino", {}, "*.mlp.*"),  # its bias is no parameter, and moves with the load
    (olmo, "smora", {}, "*.mlp.*"),
    (mixtral, "lora", {"rank": 2}, "*"),  # packed experts, taken apart
    (Plain, "lora", {"rank": 2}, "*"),
]


@pytest.mark.parametrize(
    ("build", "slug", "options", "targets"), RESUMED, ids=lambda value: getattr(value, "__name__", None)
)
def test_a_training_that_is_resumed_goes_on_as_one_that_was_not_interrupted(tmp_path, build, slug, options, targets):
    """Bit for bit; from a model that is adapted anew, with other draws, and with what the base has trained beside."""

    def begun(seed: int):
        model = build()
        torch.manual_seed(seed)
        adapted = adapt(model, slug, targets=targets, **options)
        if build is olmo:
            model.model.norm.weight.requires_grad_()
        return adapted

    def numbers(adapted):
        return {k: t.detach().clone() for k, t in own_state(adapted.layers).items()} | (
            {"norm": adapted.model.model.norm.weight.detach().clone()} if build is olmo else {}
        )

    whole = begun(1)
    trainer_of(tmp_path, whole).train()
    expected, checkpoint = numbers(whole), tmp_path / "trainer" / "checkpoint-3"
    with Run(tmp_path / "run") as run:
        losses = run.scalars("train/loss")[1]
    other = begun(2)
    fresh, loaded = numbers(other), {}
    resumed = trainer_of(tmp_path / "again", other)
    resumed.callback_handler.callbacks.insert(0, Seen(lambda: loaded.update(numbers(other))))
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert resumed.state.global_step == 6
    for name, value in numbers(other).items():
        assert torch.equal(value, expected[name]), name
    moved = [name for name, value in expected.items() if not torch.equal(value, loaded[name])]
    assert moved and any(not torch.equal(loaded[name], fresh[name]) for name in moved)
    assert build is not olmo or "norm" in moved
    with Run(tmp_path / "again" / "run") as run:
        steps, again = run.scalars("train/loss")
        assert list(steps) == [3, 4, 5] and list(again) == list(losses[3:])


def Seen(look):
    """A callback that looks when training begins, when what a checkpoint has is loaded."""

    class Look(transformers.TrainerCallback):
        def on_train_begin(self, *_, **__):
            look()

    return Look()


def test_the_best_checkpoint_is_loaded_with_its_adaptation(tmp_path):
    adapted = adapt(olmo(), "lora", targets="*.mlp.*", rank=2)
    worst = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}
    trainer = trainer_of(tmp_path, adapted, eval_strategy="steps", eval_steps=1, **worst)
    trainer.train()
    best = trainer.state.best_model_checkpoint
    assert trainer.state.global_step == 6 and not best.endswith("-6")
    load_adapter(again := olmo(), f"{best}/adapter")
    assert torch.equal(again.eval()(ROWS).logits, adapted.model.eval()(ROWS).logits)
    load_adapter(last := olmo(), tmp_path / "trainer" / "checkpoint-6" / "adapter")
    assert not torch.equal(last.eval()(ROWS).logits, again(ROWS).logits)


def test_a_checkpoint_that_cannot_be_resumed_from_says_so_and_changes_nothing(tmp_path):
    trainer_of(tmp_path, adapt(olmo(), "lora", targets="*.mlp.*", rank=2), rows=ROWS[:2]).train()
    checkpoint = tmp_path / "trainer" / "checkpoint-1"

    def refused(said: str, callback: bool = True, folder=checkpoint, **options) -> None:
        adapted = adapt(olmo(), "lora", **{"targets": "*.mlp.*", "rank": 2} | options)
        before = {k: t.clone() for k, t in adapted.model.state_dict().items()}
        trainer = trainer_of(tmp_path / "again", adapted, callback, ROWS[:2])
        with pytest.raises(InputError, match=said):
            trainer.train(resume_from_checkpoint=str(folder))
        for name, value in adapted.model.state_dict().items():
            assert torch.equal(value, before[name]), name

    # the trainer alone would go on with a fresh adaptation and an old optimizer, and warn of missing keys
    refused("before it was adapted.*WatchCallback", callback=False)
    refused("was adapted otherwise: options was .*'rank': 2.* and is .*'rank': 3", rank=3)
    refused(r"was adapted otherwise: targets was \['\*.mlp.\*'\]", targets="*.up_proj")
    (checkpoint / "adapter" / "adapter.safetensors").write_bytes(b"x")
    refused("is damaged")
    shutil.rmtree(checkpoint / "adapter")
    refused("must hold an adaptation")


def test_the_state_of_the_bare_model_is_loaded_inside_bare_alone(tmp_path):
    state = {name: value + 1 for name, value in olmo().state_dict().items()}
    adapted = adapt(model := olmo(), "lora", targets="*.q_proj")
    weight = model.model.layers[0].self_attn.q_proj.base.weight
    for strict in (True, False):
        with pytest.raises(InputError, match="before it was adapted"):
            model.load_state_dict(state, strict=strict)
    with adapted.bare():
        model.load_state_dict(state)
    assert torch.equal(weight, state["model.layers.0.self_attn.q_proj.weight"])
    model.load_state_dict(model.state_dict())
    adapted.remove().load_state_dict(state)
