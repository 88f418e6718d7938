"""What a layer has decided for a whole sequence stays with that sequence while it is generated.

A model that generates is given the prompt first and then, with a cache, one token after the other. A layer that decides
once for all tokens of a sequence decides on the prompt. What it decided is kept with the cache, in the rows the cache
has: reordered with it, copied with it, forgotten when it is emptied. Without a cache `Adapted.generating` keeps it, and
so does the model's own `generate`. A layer that a model runs several times in a forward decides anew each time.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from workbench.errors import InputError
from workbench.lib.core.adapt.layer import AdaptedLayer, Forward, RoutedLayer, Turn

KEPT = "workbench_decided"
ROWS = {
    "reorder_cache": lambda part, index: part.index_select(0, index.to(part.device)),
    "batch_select_indices": lambda part, index: part[index.to(part.device)],
    "batch_repeat_interleave": lambda part, times: part.repeat_interleave(times, 0),
}
"""What caches of transformers do with their rows."""


class Following:
    """A method of a cache that changes its rows, and those of what is kept with it."""

    def __init__(self, holder: Any, name: str):
        self.holder, self.name = holder, name

    def __call__(self, how: Any) -> Any:
        kept = getattr(self.holder, KEPT)
        for place, parts in kept.items():
            kept[place] = tuple(ROWS[self.name](part, how) for part in parts)
        return getattr(type(self.holder), self.name)(self.holder, how)


class Generate:
    """The `generate` of an adapted model: what its layers decide for a sequence in the first forward stays."""

    def __init__(self, model: nn.Module):
        self.model = model

    def __call__(self, *inputs: Any, **keywords: Any) -> Any:
        side = next(module.side for module in self.model.modules() if isinstance(module, AdaptedLayer))
        with side.deciding():
            return type(self.model).generate(self.model, *inputs, **keywords)


def is_cache(value: Any) -> bool:
    """Whether it is a cache as transformers has them."""
    return callable(getattr(type(value), "get_seq_length", None))


def begin_sequences(holder: Any) -> None:
    """A cache is used in a pass; one that holds nothing holds no sequence, so what was decided is of others."""
    if KEPT in vars(holder):
        try:
            empty = not holder.get_seq_length()
        except ValueError:  # of layers that do not count
            empty = not holder.has_previous_state()
        if empty:
            getattr(holder, KEPT).clear()


def end_pass(forward: Forward, output: Any) -> None:
    """A pass is over; with a cache that the model has made, it is kept what layers outside of it have decided."""
    values = output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple) else ()
    for holder in filter(is_cache, values):
        kept = _of(holder)
        kept.update({place: parts for place, parts in forward.decided.items() if place not in kept})


def decided(layer: RoutedLayer, rows: int) -> tuple[Tensor, ...] | None:
    """What the layer has decided for these sequences before, each (rows, ...); None if nothing.

    Raises:
        InputError: other sequences go on than were begun, or those of the batch are not along the first axis.
    """
    if layer.side.axis:
        raise InputError(f"axis is {layer.side.axis} but {layer.slug} decides for whole sequences, along axis 0")
    now = _now(layer)
    parts = next((kept[now] for kept in _kept(layer) if now in kept), None)
    if parts is None:
        return None
    if rows % len(parts[0]):
        raise InputError(
            f"what goes on has {rows} sequences but {len(parts[0])} were begun: {layer.slug} decides for whole "
            "sequences, along axis 0 of what its layers are given"
        )
    return tuple(part.repeat_interleave(rows // len(parts[0]), 0) for part in parts)


def decide(layer: RoutedLayer, *parts: Tensor) -> None:
    """Keep what the layer decides now for the sequences, each (rows, ...), where they may go on."""
    for kept in _kept(layer) or ([] if _of_tokens(layer) else [layer.side.forward.decided]):
        kept[_now(layer)] = tuple(part.detach() for part in parts)


def _now(layer: RoutedLayer) -> Turn:
    """The call of the layer that runs."""
    return layer.place, sum(call.layer is layer for call in layer.side.forward.calls)


def _kept(layer: RoutedLayer) -> list[dict[Turn, tuple[Tensor, ...]]]:
    """What is kept for the layer's sequences: with their cache, and by `Adapted.generating`."""
    side = layer.side
    if _of_tokens(layer):
        return []
    holder = side.frames[-1].cache if side.frames else None
    return [*([] if holder is None else [_of(holder)]), *([] if side.decided is None else [side.decided])]


def _of(holder: Any) -> dict[Turn, tuple[Tensor, ...]]:
    """What is kept with a cache."""
    if KEPT not in vars(holder):
        setattr(holder, KEPT, {})
        for name in ROWS:
            if hasattr(type(holder), name):
                setattr(holder, name, Following(holder, name))
    return getattr(holder, KEPT)


def _of_tokens(layer: RoutedLayer) -> bool:
    """Whether the layer is given tokens of all sequences, as packed experts are, and decides for each of them."""
    return layer.side.chosen is not None
