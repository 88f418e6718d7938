"""`workbench merge`: models or adapters of one base made into one, from files to files."""

import argparse
import json
from pathlib import Path
from typing import Any

from workbench.cli.progress import progress_bar
from workbench.errors import InputError


def add_merge(sub: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    text = "the model all others came from: a folder, or a safetensors file"
    sub.add_argument("base", nargs="?", metavar="BASE", help=text)
    text = "what was made of it: models, or LoRA folders"
    sub.add_argument("experts", nargs="*", metavar="EXPERT", help=text)
    sub.add_argument("--method", metavar="NAME", help="how to merge, such as average; an unknown name lists them all")
    sub.add_argument("--out", required=True, metavar="FOLDER", help="where to write; it must be new")
    text = "set an option of the method, as JSON or a word; -p weights '[1, 2]'"
    sub.add_argument("-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"), help=text)
    text = "merge only tensors of these names (default: '*')"
    sub.add_argument("--include", action="append", metavar="PATTERN", help=text)
    text = "leave these tensors as the base has them, such as '*classifier*'"
    sub.add_argument("--exclude", action="append", default=[], metavar="PATTERN", help=text)
    text = "read all but where to write from a recipe of mergekit's, a YAML file"
    sub.add_argument("--recipe", metavar="FILE", help=text)
    sub.add_argument("--adapter", action="store_true", help="write an adapter, of LoRA folders, instead of a model")
    sub.add_argument("--rank", type=int, metavar="N", help="with --adapter: the rank to cut the result to")


def merge(args: argparse.Namespace) -> None:
    """What the command does, as `workbench.cli.commands` hands it on."""
    if args.recipe is not None:
        given = (args.base, args.method, args.include, *args.p, *args.exclude, args.rank, args.adapter or None)
        if any(word is not None for word in given):
            raise InputError("--recipe goes with --out and --json alone: the recipe says all else")
    elif args.base is None or not args.experts:
        raise InputError("merge needs a BASE and at least one EXPERT, or a --recipe")
    elif args.method is None:
        raise InputError("--method is missing")
    if args.adapter and (args.include or args.exclude):
        raise InputError("--adapter takes neither --include nor --exclude: a whole adapter is merged")
    if args.rank is not None and not args.adapter:
        raise InputError("--rank is of an adapter: give --adapter as well")
    options = {name: _value(text) for name, text in args.p}
    if len(options) < len(args.p):
        raise InputError("an option is given twice with -p")
    from workbench.lib.core.merge import make_merger  # torch
    from workbench.lib.core.merge.files import check_new

    check_new(args.out)
    if args.recipe is None:
        merger = make_merger(args.method, options)
    else:
        from workbench.lib.core.merge.recipe import read_recipe

        merger = read_recipe(args.recipe)
        args.base, args.experts, args.method = str(merger.base), list(map(str, merger.experts)), merger.method
    files = _adapter(args, merger) if args.adapter else _model(args, merger)
    size = sum(file.stat().st_size for file in files)
    if args.json:
        said = {"folder": args.out, "method": args.method, "options": options, "base": args.base}
        names = [file.relative_to(args.out).as_posix() for file in files]
        print(json.dumps(said | {"experts": args.experts, "files": names, "bytes": size}, indent=2, ensure_ascii=False))
    else:
        many = f"{len(args.experts)} expert{'s' * (len(args.experts) != 1)}"
        print(f"{args.out}: {args.method} of {many}, {len(files)} files, {size / 2**20:.1f} MiB")


def _model(args: argparse.Namespace, merger: Any) -> list[Path]:
    from workbench.lib.core.merge.files import open_models, write_model

    vectors = open_models(args.base, args.experts, args.include or "*", args.exclude)
    try:
        with progress_bar("merge") as progress:
            return write_model(vectors, merger, args.base, args.out, progress)
    except OSError as error:
        raise InputError(f"--out is {args.out!r} but cannot be written, and is not there: {error}") from None
    except KeyboardInterrupt as stop:
        raise KeyboardInterrupt(f"nothing is at {args.out}") from stop


def _adapter(args: argparse.Namespace, merger: Any) -> list[Path]:
    from workbench.lib.core.merge.adapters import check_base, merge_adapters, read_deltas
    from workbench.lib.core.merge.files import open_model

    deltas = read_deltas(args.experts)
    base, wrong = open_model(Path(args.base)), []
    for one, path in zip(deltas, args.experts, strict=True):
        try:
            one.placed({name: shape for name, (shape, _) in base.specs.items()})
            check_base(one, base, path)
        except InputError as error:
            wrong.append(str(error))
    if wrong:
        raise InputError("; ".join(wrong))
    try:
        folder = merge_adapters(deltas, merger, args.rank).save(args.out)
    except OSError as error:
        raise InputError(f"--out is {args.out!r} but cannot be written, and is not there: {error}") from None
    return sorted(folder.iterdir())


def _value(text: str) -> Any:
    """JSON where it is any, else the word itself."""
    try:
        return json.loads(text)
    except ValueError:
        return text
