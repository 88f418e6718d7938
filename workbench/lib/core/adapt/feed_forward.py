"""Feed-forward blocks, whoever wrote them: what an expert that is a whole block needs to know of one.

Recognised by their parts: a gated block of three linear layers (`gate_proj`, `up_proj`, `down_proj` with `act_fn`, as
in Llama; `w1`, `w3`, `w2`), the workbench's `GLU` with gate and up in one layer, and a plain block of two linear layers
with an activation (`nn.Sequential(Linear, activation, Linear)`; `fc1`, `fc2`; `c_fc`, `c_proj`; `lin1`, `lin2`).
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

from workbench.lib.core.experts import GLU

GATED = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))
PLAIN = (("fc1", "fc2"), ("c_fc", "c_proj"), ("lin1", "lin2"))
ACTIVATIONS = ("act_fn", "activation_fn", "activation", "act")


@dataclass(frozen=True, eq=False)
class FeedForward:
    """One block: down(activation(gate x) * up x), or down(activation(up x)) without a gate.

    Attributes:
        module: the block itself.
        linears: its linear layers by their name inside the block.
        gate, up: name and part of the input layers. `(name, 0)` of 2 parts is the first half of its outputs; a plain
            block has no gate.
        down: name of the output layer.
        activation: element-wise.
    """

    module: nn.Module
    linears: dict[str, nn.Linear]
    gate: str | None
    up: str
    down: str
    activation: Callable[[Tensor], Tensor]

    @property
    def fused(self) -> bool:
        """Whether gate and up are the two halves of one layer."""
        return self.gate is not None and self.gate == self.up

    @property
    def d_model(self) -> int:
        return self.linears[self.up].in_features

    @property
    def d_hidden(self) -> int:
        return self.linears[self.down].in_features

    def hidden(self, x: Tensor) -> tuple[Tensor | None, Tensor]:
        """(gate x, up x), the first None without a gate, before the activation."""
        if self.fused:
            return self.linears[self.up](x).chunk(2, dim=-1)
        return None if self.gate is None else self.linears[self.gate](x), self.linears[self.up](x)

    def activate(self, gate: Tensor | None, up: Tensor) -> Tensor:
        """What the output layer is given."""
        return self.activation(up) if gate is None else self.activation(gate) * up


def find_feed_forward(module: nn.Module) -> FeedForward | None:
    """The block that `module` is, or None."""
    if isinstance(module, GLU):
        linears = {"gate_up": module.gate_up, "down": module.down}
        return FeedForward(module, linears, "gate_up", "gate_up", "down", F.silu)
    if isinstance(module, nn.Sequential):
        return _sequential(module)
    activation = next((getattr(module, name) for name in ACTIVATIONS if callable(getattr(module, name, None))), None)
    if activation is None:
        return None
    for names in (*GATED, *PLAIN):
        linears = {name: getattr(module, name, None) for name in names}
        if all(isinstance(layer, nn.Linear) for layer in linears.values()):
            gate, up, down = names if len(names) == 3 else (None, *names)
            return FeedForward(module, linears, gate, up, down, activation)
    return None


def _sequential(module: nn.Sequential) -> FeedForward | None:
    """Linear, activation, Linear, where nothing else is in between but dropout that does nothing."""
    parts = [(name, part) for name, part in module.named_children() if not isinstance(part, nn.Dropout | nn.Identity)]
    if len(parts) != 3 or any(isinstance(part, nn.Dropout) and part.p > 0 for part in module.children()):
        return None
    (first, up), (_, activation), (last, down) = parts
    linear = isinstance(up, nn.Linear) and isinstance(down, nn.Linear)
    plain = (
        not any(True for _ in activation.parameters()) and type(activation).__module__ == "torch.nn.modules.activation"
    )
    if not linear or not plain or up.out_features != down.in_features:
        return None
    return FeedForward(module, {first: up, last: down}, None, first, last, activation)
