"""What the tests of Z-code M3's groups run in processes, beside one process that has the whole batch."""

import math
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.optim import ZeroRedundancyOptimizer

from workbench.errors import InputError
from workbench.lib.core.capacity import Capacity
from workbench.lib.core.distributed.gradients import reduce_gradients
from workbench.lib.core.distributed.wire import counted
from workbench.lib.core.experts import GLU, GLUExperts
from workbench.lib.core.models import DecoderLM
from workbench.lib.core.moe import MoELayer, moe_layers
from workbench.lib.core.observe import observing
from workbench.lib.core.routers import LinearRouter
from workbench.lib.core.task import LanguageModelling
from workbench.lib.core.train import Hook, TrainConfig, train
from workbench.lib.data.types import TextDomains
from workbench.lib.distributed.expert_groups import ExpertData, ExpertGroups, ZeroAdamW, train_together
from workbench.lib.distributed.expert_memory import Bytes, memory

E, D, H, LENGTH, ROWS = 4, 8, 6, 12, 8
CONFIG = TrainConfig(5, ROWS, lr=1e-2, warmup=2, clip=0.05, seed=3, eval_every=None)
OPTIONS = {"lr": 1e-2, "betas": (0.9, 0.95), "weight_decay": 0.1}


def task() -> LanguageModelling:
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(32, 96, (400,), generator=generator, dtype=torch.uint8)
    return LanguageModelling(TextDomains("drawn", ("drawn",), {"train": {"drawn": text}}, {}), LENGTH)


def model(capacity: Capacity | None = None, dtype: torch.dtype = torch.float64) -> DecoderLM:
    torch.manual_seed(0)

    def ffn(layer: int) -> nn.Module:
        if layer == 0:
            return GLU(D, H)
        router = LinearRouter(D, E, 1, coefficients={"z": 0.01})
        return MoELayer(router, GLUExperts(E, D, H), capacity_factor=capacity)

    made = DecoderLM(256, D, 2, 2, ffn, LENGTH)
    with torch.no_grad():  # decided choices, and an expert that few ask for
        made.blocks[1].ffn.router.projection.weight *= 20
    return made.to(dtype)


def alone(dtype: torch.dtype = torch.float64) -> tuple[dict[str, Tensor], float]:
    """Weights after five steps of one process, and the norm of the last gradient."""
    made = model(dtype=dtype)
    state = train(made, task(), CONFIG, optimizer=torch.optim.AdamW(made.parameters(), **OPTIONS))
    return {name: p.detach() for name, p in made.named_parameters()}, state.grad_norm


def trained(ep: int, zero: bool, dtype: torch.dtype = torch.float64) -> dict:
    """Largest difference from one process, of weights and norms, and bytes held beside the formula."""
    made, groups = model(dtype=dtype), ExpertGroups(dist.get_world_size(), ep)
    counts = [0, sum(p.numel() for layer in moe_layers(made).values() for p in layer.experts.parameters())]
    counts[0] = sum(p.numel() for p in made.parameters()) - counts[1]
    together = ExpertData(made, groups)
    if zero:
        optimizer = ZeroAdamW(together, **OPTIONS)
    else:
        optimizer = torch.optim.AdamW([{"params": together.shared}, {"params": together.experts}], **OPTIONS)
    state = train(made, task(), CONFIG, optimizer=optimizer, replicas=together)
    whole, norm = alone(dtype)
    own = groups.experts_of(dist.get_rank(), E)
    experts, gap = set(together.experts), 0.0
    for name, p in made.named_parameters():
        expected = whole[name][own.start : own.stop] if p in experts else whole[name]
        gap = max(gap, float((p - expected).abs().max()))
    if zero:
        states = optimizer.state_bytes()
    else:
        moments = [s[what] for s in optimizer.state.values() for what in ("exp_avg", "exp_avg_sq")]
        states = sum(m.numel() * m.element_size() for m in moments)
    size = dtype.itemsize
    model_of = memory(*counts, world=groups.world, ep=ep, zero=zero, per=Bytes(size, size, (3 if zero else 2) * size))
    held = [sum(t.numel() * size for t in of) for of in (made.parameters(), [p.grad for p in made.parameters()])]
    return {
        "gap": gap,
        "norm": abs(state.grad_norm - norm),
        "clipped": norm > CONFIG.clip,
        "held": [*held, states],
        "formula": [model_of.weights, model_of.gradients, model_of.states],
    }


def together() -> dict[str, float]:
    """The gap of all weights, gathered, to those of one process; with the states shared out and without."""
    whole, _ = alone()
    found = {}
    for zero in (False, True):
        made = train_together(model(), task(), CONFIG, 2, zero, **OPTIONS)
        assert made.keys() == whole.keys()
        found[f"zero {zero}"] = max(float((made[name] - p).abs().max()) for name, p in whole.items())
    return found


def wrong_scales() -> dict[str, float]:
    """The gap to one process's gradient of the experts: divided by all ranks, and by the copies of each expert."""
    made, groups = model(), ExpertGroups(dist.get_world_size(), 2)
    together = ExpertData(made, groups)
    gradients = {}

    class Look(Hook):
        def before_update(self, state) -> None:
            gradients["experts"] = [p.grad.clone() for p in together.experts]

    once = replace(CONFIG, steps=1, clip=math.inf)
    train(made, task(), once, [Look()], optimizer=torch.optim.SGD(made.parameters(), lr=0.0), replicas=together)
    whole = model()
    train(whole, task(), once, optimizer=torch.optim.SGD(whole.parameters(), lr=0.0))
    own = groups.experts_of(dist.get_rank(), E)
    expected = [p.grad[own.start : own.stop] for p in moe_layers(whole)["blocks.1.ffn"].experts.parameters()]
    found = {}
    for name, factor in (("world", 1.0), ("copies", 2.0)):  # world / edp = 2
        pairs = zip(gradients["experts"], expected, strict=True)
        found[name] = max(float((factor * g - e).abs().max()) for g, e in pairs)
    return found


def capacity_of_ranks() -> dict:
    """With places for half of a rank's tokens, what a rank keeps is what one process keeps of those tokens alone."""
    limit = Capacity(0.5, "position")
    made = model(limit)
    together = ExpertData(made, ExpertGroups(dist.get_world_size(), 2))
    batch = together.share(task().batch("train", ROWS, torch.Generator().manual_seed(0)))
    whole, seen = model(limit), {}
    for name, one in (("ranks", made), ("alone", whole)):
        layer = one.blocks[1].ffn
        with observing([layer]) as said:
            outputs = one(batch.inputs)
        seen[name] = (outputs, said[layer][0][0].kept)
    return {
        "kept": torch.equal(seen["ranks"][1], seen["alone"][1]),
        "dropped": int((~seen["ranks"][1]).sum()),
        "gap": float((seen["ranks"][0] - seen["alone"][0]).abs().max()),
    }


def beside_torch() -> float:
    """The shared weights after three steps, beside torch's ZeroRedundancyOptimizer of AdamW on all ranks."""
    weights = []
    for ours in (True, False):
        made = model(dtype=torch.float32)
        together = ExpertData(made, ExpertGroups(dist.get_world_size(), 4))
        if ours:
            optimizer = ZeroAdamW(together, **OPTIONS)
            optimizer.param_groups[1]["lr_scale"] = 0.0  # the other has no experts
        else:
            optimizer = ZeroRedundancyOptimizer(together.shared, torch.optim.AdamW, **OPTIONS)
        train(made, task(), replace(CONFIG, steps=3, clip=1.0), optimizer=optimizer, replicas=together)
        weights.append([p.detach().clone() for p in together.shared])
    return max(float((a - b).abs().max()) for a, b in zip(*weights, strict=True))


def traffic() -> dict[str, float]:
    """Bytes that a rank sends for gradients: of what all have, and of its experts to those that have the same."""
    made = model()
    together = ExpertData(made, ExpertGroups(dist.get_world_size(), 2))
    found = {}
    for name, each in zip(("shared", "experts"), together.sets, strict=True):
        for p in each.parameters:
            p.grad = torch.ones_like(p)
        with counted() as sent:
            reduce_gradients([each], ranks=4)
        found[name] = sent.bytes
        n = each.copies.size()
        found[f"{name}_formula"] = 2 * (n - 1) / n * 8 * sum(p.numel() for p in each.parameters)
    return found


def refusals() -> list[str]:
    found, six = [], replace(CONFIG, batch_size=6)
    for act in (
        lambda: ExpertGroups(dist.get_world_size(), 3),
        lambda: train(made := model(), task(), six, replicas=ExpertData(made, ExpertGroups(4, 2))),
        lambda: ExpertData(nn.Linear(2, 2), ExpertGroups(4, 2)),
    ):
        try:
            act()
        except InputError as error:
            found.append(str(error))
    return found


def everything() -> dict:
    return {
        "E+D": trained(2, False),
        "E+D+ZeRO": trained(2, True),
        "E": trained(4, False),
        "D+ZeRO": trained(1, True),
        "E+D+ZeRO in single precision": trained(2, True, torch.float32),
        "together": together(),
        "scales": wrong_scales(),
        "capacity": capacity_of_ranks(),
        "torch": beside_torch(),
        "traffic": traffic(),
        "refusals": refusals(),
    }
