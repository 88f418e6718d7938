"""`workbench.merge`: one model of several, in memory or in files."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from workbench.lib.core.merge.files import open_models
from workbench.lib.core.merge.merger import make_merger, merged_state


def merge(
    base: Any,
    experts: Sequence[Any],
    method: str,
    *,
    include: str | Sequence[str] = "*",
    exclude: str | Sequence[str] = (),
    **options: Any,
) -> dict[str, Tensor]:
    """One model of a base and of experts that were fine-tuned from it.

    Args:
        base, experts: each a state dict, a module, or the path of a safetensors file or of a folder of them; an expert
            may be a LoRA folder, of peft or our own. None of them is changed.
        method: one of `mergers()`.
        include, exclude: glob patterns over the names of tensors; the others are the base's.
        options: of the method; `inspect.signature(merger_class(method))` says which.

    Returns:
        A state dict with the base's names, order, dtypes and ties. Integers are the base's.

    Raises:
        InputError: an unknown method or option, a value that is not allowed, experts that do not fit the base (all
            that does not fit at once), weights that are not finite, or would not be.
    """
    merger = make_merger(method, options)
    return merged_state(open_models(base, experts, include, exclude), merger)
