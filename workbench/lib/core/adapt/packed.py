"""The packed experts of a model's own mixture: tensors (E, O, I) with a matrix for each expert, as in transformers 5.

`unpack` has them computed expert by expert, each a block of two linear layers that can be adapted like any other. A
LoRA is one LoRA for each of the model's experts (peft's `target_parameters` is the same function), a mixture in a
linear layer or in a block is a mixture inside each of them, whose router sees the tokens that the model sends there.
The tensors stay where they are and as they are. The loop over the experts is that of the model's "eager" code.

Known is what has `down_proj` and `gate_up_proj` or `up_proj`, perhaps with biases and transposed, and is called with
(tokens, expert of each pair, weight of each pair); and, as in Llama 4, what is called with the tokens once for each
expert. That is checked by number, too.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from workbench.lib.core.adapt.feed_forward import agree, sample, tried
from workbench.lib.core.adapt.layer import Side
from workbench.lib.core.adapt.matrix import Matrix
from workbench.lib.core.adapt.reading import of_base

UP, DOWN = ("gate_up_proj", "up_proj"), "down_proj"
ACTS = {"gated": "act_fn", "plain": "act_fn", "own": "_apply_gate"}


@dataclass(frozen=True)
class Form:
    """How packed experts compute.

    Attributes:
        up: name of their first tensor.
        transposed: whether matrices lie as (I, O).
        act: "gated", the module's activation of the first half of what `up` gives, times the second; "plain", its
            activation; "own", a function of its own.
    """

    up: str
    transposed: bool
    act: str


class PackedExpert(nn.Module):
    """Expert `index` of the module `base` that holds the tensors: down(activation(up x))."""

    def __init__(self, base: nn.Module, form: Form, index: int):
        super().__init__()
        self.form = form
        for key in (form.up, DOWN):
            bias = f"{key}_bias" if hasattr(base, f"{key}_bias") else None
            setattr(self, key, Matrix(base, key, bias, index, form.transposed))
        self.activation = base._apply_gate if form.act == "own" else base.act_fn

    def forward(self, x: Tensor) -> Tensor:
        hidden, down = getattr(self, self.form.up)(x), getattr(self, DOWN)
        if self.form.act == "gated":
            gate, hidden = hidden.chunk(2, dim=-1)
            return down(self.activation(gate) * hidden)
        return down(self.activation(hidden))


class UnpackedExperts(nn.Module):
    """Packed experts, computed one by one, by the names "0", "1", ... here.

    Attributes:
        base: what was there.
        side: of the model; told which tokens an expert is given.
    """

    def __init__(self, base: nn.Module, form: Form):
        super().__init__()
        self.base, self.side, self.n_experts = base, Side(), len(getattr(base, form.up))
        for e in range(self.n_experts):
            self.add_module(str(e), PackedExpert(base, form, e))
        self.train(base.training)

    def forward(self, x: Tensor, index: Tensor | None = None, weight: Tensor | None = None) -> Tensor:
        """(N, D) and (N, K) expert and weight of each pair; or (E N, D), the tokens for each expert."""
        tokens = x.view(1, -1, x.shape[-1]) if index is not None else x.view(self.n_experts, -1, x.shape[-1])
        y, n = torch.zeros_like(x).view(tokens.shape), tokens.shape[1]
        for e in range(self.n_experts):
            if index is None:  # a token that is not sent here is zero, and so is what becomes of it
                token, slot, group = tokens[e].any(-1).nonzero().flatten(), None, e
            else:
                token, slot, group = *torch.where(index == e), 0
            if len(token):
                with self.side.only(token, n):
                    out = self.get_submodule(str(e))(tokens[group, token])
                out = out if slot is None else out * weight[token, slot, None]
                y[group].index_add_(0, token, out.to(y.dtype))
        return y.view(x.shape)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return of_base(self, name, lambda: None)


def find_packed(module: nn.Module) -> tuple[str, ...]:
    """The names of the packed tensors of a module."""
    packed = tuple(key for key, p in module._parameters.items() if p is not None and p.ndim == 3)
    return packed if DOWN in packed or "expert" in type(module).__name__.lower() else ()


def unpack(module: nn.Module) -> UnpackedExperts | None:
    """What can take the place of packed experts; None where they compute something that is not known."""
    packed = find_packed(module)
    up = next((key for key in UP if key in packed), None)
    if up is None or set(packed) != {up, DOWN} or len(getattr(module, up)) != len(getattr(module, DOWN)):
        return None
    acts = [act for act, needs in ACTS.items() if hasattr(module, needs)]
    for form in (Form(up, transposed, act) for transposed in (False, True) for act in acts):
        unpacked = UnpackedExperts(module, form)
        with tried(module):
            if any(_same(module, unpacked, inputs) for inputs in _calls(unpacked)):
                return unpacked
    return None


def _calls(unpacked: UnpackedExperts) -> Iterator[tuple[Tensor, ...]]:
    """The two ways in which packed experts are called, with random input."""
    n, first = unpacked.n_experts, unpacked.get_submodule("0")
    x = sample(getattr(first, first.form.up)).flatten(0, 1)
    index = torch.arange(2 * len(x), device=x.device).view(-1, 2) % n
    yield x, index, torch.rand(index.shape, device=x.device).to(x)
    yield (x.repeat(n, 1),)


def _same(module: nn.Module, unpacked: UnpackedExperts, inputs: tuple[Tensor, ...]) -> bool:
    for training in (True, False):
        try:
            expected = module.train(training)(*inputs)
        except Exception:  # it is not called like that
            return False
        if not agree(lambda: unpacked(*inputs), expected):
            return False
    return True
