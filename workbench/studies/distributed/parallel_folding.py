"""Is the fastest layout with folding faster than the fastest without, on clusters around a published one? (2504.14960)

Nothing runs here: steps are reckoned by `folding_model`, whose assumptions stand at its head, and every number is
simulated. A seed draws the constants of a cluster around the specified ones of H100 nodes, its size, and two models, of
few large experts and of many small ones; see `drawn`. All arms choose the fastest of their layouts that fits in memory.

What the model says of steps that were really taken, by two processes, is in `measured/`, made by
`workbench bench distributed`.
"""

from collections.abc import Iterator

from workbench.errors import InputError
from workbench.lib.distributed.folding_layouts import Layout, MoEConfig, layouts
from workbench.lib.distributed.folding_model import KINDS, Cluster, FoldingModel, Report, drawn, fastest
from workbench.lib.distributed.parallel_folding import METHOD
from workbench.studies.core import Power, Settings, Study
from workbench.studies.rows import Row, Rows
from workbench.studies.verdicts import NOT_REPRODUCED, REPRODUCED, Judgement, decide

ARMS = ("folded", "coupled", "thumb", "free-etp", "free-ep")
LEAST = 1.0
"""Points of MFU that folding has to gain for sure on small experts."""

RULE = (
    "The metric is the model FLOPs utilisation, in % of the peak, of the fastest layout of the model of many small "
    "experts that fits in memory; an arm without any has 0. Intervals are 95% intervals over draws of model and "
    f"cluster. (a) Small experts: folded minus coupled: the interval lies above {LEAST:g}. (b) In no draw, of small "
    "experts or of large, is folded below coupled. (c) The reason: the share of a step that goes to bringing tokens to "
    "experts and back (ep and etp), coupled minus folded, on small experts: the interval lies above 0. Reproduced if "
    f"all three hold. Not reproduced if the interval of (a) lies below {LEAST:g} or (b) fails. Not resolved otherwise."
)

PRESETS = {"smoke": {"most": 128, "seeds": 2}, "small": {"most": 512, "seeds": 36}, "full": {"most": 1024, "seeds": 48}}


def among(arm: str, config: MoEConfig, cluster: Cluster, world: int) -> Iterator[Layout]:
    """The layouts that an arm may choose from.

    "coupled": etp = tp and ep divides dp, as before folding. "thumb": of these, what a rule of thumb leaves: a sequence
    over as few ranks (tp cp pp) as memory allows. "free-etp" and "free-ep": half of folding each, an etp of its own
    with an ep that divides dp, and an ep of its own with etp = tp.
    """
    if arm == "thumb":
        fit = [
            m
            for m in layouts(config, world, False)
            if FoldingModel(config, m, cluster).memory() <= cluster.memory_bytes
        ]
        least = min((m.tp * m.cp * m.pp for m in fit), default=0)
        return (m for m in fit if m.tp * m.cp * m.pp == least)
    if arm == "free-etp":
        return (m for m in layouts(config, world) if m.dp % m.ep == 0)
    if arm == "free-ep":
        return (m for m in layouts(config, world) if m.etp == m.tp)
    return layouts(config, world, folded=arm == "folded")


def chosen(arm: str, config: MoEConfig, cluster: Cluster, world: int) -> Report | None:
    """The fastest layout of an arm; None where none fits."""
    try:
        return fastest(config, cluster, among(arm, config, cluster, world), world)
    except InputError:
        return None


def run(arm: str, seed: int, settings: Settings) -> Row:
    found, configs = {}, {}
    for kind in KINDS:
        configs[kind], cluster, world = drawn(seed, kind, settings["most"])
        report = chosen(arm, configs[kind], cluster, world)
        found[kind] = {"mfu": 0.0, "layout": "none fits", "dispatch": 0.0} if report is None else _facts(report)
    fine = configs["fine"]
    extra = found | {"world": world}
    return Row(arm, seed, fine.params, fine.active_params, round(fine.flops), 1, found["fine"]["mfu"], extra)


def _facts(report: Report) -> dict[str, float | str]:
    dispatch = (report.parts["ep"] + report.parts["etp"]) / report.seconds
    return {"mfu": round(100 * report.mfu, 4), "layout": str(report.layout), "dispatch": round(dispatch, 5)}


def judge(rows: Rows, settings: Settings) -> Judgement:
    """Apply `RULE`."""

    def of(arm: str, kind: str, what: str) -> list[float]:
        return rows.of(arm, lambda row: row.extra[kind][what])

    def gains(kind: str, what: str, a: str = "folded", b: str = "coupled") -> list[float]:
        return [x - y for x, y in zip(of(a, kind, what), of(b, kind, what), strict=True)]

    gain, coarse = rows.minus("folded", "coupled"), rows.interval(gains("coarse", "mfu"))
    worst = min(gains("fine", "mfu") + gains("coarse", "mfu"))
    relief = rows.interval(gains("fine", "dispatch", "coupled", "folded"))
    verdict = decide(
        (NOT_REPRODUCED, gain.high < LEAST or worst < 0),
        (REPRODUCED, gain.low > LEAST and relief.low > 0),
    )
    better = sum(each > 0 for each in gains("fine", "mfu"))
    reason = (
        f"Simulated: the fastest folded layout has {gain} points of MFU more than the fastest without folding on small "
        f"experts, {coarse} on large ones; on small ones it is strictly faster in {better} of "
        f"{len(rows.arm('folded'))} draws, and the least difference of all is {worst:.2g}. The share of a step that "
        f"brings tokens to experts and back, coupled minus folded, is {relief}. The effect is the first of these."
    )
    details = {
        "mfu": {kind: {arm: sum(of(arm, kind, "mfu")) / len(rows.arm(arm)) for arm in ARMS} for kind in KINDS},
        "dispatch": {
            kind: {arm: sum(of(arm, kind, "dispatch")) / len(rows.arm(arm)) for arm in ARMS} for kind in KINDS
        },
        "gain": {"fine": gain, "coarse": coarse},
        "least_gain": worst,
        "relief": relief,
        "strictly_faster": {kind: sum(each > 0 for each in gains(kind, "mfu")) for kind in KINDS},
        "folded_minus": {arm: rows.minus("folded", arm) for arm in ARMS[2:]},
        "basis": drawn(0)[1].basis,
    }
    return Judgement.on(gain, verdict, reason, details)


STUDY = Study(
    METHOD,
    metric="mfu",
    unit="% of the peak",
    higher_is_better=True,
    rule=RULE,
    presets=PRESETS,
    arms=ARMS,
    run=run,
    judge=judge,
    tested="Simulated: on drawn clusters and models, the fastest layout with folding uses at least a point of MFU more "
    "than the fastest without, on many small experts, and is never slower. To measure the paper's own 49.3 and 39.0 % "
    "takes its machines.",
    power=Power(("coupled", "thumb"), effect=2.0, deviation={"small": (4.127, 12)}),
    main="folded",
    trainings=lambda arm: "reckons steps of layouts, and trains nothing",
)
