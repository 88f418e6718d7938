"""`workbench mix`: in which proportion to train on domains of text for a purpose, searched with small proxy models."""

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from workbench.cli.files import check_new, write_new
from workbench.cli.progress import Report, progress_bar
from workbench.errors import InputError, unknown

SEARCHES = {
    "climb": "three shrinking rounds of proxies and a predictor fitted on all before (the system `climb`)",
    "regmix": "one round, and the same predictor",
    "random": "the best of random mixtures",
    "optuna": "optuna's default sampler, one proxy after the other",
    "linear-dmo": "a proxy for each domain, whose merges stand for the mixtures (the system `linear-dmo`)",
}
OVER = ("clusters", "kinds")
SETTINGS = {"documents": 1200, "initial": 60, "merge": 1.2, "seq_len": 64, "batch_size": 16, "eval_batches": 2}
WIDTH, LAYERS, WARM_STEPS, LR = 32, 1, 600, 3e-3
LEAST = 7  # runs, for three rounds that shrink: 4, 2 and 1


def add_mix(sub: argparse.ArgumentParser, whole: Any) -> None:
    """The arguments of the command; `whole` makes the type of a whole number."""
    sub.add_argument("search", metavar="SEARCH", help="; ".join(f"{name}: {what}" for name, what in SEARCHES.items()))
    text = "domains: clusters that are found in the unlabelled text (default), or its three kinds: python, docs, names"
    sub.add_argument("--over", default="clusters", metavar="WHAT", help=text)
    text = "what the mixture is for, as weights of held-out text (default: python=0.2 docs=0.5 names=0.3)"
    sub.add_argument("--purpose", nargs="+", metavar="KIND=WEIGHT", help=text)
    text = "proxies that a search may train (default: 28; linear-dmo has one for each domain)"
    sub.add_argument("--runs", type=whole(LEAST, 10_000), metavar="N", help=text)
    text = "steps of each proxy (default: 32, a fraction of a second)"
    sub.add_argument("--steps", type=whole(1, 100_000), default=32, metavar="N", help=text)
    sub.add_argument("--seed", type=whole(0, 2**31 - 1), default=0, metavar="N", help="of everything (default: 0)")
    sub.add_argument("--jobs", type=whole(1), default=1, metavar="N", help="processes (default: 1)")
    sub.add_argument("--out", required=True, metavar="FILE", help="where to write the result as JSON; it must be new")
    sub.add_argument("--html", metavar="FILE", help="a picture of all mixtures to explore; it must be new")


def mix(args: argparse.Namespace) -> None:
    """What the command does, as `workbench.cli.commands` hands it on."""
    if args.search not in SEARCHES:
        raise unknown("search", args.search, SEARCHES)
    if args.over not in OVER:
        raise unknown("--over", args.over, OVER)
    if args.search == "linear-dmo" and args.runs is not None:
        raise InputError("--runs goes with the other searches: linear-dmo has one proxy for each domain")
    for option, ending in (("out", ".json"), ("html", ".html")):
        if (path := getattr(args, option)) is not None:
            check_new(option, Path(path), ending)
    from workbench.beds import text_mixtures as bed  # torch
    from workbench.lib.core.mixtures import check_weights

    purpose = bed.PURPOSE if args.purpose is None else _weights(args.purpose)
    try:
        check_weights(purpose, bed.KINDS)
    except InputError as error:
        raise InputError(f"--purpose: {error}") from None
    with progress_bar(f"mix {args.search}") as progress:
        try:
            found = _search(args, purpose, progress)
        except KeyboardInterrupt as stop:
            raise KeyboardInterrupt("the proxy runs that are done are kept; the same command goes on") from stop
    write_new(Path(args.out), json.dumps(found, indent=2) + "\n")
    if args.html is not None:
        write_new(Path(args.html), _picture(found))
    print(json.dumps(found, indent=2) if args.json else _line(args.out, found))


def _search(args: argparse.Namespace, purpose: Mapping[str, float], progress: Report) -> dict[str, Any]:
    import torch

    from workbench.beds import text_mixtures as bed
    from workbench.studies.proxies import Proxies

    progress(0, 1, "domains")
    sizes = (SETTINGS["documents"], SETTINGS["initial"], SETTINGS["merge"])
    source = bed.discovered(*sizes) if args.over == "clusters" else bed.kinds(sizes[0])
    settings = SETTINGS | {"proxy": (WIDTH, LAYERS, WARM_STEPS, args.steps, LR)}
    trainer = bed.Trainer.of(source, purpose, settings, "proxy")
    proxies, share = Proxies(trainer, args.seed, args.jobs), source.share
    names = list(source.texts)
    if args.search == "linear-dmo":
        found, chosen = _merged(proxies, names, args.seed, progress)
    else:
        found, chosen = _asked(args, proxies, progress)
    even = torch.full_like(share, 1 / len(share))
    # What is foreseen alone gets a measurement, and so do the two mixtures that need no search.
    unmeasured = [weights for weights, score in chosen.values() if score is None]
    *late, natural, even_score = proxies.scores([*unmeasured, share, even])
    choices = [
        {"how": how, "weights": weights.tolist(), "score": late.pop(0) if score is None else score}
        for how, (weights, score) in chosen.items()
    ]
    said = {"search": args.search, "over": args.over, "unit": "bits/byte", "domains": names, "share": share.tolist()}
    said |= {"purpose": dict(purpose), "steps": args.steps, "seed": args.seed, "mixtures": found}
    said |= {"best": min(choices, key=lambda one: one["score"]), "choices": choices}
    said["experts"] = len(names) if args.search == "linear-dmo" else 0
    return said | {"natural": natural, "even": even_score, "kept": proxies.kept, "run": proxies.run}


def _asked(args: argparse.Namespace, proxies: Any, progress: Report) -> tuple[list[dict], dict[str, Any]]:
    """The mixtures of a search that asks for them; and how it would choose -> what, with a score where it has one."""
    from workbench.lib.data_mixtures.climb import IterativeMixtureSearch, MixtureSpace
    from workbench.lib.data_mixtures.optuna_search import OptunaSearch

    runs, share = args.runs or 28, proxies.trainer.source.share
    if args.search == "optuna":
        search = OptunaSearch(len(share), runs, args.seed)
    else:
        rounds = _shrinking(runs) if args.search == "climb" else [runs]
        search = IterativeMixtureSearch(MixtureSpace(share), rounds, "gp", seed=args.seed)
    done = []

    def told(score: float) -> None:
        done.append(score)
        progress(len(done), runs, f"best {min(done):.4f} bits/byte")

    while not search.done:
        search.tell(proxies.scores(search.ask(), told))
    made = search.result()
    rows = zip(made.weights.tolist(), made.scores.tolist(), made.rounds.tolist(), made.foreseen.tolist(), strict=True)
    found = [
        {"weights": weights, "score": score, "round": number, "foreseen": None if math.isnan(said) else said}
        for weights, score, number, said in rows
    ]
    chosen = {"best measured": made.best_measured}
    if args.search in ("climb", "regmix"):
        chosen["best predicted"] = made.best_predicted[0], None
    return found, chosen


def _merged(proxies: Any, names: Sequence[str], seed: int, progress: Report) -> tuple[list[dict], dict[str, Any]]:
    """Candidates by the merge of an expert for each domain, and the best of them."""
    from workbench.lib.data_mixtures.linear_dmo import MergeProxy, candidates, evaluate_mixtures
    from workbench.studies.proxies import expert

    trainer = proxies.trainer
    model, experts = trainer.warm(), []
    for state in proxies.each(expert, [(domain, seed) for domain in range(len(names))]):
        experts.append(state)
        progress(len(experts), len(names), "experts")
    merges, tried = MergeProxy(model.state_dict(), experts, names), candidates(len(names), seed)

    def judged(state: dict) -> float:
        model.load_state_dict(state)
        return trainer.judged(model)

    scores = evaluate_mixtures(merges, tried, judged)[:, 0]
    found = [
        {"weights": weights, "score": None, "round": 0, "foreseen": score}
        for weights, score in zip(tried.tolist(), scores.tolist(), strict=True)
    ]
    return found, {"best predicted": (tried[int(scores.argmin())], None)}


def _shrinking(runs: int) -> list[int]:
    """Three rounds, each half of the one before."""
    second, third = round(runs * 2 / 7), round(runs / 7)
    return [runs - second - third, second, third]


def _weights(words: Sequence[str]) -> dict[str, float]:
    found = {}
    for word in words:
        name, _, text = word.partition("=")
        try:
            value = float(text)
        except ValueError:
            raise InputError(f"--purpose has {word!r} but must have pairs such as docs=0.5") from None
        if name in found:
            raise InputError(f"--purpose has {name!r} twice")
        found[name] = value
    return found


def _line(out: str, found: Mapping[str, Any]) -> str:
    best = found["best"]
    parts = sorted(zip(best["weights"], found["domains"], strict=True), reverse=True)
    shown = ", ".join(f"{name} {weight:.2f}" for weight, name in parts if weight >= 0.005)
    experts = f"{found['experts']} experts and " if found["experts"] else ""
    runs = f"{experts}{found['run'] + found['kept']} proxy runs, {found['kept']} of them kept from before"
    return (
        f"{out}: {found['search']} over {len(parts)} {found['over']}, {runs}; {best['score']:.4f} bits/byte at {shown} "
        f"({best['how']}), {found['natural']:.4f} at the natural shares, {found['even']:.4f} at equal ones"
    )


def _picture(found: Mapping[str, Any]) -> str:
    import numpy as np

    from workbench.figures.mixtures import mixture_map

    rows, columns = _rows(found), {"measured": "score", "foreseen": "foreseen"}
    losses = {name: [math.nan if row[key] is None else row[key] for row in rows] for name, key in columns.items()}
    losses = {name: values for name, values in losses.items() if not all(map(math.isnan, values))}
    weights = np.array([row["weights"] for row in rows])
    return mixture_map(weights, losses, found["domains"], unit=found["unit"]).to_html()


def _rows(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """All mixtures that were asked for, and those that were measured in the end: what is chosen, and the two beside."""
    rows = {tuple(row["weights"]): dict(row) for row in found["mixtures"]}
    even = [1 / len(found["share"])] * len(found["share"])
    measured = [(one["weights"], one["score"]) for one in found["choices"]]
    for weights, score in (*measured, (found["share"], found["natural"]), (even, found["even"])):
        rows.setdefault(tuple(weights), {"weights": weights, "foreseen": None})["score"] = score
    return [*rows.values()]
