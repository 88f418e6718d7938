"""Does memory stay flat, does rounding waste no rows, and does a rounded model learn as well? (2512.14080)

Three parts. Memory: bytes kept for the backward pass of one expert layer, counted, at finer and finer experts. Waste:
rows that tiles compute for nothing, with the loads of trained routers. Quality: a byte model on Python sources, trained
with token choice or with rounded counts and always evaluated with token choice; the arms of one seed have the same
initial weights and the same data in the same order, so differences are paired.
"""

import math
import statistics
from collections.abc import Iterable
from itertools import chain

import torch
from torch import Tensor

from workbench.beds.python_text import decoder, python_text
from workbench.lib.core.models import DecoderLM
from workbench.lib.core.moe import moe_layers
from workbench.lib.core.observe import observing
from workbench.lib.core.routing import Routing
from workbench.lib.core.train import TrainConfig, train
from workbench.lib.kernels.sonicmoe import METHOD, SonicMoE, padded_fraction, token_rounding
from workbench.studies.core import Power, Settings, Study
from workbench.studies.kernels.sonicmoe_memory import memory
from workbench.studies.rows import Row, Rows, trained_row, training_budget
from workbench.studies.verdicts import NOT_REPRODUCED, REPRODUCED, Judgement, decide

MARGIN = 0.02  # nats per byte: what "equal quality" may cost
WORSE = 0.03  # nats per byte: what is not equal any more
FLAT = 1.1  # largest growth of the kept bytes that still counts as flat
RISE = 1.5  # least growth that counts as rising

RULE = (
    "(a) Memory: from the coarsest to the finest experts, with H K held fixed, the bytes the layer keeps for backward "
    f"grow by less than {FLAT} times, and those of the gathering and the scattering layer by more than {RISE} times. "
    "(b) Waste: with the loads of trained routers token choice pads rows, and rounding to the nearest multiple pads "
    "none, at every number of experts and every tile. "
    f"(c) Quality: the test loss of training with 'nearest' minus that of token choice is below {MARGIN} nats per byte "
    "(one-sided paired t-test at 5% over seeds) at every tile of which the mean expert has at least two. "
    f"Reproduced if all hold. Not reproduced if (a) or (b) fails, or if at one of these tiles the mean difference is "
    f"above {WORSE} and the test shows it to be above 0. Not resolved otherwise. The throughput of the paper is not "
    "part of the verdict: it is not testable here, it needs a GPU of the Hopper generation."
)

MEMORY = {"d_model": 256, "n_tokens": 4096, "n_experts": 32, "width": 512, "top_k": (2, 4, 8, 16)}
COMMON = {"n_heads": 4, "top_k": 2, "balance": 0.01, "lr": 3e-3, "mode": "nearest", "memory": MEMORY}
PRESETS = {
    "smoke": COMMON
    | {"seeds": 2, "steps": 6, "batch_size": 4, "seq_len": 16, "cap": 65_536, "test_batches": 1}
    | {"d_model": 16, "n_layers": 2, "n_experts": 4, "width": 16, "waste_tiles": (16, 32)}
    | {"rounding": (("nearest", 8), ("nearest", 16), ("down", 16)), "grid": ((8, 4),), "grid_steps": 4}
    | {"memory": MEMORY | {"d_model": 32, "n_tokens": 256, "width": 64}},
    # Tokens and tiles are a fraction of those in "full"; the tiles of the mean expert, 16, 4 and 1, are the same.
    "small": COMMON
    | {"seeds": 12, "steps": 300, "batch_size": 8, "seq_len": 64, "cap": 1_500_000, "test_batches": 4}
    | {"d_model": 64, "n_layers": 2, "n_experts": 8, "width": 64, "waste_tiles": (64, 128)}
    | {"rounding": (*(("nearest", m) for m in (8, 32, 128)), ("down", 32), ("up", 32), ("stochastic", 32))}
    | {"grid": ((32, 2), (64, 4), (64, 8)), "grid_steps": 150},
    "full": COMMON
    | {"seeds": 3, "steps": 300, "batch_size": 32, "seq_len": 128, "cap": 1_500_000, "test_batches": None}
    | {"d_model": 128, "n_layers": 3, "n_experts": 16, "width": 128, "waste_tiles": (64, 128)}
    | {"rounding": tuple((mode, m) for m in (32, 128, 512) for mode in ("nearest", "down", "up", "stochastic"))}
    | {"grid": tuple((e, k) for e in (16, 32, 64, 128, 256) for k in (2, 4, 8)), "grid_steps": 300},
}


def arms(settings: Settings) -> list[str]:
    """Token choice; every way of rounding as mode-tile; token choice at other numbers of experts, for their loads."""
    rounding = [f"{mode}-{tile}" for mode, tile in settings["rounding"]]
    return ["tc", *rounding, *(f"tc E={n} K={k}" for n, k in settings["grid"])]


def layer(arm: str, settings: Settings) -> SonicMoE:
    """The expert layer of one arm. H K is the same in all of them, and so are the active parameters of the experts."""
    n_experts, top_k = settings["n_experts"], settings["top_k"]
    options = {"balance": settings["balance"]}
    if arm.startswith("tc E="):
        n_experts, top_k = (int(part.split("=")[1]) for part in arm.split()[1:])
    elif arm != "tc":
        mode, tile = arm.split("-")
        options |= {"routing": "rounding", "mode": mode, "tile": int(tile)}
    return SonicMoE(settings["d_model"], n_experts, top_k, settings["width"] // top_k, **options)


def build(arm: str, settings: Settings) -> DecoderLM:
    """The model of one arm."""
    return decoder(settings, lambda _: layer(arm, settings))


def run(arm: str, seed: int, settings: Settings) -> Row:
    task = python_text(settings)
    torch.manual_seed(seed)
    model = build(arm, settings)
    layers = moe_layers(model).values()
    steps = settings["grid_steps" if arm.startswith("tc E=") else "steps"]
    config = TrainConfig(steps, settings["batch_size"], settings["lr"], seed=seed, eval_every=None)
    budget = training_budget(model, task, config.batch_size, seed)
    with observing(layers, sizes) as trained:
        train(model, task, config)
    pairs, tokens, bare = (sum(parts) for parts in zip(*chain(*trained.values()), strict=True))
    extra = {"pairs_per_token": pairs / tokens, "tokens_without_expert": bare / tokens}
    with observing(layers if arm.startswith("tc") else (), lambda routing, _: routing) as tested:
        bits = task.evaluate(model, "test", settings["test_batches"])["bits_per_byte"]
    if tested:
        extra["waste"] = waste([*chain(*zip(*tested.values(), strict=True))], settings)
    if arm == "tc":
        extra["memory"] = memory(seed=seed, **settings["memory"])
    return trained_row(arm, seed, budget, steps, bits * math.log(2), **extra)


def sizes(routing: Routing, context: object) -> tuple[int, int, int]:
    """What rounding changes: pairs, tokens, tokens without an expert."""
    return routing.expert.numel(), routing.n_tokens, int((routing.active_counts == 0).sum())


def waste(seen: list[Routing], settings: Settings) -> dict:
    """Padded rows over rows for each tile, of token choice and of the same batches rounded."""
    largest = max(routing.n_tokens for routing in seen)
    seen = [routing for routing in seen if routing.n_tokens == largest]  # the last batch of a text may be short
    chosen = torch.stack([routing.counts for routing in seen])
    found = {"n_tokens": largest, "n_experts": seen[0].n_experts, "top_k": seen[0].top_k, "tiles": {}}
    for tile in settings["waste_tiles"]:
        rounded = torch.stack([token_rounding(routing, tile, settings["mode"]).counts for routing in seen])
        found["tiles"][str(tile)] = {
            "tc": mean(padded_fraction(chosen, tile)),
            "rounding": float(padded_fraction(rounded, tile).max()),
            "changed": mean((rounded - chosen).abs().sum(-1) / chosen.sum(-1)),
        }
    return found


def mean(values: Tensor) -> float:
    return float(values.double().mean())


def judge(rows: Rows, settings: Settings) -> Judgement:
    """Apply `RULE`."""
    against = {arm: rows.tost(arm, "tc", MARGIN) for arm in rows.arms if "-" in arm}
    mean_rows = settings["batch_size"] * settings["seq_len"] * settings["top_k"] / settings["n_experts"]
    claimed = [f"{mode}-{m}" for mode, m in settings["rounding"] if mode == settings["mode"] and mean_rows >= 2 * m]
    memory_rows = rows.of("tc", "memory")[0]
    grown, saving = growth(memory_rows), savings(memory_rows)
    flat = grown["ours"] < FLAT and min(grown["gather"], grown["scatter"]) > RISE
    tiles = [tile for row in rows if "waste" in row.extra for tile in row.extra["waste"]["tiles"].values()]
    filled = all(tile["rounding"] == 0 and tile["tc"] > 0 for tile in tiles)
    worse = [arm for arm in claimed if against[arm].diff > WORSE and against[arm].ci90[0] > 0]
    verdict = decide(
        (NOT_REPRODUCED, not flat or not filled or bool(worse)),
        (REPRODUCED, all(against[arm].ci90[1] < MARGIN for arm in claimed)),
    )
    shown = ", ".join(
        f"{arm} {test.diff:+.4f} [{test.ci90[0]:+.4f}, {test.ci90[1]:+.4f}]" for arm, test in against.items()
    )
    padded = [tile["tc"] for tile in tiles]
    reason = (
        f"Kept bytes from K = {memory_rows[0]['top_k']} to {memory_rows[-1]['top_k']} grow {grown['ours']:.2f} times "
        f"(gathering {grown['gather']:.2f}, scattering {grown['scatter']:.2f}); "
        f"at K = {saving['top_k']} they are {saving['gather']:.0%} fewer than gathering keeps and "
        f"{saving['scatter']:.0%} fewer than scattering. "
        f"Token choice pads {min(padded):.1%} to {max(padded):.1%} of its rows, rounding at most "
        f"{max(tile['rounding'] for tile in tiles):.0%}. Nats per byte minus token choice, 90% intervals: {shown}. "
        f"The claim is about {' and '.join(claimed)}; the effect is the last of these. Throughput is not testable here."
    )
    details = {
        "memory": memory_rows,
        "memory_growth": grown,
        "memory_saving": saving,
        "waste": waste_table(rows),
        "nats_per_byte": {arm: {"mean": test.diff, "ci90": test.ci90} for arm, test in against.items()},
        "pairs_per_token": rows.means("pairs_per_token"),
        "tokens_without_expert": rows.means("tokens_without_expert"),
        "throughput": "not testable here: it needs a GPU of the Hopper generation",
    }
    return Judgement.on(against[claimed[-1]], verdict, reason, details, claimed=(-math.inf, MARGIN))


def growth(table: list[dict]) -> dict[str, float]:
    """Kept bytes at the finest experts over those at the coarsest, by layer."""
    return {name: table[-1][name] / table[0][name] for name in ("gather", "scatter", "ours")}


def savings(table: list[dict], top_k: int = 8) -> dict[str, float]:
    """The share of the bytes of either other layer that ours does not keep, at K = 8 (or the finest there is)."""
    row = next((row for row in table if row["top_k"] == top_k), table[-1])
    return {"top_k": row["top_k"]} | {name: 1 - row["ours"] / row[name] for name in ("gather", "scatter")}


def waste_table(rows: Iterable[Row]) -> list[dict]:
    """Means over seeds: one entry for each number of experts, K and tile."""
    cells: dict[tuple, list[dict]] = {}
    for row in rows:
        if "waste" in row.extra:
            found = row.extra["waste"]
            for tile, values in found["tiles"].items():
                key = (found["n_experts"], found["top_k"], int(tile), found["n_tokens"])
                cells.setdefault(key, []).append(values)
    names = ("n_experts", "top_k", "tile", "n_tokens")
    return [
        dict(zip(names, key, strict=True))
        | {what: statistics.fmean(cell[what] for cell in cells[key]) for what in ("tc", "rounding", "changed")}
        for key in sorted(cells)
    ]


STUDY = Study(
    METHOD,
    metric="nats_per_byte",
    unit="nats/byte",
    higher_is_better=False,
    rule=RULE,
    presets=PRESETS,
    arms=arms,
    run=run,
    judge=judge,
    power=Power(("tc", "down-32"), effect=MARGIN, level=0.9, deviation={"small": (0.016, 12)}),
    main=lambda settings: f"nearest-{settings['rounding'][1][1]}",
)
