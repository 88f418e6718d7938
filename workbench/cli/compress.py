"""`workbench compress`: a trained model with factors of low rank in the place of its matrices, from files to files."""

import argparse
import json
import math

from workbench.cli.progress import progress_bar
from workbench.errors import InputError, unknown

METHODS = ("welore", "uniform")


def add_compress(sub: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    sub.add_argument("model", metavar="MODEL", help="a folder as transformers has it, or a safetensors file")
    text = f"how ranks are chosen: {', '.join(METHODS)}"
    sub.add_argument("--method", required=True, metavar="NAME", help=text)
    text = "share of all ranks to take away, above 0; parameters follow from that"
    sub.add_argument("--reduce", required=True, type=_share, metavar="SHARE", help=text)
    sub.add_argument("--out", required=True, metavar="FOLDER", help="where to write; it must be new")
    text = "only layers of these names, such as '*attention*' (default: all linear ones but the output's; of a file, "
    text += "which does not say, all matrices but those that are called like an embedding, an output or a router)"
    sub.add_argument("--targets", action="append", metavar="PATTERN", help=text)
    text = "a matrix that loses no more than this share of its rank stays as it is (default: 0.5)"
    sub.add_argument("--rho", type=float, default=0.5, metavar="SHARE", help=text)


def compress(args: argparse.Namespace) -> None:
    """What the command does, as `workbench.cli.commands` hands it on."""
    if args.method not in METHODS:
        raise unknown("--method", args.method, METHODS)
    if not 0 <= args.rho < 1:
        raise InputError(f"--rho is {args.rho} but must be at least 0 and below 1")
    from workbench.lib.core.factored_files import open_dense, write_factored  # torch
    from workbench.lib.core.merge.files import check_new
    from workbench.lib.low_rank.welore import is_low_rank, solve_threshold, spectrum, uniform_ranks

    check_new(args.out)
    model = open_dense(args.model, args.targets)
    try:
        with progress_bar("compress") as progress:
            spectra, total = {}, 2 * len(model.matrices)
            for name, weight in model.weights():
                progress(len(spectra), total, f"spectrum of {name}")
                try:
                    spectra[name] = spectrum(weight)
                except InputError as error:
                    raise InputError(f"{name}: {error}") from None
            tau, ranks = None, uniform_ranks(spectra, args.reduce)
            if args.method == "welore":
                threshold = solve_threshold(spectra, args.reduce)
                tau, ranks = threshold.tau, dict(threshold.ranks)
            low = {name: rank for name, rank in ranks.items() if is_low_rank(rank, len(spectra[name]), args.rho)}
            if not low:
                raise InputError(
                    f"--reduce is {args.reduce} but at that no matrix loses more than {args.rho:g} of its rank, so "
                    "none becomes two"
                )
            how = {"method": args.method, "reduce": args.reduce, "rho": args.rho, "tau": tau}
            made = write_factored(
                model, low, args.out, how, lambda done, name: progress(len(spectra) + done, total, f"factors of {name}")
            )
    except OSError as error:
        raise InputError(f"--out is {args.out!r} but cannot be written, and is not there: {error}") from None
    except KeyboardInterrupt as stop:
        raise KeyboardInterrupt(f"nothing is at {args.out}") from stop
    if args.json:
        print(json.dumps({"folder": args.out, "ranks": ranks} | how | made, indent=2, ensure_ascii=False))
        return
    at = "" if tau is None else f" at a threshold of {tau:.4g}"
    before, after = (f"{count / 1e6:.2f} M" for count in (made["params_before"], made["params"]))
    sizes = " -> ".join(f"{made[key] / 2**20:.1f}" for key in ("bytes_before", "bytes"))
    print(
        f"{args.out}: {args.method}{at}, {len(low)} of {len(ranks)} matrices in factors, {before} -> {after} "
        f"parameters, {sizes} MiB; workbench.load_factored({args.out!r}{model.loads}) loads it"
    )


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"is {text!r} but must be a share above 0 and below 1")
    return value
