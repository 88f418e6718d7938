"""The bandwidth model of streaming DiLoCo held to real trainings of two processes over a shaped link.

Calibrated by all-gathers of messages alone, and by steps without an exchange; what is predicted is the share of the
time in which is computed, of ways to exchange that had no part in it.
"""

from collections.abc import Mapping
from typing import Any

from workbench.bench.distributed._shaped import ARMS, MBIT, WORLD, seen
from workbench.lib.core.simulation.fits import LinkModel
from workbench.lib.core.simulation.validation import Validation
from workbench.lib.distributed.bandwidth import BandwidthModel
from workbench.lib.distributed.streaming_diloco import E3M0Codec


def measure(quick: bool = False) -> Validation:
    """Shares of computing, predicted and measured. An `InputError` where the link cannot be shaped."""
    found = seen(quick)
    # what all-gathers of each size took, as one link that the messages of both go through one after the other
    link = LinkModel.fit([WORLD * size for size in found.sizes], found.gathers)
    rows = []
    for arm, spent in zip(ARMS, found.trained, strict=True):
        if arm["kind"] == "ddp":  # it hides some of its messages behind its backward pass
            continue
        model = _model(arm, found.params, spent["alone"], link)
        rows.append(
            {
                "configuration": _text(arm),
                "predicted": model.utilisation,
                "measured": spent["alone"] / spent["seconds"],
                "step_seconds": spent["seconds"],
                "alone_seconds": spent["alone"],
                "sent_bytes": model.sent_bytes,
            }
        )
    calibration = {
        "mbit": MBIT,
        "socket_bytes_a_second": found.rate,
        "link": {"alpha": link.alpha, "beta": link.beta},
        "gathers": [list(pair) for pair in zip(found.sizes, found.gathers, strict=True)],
        "params": found.params,
    }
    return Validation.made("streaming-diloco", calibration, rows, "share of computing")


def _model(arm: Mapping[str, Any], params: int, step_seconds: float, link: LinkModel) -> BandwidthModel:
    if arm["kind"] == "all-reduce":
        return BandwidthModel.data_parallel(params, 32, step_seconds, link, WORLD, shared=True)
    bits = E3M0Codec().bits if arm["codec"] else 32
    return BandwidthModel(
        params, arm["count"], arm["sync_every"], arm["delay"], bits, step_seconds, link, WORLD, shared=True
    )


def _text(arm: Mapping[str, Any]) -> str:
    if arm["kind"] == "all-reduce":
        return "data-parallel, float32"
    form = "four bits" if arm["codec"] else "float32"
    return f"P={arm['count']} H={arm['sync_every']} tau={arm['delay']}, {form}"
