"""A mixture-of-experts layer by its components, and the rest of its model: where several tasks may be in conflict."""

from collections.abc import Iterable

from torch import nn

from workbench.errors import InputError
from workbench.lib.core.moe import MoELayer
from workbench.lib.measures.gradients import Member, Place


def layer_components(name: str, layer: nn.Module, width: int) -> dict[str, list[Member]]:
    """The groups of one feed-forward layer, for `measures.gradients.task_gradients` and `ConflictMeter`.

    "NAME.input" is what it is given and "NAME" all of it. Of a `MoELayer` also "NAME.router", "NAME.shared", what every
    token passes, and each expert, "NAME.experts.0" and so on. What has nothing trained is left out.

    Args:
        width: D of the hidden states that it is given.
    """
    groups: dict[str, list[Member]] = {f"{name}.input": [Place(layer, width)], name: trained(layer)}
    if isinstance(layer, MoELayer):
        groups[f"{name}.router"] = trained(layer.router)
        groups[f"{name}.shared"] = [] if layer.shared is None else trained(layer.shared)
        for expert in range(layer.n_experts):
            groups[f"{name}.experts.{expert}"] = expert_members(layer.experts, layer.n_experts, expert)
    return {group: members for group, members in groups.items() if members}


def expert_members(bank: nn.Module, n_experts: int, expert: int) -> list[Member]:
    """One expert of a bank: of a list of modules one of them; else its slice of every trained parameter.

    Raises:
        InputError: the bank is no list, and a parameter of it has no axis of experts first.
    """
    if isinstance(bank, nn.ModuleList):
        return trained(bank[expert])
    for name, parameter in bank.named_parameters():
        if len(parameter) != n_experts:
            raise InputError(f"{name} of a bank of {n_experts} experts has shape {tuple(parameter.shape)}")
    return [(parameter, expert) for parameter in trained(bank)]


def trained(module: nn.Module, without: Iterable[nn.Module] = ()) -> list[nn.Parameter]:
    """The trained parameters of a module, but those of the modules `without`, such as heads that a task has alone."""
    others = {id(parameter) for other in without for parameter in other.parameters()}
    return [p for p in module.parameters() if p.requires_grad and id(p) not in others]
