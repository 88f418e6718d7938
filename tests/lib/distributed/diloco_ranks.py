"""A small network and its shards, and what the tests of Streaming DiLoCo run in processes."""

import copy

import torch
import torch.distributed as dist
from torch import Tensor, nn

from workbench.errors import InputError
from workbench.lib.core.distributed.wire import counted
from workbench.lib.core.task import Regression
from workbench.lib.core.train import TrainConfig, make_optimizer, train
from workbench.lib.core.train import steps as alone
from workbench.lib.distributed.replicas import Shards, train_rank
from workbench.lib.distributed.streaming_diloco import E3M0Codec, StreamingDiLoCo, fragments

WIDTH = 6


class Net(nn.Module):
    """Four residual layers between two maps; a vector and a frozen matrix among its parameters."""

    def __init__(self, dtype: torch.dtype = torch.float32, seed: int = 0):
        super().__init__()
        torch.manual_seed(seed)
        self.into = nn.Linear(WIDTH, WIDTH)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=i % 2 == 0) for i in range(4))
        self.scale = nn.Parameter(torch.ones(WIDTH))
        self.fixed = nn.Parameter(torch.eye(WIDTH), requires_grad=False)
        self.to(dtype)

    def forward(self, x: Tensor, context=None) -> Tensor:
        x = self.into(x.to(self.scale.dtype))
        for layer in self.layers:
            x = x + layer(x).tanh()
        return (x * self.scale) @ self.fixed


def task(seed: int = 0) -> Regression:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(64, WIDTH, generator=generator)
    y = x.flip(1).sin() + 0.1 * torch.randn(64, WIDTH, generator=generator) + seed
    return Regression("waves", {split: {"all": (x, y)} for split in ("train", "validation", "test")}, {})


def shards(replicas: int) -> Shards:
    return Shards([task(m) for m in range(replicas)])


def config(n_steps: int, rows: int = 4) -> TrainConfig:
    return TrainConfig(n_steps, rows, 1e-2, warmup=0, seed=3, eval_every=None, clip=0.5)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def trained(cases: list[dict]) -> list[dict]:
    """On each rank one training a case: {"steps", "count", "codec", ...: as of `StreamingDiLoCo`}."""
    return [train_one(**case) for case in cases]


def train_one(steps: int, count: int, codec: bool, **settings) -> dict:
    rank, world = dist.get_rank(), dist.get_world_size()
    model = Net()
    diloco = StreamingDiLoCo(model, fragments(model, count), codec=E3M0Codec(16) if codec else None, **settings)
    sent, first = [], weights(model)
    for _ in alone(model, shards(world).of(rank), config(steps)):
        with counted() as traffic:
            diloco.step()
        sent.append(traffic.bytes)
    return {
        "first": first,
        "weights": weights(model),
        "global": diloco.global_parameters(),
        "sent": sent,
        "formula": diloco.sent_bytes(steps, world),
    }


def resumed(total: int, cut: int, sync_every: int, delay: int) -> tuple[dict, dict]:
    """The weights of a training as a hook, and of one that is cut, kept and begun anew in a fresh model."""
    rank, world = dist.get_rank(), dist.get_world_size()
    shard = shards(world).of(rank)

    def part_of(model):
        return StreamingDiLoCo(model, fragments(model, 2), codec=E3M0Codec(16), sync_every=sync_every, delay=delay)

    def begun():
        model = Net()
        return model, part_of(model)

    whole, diloco = begun()
    train(whole, shard, config(total), [diloco])
    model, diloco = begun()
    training = alone(model, shard, config(total), [diloco])
    for _ in range(cut):
        state = next(training)
    kept = copy.deepcopy((model.state_dict(), state.optimizer.state_dict(), diloco.state_dict()))
    assert "message" in kept[2], "cut while a fragment is under way"
    training.close()
    diloco.flush()
    again = Net(seed=9)
    again.load_state_dict(kept[0])
    second = part_of(again)
    second.load_state_dict(kept[2])
    optimizer = make_optimizer(again, config(total))
    optimizer.load_state_dict(kept[1])
    train(again, shard, config(total), [second], optimizer=optimizer, start=cut)
    return weights(whole), weights(again)


def local_sgd(n_steps: int, period: int) -> tuple[dict, dict]:
    """torch's own local SGD and ours: outer steps of rate 1 without momentum."""
    from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager  # seconds each
    from torch.distributed.optim import PostLocalSGDOptimizer

    shard = shards(dist.get_world_size()).of(dist.get_rank())
    found = []
    for ours in (False, True):
        model = Net(torch.float64)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        if ours:
            diloco = StreamingDiLoCo(
                model, fragments(model, 1), sync_every=period, delay=0, mix=0.0, outer_lr=1.0, outer_momentum=0.0
            )
        else:
            optimizer = PostLocalSGDOptimizer(optimizer, PeriodicModelAverager(period=period, warmup_steps=period - 1))
        for step in range(n_steps):
            loss, _ = shard.loss(model, shard.batch("train", 4, torch.Generator().manual_seed(step)))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if ours:
                diloco.step()
        found.append(weights(model))
    return found[0], found[1]


def unlike(how: str) -> str:
    """What is said to replicas that begin with other weights, or with other settings."""
    rank = dist.get_rank()
    model = Net(seed=rank if how == "weights" else 0)
    diloco = StreamingDiLoCo(model, fragments(model, 1), sync_every=4, delay=0, mix=0.1 * rank * (how == "mix"))
    try:
        diloco.step()
    except InputError as error:
        return str(error)
    return "nothing"


def on_two(cases: list[dict], how: dict) -> dict:
    """All that two processes are asked for, in one start of them."""
    return {
        "trained": trained(cases),
        "by the function": train_rank(Net(), shards(2), config(7), fragments(Net(), 2), how),
        "resumed": resumed(14, 10, 6, 2),
        "local sgd": local_sgd(11, 3),
        "unlike": [unlike("weights"), unlike("mix")],
    }
