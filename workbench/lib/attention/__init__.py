"""Attention: routing inside it. One file per system; dense attention is in `workbench.lib.core.attention`.

from workbench.lib.attention import MoA, MoBA
"""

from importlib import import_module

_LAZY = {"MoBA": "moba", "MoA": "moa"}
__all__ = list(_LAZY)


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
