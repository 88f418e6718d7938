"""Byte models with mixtures of experts, two kinds of them: trained once a seed, and kept.

"upcycled": one feed-forward block, trained as it is, becomes all the experts, which then part; so their hidden units
stand in the same order. "independent": experts from random weights of their own, trained as long in all.

Not a part of the study's own file, so that another rule or arm leaves the models as they are.
"""

import sys

import torch
from torch import nn

from workbench.beds import byte_domains as bed
from workbench.beds.pretrained import pretrained
from workbench.lib.core import moe, routers
from workbench.lib.core.experts import GLUExperts
from workbench.lib.core.models import DecoderLM
from workbench.lib.core.moe import MoELayer
from workbench.lib.core.routers import LinearRouter
from workbench.lib.core.task import LanguageModelling
from workbench.lib.core.train import TrainConfig, train
from workbench.studies.core import Settings

INITS = ("upcycled", "independent")
#: What of the settings decides the weights.
SHAPE = ("d_model", "d_hidden", "n_layers", "n_heads", "n_experts", "top_k", "balance")
TRAINING = ("dense_steps", "steps", "batch_size", "seq_len", "cap")


def make_task(settings: Settings) -> LanguageModelling:
    return LanguageModelling(bed.texts(settings["cap"])[1], settings["seq_len"])


def trained(init: str, seed: int, settings: Settings) -> DecoderLM:
    """A model of five domains: trained once, then from the cache."""
    task = make_task(settings)

    def config(steps: int) -> TrainConfig:
        return TrainConfig(steps, settings["batch_size"], bed.LR, seed=seed, eval_every=None)

    def build() -> nn.Module:
        torch.manual_seed(seed)
        return with_experts(bed.make_model(settings), settings)

    def teach(model: DecoderLM) -> None:
        if init == "independent":
            train(model, task, config(settings["dense_steps"] + settings["steps"]))
            return
        torch.manual_seed(seed)
        dense = bed.make_model(settings)
        train(dense, task, config(settings["dense_steps"]))
        model.load_state_dict(upcycled(dense, model).state_dict())
        train(model, task, config(settings["steps"]))

    recipe = {name: settings[name] for name in (*SHAPE, *TRAINING)}
    recipe |= {"init": init, "seed": seed, "lr": bed.LR, "data": bed.digests(task.data)}
    return pretrained("byte-mixture", recipe, build, teach, [moe, routers, bed, sys.modules[__name__]])


def with_experts(model: DecoderLM, settings: Settings) -> DecoderLM:
    """Each feed-forward block becomes a mixture of random experts."""
    width, hidden, experts = (settings[name] for name in ("d_model", "d_hidden", "n_experts"))
    for block in model.blocks:
        router = LinearRouter(width, experts, settings["top_k"], coefficients={"lbl": settings["balance"]})
        block.ffn = MoELayer(router, GLUExperts(experts, width, hidden))
    return model


@torch.no_grad()
def upcycled(dense: DecoderLM, model: DecoderLM) -> DecoderLM:
    """The dense model with each block in the place of every expert of the other's, whose routers it gets."""
    for block, mixture in zip(dense.blocks, model.blocks, strict=True):
        for name, weight in (("gate_up", block.ffn.gate_up.weight), ("down", block.ffn.down.weight)):
            getattr(mixture.ffn.experts, name).copy_(weight)  # of each expert
        block.ffn = mixture.ffn
    return dense
