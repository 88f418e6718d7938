"""A mixed batch through many low-rank adapters of one layer: each row belongs to one of them.

The contestants are a bank of low-rank experts beside the layer, and PEFT's way to serve such a batch
(`adapter_names=`, which is for inference: it is timed forward only), called on the layer itself. Both start from the
adapter of each row, so sorting is timed with the rest.

The bound is the base layer, forward or with the gradient of its input, and one dense product of as many operations as
the adapters need, three for a forward and backward. Since everybody computes the base layer, which takes the longer the
better its products are, no more can be gained over a peer than its own ratio to the bound; so the adapters are timed by
themselves as well, with a base layer that hands over a tensor that is there already.

N rows, I = O width of the layer, E adapters, r their rank.
"""

from functools import partial
from importlib.util import find_spec

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from workbench.bench.core import BOTH, FORWARD, LIMIT, OURS, Case, Contestants
from workbench.lib.core.low_rank import LowRankExperts
from workbench.lib.core.routing import Routing

REPEATS = 31
PEER = "peft/mixed_batch"
QUICK = ((16, 32, 4, 2),)
SHAPES = ((64, 512, 8, 8), (2048, 512, 8, 8), (2048, 1024, 32, 16))  # N, width, E, r


def cases(quick: bool = False) -> list[Case]:
    """The layer with its adapters, forward and backward, and the adapters alone, forward."""
    found = []
    for shape in QUICK if quick else SHAPES:
        name = "N={} I=O={} E={} r={}".format(*shape)
        found.append(Case(name, partial(_contestants, shape)))
        found.append(Case(f"{name}, adapters alone", partial(_alone, shape), (FORWARD,)))
    return found


class Problem:
    """Random rows, a layer and adapters, and the implementations that serve them with the same weights."""

    def __init__(self, n_rows: int, width: int, n_adapters: int, rank: int):
        generator = torch.Generator().manual_seed(0)
        draw = partial(torch.randn, generator=generator)
        self.weight = draw(width, width) * width**-0.5
        self.bank = LowRankExperts(n_adapters, width, width, rank)
        with torch.no_grad():
            self.bank.a.copy_(draw(n_adapters, rank, width) * width**-0.5)
            self.bank.b.copy_(draw(n_adapters, width, rank) * rank**-0.5)
        self.x, self.grad = draw(n_rows, width), draw(n_rows, width)
        self.adapter = torch.randint(n_adapters, (n_rows,), generator=generator)
        self.ones = torch.ones(n_rows, 1)

    def base(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)

    def update(self, x: Tensor) -> Tensor:
        """The adapters of a mixed batch."""
        return self.bank(x, Routing.fixed(self.adapter[:, None], self.ones, self.bank.n_experts))

    def ours(self, x: Tensor) -> Tensor:
        return self.base(x) + self.update(x)

    def peft(self, alone: bool = False) -> nn.Module:
        """PEFT's layer with these adapters, called as layer(x, adapter_names=names)."""
        from peft import LoraConfig, get_peft_model

        n_adapters, rank, width = self.bank.a.shape
        model = nn.Sequential(Ready(self.x) if alone else nn.Linear(width, width, bias=False))
        model[0].weight.data = self.weight
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=["0"])
        model = get_peft_model(model, config, adapter_name="0")
        for e in range(1, n_adapters):
            model.add_adapter(str(e), config)
        layer = model.base_model.model[0].eval()
        for e in range(n_adapters):
            layer.lora_A[str(e)].weight.data = self.bank.a.data[e]
            layer.lora_B[str(e)].weight.data = self.bank.b.data[e]
        return layer

    @property
    def names(self) -> list[str]:
        """Of the adapter of each row, as PEFT is told."""
        return [str(e) for e in self.adapter.tolist()]


class Ready(nn.Linear):
    """A layer whose result is there already; what is added to it stays."""

    def __init__(self, like: Tensor):
        super().__init__(like.shape[1], like.shape[1], bias=False)
        self.result = torch.zeros_like(like)

    def forward(self, x: Tensor) -> Tensor:
        return self.result


def _contestants(shape: tuple[int, int, int, int], direction: str) -> Contestants:
    problem = Problem(*shape)
    n_rows, width, _, rank = shape
    x, columns = problem.x, 2 * rank
    right, out = torch.randn(width, columns), torch.empty(n_rows, columns)

    def limit(products: int) -> None:
        for _ in range(products):
            torch.mm(x, right, out=out)

    if direction == BOTH:
        leaf = x.clone().requires_grad_()

        def ours() -> None:
            torch.autograd.grad(problem.ours(leaf), (leaf, problem.bank.a, problem.bank.b), problem.grad)

        def bound() -> None:
            torch.autograd.grad(problem.base(leaf), leaf, problem.grad)
            limit(3)

        return {LIMIT: bound, OURS: ours}

    @torch.no_grad()
    def bound() -> None:
        problem.base(x)
        limit(1)

    ours = torch.no_grad()(partial(problem.ours, x))
    return {LIMIT: bound, OURS: ours, **_peer(problem, alone=False)}


def _alone(shape: tuple[int, int, int, int], direction: str) -> Contestants:
    problem = Problem(*shape)
    return {OURS: torch.no_grad()(partial(problem.update, problem.x)), **_peer(problem, alone=True)}


def _peer(problem: Problem, alone: bool) -> Contestants:
    if find_spec("peft") is None:
        return {}
    layer, names = problem.peft(alone), problem.names
    return {PEER: torch.no_grad()(lambda: layer(problem.x, adapter_names=names))}
