"""A study that costs nothing and writes down each row it runs; also as a process of its own:

    python -m tests.studies.toy LOG SEEDS JOBS     in JOBS workers, or itself; prints the origin of its rows

The environment asks it to be slow (TOY_SECONDS a row) or to be killed in the middle (TOY_KILL: the row that does it).
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

from workbench.catalogue import Method
from workbench.engines import Workers
from workbench.studies.core import Power, Study
from workbench.studies.rows import Row
from workbench.studies.verdicts import NOT_REPRODUCED, REPRODUCED, Judgement, decide

ARMS = ("method", "one", "other")


def run(arm: str, seed: int, settings) -> Row:
    with open(os.environ["TOY_LOG"], "a") as log:
        log.write(f"{arm}-{seed}\n")
    time.sleep(float(os.environ.get("TOY_SECONDS", 0)))
    if os.environ.get("TOY_KILL") == f"{arm}-{seed}":
        os.kill(os.getpid(), signal.SIGKILL)
    value = ((seed * 37 + ARMS.index(arm) * 11) % 17) / 17 + (2.0 if arm == "method" else 0.0)
    return Row(arm, seed, 10, 5, 100, settings["steps"], value, {"pair": (1, 2), "nan": float("nan"), 3: [-0.0]})


def judge(rows, settings) -> Judgement:
    gain = rows.minus("method", "one")
    verdict = decide((REPRODUCED, gain.low > 0), (NOT_REPRODUCED, gain.high < 0))
    return Judgement.on(gain, verdict, "The method minus one.", {"of": rows.of("method", "pair")})


STUDY = Study(
    Method("toy", "Toy", "routing", 2020, "arXiv:0000.00000", "Two is more than zero.", ()),
    metric="score",
    unit="points",
    higher_is_better=True,
    rule="Reproduced if the method is higher.",
    presets={name: {"seeds": 2, "steps": steps} for name, steps in (("smoke", 3), ("small", 4))},
    arms=ARMS,
    run=run,
    judge=judge,
    power=Power(("one", "other"), effect=0.5),
)


def ran() -> list[str]:
    """The rows that were run, in that order."""
    log = Path(os.environ["TOY_LOG"])
    return log.read_text().split() if log.exists() else []


if __name__ == "__main__":
    from tests.studies import toy  # by its name: the code of __main__ would be another's

    os.environ["TOY_LOG"] = sys.argv[1]
    seeds, jobs = map(int, sys.argv[2:])
    print(json.dumps(dict(toy.STUDY.execute("smoke", seeds=seeds, workers=Workers(jobs)).origin)))
