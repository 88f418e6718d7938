"""A network with what a user's own has, and what tests train of it in processes, each beside one process."""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from workbench.errors import InputError
from workbench.lib.core.distributed.dispatcher import FORMS, TokenDispatcher
from workbench.lib.core.distributed.layouts import Processes
from workbench.lib.core.experts import GLUExperts
from workbench.lib.core.moe import MoELayer
from workbench.lib.core.routers import LinearRouter
from workbench.lib.core.routing import Routing
from workbench.lib.core.task import Regression
from workbench.lib.core.train import Hook, TrainConfig, train
from workbench.lib.distributed.expert_groups import ExpertData, ExpertGroups, ZeroAdamW, train_together

E, D, H = 6, 6, 4
CONFIG = TrainConfig(4, 6, lr=1e-2, warmup=0, clip=0.5, seed=3, eval_every=None)
OPTIONS = {"lr": 1e-2, "weight_decay": 0.1}


class Odd(nn.Module):
    """Two layers that share a bank, which the network holds too; a frozen matrix, a buffer, unloved experts."""

    def __init__(self, unused: bool = True):
        super().__init__()
        torch.manual_seed(0)
        self.bank = GLUExperts(E, D, H)
        self.layers = nn.ModuleList(MoELayer(LinearRouter(D, E, 1), self.bank) for _ in range(2))
        self.fixed = nn.Parameter(torch.randn(D, D), requires_grad=False)
        self.register_buffer("shift", torch.ones(D))
        self.out = nn.Linear(D, D)
        if unused:
            self.unused = nn.Parameter(torch.ones(3))
        with torch.no_grad():
            for layer in self.layers:
                layer.router.projection.weight[3] = 0.0
                layer.router.projection.weight[2] = -5.0 * layer.router.projection.weight[4]
        self.double()

    def forward(self, x: Tensor, context=None) -> Tensor:
        x = x @ self.fixed + self.shift
        for layer in self.layers:
            x = x + layer(x, context)
        return self.out(x)


def task() -> Regression:
    x = torch.randn(24, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return Regression("rows", {split: {"all": (x, x.sin())} for split in ("train", "validation", "test")}, {})


def alone(unused: bool = True) -> dict[str, Tensor]:
    model = Odd(unused)
    train(model, task(), CONFIG, optimizer=torch.optim.AdamW(model.parameters(), **OPTIONS))
    return {name: p.detach() for name, p in model.named_parameters()}


def gap(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert found.keys() == expected.keys()
    return max(float((found[name] - expected[name]).abs().max()) for name in expected)


def layouts() -> dict[str, float]:
    found = {}
    for layout in ("data", "sharded", "experts"):
        model = Odd()
        replicas = Processes(model, layout)
        optimizer = torch.optim.AdamW(model.parameters(), **OPTIONS)
        train(model, task(), CONFIG, replicas=replicas, optimizer=optimizer)
        found[layout] = gap({n: replicas.whole(p, p) for n, p in replicas.parameters(model).items()}, alone())
    return found


def together() -> dict:
    found = {"plain": gap(train_together(Odd(), task(), CONFIG, dist.get_world_size(), **OPTIONS), alone())}
    made = train_together(Odd(unused=False), task(), CONFIG, dist.get_world_size(), zero=True, **OPTIONS)
    found["zero"] = gap(made, alone(unused=False))
    try:
        train_together(Odd(), task(), CONFIG, dist.get_world_size(), zero=True, **OPTIONS)
    except InputError as error:
        found["refused"] = str(error)
    return found


def resumed() -> dict:
    """ZeRO's states kept after two steps and put into a fresh optimizer: the weights in the end, and a refusal."""

    class Stop(Hook):
        def after_step(self, state) -> None:
            state.stop = state.step == 1

    def made():
        model = Odd(unused=False)
        ranks = ExpertData(model, ExpertGroups(dist.get_world_size(), 1))
        return model, ranks, ZeroAdamW(ranks, **OPTIONS)

    model, ranks, optimizer = made()
    train(model, task(), CONFIG, [Stop()], optimizer=optimizer, replicas=ranks)
    kept = optimizer.state_dict()
    again, others, second = made()
    second.load_state_dict(kept)
    train(again, task(), CONFIG, optimizer=second, start=2, replicas=others)
    train(model, task(), CONFIG, optimizer=optimizer, start=2, replicas=ranks)
    whole, _, third = made()
    found = {"equal": all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))}
    found["moved"] = not torch.equal(whole.out.weight, again.out.weight)
    try:
        third.load_state_dict(torch.optim.AdamW(whole.parameters()).state_dict())
    except InputError as error:
        found["refused"] = str(error)
    return found


def everything_to_one() -> list[float]:
    """All rows to an expert of the first rank, from ranks of which one has none; x with and without a gradient."""
    rank, found = dist.get_rank(), []
    torch.manual_seed(0)
    for dtype in (torch.float64, torch.bfloat16):
        for form in FORMS:
            for wanted in (True, False):
                whole, bank = GLUExperts(E, D, H).to(dtype), GLUExperts(2, D, H).to(dtype)
                with torch.no_grad():
                    for own, of in zip(bank.parameters(), whole.parameters(), strict=True):
                        own.copy_(of[2 * rank : 2 * rank + 2])
                x = torch.ones(D, 5).cumsum(1).t().sub(2).to(dtype).split([3, 0, 2])[rank].requires_grad_(wanted)
                assert rank == 1 or not x.is_contiguous()
                routing = Routing.fixed(torch.ones(len(x), 1).long(), torch.ones(len(x), 1, dtype=dtype), E)
                dispatcher = TokenDispatcher(E, dist.group.WORLD, form=form)
                sent = dispatcher.dispatch(x, routing)
                y = dispatcher.combine(bank(sent.rows, sent.routing), sent)
                y.square().sum().backward()  # which hangs where a rank without rows does not take part
                assert all(p.grad is not None and bool(p.grad.any()) == (rank == 0) for p in bank.parameters())
                if len(x):
                    found.append(float((y - whole(x, routing)).detach().abs().max()))
    return found


def everything() -> dict:
    return {call.__name__: call() for call in (layouts, together, resumed, everything_to_one)}
