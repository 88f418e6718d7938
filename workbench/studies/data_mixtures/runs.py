"""Experts of a domain, and the true losses of mixtures of domains: trained once a seed, and kept.

Not a part of the study's own file, so that another rule or proxy leaves them as they are.
"""

import sys

import torch
from torch import Tensor, nn

from workbench.beds import stdlib_domains as bed
from workbench.beds.pretrained import pretrained
from workbench.beds.stdlib_domains import DOMAINS, JUDGED, SHAPE, DrawnText
from workbench.lib.core import mixtures
from workbench.lib.core.models import DecoderLM
from workbench.lib.core.train import TrainConfig, train
from workbench.studies.core import Settings

EXPERTS = 100_000  # added to a seed, for the experts' draws
MADE_BY = (*SHAPE, "batch_size", "lr", "steps")
"""What of the settings decides an expert or a true run."""
CODE = (mixtures, bed, sys.modules[__name__])


def learn(model: DecoderLM, weights: Tensor, draws: int, steps: int, settings: Settings) -> None:
    """Train the base on a mixture."""
    size = settings["batch_size"]
    task = DrawnText(bed.texts(settings["cap"])[1], weights, settings["seq_len"], steps, size, draws)
    warmup = max(1, steps // 10)
    config = TrainConfig(steps, size, settings["lr"], warmup, 0.0, weight_decay=0.0, seed=draws, eval_every=None)
    train(model, task, config, [task])


def expert(domain: int, seed: int, part: int, settings: Settings) -> DecoderLM:
    """The expert of a domain, of one in `part` of the steps: trained once, then from the cache."""
    steps = max(1, settings["steps"] // part)
    recipe = {name: settings[name] for name in MADE_BY} | {"domain": domain, "seed": seed, "steps": steps}
    recipe["data"] = bed.digests(bed.texts(settings["cap"])[1])

    def teach(model: nn.Module) -> None:
        learn(model, torch.eye(len(DOMAINS), dtype=torch.float64)[domain], EXPERTS + seed, steps, settings)

    return pretrained("domain-expert", recipe, lambda: bed.base(settings), teach, CODE, watched=True)


class Losses(nn.Module):
    """Bits per byte of the model of each mixture on each text: a table that can be kept like a model."""

    def __init__(self, n: int):
        super().__init__()
        for split in ("validation", "test"):
            self.register_buffer(split, torch.zeros(n, len(JUDGED), dtype=torch.float64))


def truth(seed: int, tried: Tensor, settings: Settings) -> Losses:
    """The losses of models trained on every mixture (M, K), with one seed's draws: trained once, and kept."""
    recipe = {name: settings[name] for name in (*MADE_BY, "batches")} | {"seed": seed, "mixtures": tried.tolist()}
    _, mixed, judged = bed.texts(settings["cap"])
    recipe |= {"data": bed.digests(mixed), "judged": bed.digests(judged)}

    def teach(table: Losses) -> None:
        for row, weights in enumerate(tried):
            model = bed.base(settings)
            learn(model, weights, seed, settings["steps"], settings)
            for split in ("validation", "test"):
                table.get_buffer(split)[row] = torch.tensor(bed.bits(model, settings, split), dtype=torch.float64)

    return pretrained("mixture-losses", recipe, lambda: Losses(len(tried)), teach, CODE)
