"""What `workbench simulate` asks of a system, and what it is told.

A system that can be simulated on a user's own machine has, among its `objects`, a function

    simulate(hardware: Hardware, workload: Workload) -> Simulation

which asks the machine for the parts it needs (`Hardware.need`) and raises an `InputError` for what cannot be run on it.
One that trains a dense model says `workload: Training` instead.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from workbench.errors import InputError
from workbench.lib.core.simulation.timeline import Timeline
from workbench.lib.core.simulation.traces import RouterTrace


@dataclass(frozen=True)
class Workload:
    """A model and its requests, as far as a simulation needs to know them.

    Attributes:
        trace: of the routers: layers, experts, active ones; prompts, and the tokens of each and after it.
        expert_bytes: of the weights of one expert, above 0.
        budget_bytes: of the device's memory, for experts; for at least one of each layer.
        weight_bytes: of one weight.
    """

    trace: RouterTrace
    expert_bytes: float
    budget_bytes: float
    weight_bytes: float = 2.0

    def __post_init__(self):
        for name in ("expert_bytes", "budget_bytes", "weight_bytes"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise InputError(f"{name} is {value} but must be a finite number above 0")
        least = self.expert_bytes * self.trace.n_layers
        if self.budget_bytes < least:
            raise InputError(
                f"budget is {self.budget_bytes:,.0f} bytes but must hold one expert of each of {self.trace.n_layers} "
                f"layers, {least:,.0f} bytes"
            )

    @property
    def capacity(self) -> int:
        """Experts of each layer that the budget holds, at most all."""
        return min(self.trace.n_experts, int(self.budget_bytes / (self.expert_bytes * self.trace.n_layers)))

    @property
    def expert_flops(self) -> float:
        """Of one expert for one token: a product and a sum for each weight."""
        return 2 * self.expert_bytes / self.weight_bytes

    def __str__(self) -> str:
        rows, time, layers, experts = self.trace.probs.shape
        return (
            f"{rows} prompts of {self.trace.prompt} tokens and {time - self.trace.prompt} after each, {layers} layers, "
            f"{self.trace.top_k} of {experts} experts of {self.expert_bytes / 1e6:,.3g} MB, in "
            f"{self.budget_bytes / 1e9:,.3g} GB ({self.trace.source})"
        )


@dataclass(frozen=True)
class Training:
    """A dense model and the ranks that it is trained on.

    Attributes:
        model: its name; the system says which there are.
        world: ranks, at least 1; None: as few nodes as it fits on.
    """

    model: str
    world: int | None = None

    def __post_init__(self):
        if self.world is not None and (isinstance(self.world, bool) or self.world < 1):
            raise InputError(f"world is {self.world!r} but must be a whole number of ranks, at least 1")


@dataclass(frozen=True)
class Simulation:
    """What a simulation says.

    Attributes:
        slug: of the system.
        basis: "simulated, calibrated by ..."; it stands on every figure and table.
        workload: in words.
        rows: what was compared, each a row of the same names: words and numbers; the system's own first.
        timeline: of the system's own, or the part of it that is shown.
    """

    slug: str
    basis: str
    workload: str
    rows: Sequence[Mapping[str, str | float]]
    timeline: Timeline

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON has them."""
        rows = [dict(row) for row in self.rows]
        head = {"slug": self.slug, "basis": self.basis, "workload": self.workload}
        return head | {"rows": rows, "timeline": self.timeline.to_dict()}
