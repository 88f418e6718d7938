"""Likes of films and late flights: rows of categorical ids with a yes or no, for embeddings and feature crosses.

    ratings    MovieLens 100K, 8 fields, 72,855 rows, 76 % likes    GroupLens terms: research use, not redistributed
    flights    New York 2013, 7 fields, 327,346 rows, 24 % late     CC0

Both come by `workbench data get movielens-100k flights`; ids, splits and what is unknown: `lib/data/tables.py`. The
area under the ROC curve is what is judged: 0.5 knows nothing. A perceptron reaches 0.84 on ratings (0.77 where they are
split by time and most users are new) and 0.61 on flights (0.66 where the months are mixed).

Tensor letters: B batch, F fields.
"""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from workbench.beds.baseline import MLP, Measured, seeded
from workbench.lib import data
from workbench.lib.core.modes import evaluating
from workbench.lib.core.routing import Context
from workbench.lib.core.task import ArrayTask, Batch, device_of
from workbench.lib.core.train import TrainConfig, train
from workbench.lib.data.types import Table

NEEDS = ("movielens-100k", "flights")
SETS = {"ratings": "movielens-100k", "flights": "flights"}

SMOKE = {"steps": 10, "batch": 128, "seeds": 1}
SMALL = {"steps": 600, "batch": 256, "seeds": 1}
FULL = {"steps": 4000, "batch": 256, "seeds": 5}


class YesOrNo(ArrayTask):
    """The logit (B,) of a yes from ids (B, F); metric: area under the ROC curve; "log_loss" (nats) is given beside it.

    Args:
        table: as `workbench.lib.data` loads it.
    """

    metric, unit, higher_is_better = "auc", "of 1", True

    def __init__(self, table: Table):
        super().__init__(
            table.name, {split: {table.name: rows} for split, rows in table.splits.items()}, table.manifest
        )
        self.table = table

    def criterion(self, outputs: Tensor, batch: Batch) -> Tensor:
        return F.binary_cross_entropy_with_logits(outputs, batch.targets)

    def evaluate(self, model: nn.Module, split: str = "validation", max_batches: int | None = None) -> dict[str, float]:
        from sklearn.metrics import roc_auc_score

        logits, targets = [], []
        with evaluating(model):
            for number, batch in enumerate(self.batches(split, 4096)):
                if max_batches is not None and number >= max_batches:
                    break
                batch = batch.to(device_of(model))
                logits.append(model(batch.inputs, Context()).double().cpu())
                targets.append(batch.targets.cpu())
        score, truth = torch.cat(logits), torch.cat(targets)
        auc = float(roc_auc_score(truth.numpy(), score.numpy()))  # of logits: their sigmoids are 1 from 37 on
        loss = float(F.binary_cross_entropy_with_logits(score, truth.double()))
        return {"auc": auc, f"auc/{self.name}": auc, "log_loss": loss}


class FieldsMLP(nn.Module):
    """An embedding of each field, side by side, and a perceptron: ids (B, F) -> logits (B,)."""

    def __init__(self, sizes: tuple[int, ...], width: int = 16, hidden: tuple[int, ...] = (64, 32)):
        super().__init__()
        self.embeddings = nn.ModuleList(nn.Embedding(size, width) for size in sizes)
        for embedding in self.embeddings:
            nn.init.uniform_(embedding.weight, -0.05, 0.05)
        self.mlp = MLP((width * len(sizes), *hidden, 1))

    def forward(self, ids: Int64[Tensor, "batch fields"], context: Context | None = None) -> Float[Tensor, " batch"]:
        parts = [embedding(ids[:, field]) for field, embedding in enumerate(self.embeddings)]
        return self.mlp(torch.cat(parts, 1))[:, 0]


def ratings(by: str = "random") -> YesOrNo:
    return YesOrNo(data.load("movielens-100k", by=by))


def flights(by: str = "time") -> YesOrNo:
    return YesOrNo(data.load("flights", by=by))


def prepare(settings: Mapping[str, Any] = SMALL) -> list[YesOrNo]:
    return [ratings(), ratings("time"), flights(), flights("random")]


def measure(settings: Mapping[str, Any] = SMALL) -> list[Measured]:
    """Embeddings of 16 a field and a perceptron 64-32, on both splits of both tables."""
    rows = []
    for task in prepare(settings):
        reached = []
        for seed in range(settings["seeds"]):
            model = seeded(seed, lambda sizes=task.table.sizes: FieldsMLP(sizes))
            config = TrainConfig(settings["steps"], settings["batch"], lr=1e-3, weight_decay=0.0, seed=seed)
            train(model, task, config)
            reached.append(task.evaluate(model, "test")["auc"])
        about = task.manifest[task.name]
        size = " / ".join(f"{rows:,}" for rows in about["splits"].values())
        mean = sum(reached) / len(reached)
        case = f"{task.name}, {'by time' if about['by'] == 'time' else 'at random'}"
        rows.append(Measured(case, size, "embeddings 16, perceptron 64-32", "AUC", 0.5, mean, 1.0))
    return rows
