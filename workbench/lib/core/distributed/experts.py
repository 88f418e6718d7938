"""Experts of a model on the ranks of a group, some on each; tokens travel to them.

own = split_experts(model, group)       # in place; the parameters of this rank's experts
"""

from typing import Any

from torch import Tensor, nn

from workbench.errors import InputError
from workbench.lib.core.distributed.dispatcher import TokenDispatcher
from workbench.lib.core.experts import GLUExperts
from workbench.lib.core.moe import moe_layers
from workbench.lib.core.routing import Routing


class SplitExperts(GLUExperts):
    """The experts that this rank has of a bank; called with the tokens of this rank as the whole bank would be.

    Args:
        group: r ranks, rank i of which has the experts i E / r to (i + 1) E / r.

    Attributes:
        n_experts: E, of all ranks; the parameters have the E / r of this one.

    Raises:
        InputError: r does not divide E.
    """

    def __init__(self, bank: GLUExperts, group: Any):
        nn.Module.__init__(self)
        self.n_experts, self.dispatcher = bank.n_experts, TokenDispatcher(bank.n_experts, group)
        first, n = group.rank() * self.dispatcher.n_local, self.dispatcher.n_local
        for name, whole in bank.named_parameters():
            mine = whole.detach()[first : first + n].clone()
            setattr(self, name, nn.Parameter(mine, whole.requires_grad))

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        sent = self.dispatcher.dispatch(x, routing)
        return self.dispatcher.combine(super().forward(sent.rows, sent.routing), sent)


def split_experts(model: nn.Module, group: Any) -> list[nn.Parameter]:
    """Leave this rank its experts of every MoE layer of a model, in place; their parameters.

    Layers that share a bank share what is left of it, and so does whatever else in the model holds it.

    Raises:
        InputError: as `check_banks` and `SplitExperts`; the model is as it was.
    """
    check_banks(model)
    banks = {layer.experts: None for layer in moe_layers(model).values()}
    own = {bank: SplitExperts(bank, group) for bank in banks}  # all of them, or the model is as it was
    for module in list(model.modules()):
        for name, child in module._modules.items():
            if child in own:
                setattr(module, name, own[child])
    return [p for bank in own.values() for p in bank.parameters()]


def check_banks(model: nn.Module) -> None:
    """Raise `InputError` unless a model has MoE layers, and experts in them that can be split over ranks."""
    layers = moe_layers(model)
    if not layers:
        raise InputError("model has no MoELayer but must have one, whose experts are split over ranks")
    for name, layer in layers.items():
        if type(layer.experts) is not GLUExperts:
            has = type(layer.experts).__name__
            raise InputError(f"{name} has {has} but must have GLUExperts, whose experts can be split over ranks")
