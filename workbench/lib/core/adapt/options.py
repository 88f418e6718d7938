"""The options of a system: of the kinds its signature says, and from a file no more than the file has room for."""

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import torch
from torch.overrides import TorchFunctionMode

from workbench.errors import InputError, unknown

WORDS = {int: "a whole number", float: "a finite number", bool: "True or False", str: "a text", NoneType: "None"}
WORDS |= {Callable: "a function"}


def check_options(slug: str, kind: type, options: Mapping[str, Any]) -> None:
    """An `InputError` for an option that the system has not, or of another kind than its signature says."""
    signature, hints = inspect.signature(kind), get_type_hints(kind.__init__)
    for name, value in options.items():
        if name not in signature.parameters:
            raise unknown(f"option of {slug}", name, signature.parameters)
        if not _is_a(value, hints[name]):
            raise InputError(f"option {name} of {slug} is {value!r} but must be {_words(hints[name])}")
        if name == "dropout" and not 0 <= value < 1:
            raise InputError(f"option {name} of {slug} is {value!r} but must be at least 0 and below 1")
        if name == "seed" and isinstance(value, int) and not 0 <= value < 2**63:
            raise InputError(f"option {name} of {slug} is {value!r} but must be at least 0 and below 2**63")


def _is_a(value: object, hint: Any) -> bool:
    kind, inside = get_origin(hint) or hint, get_args(hint)
    if kind in (Union, UnionType):
        return any(_is_a(value, one) for one in inside)
    if kind is Any:
        return True
    if kind is Literal:
        return any(value == one and type(value) is type(one) for one in inside)
    if kind is int:
        return isinstance(value, Integral) and not isinstance(value, bool)
    if kind is float:
        return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    if kind is Callable:
        return callable(value)
    if kind is Sequence:
        return isinstance(value, Sequence) and not isinstance(value, str) and all(_is_a(v, inside[0]) for v in value)
    if kind is dict:
        return isinstance(value, dict) and all(_is_a(k, inside[0]) and _is_a(v, inside[1]) for k, v in value.items())
    return isinstance(value, kind)


def _words(hint: Any) -> str:
    kind, inside = get_origin(hint) or hint, get_args(hint)
    if kind in (Union, UnionType):
        return " or ".join(map(_words, inside))
    if kind is Literal:
        return " or ".join(map(repr, inside))
    if kind is Sequence:
        return "a list" if inside[0] is Any else f"a list, each {_words(inside[0])}"
    if kind is dict:
        return f"a dict, each value {_words(inside[1])}"
    return WORDS.get(kind, str(hint))


MAKERS = {
    *(torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn, torch.eye, torch.arange),
    *(torch.Tensor.new_empty, torch.Tensor.new_zeros, torch.Tensor.new_ones, torch.Tensor.new_full),
}
"""What makes tensors as large as the numbers it is given say."""


class Room(TorchFunctionMode):
    """Inside, no more than `most` elements of new tensors are made; an `InputError` instead of the first beyond them.

    A few digits in a file can ask for more memory than there is.
    """

    def __init__(self, most: int):
        super().__init__()
        self.most, self.made = most, 0

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if function in MAKERS:
            self.made += math.prod(max(1, n) for n in _numbers((*args, *(kwargs or {}).values())))
            if self.made > self.most:
                raise InputError(f"options ask for more than {self.most} numbers, of which the file has not half")
        return function(*args, **(kwargs or {}))


def _numbers(values: Iterable[object]) -> Iterator[int]:
    for value in values:
        if isinstance(value, int):
            yield value
        elif isinstance(value, list | tuple):
            yield from _numbers(value)
