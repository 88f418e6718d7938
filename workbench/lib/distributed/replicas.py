"""Replicas of one model in one process, trained side by side by the one loop: a network of them, and a task of shards.

    shards = Shards([code, prose])                                  # or of one task, M times
    replicas = LocalReplicas([make() for _ in range(2)], fragments(make(), 3), sync_every=30)
    train_replicas(replicas, shards, config)

and on as many processes, to the same bits:

    run_processes(train_rank, 2, make(), shards, config_of_one, fragments(make(), 3), {"sync_every": 30})

Being one network, what they exchange included, they are watched, kept and resumed like any other.
"""

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load, save
from torch import Tensor, nn

from workbench.errors import InputError
from workbench.lib.core.routing import Context
from workbench.lib.core.task import Batch, Task
from workbench.lib.core.train import Hook, State, TrainConfig, train
from workbench.lib.distributed.streaming_diloco import Arrived, Gather, StreamingDiLoCo


class Mailboxes:
    """A `Gather` for each of M replicas of one process, which take turns: all send, and then all look."""

    def __init__(self, replicas: int):
        self.replicas = replicas
        self.open: dict[int, list[Tensor | None]] = {}  # rounds in which not all have sent

    def of(self, replica: int) -> Gather:
        count = iter(range(2**62))

        def gather(message: Tensor) -> Arrived:
            at = next(count)
            messages = self.open.setdefault(at, [None] * self.replicas)
            messages[replica] = message
            if all(found is not None for found in messages):
                del self.open[at]

            def arrived() -> Sequence[Tensor]:
                if (late := next((i for i, found in enumerate(messages) if found is None), None)) is not None:
                    raise RuntimeError(f"replica {replica} waits for replica {late}, which has not sent")
                return messages

            return arrived

        return gather


class LocalReplicas(nn.Module):
    """M models of equal weights, each with its part in the exchange: `parts[m]` is replica m's.

    Its state, which checkpoints keep, has what is exchanged and what is under way.

    Args:
        models: the replicas.
        fragments, settings: as of `StreamingDiLoCo`.

    Raises:
        InputError: as `StreamingDiLoCo`; or two replicas are one.
    """

    def __init__(self, models: Sequence[nn.Module], fragments: Sequence[Sequence[str]], **settings):
        super().__init__()
        held = [id(p) for model in models for p in model.parameters()]
        if not models or len(set(held)) < len(held):
            has = "have parameters in common" if models else "has none"
            raise InputError(f"models {has} but must be at least one, each with parameters of its own")
        self.replicas = nn.ModuleList(models)
        boxes = Mailboxes(len(models))
        self.parts = [
            StreamingDiLoCo(model, fragments, gather=boxes.of(m), **settings) for m, model in enumerate(models)
        ]

    def step(self) -> None:
        """What is to be done after a step of all replicas."""
        for part in self.parts:
            part.depart()
        for part in self.parts:
            part.arrive()

    def mean_model(self) -> nn.Module:
        """A model with the mean of the replicas' parameters: what one more exchange would make of them."""
        return self._model(
            {
                name: torch.stack([replica.get_parameter(name).detach() for replica in self.replicas]).mean(0)
                for name in self.parts[0].global_parameters()
            }
        )

    def global_model(self) -> nn.Module:
        """A model with the global copy."""
        return self._model(self.parts[0].global_parameters())

    def _model(self, parameters: dict[str, Tensor]) -> nn.Module:
        model = copy.deepcopy(self.replicas[0])
        for name, value in parameters.items():
            model.get_parameter(name).data.copy_(value)
        return model

    def get_extra_state(self) -> Tensor:
        """What the replicas keep beside their weights, as the bytes of a safetensors file."""
        state = {f"{m}.{name}": t for m, part in enumerate(self.parts) for name, t in part.state_dict().items()}
        return torch.frombuffer(bytearray(save(state)), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        found = load(state.cpu().numpy().tobytes())
        for m, part in enumerate(self.parts):
            part.load_state_dict({n.removeprefix(f"{m}."): t for n, t in found.items() if n.startswith(f"{m}.")})


class Shards:
    """What M replicas learn, as one task: the rows of a batch are those of each replica, one after the other.

    Of a model that is not `LocalReplicas` it is the task of all rows: data-parallel training on the same ones.

    Args:
        tasks: of each replica. They may be one and the same: its rows are drawn for each replica anew.
        judge: what is evaluated, of which the tasks' domains are a part; None for the first task.
    """

    def __init__(self, tasks: Sequence[Task], judge: Task | None = None):
        self.tasks, self.judge = list(tasks), judge or tasks[0]
        for name in ("name", "domains", "metric", "unit", "higher_is_better", "manifest"):
            setattr(self, name, getattr(self.judge, name))

    def of(self, replica: int) -> "Shard":
        """The task of one replica, for a process of its own."""
        return Shard(self, replica)

    def batch(self, split: str, size: int, generator: torch.Generator, domain: int | None = None) -> Batch:
        if split != "train" or domain is not None:
            return self.judge.batch(split, size, generator, domain)
        seeds, parts = self.seeds(generator), []
        for m, rows in enumerate(_shares(size, len(self.tasks))):
            if rows:
                parts.append(self.rows(m, rows, seeds[m]))
        return Batch(*(torch.cat([getattr(part, name) for part in parts]) for name in ("inputs", "targets", "domain")))

    def seeds(self, generator: torch.Generator) -> list[int]:
        """Of the rows of each replica in a step."""
        return torch.randint(2**62, (len(self.tasks),), generator=generator).tolist()

    def rows(self, replica: int, size: int, seed: int) -> Batch:
        """Training rows of a replica, with the judge's numbers for the domains."""
        task = self.tasks[replica]
        found = task.batch("train", size, torch.Generator().manual_seed(seed))
        numbers = torch.tensor([self.domains.index(name) for name in task.domains])
        return Batch(found.inputs, found.targets, numbers[found.domain])

    def batches(self, split: str, size: int) -> Iterator[Batch]:
        return self.judge.batches(split, size)

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Context]:
        """Of replicas the value of the mean of their losses, and the gradient of the sum: each has that of its own."""
        if not isinstance(model, LocalReplicas):
            return self.judge.loss(model, batch)
        total, aux, count = 0.0, 0.0, 0
        fields = [
            t.split(_shares(len(batch), len(model.replicas))) for t in (batch.inputs, batch.targets, batch.domain)
        ]
        for replica, *rows in zip(model.replicas, *fields, strict=True):
            if len(rows[0]):
                loss, context = self.judge.loss(replica, Batch(*rows))
                total, aux, count = total + loss, aux + context.aux, count + 1
        return total + (total / count - total).detach(), Context(aux=aux)

    def evaluate(self, model: nn.Module, split: str = "validation", max_batches: int | None = None) -> dict[str, float]:
        """The judge's, of replicas that of their mean."""
        model = model.mean_model() if isinstance(model, LocalReplicas) else model
        return self.judge.evaluate(model, split, max_batches)


class Shard:
    """One replica's part of `Shards`; everything but its training rows is the judge's."""

    def __init__(self, shards: Shards, replica: int):
        if not 0 <= replica < len(shards.tasks):
            raise InputError(f"replica is {replica} but must be 0 to {len(shards.tasks) - 1}")
        self.shards, self.replica = shards, replica

    def __getattr__(self, name: str):
        return getattr(self.shards.judge, name)

    def batch(self, split: str, size: int, generator: torch.Generator, domain: int | None = None) -> Batch:
        if split != "train" or domain is not None:
            return self.shards.judge.batch(split, size, generator, domain)
        return self.shards.rows(self.replica, size, self.shards.seeds(generator)[self.replica])


class _Side(Hook):
    """Clips the gradient of each replica by its own norm, and exchanges what is due."""

    def __init__(self, replicas: LocalReplicas, clip: float):
        self.replicas, self.clip = replicas, clip

    def before_update(self, state: State) -> None:
        trained = [p for group in state.optimizer.param_groups for p in group["params"]]
        for replica in self.replicas.replicas:
            own = {id(p) for p in replica.parameters()}
            nn.utils.clip_grad_norm_([p for p in trained if id(p) in own], self.clip)

    def after_step(self, state: State) -> None:
        self.replicas.step()


def train_replicas(
    replicas: LocalReplicas,
    shards: Shards,
    config: TrainConfig,
    hooks: Sequence[Hook] = (),
    *,
    optimizer: torch.optim.Optimizer | None = None,
    start: int = 0,
) -> State:
    """Train all replicas, each on its shard; `config.batch_size` is of all of them together. Arguments as in `train`.

    Each is trained as alone: rows, gradient, its clipping and AdamW are its own. The gradient norm that is shown is
    that of all together, before it is clipped.
    """
    count = len(replicas.replicas)
    if config.batch_size % count:
        raise InputError(f"batch_size is {config.batch_size} but must be a multiple of {count}, the replicas")
    if len(shards.tasks) != count:
        raise InputError(f"shards has {len(shards.tasks)} tasks but must have {count}, one for each replica")
    # what is clipped are the gradients of each, by a hook
    config, side = replace(config, clip=math.inf), _Side(replicas, config.clip)
    return train(replicas, shards, config, [side, *hooks], optimizer=optimizer, start=start)


def train_rank(
    model: nn.Module,
    shards: Shards,
    config: TrainConfig,
    fragments: Sequence[Sequence[str]],
    settings: Mapping[str, Any],
) -> nn.Module:
    """What each process of torch.distributed does: trains its replica on its shard, exchanges, and returns it.

    `config.batch_size` is of the one replica; `fragments` and `settings` are as of `StreamingDiLoCo`.
    """
    part = StreamingDiLoCo(model, fragments, **settings)
    train(model, shards.of(dist.get_rank()), config, [part])
    return model


def _shares(rows: int, replicas: int) -> list[int]:
    """Rows of each, as even as can be."""
    return [rows // replicas + (m < rows % replicas) for m in range(replicas)]
