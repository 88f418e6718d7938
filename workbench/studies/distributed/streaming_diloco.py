"""Do fragments, exchanged while replicas go on and in four bits, keep the quality of data-parallel training?
(2501.18512)

A byte model that knows other text of the kind goes on to learn Python sources and their documentation, by two replicas
from one start. All arms of one seed see the same rows, a replica half of a step's; data-parallel is one model on all of
them. Judged is the mean of the replicas, which one more exchange would make: the model that a training is finished
with. In arms "by-domain" a replica has one of the two domains alone, and both are judged.
"""

import math
from collections.abc import Mapping
from operator import itemgetter
from typing import Any

from torch import nn

from workbench.beds import byte_domains
from workbench.lib.core.budget import count_params
from workbench.lib.core.task import LanguageModelling
from workbench.lib.core.train import TrainConfig, train
from workbench.lib.data.types import TextDomains
from workbench.lib.distributed.replicas import LocalReplicas, Shards, train_replicas
from workbench.lib.distributed.streaming_diloco import METHOD, E3M0Codec, fragments
from workbench.studies.core import Power, Settings, Study
from workbench.studies.rows import Row, Rows, trained_row, training_budget
from workbench.studies.verdicts import NOT_REPRODUCED, REPRODUCED, Judgement, decide

DOMAINS = ("python", "docs")
PARALLEL, DILOCO, STREAMING = "data-parallel", "diloco", "streaming-diloco"
NAT = 1 / math.log(2)
BESIDE_PARALLEL, BESIDE_DILOCO = 0.03 * NAT, 0.02 * NAT  # bits per byte that may be lost
BASELINES = (PARALLEL, DILOCO)

_FULL = {"count": 3, "delay": 1, "mix": 0.5, "codec": True}
_WHOLE = {"count": 1, "delay": 0, "mix": 0.0, "codec": False}
#: Arm -> how it exchanges; None where it does after every step. "replicas" are 2 and "every" is H, unless it says so.
ARMS: Mapping[str, dict[str, Any] | None] = {
    PARALLEL: None,
    DILOCO: _WHOLE,
    STREAMING: _FULL,
    "float32": _FULL | {"codec": False},
    "diloco-by-domain": _WHOLE | {"split": True},
    "streaming-by-domain": _FULL | {"split": True},
    "delay-5": _FULL | {"delay": 5},
    "delay-5-replaced": _FULL | {"delay": 5, "mix": 0.0},
    "sequential": _FULL | {"order": "sequential"},
    "at-once": _FULL | {"delay": 0, "mix": 0.0},
    "every-10": _FULL | {"every": 10},
    "every-60": _FULL | {"every": 60},
    "four-replicas": _FULL | {"replicas": 4},
}
SMALL_ARMS = tuple(ARMS)[:6]

RULE = (
    "The metric is bits per byte on test text, the mean of two domains; intervals are paired over seeds, of 90% (one "
    "side at 5%). (a) streaming-diloco (three fragments, one step of delay, half mixed, four bits) minus data-parallel "
    f"lies below the margin of {BESIDE_PARALLEL:.4f} bits (0.03 nats); (b) streaming-diloco minus diloco lies below "
    f"{BESIDE_DILOCO:.4f} bits (0.02 nats); (c) it sends at most a hundredth of data-parallel's bytes in bfloat16. "
    "Reproduced if all hold. Not reproduced if (a) or (b) lies above its margin, or (c) does not hold. Not resolved "
    "otherwise. Beside it, without a part in the verdict: diloco minus data-parallel; four bits minus float32; and "
    "replicas that have a domain each."
)

COMMON = {"n_heads": 4, "lr": 3e-3, "outer_lr": 0.2, "arms": SMALL_ARMS}
PRESETS = {
    "smoke": COMMON
    | {"seeds": 2, "steps": 12, "every": 6, "batch_size": 4, "seq_len": 16, "cap": 65_536, "test_batches": 1}
    | {"d_model": 16, "d_hidden": 16, "n_layers": 3, "public_steps": 30},
    "small": COMMON
    | {"seeds": 12, "steps": 240, "every": 30, "batch_size": 8, "seq_len": 64, "cap": 1_500_000, "test_batches": 4}
    | {"d_model": 64, "d_hidden": 128, "n_layers": 3, "public_steps": 1000},
    "full": COMMON
    | {"seeds": 12, "steps": 3000, "every": 30, "batch_size": 32, "seq_len": 128, "cap": 1_500_000}
    | {"test_batches": None, "d_model": 128, "d_hidden": 256, "n_layers": 6, "public_steps": 3000}
    | {"arms": tuple(ARMS)},
}


def text(settings: Settings) -> LanguageModelling:
    """The two domains, drawn evenly: text that the base has not seen."""
    found = byte_domains.texts(settings["cap"])[1]
    splits = {split: {name: parts[name] for name in DOMAINS} for split, parts in found.splits.items()}
    manifest = {name: found.manifest[name] for name in DOMAINS}
    return LanguageModelling(TextDomains(found.name, DOMAINS, splits, manifest), settings["seq_len"])


def replicas_of(arm: str, settings: Settings) -> LocalReplicas:
    """The replicas of an arm, as they begin."""
    how = ARMS[arm]
    models = [byte_domains.base(settings) for _ in range(how.get("replicas", 2))]
    return LocalReplicas(
        models,
        fragments(models[0], how["count"], how.get("order", "strided")),
        sync_every=how.get("every", settings["every"]),
        delay=how["delay"],
        mix=how["mix"],
        outer_lr=settings["outer_lr"],
        codec=E3M0Codec() if how["codec"] else None,
    )


def shards(task: LanguageModelling, split: bool = False, replicas: int = 2) -> Shards:
    """What each replica learns: both domains, or one of them alone."""
    return Shards([byte_domains.alone(task, name) for name in DOMAINS] if split else [task] * replicas, task)


def run(arm: str, seed: int, settings: Settings) -> Row:
    task, how = text(settings), ARMS[arm]
    model = byte_domains.base(settings)
    config = TrainConfig(settings["steps"], settings["batch_size"], settings["lr"], seed=seed, eval_every=None)
    budget = training_budget(model, task, settings["batch_size"], seed)  # of M replicas on the rows of a step, too
    params = count_params(model)
    if how is None:
        train(model, shards(task), config)
        sent = [2 * params] * config.steps  # bfloat16; of two an all-reduce sends as much as it reduces
        extra: dict[str, Any] = {}
    else:
        replicas = replicas_of(arm, settings)
        train_replicas(replicas, shards(task, how.get("split", False), len(replicas.replicas)), config)
        sent = replicas.parts[0].sent_bytes(config.steps, len(replicas.replicas))
        model = replicas.mean_model()
        extra = {
            "global_bits": bits(replicas.global_model(), task, settings)[0],
            "apart": apart(replicas),
        }
    found, by_domain = bits(model, task, settings)
    extra |= {"by_domain": by_domain, "sent_bytes": sum(sent), "largest_bytes": max(sent)}
    extra["share"] = sum(sent) / (2 * params * config.steps)
    return trained_row(arm, seed, budget, config.steps, found, **extra)


def bits(model: nn.Module, task: LanguageModelling, settings: Settings) -> tuple[float, list[float]]:
    """Bits per byte of test text, and of each domain."""
    found = task.evaluate(model, "test", settings["test_batches"])
    return found[task.metric], [found[f"{task.metric}/{name}"] for name in DOMAINS]


def apart(replicas: LocalReplicas) -> float:
    """How far replicas are from their mean, over its length."""
    mean = dict(replicas.mean_model().named_parameters())
    names = list(mean)
    off = sum(
        float((replica.get_parameter(name) - mean[name]).detach().square().sum())
        for replica in replicas.replicas
        for name in names
    )
    return math.sqrt(off / len(replicas.replicas) / sum(float(mean[name].detach().square().sum()) for name in names))


def judge(rows: Rows, settings: Settings) -> Judgement:
    """Apply `RULE`."""
    beside_parallel = rows.minus(STREAMING, PARALLEL, level=0.9)
    beside_diloco = rows.minus(STREAMING, DILOCO, level=0.9)
    share = rows.mean(STREAMING, "share")
    verdict = decide(
        (
            REPRODUCED,
            beside_parallel.high < BESIDE_PARALLEL and beside_diloco.high < BESIDE_DILOCO and share <= 0.01,
        ),
        (
            NOT_REPRODUCED,
            beside_parallel.low > BESIDE_PARALLEL or beside_diloco.low > BESIDE_DILOCO or share > 0.01,
        ),
    )
    details = {
        "streaming_minus_data_parallel": beside_parallel,
        "streaming_minus_diloco": beside_diloco,
        "diloco_minus_data_parallel": rows.minus(DILOCO, PARALLEL),
        "four_bits_minus_float32": rows.minus(STREAMING, "float32"),
        "by_domain_streaming_minus_diloco": rows.minus("streaming-by-domain", "diloco-by-domain"),
    }
    if "delay-5" in rows.arms:
        details["delay_5_replaced_minus_mixed"] = rows.minus("delay-5-replaced", "delay-5")
    beside = "; ".join(f"{name.replace('_', ' ')} {found}" for name, found in list(details.items())[2:])
    reason = (
        f"Bits per byte: streaming-diloco minus data-parallel {beside_parallel} (90%; the margin is "
        f"{BESIDE_PARALLEL:.4f}), minus diloco {beside_diloco} (90%; {BESIDE_DILOCO:.4f}), with {share:.2%} of "
        f"data-parallel's bytes. Beside it {beside}. The effect is streaming-diloco minus data-parallel."
    )
    details |= {
        "share_of_bytes": rows.means("share"),
        "largest_message": {arm: int(mean) for arm, mean in rows.means("largest_bytes").items()},
        "apart": rows.means("apart", [arm for arm in rows.arms if arm != PARALLEL]),
    }
    return Judgement.on(beside_parallel, verdict, reason, details)


STUDY = Study(
    METHOD,
    metric="bits_per_byte",
    unit="bits/byte",
    higher_is_better=False,
    rule=RULE,
    presets=PRESETS,
    arms=itemgetter("arms"),
    run=run,
    judge=judge,
    tested="Two replicas that exchange a third of the model at a time, in four bits and a step late, reach the quality "
    "of data-parallel training and of DiLoCo with a hundredth of the bytes.",
    power=Power(BASELINES, effect=BESIDE_DILOCO, level=0.9, deviation={"small": (0.00736, 12)}),
    main=STREAMING,
)
