"""Low-rank adapters, and mixtures of them, on the linear layers of any model."""

from workbench.lib.core.adapt.adapted import Adapted, Adapter
from workbench.lib.core.adapt.layer import AdaptedLayer, RoutedLayer, RoutedLinear
from workbench.lib.core.adapt.lora import FactorsLinear, LoRA, LoRALinear
from workbench.lib.core.adapt.put import adapt, load_adapter

__all__ = [
    "Adapted",
    "AdaptedLayer",
    "Adapter",
    "FactorsLinear",
    "LoRA",
    "LoRALinear",
    "RoutedLayer",
    "RoutedLinear",
    "adapt",
    "load_adapter",
]
