"""The experts of `digit_experts` as LoRAs: the same base, tasks and rows, and every matrix but the head's adapted.

For methods that merge adapters. Three sources, which differ in what the factors of different tasks have in common:

    shared         LoRAs whose A all start from the same numbers
    independent    LoRAs whose A start from numbers of their own
    pt-svd         the full experts' updates cut to rank r by an SVD, the root of S in either factor

A LoRA (B A) is the same update as (B R^-1) (R A): what is between the factors, R, is the gauge. The first source gives
all tasks nearly the same one, the second gives each its own. The adapters have as many steps as the full experts, at
`LR`. Their biases and norms stay the base's.
"""

import sys
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from workbench.beds import digit_experts
from workbench.beds.baseline import seeded
from workbench.beds.digit_experts import BATCH, SMALL, TASKS, base, expert, task
from workbench.beds.pretrained import pretrained
from workbench.errors import unknown
from workbench.lib.core import low_rank as banks
from workbench.lib.core.adapt import Adapted, adapt, lora
from workbench.lib.core.merge.low_rank import Factors, thin_svd
from workbench.lib.core.train import TrainConfig, train

NEEDS = digit_experts.NEEDS
LR = 2e-3
RANK = 8
TARGETS = ("embedding", "blocks.*")
SOURCES = ("shared", "independent", "pt-svd")
CODE = [digit_experts, sys.modules[__name__], banks, lora]

Loras = dict[str, Factors]
"""Layer -> (A (r, I), B (O, r), scale), the update being scale B A."""


class _Kept(nn.Module):
    """What is kept of an adapted model: the adapters alone."""

    def __init__(self, adapted: Adapted):
        super().__init__()
        self.adapted = adapted
        self.banks = nn.ModuleList(layer.experts for layer in adapted.layers.values())

    def loras(self) -> Loras:
        found = zip(self.adapted.layers, self.banks, strict=True)
        return {name: (bank.a[0].detach(), bank.b[0].detach(), float(bank.scale[0])) for name, bank in found}


def adapter(
    name: str, source: str = "shared", settings: Mapping[str, Any] = SMALL, seed: int = 0, rank: int = RANK
) -> Loras:
    """The adapter of a task, of every matrix of the trunk.

    Raises:
        InputError: the task or the source is unknown, or MNIST is not on this machine.
    """
    if source not in SOURCES:
        raise unknown("source", source, SOURCES)
    if source == "pt-svd":
        return truncated(name, settings, seed, rank)
    learned, own = task(name, seed), list(TASKS).index(name) + 1
    recipe = {"base": dict(settings), "seed": seed, "task": name, "data": learned.manifest}
    recipe |= {"rank": rank, "lr": LR, "source": source}
    first = seed if source == "shared" else 100 * seed + own

    def build() -> _Kept:
        model = base(settings, seed)
        return _Kept(seeded(first, lambda: adapt(model, "lora", targets=TARGETS, rank=rank)))

    def teach(kept: _Kept) -> None:
        train(kept.adapted.model, learned, TrainConfig(settings["expert_steps"], BATCH, lr=LR, seed=seed))

    return pretrained("digit-lora", recipe, build, teach, CODE).loras()


def truncated(name: str, settings: Mapping[str, Any], seed: int, rank: int) -> Loras:
    """The best of rank `rank` for each matrix that the full expert changed, balanced, signs as in `thin_svd`."""
    before, after = base(settings, seed).state_dict(), expert(name, settings, seed).state_dict()
    found = {}
    for key in layers(before):
        u, s, v = thin_svd(after[f"{key}.weight"] - before[f"{key}.weight"], rank)
        found[key] = (s.sqrt()[:, None] * v, u * s.sqrt(), 1.0)
    return found


def layers(state: Mapping[str, Tensor]) -> list[str]:
    """The names of the adapted layers, in the order of the model."""
    names = [name.removesuffix(".weight") for name, value in state.items() if value.ndim == 2]
    return [name for name in names if name != "head"]
