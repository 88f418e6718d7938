"""What is seen of the modules around adapted layers: where a pass begins and ends, what is padding, which cache.

Every module that holds an adapted layer is listened to, so that it does not matter whether the model is called, its
`forward`, or a part of it, nor whether a mask is given by keyword, by position or behind a wrapper. A mask is that of
the innermost module that is given one: the encoder and the decoder of one model each have their own.
"""

import inspect
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from workbench.lib.core.adapt.layer import AdaptedLayer, Forward, Frame, Side
from workbench.lib.core.adapt.sequences import begin_sequences, end_pass, is_cache
from workbench.lib.core.recompute import recomputing
from workbench.lib.core.routing import Context

MASKS = ("attention_mask", "tgt_key_padding_mask", "src_key_padding_mask")
"""Parameters that say what is padding: as in transformers, where it is 0, and as in torch, where it is True."""


class Passes:
    """Listens to the modules around the layers of one adapted model."""

    def __init__(self, side: Side):
        self.side = side

    def listen(self, model: nn.Module) -> list[Any]:
        """Begin to; returns the handles to end it with."""
        inside = {part for m in model.modules() if isinstance(m, AdaptedLayer) for part in m.modules()}
        around = [m for m in model.modules() if m is model or (m not in inside and inside & set(m.modules()))]
        before = [m.register_forward_pre_hook(self.before, with_kwargs=True) for m in around]
        return before + [m.register_forward_hook(self.after, with_kwargs=True, always_call=True) for m in around]

    @torch.compiler.disable
    def before(self, module: nn.Module, inputs: tuple, keywords: dict[str, Any]) -> None:
        if recomputing():
            return
        frames = self.side.frames
        while any(frame.module is module for frame in frames):  # left behind by an interrupt
            frames.pop()
        if not frames:
            tensors = [t for t in (*inputs, *keywords.values()) if isinstance(t, Tensor) and t.ndim > 1]
            forward = self.side.enter(module)
            forward.context = context_of(inputs, keywords) or Context()
            forward.rows = frozenset(t.shape[self.side.axis] for t in tensors)
        named = dict(zip(_parameters(type(module)), inputs, strict=False)) | keywords
        frame = Frame(module, frames[-1].mask, frames[-1].cache) if frames else Frame(module)
        for name in MASKS:
            if name in named or name in _parameters(type(module)):
                frame.mask = _padding(named.get(name), name, frame.mask)
                break
        found = next((value for value in named.values() if is_cache(value)), None)
        if found is not None and found is not frame.cache:
            frame.cache = found
            begin_sequences(found)
        frames.append(frame)

    @torch.compiler.disable
    def after(self, module: nn.Module, inputs: tuple, keywords: dict[str, Any], output: Any) -> None:
        frames = self.side.frames
        if recomputing() or not frames or frames.pop().module is not module or frames:
            return
        context = context_of(inputs, keywords)
        if context is not None and output is not None:  # None: it has failed
            with torch.set_grad_enabled(not torch.is_inference_mode_enabled()):  # off in a reentrant checkpoint
                context.aux = context.aux + sum(self.side.forward.losses().values(), 0.0)
        end_pass(self.side.forward, output)
        _tie(self.side.forward, output)


def context_of(inputs: tuple, keywords: dict[str, Any]) -> Context | None:
    """The context a model of the workbench is called with."""
    return next((value for value in (*inputs, *keywords.values()) if isinstance(value, Context)), None)


@cache
def _parameters(kind: type[nn.Module]) -> tuple[str, ...]:
    """The names of what modules of this kind are called with, in their order."""
    return tuple(inspect.signature(kind.forward).parameters)[1:]


def _padding(given: Any, name: str, outer: Tensor | None) -> Tensor | None:
    """(B, T) False where a token is padding, from what a module is given; where that says nothing, the mask around."""
    if given is None:
        return None
    if not isinstance(given, Tensor) or given.ndim != 2:  # made of the one around it
        return outer
    if given.is_floating_point():
        share = ((given == 0) | (given == 1)).all() and given.any()
        return given > 0 if name == "attention_mask" and share else given >= 0  # as a factor, or added to scores
    return given > 0 if name == "attention_mask" else given == 0


def _tie(forward: Forward, output: Any) -> None:
    """Let the pass live as long as the graph of its output, in whose backward pass checkpoints may repeat it."""
    for leaf in tree_leaves(output):
        if isinstance(leaf, Tensor) and leaf.grad_fn is not None:
            leaf.grad_fn.metadata["workbench"] = forward
