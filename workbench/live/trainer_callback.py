"""A training by transformers' `Trainer`, watched, with the losses of a mixture in it.

adapted = workbench.adapt(model, "mixlora")
optimizers = adapted.optimizer(args.learning_rate), None  # the trainer's own does only what AdamW does
trainer = transformers.Trainer(model, args, train_dataset=rows, optimizers=optimizers)
trainer.add_callback(WatchCallback(trainer, "my-run", adapted=adapted))
trainer.train()
"""

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback

from workbench.errors import InputError
from workbench.lib.core.adapt import Adapted, restore_adapter
from workbench.lib.core.adapt.adapted import BESIDE
from workbench.lib.core.adapt.files import read_adapter
from workbench.lib.core.train import tell_step
from workbench.live.watch import Watch, watch

COEFFICIENTS = ("router_aux_loss_coef", "aux_loss_coef", "router_z_loss_coef")
"""What configs call the coefficient of a model's own balance loss."""


class WatchCallback(TrainerCallback):
    """Records each optimizer step in a run, and trains the losses of an adapted model beside the task's.

    `Adapted.losses` are means over tokens. A step adds them up with the weight that each batch of it has by its tokens,
    over gradient accumulation and over processes: a mean over tokens then is what it is of one batch of the same rows.
    (A balance loss is a product of two means; of that, one batch differs from the mean of its parts.) It is the same
    with label smoothing and with a loss of one's own. What `Trainer` logs as loss has them in it; the run has the
    task's loss as "loss" and theirs as "aux".

    A checkpoint that the trainer saves of an adapted model of transformers has the adaptation beside the model. The
    trainer loads it with it, to resume from or as the best one, and a resumed training goes on as one that was not
    interrupted; but only the trainer that this was made for.

    What the trainer does with a balance loss that the model has by itself is said when training begins: nothing is
    changed in it. So is what the adapted model's system does in the steps of `Adapted.optimizer` alone, such as the
    rates of lora+ or the restarts of relora, where the trainer was not given that optimizer.

    Args:
        trainer: that this is added to.
        run: see `watch`, as for `options`. With several processes the first one records, what it sees itself.
        adapted: the adapted model that is trained; None for one without.

    Attributes:
        watched: the `Watch` of the training that goes on; None else.
    """

    def __init__(
        self, trainer: Trainer, run: str | Path | None = None, *, adapted: Adapted | None = None, **options: Any
    ):
        if adapted is not None and trainer.accelerator.unwrap_model(trainer.model) is not adapted.model:
            raise InputError("adapted is of another model than the trainer's")
        if trainer.args.n_gpu > 1:
            raise InputError(
                f"n_gpu is {trainer.args.n_gpu}, for which the trainer copies the model in every step, and what is "
                "watched is the copies': start with torchrun"
            )
        self.trainer, self.run, self.adapted, self.options = trainer, run, adapted, options
        if adapted is not None:
            load, best = trainer._load_from_checkpoint, trainer._load_best_model
            trainer._load_from_checkpoint = lambda folder, *a, **k: self._load(folder, lambda: load(folder, *a, **k))
            trainer._load_best_model = lambda: self._load(trainer.state.best_model_checkpoint, best)
        self.watched: Watch | None = None
        self._undo: Callable[[], None] = lambda: None
        self._loss = self._aux = 0.0
        self._tokens, self._said = 1.0, False

    def on_train_begin(self, args, state, control, model=None, **_) -> None:
        self.on_train_end(args, state, control)  # of a training that was broken off
        self._loss, self._aux, self._said = 0.0, 0.0, False
        trainer = self.trainer
        compute, batches = trainer.compute_loss, trainer.get_batch_samples
        trainer.compute_loss = lambda *a, **k: self._compute_loss(compute, *a, **k)
        trainer.get_batch_samples = lambda *a, **k: self._count(batches(*a, **k))

        def undo() -> None:
            trainer.compute_loss, trainer.get_batch_samples = compute, batches

        self._undo = undo
        if state.is_world_process_zero:
            model = trainer.accelerator.unwrap_model(model)
            self.watched = watch(model, self.run, **{"total_steps": state.max_steps, "seed": args.seed, **self.options})
            self.watched.next_step = max(self.watched.next_step, state.global_step)
            self._say_of_optimizer()

    def on_optimizer_step(self, args, state, control, optimizer=None, **_) -> None:
        for layer in self.adapted.layers.values() if self.adapted else ():
            tell_step(layer)  # now, for a checkpoint is saved before the next forward
        loss, aux, self._loss, self._aux = self._loss, self._aux, 0.0, 0.0
        # a training that went back to a checkpoint makes some steps again
        if self.watched is not None and state.global_step >= self.watched.next_step:
            values = {"lr": optimizer.param_groups[0]["lr"]}
            self.watched.step(float(loss), **values, **({"aux": float(aux)} if self.adapted else {}))

    def on_evaluate(self, args, state, control, metrics=None, **_) -> None:
        if self.watched is not None and metrics:
            numbers = {k.removeprefix("eval_"): v for k, v in metrics.items() if isinstance(v, int | float)}
            self.watched.evaluation(numbers)

    def on_train_end(self, args, state, control, **_) -> None:
        self._undo()
        self._undo = lambda: None
        watched, self.watched = self.watched, None
        if watched is not None:
            watched.close()

    def _load(self, folder: str, load: Callable[[], None]) -> None:
        """Load a checkpoint of the model by `load`, which knows nothing of the adaptation, and the adaptation.

        Raises:
            InputError: the checkpoint has none, or it does not fit.
        """
        model, beside = self.adapted.model, Path(folder) / BESIDE
        if "save_pretrained" not in vars(model):  # no model of transformers: its checkpoint has all names
            return load()
        read_adapter(beside)  # what is damaged is seen before anything is changed
        with self.adapted.bare():
            load()
        restore_adapter(self.adapted, beside)

    def _count(self, samples: tuple[list, Any]) -> tuple[list, Any]:
        """Note how many tokens the batches of a step have, on all processes together."""
        batches, items = samples
        count = torch.tensor(float(sum(map(_tokens, batches))), device=self.trainer.args.device)
        self._tokens = max(1.0, float(self.trainer.accelerator.gather(count).sum()))
        return batches, items

    def _compute_loss(
        self, compute: Callable, model, inputs: Mapping[str, Any], return_outputs: bool = False, **given: Any
    ) -> Any:
        tokens = _tokens(inputs)
        loss, outputs = compute(model, inputs, return_outputs=True, **given)
        if model.training:
            trainer = self.trainer
            items, batches = given.get("num_items_in_batch"), trainer.current_gradient_accumulation_steps
            # as `Trainer.training_step` decides it
            scaled = getattr(trainer, "loss_is_scaled_for_ga", None)
            if scaled is None:
                by_items = trainer.model_accepts_loss_kwargs and items is not None
                scaled = by_items or trainer.compute_loss_func is not None
            later = 1.0 if scaled else 1 / batches  # what the trainer still multiplies by
            self._say_of_host(outputs, scaled, batches)
            self._loss = self._loss + loss.detach() * later
            losses = self.adapted.losses().values() if self.adapted else ()
            if losses:
                # gradients are averaged over processes, so each gives its share times their number
                share = tokens * trainer.accelerator.num_processes / self._tokens
                aux = share * sum(losses)
                self._aux = self._aux + aux.detach()
                loss = loss + aux / later
        return (loss, outputs) if return_outputs else loss

    def _say_of_optimizer(self) -> None:
        """Say where the trainer's optimizer is not the adapted model's, and what is missing by that."""
        wrapped = self.trainer.optimizer
        if self.adapted is None or getattr(getattr(wrapped, "optimizer", wrapped), "adapted", None) is self.adapted:
            return
        adapter = self.adapted.adapter
        if (beside := adapter.beside_adamw(self.adapted)) is not None:
            name = getattr(adapter, "variant", adapter.slug)
            self._note(
                f"{name} has {beside} in the steps of adapted.optimizer() alone, and the trainer has another: "
                "Trainer(..., optimizers=(adapted.optimizer(args.learning_rate), None))"
            )

    def _note(self, said: str) -> None:
        self.watched.writer.event(self.watched.next_step, "note", said)
        print(f"workbench: note: {said}", file=sys.stderr)

    def _say_of_host(self, outputs: Any, scaled: bool, batches: int) -> None:
        """Say once where the trainer does not train the model's own balance loss as the model has it."""
        if self._said or self.watched is None:
            return
        self._said = True
        trainer, model = self.trainer, self.trainer.accelerator.unwrap_model(self.trainer.model)
        if not hasattr(model, "config"):
            return
        config = model.config.get_text_config()
        name = next((name for name in COEFFICIENTS if getattr(config, name, 0)), None)
        if name is None or not isinstance(outputs, Mapping) or outputs.get("router_logits") is None:
            return
        times = batches * (trainer.accelerator.num_processes if trainer.args.average_tokens_across_devices else 1)
        if not isinstance(outputs.get("aux_loss"), Tensor):
            said = "is in no loss: this architecture gives router logits, but adds nothing"
        elif trainer.label_smoother is not None or trainer.compute_loss_func is not None:
            said = "is not trained: with label smoothing, or a loss of one's own, the trainer leaves it out"
        elif scaled and times > 1:
            said = f"counts {times} times: it is added whole in each batch of a step, and the task's loss in parts"
        else:
            return
        self._note(f"the model's own balance loss ({name} = {getattr(config, name):g}) {said}")


def _tokens(inputs: Mapping[str, Any]) -> int:
    """Tokens of a batch, without padding where a mask says which; rows where it has no tokens."""
    mask = inputs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.ndim == 2:
        return int(mask.sum())
    ids = inputs.get("input_ids")
    if isinstance(ids, Tensor):
        return ids.numel()
    return next((len(value) for value in inputs.values() if isinstance(value, Tensor) and value.ndim), 1)
