"""The expert layer on a CPU: `moe_mlp` beside the experts of transformers and the dense products of the same size.

The bound is what torch's products would take if there were no experts: (T K, D) x (D, 3 H) once for a forward, three
times for a forward and backward. A path in C makes its own and can fall below it. Each contestant starts from router
indices and weights, so sorting is timed with the rest. The implementation "batched_mm" of transformers copies a matrix
for every pair, 17 GB in the first case; it is left out.

T tokens, D model width, H expert hidden width, E experts, K per token, P = T K pairs.
"""

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from workbench.bench.core import BOTH, FORWARD, LIMIT, OURS, Case, Contestants
from workbench.kernels.memory import saved_bytes
from workbench.kernels.moe_mlp import moe_mlp
from workbench.kernels.moe_mlp.scattered import scattered
from workbench.kernels.plan import RoutePlan

REPEATS = 9
QUICK = ((256, 64, 64, 8, 2),)
SHAPES = ((2048, 512, 256, 64, 8), (2048, 256, 512, 8, 2), (4096, 512, 128, 128, 8))  # T, D, H, E, K
MEMORY = {"n_tokens": 4096, "dim": 256, "active": 512, "experts_per_k": 8, "top_k": (2, 4, 8, 16)}
PEERS = ("eager", "grouped_mm")
SCATTER = "scatter-style"

Layer = Callable[[Tensor, Tensor, Tensor], Tensor]  # x (T, D), index (T, K), weight (T, K) -> (T, D)


def cases(quick: bool = False) -> list[Case]:
    """The timings: three shapes, many small experts, few large ones, and very many very small ones."""
    shapes = QUICK if quick else SHAPES
    return [Case(f"T={t} D={d} H={h} E={e} K={k}", partial(_contestants, (t, d, h, e, k))) for t, d, h, e, k in shapes]


def tables(quick: bool = False) -> dict[str, list[dict]]:
    """What is kept for the backward while experts become finer, I K and the weights held fixed.

    Returns:
        {"memory": a row for each K and implementation: {case, implementation, saved_bytes}}, without the weights.
    """
    rows = []
    for top_k in MEMORY["top_k"]:
        n_tokens = 256 if quick else MEMORY["n_tokens"]
        shape = (n_tokens, MEMORY["dim"], MEMORY["active"] // top_k, MEMORY["experts_per_k"] * top_k, top_k)
        problem = Problem(*shape)
        for name, layer in problem.layers(scatter=True).items():
            kept = saved_bytes(lambda layer=layer, p=problem: layer(*p.inputs), exclude=problem.weights)
            case = "T={} D={} H={} E={} K={}".format(*shape)
            rows.append({"case": case, "implementation": name, "saved_bytes": kept})
    return {"memory": rows}


class Problem:
    """Random tokens, weights and a uniform routing, and the implementations that solve it with the same weights."""

    def __init__(self, n_tokens: int, dim: int, hidden: int, n_experts: int, top_k: int):
        generator = torch.Generator().manual_seed(0)
        draw = partial(torch.randn, generator=generator)
        self.n_experts, self.top_k = n_experts, top_k
        self.w1 = nn.Parameter(draw(n_experts, 2 * hidden, dim) * dim**-0.5)
        self.w2 = nn.Parameter(draw(n_experts, dim, hidden) * hidden**-0.5)
        x = draw(n_tokens, dim).requires_grad_()
        index = torch.rand(n_tokens, n_experts, generator=generator).argsort(1)[:, :top_k]
        weight = torch.rand(n_tokens, top_k, generator=generator).softmax(1).requires_grad_()
        self.inputs = x, index, weight
        self.grad = draw(n_tokens, dim)

    @property
    def weights(self) -> tuple[nn.Parameter, nn.Parameter]:
        return self.w1, self.w2

    def layers(self, scatter: bool = False) -> dict[str, Layer]:
        """The implementations by name: ours, transformers' where it is installed, and the one of scattered rows."""
        layers: dict[str, Layer] = {OURS: self._ours}
        if find_spec("transformers") is not None:
            layers |= {f"transformers/{peer}": self._transformers(peer) for peer in PEERS}
        if scatter:
            layers[SCATTER] = self._scattered
        return layers

    def forward(self, layer: Layer) -> None:
        with torch.no_grad():
            layer(*self.inputs)

    def both(self, layer: Layer) -> None:
        for leaf in (self.inputs[0], self.inputs[2], *self.weights):
            leaf.grad = None
        layer(*self.inputs).backward(self.grad)

    def _ours(self, x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        plan = RoutePlan.build(index.reshape(-1), self.n_experts, top_k=self.top_k)
        return moe_mlp(x, self.w1, self.w2, plan, weight.reshape(-1))

    def _transformers(self, implementation: str) -> Layer:
        from transformers import MixtralConfig
        from transformers.models.mixtral.modeling_mixtral import MixtralExperts

        (_, dim, hidden) = self.w2.shape
        config = MixtralConfig(hidden_size=dim, intermediate_size=hidden, num_local_experts=self.n_experts)
        config._experts_implementation = implementation
        experts = MixtralExperts(config)
        experts.gate_up_proj, experts.down_proj = self.weights
        return experts

    def _scattered(self, x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        plan = RoutePlan.build(index.reshape(-1), self.n_experts, top_k=self.top_k)
        return scattered(x, self.w1, self.w2, plan, weight.reshape(-1))


def _contestants(shape: tuple[int, int, int, int, int], direction: str) -> Contestants:
    n_tokens, dim, hidden, _, top_k = shape
    problem = Problem(*shape)
    a, b = torch.randn(n_tokens * top_k, dim), torch.randn(dim, 3 * hidden)
    out = torch.empty(n_tokens * top_k, 3 * hidden)
    products = {FORWARD: 1, BOTH: 3}[direction]

    def limit() -> None:
        for _ in range(products):
            torch.mm(a, b, out=out)

    run = {FORWARD: problem.forward, BOTH: problem.both}[direction]
    return {LIMIT: limit, **{name: partial(run, layer) for name, layer in problem.layers().items()}}
