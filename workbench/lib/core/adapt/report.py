"""What was put where in an adapted model, target by target."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from workbench.lib.core.adapt.layer import AdaptedLayer

ROUTERS = ("gate", "router", "wg", "shared_expert_gate")


def target_rows(model: nn.Module, layers: Mapping[str, AdaptedLayer]) -> dict[str, dict[str, Any]]:
    """Of each layer by name:

    - part: "router" or "experts" of a mixture that the model has by itself, "" elsewhere. Patterns such as "*" take
      routers and experts, too;
    - rank, scale: of its updates; a list where they differ; None for full matrices;
    - experts: how many updates it chooses from, or has for as many experts of the model; None for one alone;
    - router: whether what chooses is "trained" or "fixed"; None where nothing does.
    """
    return {name: {"part": _part(model, name), **_row(layer)} for name, layer in layers.items()}


def _row(layer: AdaptedLayer) -> dict[str, Any]:
    experts, router = getattr(layer, "experts", None), getattr(layer, "router", None)
    banks = list(experts.values()) if isinstance(experts, nn.ModuleDict) else [] if experts is None else [experts]
    n_experts = max((getattr(bank, "n_experts", 1) for bank in banks), default=1)
    trained = isinstance(router, nn.Module) and any(p.requires_grad for p in router.parameters())
    return {
        "rank": _one(getattr(bank, "ranks", getattr(bank, "rank", None)) for bank in banks),
        "scale": _one(getattr(bank, "scale", None) for bank in banks),
        "experts": n_experts if n_experts > 1 or router is not None else None,
        "router": None if router is None else "trained" if trained else "fixed",
    }


def _one(values: Iterable[Any]) -> Any:
    """The value that all have, or the different ones in order."""
    flat: list[Any] = []
    for value in values:
        value = None if isinstance(value, Tensor) and value.is_meta else value  # which holds no numbers
        flat += value.tolist() if isinstance(value, Tensor) else value if isinstance(value, list | tuple) else [value]
    found = list(dict.fromkeys(flat))
    return found[0] if len(found) == 1 else found or None


def _part(model: nn.Module, name: str) -> str:
    """A router is what is called one beside `experts`."""
    path = name.split(".")
    if "experts" in path:
        return "experts"
    parent = model.get_submodule(".".join(path[:-1]))
    return "router" if path[-1] in ROUTERS and hasattr(parent, "experts") else ""
