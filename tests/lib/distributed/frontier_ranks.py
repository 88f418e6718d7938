"""What the tests of frontier run in processes: every kind of plan of a world, each beside a decoder that knows none."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from workbench.errors import InputError
from workbench.lib.core.distributed.wire import counted
from workbench.lib.distributed.frontier_memory import memory, sent, shard, stage_params
from workbench.lib.distributed.frontier_plans import DenseConfig, ParallelPlan
from workbench.lib.distributed.frontier_schedules import in_flight
from workbench.lib.distributed.frontier_train import Trainer3D, drawn_tokens, drawn_weights, train_3d

STEPS, LR = 5, 1e-2


def config(width: int = 8, vocab: int = 20) -> DenseConfig:
    return DenseConfig("test", layers=4, dim=16, heads=4, vocab=vocab, time=8, width=width)


#: Plans by their world. Of 12 rows a step, so that all of them see the same tokens.
PLANS = {
    2: [
        ParallelPlan(tp=2, micro_batch=3, accum=4),
        ParallelPlan(pp=2, micro_batch=2, accum=6),
        ParallelPlan(pp=2, micro_batch=2, accum=6, schedule="gpipe", flash=False),
        ParallelPlan(pp=2, micro_batch=3, accum=4, interleave=2),
        ParallelPlan(dp=2, micro_batch=2, accum=3),
        ParallelPlan(dp=2, micro_batch=6, accum=1, zero=0),
    ],
    4: [
        ParallelPlan(tp=2, pp=2, micro_batch=2, accum=6, recompute=True),
        ParallelPlan(tp=2, dp=2, micro_batch=1, accum=6),
        ParallelPlan(tp=2, dp=2, micro_batch=2, accum=3, zero=0, recompute=True, flash=False),
        ParallelPlan(pp=2, dp=2, micro_batch=1, accum=6, interleave=2),
        ParallelPlan(tp=4, micro_batch=4, accum=3),
        ParallelPlan(pp=4, micro_batch=4, accum=3),
        ParallelPlan(dp=4, micro_batch=1, accum=3),
    ],
    8: [ParallelPlan(tp=2, pp=2, dp=2, micro_batch=1, accum=6), ParallelPlan(tp=2, pp=2, dp=2, micro_batch=3, accum=2)],
}


def plain_loss(config: DenseConfig, weights: dict[str, Tensor], tokens: Tensor) -> Tensor:
    """The mean cross-entropy, of the whole decoder at once: no rank, no micro-batch, no part."""
    x = weights["embedding"][tokens[:, :-1]] + weights["position"]
    for i in range(config.layers):
        w = {name.removeprefix(f"layers.{i}."): p for name, p in weights.items() if name.startswith(f"layers.{i}.")}
        y = F.rms_norm(x, (config.dim,), w["attention_norm.weight"])
        q, k, v = ((y @ part.T).unflatten(-1, (config.heads, -1)).movedim(2, 1) for part in w["qkv.weight"].chunk(3))
        scores = (q @ k.mT) * q.shape[-1] ** -0.5
        scores = scores.masked_fill(torch.ones(config.time, config.time).triu(1).bool(), -torch.inf)
        x = x + (scores.softmax(-1) @ v).movedim(1, 2).flatten(2) @ w["out.weight"].T
        y = F.rms_norm(x, (config.dim,), w["ffn_norm.weight"])
        x = x + F.gelu(y @ w["up.weight"].T) @ w["down.weight"].T
    logits = F.rms_norm(x, (config.dim,), weights["norm.weight"]) @ weights["embedding"].T
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def alone(config: DenseConfig, batch: int) -> tuple[list[float], dict[str, Tensor]]:
    """Losses and weights of as many steps by one process."""
    weights = {name: p.requires_grad_() for name, p in drawn_weights(config, 0).items()}
    optimizer, losses = torch.optim.AdamW(weights.values(), lr=LR), []
    for tokens in drawn_tokens(config, batch, STEPS, 0):
        optimizer.zero_grad()
        loss = plain_loss(config, weights, tokens)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, {name: p.detach() for name, p in weights.items()}


def compared(width: int = 8) -> list[dict[str, Any]]:
    """Of each plan of this world: how far it is from one process, and its counts beside the formulas'."""
    found, shape = [], config(width)
    for plan in PLANS[dist.get_world_size()]:
        losses, weights = alone(shape, plan.batch)
        run = train_3d(shape, plan, STEPS, lr=LR)
        trainer = Trainer3D(shape, plan, drawn_weights(shape, 0), LR)
        with counted() as traffic:
            trainer.step(drawn_tokens(shape, plan.batch, 1, 0)[0])
        stage, model = trainer.at["pp"], trainer.model
        counts = memory(shape, plan, stage)
        found.append(
            {
                "plan": str(plan),
                "losses": run["loss"],
                "loss": max(abs(a - b) for a, b in zip(run["loss"], losses, strict=True)),
                "weights": max(float((p - model.cut(n, weights[n])).abs().max()) for n, p in run["weights"].items()),
                "params": (sum(p.numel() for p in model.parameters()), stage_params(shape, plan, stage)),
                "held": (run["held"], {k: getattr(counts, k) for k in ("weights", "gradients", "states")}),
                "sent": ({k: s.bytes for k, s in traffic.of.items() if s.bytes}, sent(shape, plan, stage)),
                "most": (run["most"], in_flight(plan, stage)),
            }
        )
    return found


def sharded() -> dict[str, Any]:
    """ZeRO-1 beside the whole optimiser, both on this world as dp; the vocabulary leaves a part that is filled up."""
    shape, dp, found = config(4, vocab=21), dist.get_world_size(), {}
    for zero in (0, 1):
        plan = ParallelPlan(dp=dp, micro_batch=2, accum=2, zero=zero)
        trainer = Trainer3D(shape, plan, drawn_weights(shape, 0), LR)
        trainer.accumulate(drawn_tokens(shape, plan.batch, 1, 0)[0])
        found[zero] = trainer
        n = stage_params(shape, plan, 0)
    whole, part = found[0], found[1]
    total = part.grad.clone()
    dist.all_reduce(total)
    whole.grad.copy_(total[: len(whole.grad)])
    whole.part.grad = whole.grad
    part.part.grad = total[part.own].clone()
    for trainer in (whole, part):
        for _ in range(3):
            trainer.optimizer.step()
    (mine,) = part.optimizer.state.values()
    (all_,) = whole.optimizer.state.values()
    own = slice(part.own.start, min(part.own.stop, n))
    k = own.stop - own.start
    return {
        "weights": torch.equal(part.part.data[:k], whole.flat[own]),
        "states": all(torch.equal(mine[key][:k], all_[key][own]) for key in ("exp_avg", "exp_avg_sq")),
        "padding": len(part.flat) - n,
        "numbers": (len(part.part), shard(n, part.plan)),
    }


def refused() -> list[str]:
    """What is said of plans and tokens that do not fit two ranks."""
    shape, said = config(), []
    for plan in (ParallelPlan(tp=3), ParallelPlan(tp=2, dp=2), ParallelPlan(dp=2, pp=1, interleave=2)):
        try:
            Trainer3D(shape, plan, {})
        except InputError as error:
            said.append(str(error))
    trainer = Trainer3D(shape, ParallelPlan(dp=2), drawn_weights(shape, 0))
    try:
        trainer.step(torch.zeros(3, 9, dtype=torch.long))
    except InputError as error:
        said.append(str(error))
    return said
