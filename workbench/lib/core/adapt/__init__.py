"""Low-rank adapters, and mixtures of them, on the linear layers of any model."""

from workbench.lib.core.adapt.adapted import Adapted, Adapter
from workbench.lib.core.adapt.layer import AdaptedLayer, RoutedLayer, RoutedLinear
from workbench.lib.core.adapt.lora import LoRA, LoRALinear, MadeLinear
from workbench.lib.core.adapt.put import adapt, load_adapter, restore_adapter

__all__ = [
    "Adapted",
    "AdaptedLayer",
    "Adapter",
    "LoRA",
    "LoRALinear",
    "MadeLinear",
    "RoutedLayer",
    "RoutedLinear",
    "adapt",
    "load_adapter",
    "restore_adapter",
]
