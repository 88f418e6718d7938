"""What the layers of a model tell of their form, which changes while they train: ranks, masks, stages."""

import numpy as np
import torch
from torch import Tensor, nn

from workbench.lib.core.observe import Changing
from workbench.live.probes.blocks import modules
from workbench.live.records import FORM, FORM_TABLE


class FormProbe:
    """Asks every `Changing` module of a model.

    Attributes:
        shapes: layer -> name -> () of a number or (m, n) of a table, as first told. A vector is a table of one row.
        doubts: layer -> what is wrong with what it tells; it is not recorded then.
    """

    def __init__(self, model: nn.Module):
        self._layers = {name: module for name, module in modules(model).items() if isinstance(module, Changing)}
        self.doubts: dict[str, str] = {}
        told = {layer: self._ask(layer) for layer in self._layers}
        self.shapes = {layer: {what: value.shape for what, value in form.items()} for layer, form in told.items()}

    def take(self) -> tuple[dict[str, float], dict[str, np.ndarray]]:
        """(scalars, float32 tables) by their `records.FORM` and `records.FORM_TABLE`."""
        scalars: dict[str, float] = {}
        tables: dict[str, np.ndarray] = {}
        for layer in self._layers:
            form = self._ask(layer)
            shapes = {what: value.shape for what, value in form.items()}
            if layer not in self.doubts and shapes != self.shapes[layer]:
                self.doubts[layer] = f"its form is now {shapes} but was first {self.shapes[layer]}"
            if layer in self.doubts:
                continue
            scalars |= {FORM.name(layer, what): float(value) for what, value in form.items() if not value.ndim}
            tables |= {FORM_TABLE.name(layer, what): value for what, value in form.items() if value.ndim}
        return scalars, tables

    def gone(self, model: nn.Module) -> list[str]:
        """Names of the layers that are not in the model any more; they are asked no more."""
        there = set(model.modules())
        left = [name for name, module in self._layers.items() if module not in there]
        for name in left:
            del self._layers[name]
        return left

    @torch.no_grad()
    def _ask(self, layer: str) -> dict[str, np.ndarray]:
        """What a layer tells, as numbers () and tables (m, k); nothing, and a doubt, where it is none of them."""
        form = {what: _array(value) for what, value in self._layers[layer].form_now().items()}
        if wrong := [what for what, array in form.items() if array is None]:
            self.doubts[layer] = f"its form has {', '.join(wrong)}, which must be a number, a vector or a matrix"
            return {}
        return form


def _array(value: float | Tensor) -> np.ndarray | None:
    if isinstance(value, Tensor):
        value = value.detach().float().cpu().numpy()
    if not isinstance(value, int | float | np.ndarray | np.number) or np.ndim(value) > 2 or not np.size(value):
        return None
    return np.atleast_2d(value).astype(np.float32) if np.ndim(value) else np.asarray(value, dtype=np.float64)
