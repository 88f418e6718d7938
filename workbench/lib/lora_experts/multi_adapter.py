"""Several adapters trained at once over one frozen base: what MixLoRA's authors built to train many LoRAs on one GPU.

Source: Ye et al. 2023, "mLoRA: Fine-Tuning LoRA Adapters via Highly-Efficient Pipeline Parallelism in Multiple GPUs"
(arXiv:2312.02515), and MixLoRA (arXiv:2404.15159); public code: TUDB-Labs/mLoRA, TUDB-Labs/MoE-PEFT.

A batch is the rows of all jobs one after the other, padded to one length. What is frozen runs once on all of it; where
a job has adapted a layer, its own rows go through its own layer, which is given the frozen product of its rows. Every
job has its own loss, clipping, learning rate and optimizer, as if it were alone: rows never meet, so its gradients do
not know of the other jobs.

    trainer = MultiAdapterTrainer(base, {"a": Job("mixlora", task_a, config), "b": Job("lora", task_b, config)})
    trainer.run()
    trainer.adapted["a"].save("a")             # an adapted model of its own, on the same weights in memory

Tensor letters: B rows, T time, D model width.
"""

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from workbench.errors import InputError, unknown
from workbench.lib.core.adapt import Adapted, adapt
from workbench.lib.core.adapt.feed_forward import find_feed_forward
from workbench.lib.core.adapt.layer import Forward
from workbench.lib.core.routing import Context
from workbench.lib.core.task import Batch, Task, device_of
from workbench.lib.core.train import TrainConfig, step_seed, update


@dataclass(frozen=True)
class Job:
    """One adapter to train.

    Attributes:
        slug: the system, as in `adapt`.
        task: what it is trained on; its loss calls the model once, as `model(batch.inputs, context)`, with all rows.
        config: as in `train`; evaluation is the caller's.
        targets, options: as in `adapt`.
        seed: of the adapter's initial weights; default that of the config.
    """

    slug: str
    task: Task
    config: TrainConfig
    targets: str | Sequence[str] = "*"
    options: Mapping[str, Any] = field(default_factory=dict)
    seed: int | None = None


class MultiAdapterTrainer:
    """Trains every job as `lib.core.train.train` would, with one forward and one backward of the base a step.

    A job whose loss, gradient or routing is no longer finite is stopped before it changes a weight, and the others go
    on as if it had never been there; so they do when a job is stopped by hand.

    Attributes:
        adapted: the adapted model of each job, by its name. They share the frozen weights with `base` and each other.
        losses: of the step just made, by job, without the auxiliary losses.
        step_number: steps made.
        stopped: why a job makes no more steps, by its name; a job that has made all its steps is not here.

    Args:
        base: stays as it is, except that its parameters are not trained from now on. It is called as
            `base(inputs, context)`. Inputs of different lengths are padded with zeros on the right, which only a
            causal model does not notice; adapters never see the padding.

    Dropout and noise are drawn for all jobs at once, so with them a job has other random numbers than alone. Auxiliary
    losses of the base itself are left out.

    Raises:
        InputError: no job, targets or options that `adapt` refuses (the job is named), or batch normalisation in the
            base, where the rows of different jobs would meet.
    """

    def __init__(self, base: nn.Module, jobs: Mapping[str, Job]):
        if not jobs:
            raise InputError("jobs is empty but must hold at least one")
        if any(isinstance(module, _BatchNorm) for module in base.modules()):
            raise InputError("base has batch normalisation, in which the rows of different jobs would meet")
        self.jobs = dict(jobs)
        self.step_number, self.losses = 0, {}
        self.stopped: dict[str, str] = {}
        self.adapted: dict[str, Adapted] = {}
        for name, job in self.jobs.items():
            torch.manual_seed(job.config.seed if job.seed is None else job.seed)
            try:
                self.adapted[name] = adapt(skeleton(base), job.slug, job.targets, **job.options)
            except InputError as error:
                raise InputError(f"job {name!r}: {error}") from error
        self.together = Together(base, self.adapted)
        self.optimizers = {name: self.adapted[name].optimizer(job.config.lr) for name, job in self.jobs.items()}

    def run(self, steps: int | None = None) -> dict[str, list[float]]:
        """Make so many steps, or all that are left of the longest job; the losses of each job at each of its steps."""
        curves: dict[str, list[float]] = {name: [] for name in self.jobs}
        while self.running() and steps != 0:
            for name, loss in self.step().items():
                curves[name].append(loss)
            steps = None if steps is None else steps - 1
        return curves

    def running(self) -> dict[str, Job]:
        """The jobs that have steps left and are not stopped."""
        left = (name for name, job in self.jobs.items() if self.step_number < job.config.steps)
        return {name: self.jobs[name] for name in left if name not in self.stopped}

    def stop(self, name: str) -> None:
        """Make no more steps of this job; its adapted model stays."""
        if name not in self.jobs:
            raise unknown("job", name, self.jobs)
        self.stopped.setdefault(name, f"by hand before step {self.step_number}")

    def step(self) -> dict[str, float]:
        """One step of every running job: its loss by name, without those that this step stops.

        Raises:
            InputError: no job is running.
        """
        step, device, running = self.step_number, device_of(self.together.model), self.running()
        if not running:
            raise InputError(f"no job is running at step {step}: all have made their steps or are stopped")
        self.together.model.train()
        batches = {}
        for name, job in running.items():
            seed = step_seed(job.config.seed, step)
            torch.manual_seed(seed)
            generator = torch.Generator().manual_seed(seed)
            batches[name] = job.task.batch("train", job.config.batch_size, generator).to(device)
            self.adapted[name].model.train()
            self.optimizers[name].zero_grad(set_to_none=True)
        outputs = self.together(batches)
        wholes, losses = {}, {}
        for name, job in running.items():
            loss, _ = job.task.loss(_Answer(outputs[name]), batches[name])
            whole = loss + sum(self.adapted[name].losses().values())
            value = float(whole.detach())
            if math.isfinite(value):
                wholes[name], losses[name] = whole, loss.item()
            else:
                why = self.together.refused.get(name, f"the loss is {value}")
                self.stopped[name] = f"{why} at step {step}"
        if wholes:
            sum(wholes.values()).backward()
        for name in wholes:
            if not self._update(name, running[name].config, step):
                self.stopped[name] = f"the gradient is not finite at step {step}"
                del losses[name]
        self.step_number, self.losses = step + 1, losses
        return losses

    def _update(self, name: str, config: TrainConfig, step: int) -> bool:
        """Change the weights of a job; False, and nothing is changed, where its gradient is not finite."""
        optimizer = self.optimizers[name]
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        if not nn.utils.clip_grad_norm_(parameters, config.clip).isfinite():
            return False
        update(self.adapted[name].model, optimizer, config.lr_at(step))
        return True


class Together:
    """The base with the adapted layers of several jobs in it: one forward for the rows of all.

    Attributes:
        model: shares its weights with the base.
        refused: what a layer of a job said to its rows in the last forward, where it refused them.

    Args:
        adapted: adapted models made of the same base, whose frozen weights are the base's own.
    """

    def __init__(self, base: nn.Module, adapted: Mapping[str, Adapted]):
        self.adapted = dict(adapted)
        self.model = skeleton(base)
        self.rows, self.refused = _Rows(), {}
        names = {name for one in adapted.values() for name in one.layers}
        for job, one in self.adapted.items():
            if one.rebuilt:
                raise InputError(f"{job} adapts packed experts, or blocks in two modules, which jobs cannot share")
        outermost = sorted(n for n in names if not any(n.startswith(f"{other}.") for other in names))
        for place in outermost:
            parts = {name: one.model.get_submodule(place) for name, one in adapted.items()}
            parent, _, key = place.rpartition(".")
            layer = _Shared(self.model.get_submodule(place), parts, self.rows, self.refused)
            self.model.get_submodule(parent)._modules[key] = layer

    def __call__(self, batches: Mapping[str, Batch]) -> dict[str, Tensor]:
        """The output of each job's rows. Each layer's losses are in the `side` of its own adapted model."""
        inputs = {name: batch.inputs for name, batch in batches.items()}
        shapes = {tuple(x.shape[1:]) for x in inputs.values()}
        length = max(x.shape[1] for x in inputs.values())
        if len({(len(shape), shape[1:]) for shape in shapes}) > 1:
            shown = ", ".join(f"{name} {tuple(x.shape)}" for name, x in inputs.items())
            raise InputError(f"inputs have shapes {shown} but may differ in their rows and their length only")
        self.rows.set({name: tuple(x.shape[:2]) for name, x in inputs.items()}, length)
        self.refused.clear()
        for name, batch in batches.items():
            domain = batch.domain.repeat_interleave(batch.inputs.shape[1]) if batch.inputs.ndim == 2 else batch.domain
            ids = None if batch.inputs.is_floating_point() else batch.inputs.flatten()
            self.adapted[name].side.forward = Forward(Context(token_ids=ids, domain=domain))
        padded = [
            x if x.shape[1] == length else F.pad(x, (0, 0) * (x.ndim - 2) + (0, length - x.shape[1]))
            for x in inputs.values()
        ]
        output = self.model(torch.cat(padded), Context())
        return {name: self.rows.cut(output, name) for name in inputs}


class _Rows:
    """Which rows of the batch now running belong to which job."""

    def set(self, shapes: Mapping[str, tuple[int, int]], length: int) -> None:
        self.shapes, self.length, self.start, at = dict(shapes), length, {}, 0
        for name, (rows, _) in shapes.items():
            self.start[name], at = at, at + rows
        self.total = at

    def cut(self, x: Tensor, name: str) -> Tensor:
        """The job's part of x (B, T, ...), (B T, ...) or (B, ...), without the padding."""
        rows, own = self.shapes[name]
        start = self.start[name]
        if x.shape[0] == self.total:
            part = x[start : start + rows]
            return part[:, :own].contiguous() if own < self.length and part.ndim > 2 else part
        each = x.shape[0] // self.total
        part = x[start * each : (start + rows) * each]
        if own < self.length and each == self.length:
            part = part.unflatten(0, (rows, each))[:, :own].flatten(0, 1)
        return part

    def join(self, parts: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """The inverse of `cut` for parts of x with any last width; zeros where the padding was."""
        whole = []
        for name, part in parts.items():
            rows, own = self.shapes[name]
            if own < self.length and x.shape[0] == self.total and part.ndim > 2:
                part = F.pad(part, (0, 0) * (part.ndim - 2) + (0, self.length - own))
            elif own < self.length and x.shape[0] == self.total * self.length:
                part = part.unflatten(0, (rows, own))
                part = F.pad(part, (0, 0) * (part.ndim - 2) + (0, self.length - own)).flatten(0, 1)
            whole.append(part)
        return torch.cat(whole)


class _Shared(nn.Module):
    """A place that some job has adapted: the first frozen products for all rows, then each job's own module for its.

    Args:
        base: the frozen module of this place.
        parts: each job's module of this place, which reads the same weights.
        refused: where it is noted that a module refuses its rows (a router refuses what is not finite). The output of
            that job is NaN then, so that its loss says so and the rows of others go on.
    """

    def __init__(self, base: nn.Module, parts: Mapping[str, nn.Module], rows: _Rows, refused: dict[str, str]):
        super().__init__()
        self.base, self.rows, self.refused = base, rows, refused
        self.parts = dict(parts)  # not registered: their parameters belong to the jobs' own models
        block = find_feed_forward(base)
        if isinstance(base, nn.Linear):
            first = [base]
        else:
            first = [] if block is None else [block.linears[n] for n in dict.fromkeys((block.gate, block.up)) if n]
        self.first = first
        weights = {linear.weight for linear in first}
        self.known: dict[str, dict[nn.Parameter, tuple[Tensor, Tensor]]] = {name: {} for name in parts}
        for name, part in self.parts.items():
            for linear in part.modules():
                if isinstance(linear, nn.Linear) and linear.weight in weights:
                    linear.forward = partial(_product, linear, self.known[name])

    def forward(self, x: Tensor, *others: Any, **keywords: Any) -> Tensor:
        products = {linear.weight: linear(x) for linear in self.first}
        outputs = {}
        for name in self.rows.shapes:
            own, known = self.rows.cut(x, name), self.known[name]
            known.update({weight: (own, self.rows.cut(y, name)) for weight, y in products.items()})
            try:
                outputs[name] = self.parts[name](own, *others, **keywords)
            except InputError as error:
                self.refused.setdefault(name, str(error))
                outputs[name] = self.base(own, *others, **keywords) * math.nan
            finally:
                known.clear()
        return self.rows.join(outputs, x)


def _product(linear: nn.Linear, known: Mapping[nn.Parameter, tuple[Tensor, Tensor]], x: Tensor) -> Tensor:
    """What a frozen layer gives for x: the rows that are computed already, where x is what they were computed of."""
    if linear.weight in known:
        before, y = known[linear.weight]
        if x.data_ptr() == before.data_ptr() and x.numel() == before.numel() and x.is_contiguous():
            return y.reshape(*x.shape[:-1], -1)
    return F.linear(x, linear.weight, linear.bias)


class _Answer(nn.Module):
    """A model that has its output already."""

    def __init__(self, output: Tensor):
        super().__init__()
        self.register_buffer("output", output)

    def forward(self, inputs: Tensor, context: Context | None = None) -> Tensor:
        return self.output


def skeleton(base: nn.Module) -> nn.Module:
    """A copy of the modules of a model that reads the same parameters and buffers."""
    shared = {id(tensor): tensor for tensor in (*base.parameters(), *base.buffers())}
    return copy.deepcopy(base, shared)
