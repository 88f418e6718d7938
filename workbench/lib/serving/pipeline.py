"""VSLPipe: how the layers of a pass, cut into two micro-groups, are woven over link, device and CPU.

While the CPU attends for one group, the device works on the other; while both do, the weights of the next layer come
into the second of two buffers. The order is said once, by `weave`, for the simulation here and the real run in
`offload`.
"""

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from workbench.lib.core.simulation.engine import Resource, Task, run
from workbench.lib.core.simulation.timeline import Timeline
from workbench.lib.serving.costs import Costs, stretches
from workbench.lib.serving.paging import Pass, Share

LOAD, QKV, ATTEND, MOE, HEAD = KINDS = ("load", "qkv", "attend", "moe", "head")
LINK, DEVICE, CPU = LANES = ("link", "device", "cpu")
LANE = {LOAD: LINK, QKV: DEVICE, ATTEND: CPU, MOE: DEVICE, HEAD: DEVICE}
BUFFERS = 2

Handle = TypeVar("Handle")
Put = Callable[[str, int, int, Sequence[Share], Sequence[Handle]], Handle]
"""put(kind, number of the pass, layer, shares, after): begin it when those `after` which it comes have ended."""


def weave(passes: Iterable[Pass], n_layers: int, put: Put) -> None:
    """Put every task of the passes, in an order in which each resource may take what is ready.

    - The weights of a layer come when the experts of the layer two before it are done with their buffer.
    - Queries, keys and values of a group come after the layer before it and the weights; in the first layer after the
      group's last pass, whose tokens it reads, and after all of the pass before that: a request that was turned out
      may have been in another group.
    - Attention comes after them, if there is any to do; output projection and experts after that.

    Of two groups, the second's experts of a layer come behind the first's queries of the next: the CPU has work then.
    """
    done: deque[list[Handle]] = deque([[] for _ in range(BUFFERS)], maxlen=BUFFERS)  # experts of the layers before
    ends: dict[int, Handle] = {}  # group -> the last of its chain
    before: list[Handle] = []  # ends as they were a pass ago
    pending: dict[int, Callable[[], None]] = {}

    def flush(group: int) -> None:
        if group in pending:
            pending.pop(group)()

    def later(group: int, number: int, layer: int, shares: Sequence[Share], after: Handle, into: list[Handle]) -> None:
        def moe() -> None:
            ends[group] = put(MOE, number, layer, shares, [after])
            into.append(ends[group])
            if layer == n_layers - 1:
                ends[group] = put(HEAD, number, layer, shares, [ends[group]])

        pending[group] = moe

    for number, step in enumerate(passes):
        parts = {group: step.group(group) for group in sorted({share.group for share in step.shares})}
        for group in [group for group in pending if group not in parts]:
            flush(group)
        earlier = before
        for layer in range(n_layers):
            load = put(LOAD, number, layer, step.shares, tuple(done[0]))
            experts: list[Handle] = []
            for group, shares in parts.items():
                flush(group)
                after = [load, *([ends[group]] if group in ends else [])]
                last = put(QKV, number, layer, shares, after + (earlier if layer == 0 else []))
                if any(share.decodes for share in shares):
                    last = put(ATTEND, number, layer, shares, [last])
                later(group, number, layer, shares, last, experts)
            if layer == 0:
                before = list(ends.values())
            done.append(experts)
    for group in list(pending):
        flush(group)


class PipelineSim:
    """The woven passes as tasks with the durations of a cost model; see `stretches` for what depends on the others."""

    def __init__(self, costs: Costs):
        self.costs = costs
        self.lanes = {name: Resource(name) for name in LANES}

    def tasks(self, passes: Iterable[Pass]) -> list[Task]:
        """All tasks, in the order in which they are put."""
        found: list[Task] = []
        longer: dict[int, dict[str, float]] = {}
        known: dict[tuple[int, str, int], float] = {}  # the layers of a pass are alike

        def put(kind: str, number: int, layer: int, shares: Sequence[Share], after: Sequence[Task]) -> Task:
            if kind == LOAD:
                if layer == 0:
                    longer[number] = dict(zip((DEVICE, CPU), stretches(self.costs, shares), strict=True))
                seconds = self.costs.load()
            else:
                key = number, kind, shares[0].group
                if key not in known:
                    known[key] = getattr(self.costs, kind)(shares) * longer[number][LANE[kind]]
                seconds = known[key]
            found.append(Task(name_of(kind, number, layer, shares), self.lanes[LANE[kind]], seconds, after, group=kind))
            return found[-1]

        weave(passes, self.costs.layers, put)
        return found

    def run(self, passes: Iterable[Pass]) -> Timeline:
        """The timeline, labelled by what the costs are."""
        return run(self.tasks(passes), self.costs.basis)


def name_of(kind: str, number: int, layer: int, shares: Sequence[Share]) -> str:
    """A task as it is called on timelines: pass, layer, group."""
    group = "" if kind == LOAD else f" group {shares[0].group}"
    return f"{kind} pass {number} layer {layer}{group}"
