"""Tasks that conflict by construction: each rewrites a string of symbols by a random map of its own.

A row is [task] x1 .. xS [=] y1 .. yS, and y_i = map_task(x_(i + rotation_task)). Two tasks want different answers to
the same question, and only the first token says which; so what they can share, and what has to be kept apart, is known.

The base is a small decoder that has learned six maps; twelve new ones are to be learned on it, frozen. A plain LoRA of
rank 16 on all its feed-forward layers does not reach the end of that in the steps of `SMALL`, so that arms of equal
total rank can be told apart as well as arms of equal active rank.

Tensor letters: B batch, T time, S symbols in a string, V vocabulary.
"""

import hashlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from workbench.beds.pretrained import pretrained
from workbench.errors import InputError, unknown
from workbench.lib.core.adapt import Adapted, adapt
from workbench.lib.core.experts import GLU
from workbench.lib.core.models import DecoderLM
from workbench.lib.core.modes import evaluating
from workbench.lib.core.routing import Context
from workbench.lib.core.task import Batch, device_of
from workbench.lib.core.train import State, TrainConfig, train

SYMBOLS = 10
SPLITS = ("train", "validation", "test")
OLD, NEW, LENGTH = 6, 12, 6
LR = 3e-3
TARGETS = "*.ffn.*"
COMMON = {"batch": 64, "held_out": 256}
SMOKE = {"base_steps": 20, "steps": 4, "batch": 16, "held_out": 32, "seeds": 1}
SMALL = COMMON | {"base_steps": 600, "steps": 400, "seeds": 3}
FULL = COMMON | {"base_steps": 2000, "steps": 1500, "seeds": 5}
"""Settings that studies on the frozen base share; a study adds its own, and may change those here for its time."""


class SymbolMaps:
    """Next-symbol prediction of the answers; metric: the share of right symbols, the mean over the tasks.

    Tokens: 0..9 the symbols, 10 "=", then one token a task. Strings belong to a split by their digest, so no string of
    one split is ever drawn in another.

    Args:
        tasks: numbers of the tasks, each with a map and a token of its own; the domains "task 0", "task 1" and so on.
        n_tasks: of the vocabulary; at least 1 + the largest number of `tasks`.
        length: S.
        seed: of the maps. The same seed gives the same maps whatever `tasks` are chosen.
        maps, rotations: which map and which rotation each task of `n_tasks` takes, for tasks made of parts they
            share; default: map i for task i, and no rotation.
        held_out: strings of each task in the validation and in the test split.
    """

    metric, unit, higher_is_better = "accuracy", "fraction", True
    name = "symbol-maps"

    def __init__(
        self,
        tasks: Sequence[int],
        n_tasks: int,
        length: int = 6,
        seed: int = 0,
        maps: Sequence[int] | None = None,
        rotations: Sequence[int] | None = None,
        held_out: int = 256,
    ):
        if not tasks or min(tasks) < 0 or max(tasks) >= n_tasks:
            raise InputError(
                f"tasks is {list(tasks)} but must be one or more numbers from 0 to n_tasks - 1 = {n_tasks - 1}"
            )
        for name, value in (("length", length), ("held_out", held_out)):
            if value < 1:
                raise InputError(f"{name} is {value} but must be at least 1")
        maps, rotations = maps or list(range(n_tasks)), rotations or [0] * n_tasks
        if len(maps) != n_tasks or len(rotations) != n_tasks or min(maps) < 0:
            raise InputError(
                f"maps and rotations have {len(maps)} and {len(rotations)} entries but must have {n_tasks}"
            )
        self.tasks, self.n_tasks, self.length = tuple(tasks), n_tasks, length
        self.vocab = SYMBOLS + 1 + n_tasks
        self.seq_len = 2 * length + 1
        self.domains = tuple(f"task {task}" for task in self.tasks)
        drawn = torch.Generator().manual_seed(seed)
        table = torch.stack([torch.randperm(SYMBOLS, generator=drawn) for _ in range(max(maps) + 1)])
        self.maps = table[torch.tensor(maps)]  # (n_tasks, 10)
        self.rotations = torch.tensor(rotations)
        digest = hashlib.sha256(self.maps.numpy().tobytes() + self.rotations.numpy().tobytes()).hexdigest()
        self.manifest = {"name": self.name, "tasks": list(self.tasks), "length": length, "seed": seed, "sha256": digest}
        self.shots: Batch | None = None
        self._held_out = {split: self._fixed(split, held_out, seed) for split in SPLITS[1:]}

    def only(self, shots: int, seed: int) -> "SymbolMaps":
        """The task itself, with no more rows to train on than these, drawn now; not where a domain is asked for."""
        self.shots = self.batch("train", shots, torch.Generator().manual_seed(seed))
        self.manifest |= {"shots": shots, "shots_seed": seed}
        return self

    def batch(self, split: str, size: int, generator: torch.Generator, domain: int | None = None) -> Batch:
        if size < 1:
            raise InputError(f"size is {size} but must be at least 1")
        if self.shots is not None and split == "train" and domain is None:
            pick = torch.randint(len(self.shots), (size,), generator=generator)
            return Batch(self.shots.inputs[pick], self.shots.targets[pick], self.shots.domain[pick])
        if domain is None:
            domains = torch.randint(len(self.tasks), (size,), generator=generator)
        else:
            domains = torch.full((size,), domain)
        return self._rows(self._strings(split, size, generator), domains)

    def batches(self, split: str, size: int) -> Iterator[Batch]:
        if split not in self._held_out:
            raise unknown("split", split, self._held_out)
        for domain in range(len(self.tasks)):
            for strings in self._held_out[split].split(size):
                yield self._rows(strings, torch.full((len(strings),), domain))

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Context]:
        batch = batch.to(device_of(model))
        context = Context(domain=batch.domain.repeat_interleave(batch.inputs.shape[1]))
        logits = model(batch.inputs, context)[:, -self.length :]
        return F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten()), context

    def evaluate(self, model: nn.Module, split: str = "validation", max_batches: int | None = None) -> dict[str, float]:
        right: dict[int, list[Tensor]] = {}
        with evaluating(model):
            for batch in self.batches(split, 64):
                seen = right.setdefault(int(batch.domain[0]), [])
                if max_batches is None or len(seen) < max_batches:
                    batch = batch.to(device_of(model))
                    context = Context(domain=batch.domain.repeat_interleave(batch.inputs.shape[1]))
                    logits = model(batch.inputs, context)[:, -self.length :]
                    seen.append((logits.argmax(-1) == batch.targets).double().mean())
        mean = {name: float(torch.stack(right[i]).mean()) for i, name in enumerate(self.domains)}
        return {self.metric: sum(mean.values()) / len(mean)} | {f"{self.metric}/{name}": v for name, v in mean.items()}

    def _rows(self, strings: Tensor, domains: Tensor) -> Batch:
        """inputs (B, 2 S + 1): all but the last answer; targets (B, S): the answers."""
        task = torch.tensor(self.tasks)[domains]
        place = (torch.arange(self.length) + self.rotations[task, None]) % self.length
        answers = self.maps[task].gather(1, strings.gather(1, place))
        first, equals = (SYMBOLS + 1 + task)[:, None], torch.full((len(strings), 1), SYMBOLS)
        return Batch(torch.cat([first, strings, equals, answers[:, :-1]], 1), answers, domains)

    def _strings(self, split: str, size: int, generator: torch.Generator) -> Tensor:
        """(size, S) strings of a split: training takes eight in ten of all strings, the others one each."""
        if split not in SPLITS:
            raise unknown("split", split, SPLITS)
        parts: list[Tensor] = []
        while sum(map(len, parts)) < size:
            drawn = torch.randint(SYMBOLS, (4 * size + 64, self.length), generator=generator)
            # a number made of the symbols, mixed so that neighbours fall into different splits
            number = (drawn * SYMBOLS ** torch.arange(self.length)).sum(1) * 2654435761 % 2**32 // 2**22 % 10
            parts.append(drawn[(number - 7).clamp(min=0) == SPLITS.index(split)])
        return torch.cat(parts)[:size]

    def _fixed(self, split: str, size: int, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed + SPLITS.index(split))
        return self._strings(split, size, generator)


def make_model() -> DecoderLM:
    return DecoderLM(11 + OLD + NEW, 48, 2, 4, lambda layer: GLU(48, 96), 2 * LENGTH + 1)


def base(settings: Mapping[str, Any]) -> DecoderLM:
    """The decoder that knows the old maps: trained once, then from the cache."""
    task = SymbolMaps(range(OLD), OLD + NEW, LENGTH)

    def build() -> nn.Module:
        torch.manual_seed(0)
        return make_model()

    def teach(model: nn.Module) -> State:
        return train(model, task, TrainConfig(settings["base_steps"], settings["batch"], eval_every=None))

    recipe = {"steps": settings["base_steps"], "batch": settings["batch"], "data": task.manifest}
    return pretrained("symbol-maps-base", recipe, build, teach, [sys.modules[__name__]])


def new_maps(settings: Mapping[str, Any] = SMALL, which: Sequence[int] = range(NEW)) -> SymbolMaps:
    """The task of some of the new maps, by default of all."""
    return SymbolMaps([OLD + i for i in which], OLD + NEW, LENGTH, held_out=settings["held_out"])


def adapt_and_train(
    slug: str, options: Mapping[str, Any], settings: Mapping[str, Any], seed: int, task: SymbolMaps | None = None
) -> tuple[Adapted, State]:
    """Put a system on the base and train it on a task, by default on all new maps; not yet evaluated."""
    model = base(settings)
    torch.manual_seed(seed)
    adapted = adapt(model, slug, TARGETS, **options)
    config = TrainConfig(settings["steps"], settings["batch"], lr=LR, weight_decay=0.0, seed=seed, eval_every=None)
    return adapted, train(model, task or new_maps(settings), config, optimizer=adapted.optimizer(LR))
