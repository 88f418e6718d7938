"""The flags of ``workbench live``: one for each value of a ``Recipe``, so that there is nothing to keep in step."""

import argparse
from dataclasses import fields
from typing import Any, get_args, get_type_hints

from workbench.live.recipe import Recipe

TYPES = get_type_hints(Recipe)


def add_recipe(parser: argparse.ArgumentParser) -> None:
    """Add ``--n-experts``, ``--top-k``, ... ; a flag that is not given is not in the namespace."""
    group = parser.add_argument_group("what to train")
    for field in fields(Recipe):
        default = "" if field.default is None else f" (default: {_text(field.default)})"
        group.add_argument(
            f"--{field.name.replace('_', '-')}",
            dest=f"recipe.{field.name}",
            default=argparse.SUPPRESS,
            type=_kind(TYPES[field.name]),
            metavar="A,B" if field.name == "domains" else "X",
            help=field.metadata["help"].replace("%", "%%") + default,
        )


def overrides(args: argparse.Namespace) -> dict[str, Any]:
    """The values of the recipe that were given."""
    return {name.removeprefix("recipe."): value for name, value in vars(args).items() if name.startswith("recipe.")}


def _kind(hint: Any) -> Any:
    """The type that argparse converts to; the recipe itself checks bounds and names."""
    if hint == tuple[str, ...]:
        return _names
    return next((kind for kind in get_args(hint) if kind is not type(None)), hint)


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def _text(value: Any) -> str:
    return ",".join(value) if isinstance(value, tuple) else str(value)
