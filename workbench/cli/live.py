"""The flags of ``workbench live``: one for each value of a ``Recipe``, so that there is nothing to keep in step; and a
study in its place."""

import argparse
from dataclasses import fields
from typing import Any, get_args, get_type_hints

from workbench.errors import InputError
from workbench.live.arm import Arm
from workbench.live.recipe import Recipe

SHOWN = 2  # runs that one page shows side by side
TYPES = get_type_hints(Recipe)


def add_recipe(parser: argparse.ArgumentParser) -> None:
    """Add ``--n-experts``, ``--top-k``, ... ; a flag that is not given is not in the namespace."""
    parser.add_argument(
        "--processes", type=int, default=1, metavar="N", help="train in N processes, see --layout (default: 1)"
    )
    group = parser.add_argument_group("a study, in place of the language model")
    group.add_argument("--study", metavar="SLUG", help="train an arm of this study, such as mixlora")
    group.add_argument(
        "--arm", nargs="+", metavar="A", help="one arm, or two side by side (default: the paper's method)"
    )
    group.add_argument("--preset", metavar="P", help="smoke, small or full (default: small)")
    group = parser.add_argument_group(f"the language model ({', '.join(OF_BOTH)}: of a study as well)")
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


OF_BOTH = ("seed", "checkpoint_every")


def recipes(args: argparse.Namespace) -> list[Recipe | Arm]:
    """What is to be trained: the language model, or one or two arms of a study."""
    given = {name.removeprefix("recipe."): value for name, value in vars(args).items() if name.startswith("recipe.")}
    if args.study is None:
        for name in ("arm", "preset"):
            if getattr(args, name) is not None:
                raise InputError(f"--{name} needs a --study")
        return [Recipe.from_dict(given)]
    for name in given:
        if name not in OF_BOTH:
            raise InputError(f"--{name.replace('_', '-')} is of the language model, but --study is {args.study}")
    arms = args.arm or [None]
    if len(arms) > SHOWN or len(set(arms)) < len(arms):
        raise InputError(f"--arm is {', '.join(map(repr, arms))} but must be one arm, or two that differ")
    if args.preset is not None:
        given["preset"] = args.preset
    return [Arm(args.study, arm, **given) for arm in arms]


def _kind(hint: Any) -> Any:
    """The type that argparse converts to; the recipe itself checks bounds and names."""
    if hint == tuple[str, ...]:
        return _names
    return next((kind for kind in get_args(hint) if kind is not type(None)), hint)


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def _text(value: Any) -> str:
    return ",".join(value) if isinstance(value, tuple) else str(value)
