"""A decoder trained over tp x dp x pp processes, and nothing else changed: this rank's part, and a step of it.

Tensors: each product of a layer is split over tp, first by outputs, then by inputs, with one all-reduce after attention
and one after the feed-forward part, and their adjoints backward. The embedding and the output, one matrix, are split by
tokens known. Stages: passes are done in the order of `frontier_schedules`; activations go to the next stage, gradients
to the one before. The first and last stage have the matrix of the embedding both, and sum its gradient. Copies sum
gradients; with ZeRO-1 each gets a part of the sum, keeps the optimiser's states of that part alone, and sends it round.

Losses are sums over a rank's tokens, divided by the number of all tokens: so every sum over micro-batches and copies is
a plain one, and nothing is averaged twice.

Tensor letters: B rows of a micro-batch, T time, D model width, V vocabulary, v this rank's part of it.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from workbench.errors import InputError
from workbench.lib.core.distributed.grids import RankGrid
from workbench.lib.core.distributed.rows import Group, ranks_of
from workbench.lib.distributed.frontier_plans import DenseConfig, ParallelPlan
from workbench.lib.distributed.frontier_schedules import Pass, orders

DTYPES = {2: torch.bfloat16, 4: torch.float32, 8: torch.float64}


class _Copied(torch.autograd.Function):
    """The same rows on all ranks, for products that each computes a part of; their gradients are summed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.contiguous().clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


class _Summed(torch.autograd.Function):
    """The sum over all ranks, on each; its gradient is that of every part."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        x = x.contiguous().clone()
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def copied(x: Tensor, group: Group) -> Tensor:
    return x if ranks_of(group) == 1 else _Copied.apply(x, group)


def summed_everywhere(x: Tensor, group: Group) -> Tensor:
    return x if ranks_of(group) == 1 else _Summed.apply(x, group)


class DenseLayer(nn.Module):
    """A pre-norm layer, or the part of it that one of `parts` ranks computes. Rows are (B, T, D).

    Args:
        group: the ranks that have the other parts; None: they are not summed with.
        flash: whether attention keeps no scores.
    """

    def __init__(self, config: DenseConfig, parts: int = 1, group: Group = None, flash: bool = True):
        super().__init__()
        own = config.dim // parts
        self.heads, self.group, self.flash = config.heads // parts, group, flash
        self.attention_norm, self.ffn_norm = nn.RMSNorm(config.dim), nn.RMSNorm(config.dim)
        self.qkv, self.out = nn.Linear(config.dim, 3 * own, bias=False), nn.Linear(own, config.dim, bias=False)
        self.up, self.down = nn.Linear(config.dim, 4 * own, bias=False), nn.Linear(4 * own, config.dim, bias=False)

    def forward(self, x: Float[Tensor, "batch time dim"]) -> Float[Tensor, "batch time dim"]:
        x = x + summed_everywhere(self._attend(copied(self.attention_norm(x), self.group)), self.group)
        y = self.down(F.gelu(self.up(copied(self.ffn_norm(x), self.group))))
        return x + summed_everywhere(y, self.group)

    def _attend(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).movedim(-3, 0).transpose(-3, -2)
        if self.flash:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            unseen = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
            scores = (q @ k.mT).mul_(q.shape[-1] ** -0.5).masked_fill_(unseen, -torch.inf)
            y = scores.softmax(-1) @ v
        return self.out(y.transpose(-3, -2).flatten(-2))


class Decoder(nn.Module):
    """The whole of a `DenseConfig`, or what a rank has of it: chunks of layers, and the ends where they are.

    Names of parameters are those of the whole; `cut` makes this rank's part of any of its tensors.
    """

    def __init__(self, config: DenseConfig, plan: ParallelPlan, at: dict[str, int], groups: dict[str, Group]):
        super().__init__()
        self.config, self.plan, self.at, self.group = config, plan, at, groups.get("tp")
        self.first, self.last = at["pp"] == 0, at["pp"] == plan.pp - 1
        if self.first or self.last:
            self.embedding = nn.Parameter(torch.empty(config.vocab // plan.tp, config.dim))
        if self.first:
            self.position = nn.Parameter(torch.empty(config.time, config.dim))
        if self.last:
            self.norm = nn.RMSNorm(config.dim)
        per, mine = config.layers // plan.chunks, range(at["pp"], plan.chunks, plan.pp)
        self.layers = nn.ModuleDict(
            {
                str(i): DenseLayer(config, plan.tp, self.group, plan.flash)
                for c in mine
                for i in range(c * per, c * per + per)
            }
        )
        self.to(DTYPES[config.width])

    def cut(self, name: str, whole: Tensor) -> Tensor:
        """This rank's part of a tensor of the whole model."""
        tp, at = self.plan.tp, self.at["tp"]
        if name.endswith("qkv.weight"):  # of q, k and v each the rows of this rank's heads
            return whole.unflatten(0, (3, tp, -1))[:, at].flatten(0, 1)
        if name.endswith(("up.weight", "embedding")):
            return whole.unflatten(0, (tp, -1))[at]
        if name.endswith(("out.weight", "down.weight")):
            return whole.unflatten(1, (tp, -1))[:, at]
        return whole

    def embed(self, tokens: Int64[Tensor, "batch time"]) -> Float[Tensor, "batch time dim"]:
        here = tokens - self.at["tp"] * len(self.embedding)
        known = (here >= 0) & (here < len(self.embedding))
        x = F.embedding(here.where(known, 0), self.embedding).where(known[..., None], 0)
        return summed_everywhere(x, self.group) + self.position[: tokens.shape[1]]

    def loss(self, x: Float[Tensor, "batch time dim"], targets: Int64[Tensor, "batch time"]) -> Float[Tensor, ""]:
        """The sum of the cross-entropies, of logits that no rank has whole."""
        logits = copied(self.norm(x), self.group) @ self.embedding.T  # (B, T, v)
        largest = logits.detach().amax(-1)
        if ranks_of(self.group) > 1:
            dist.all_reduce(largest, dist.ReduceOp.MAX, group=self.group)
        logits = logits - largest[..., None]
        here = targets - self.at["tp"] * len(self.embedding)
        known = (here >= 0) & (here < len(self.embedding))
        right = logits.gather(-1, here.where(known, 0)[..., None])[..., 0].where(known, 0)
        total, right = summed_everywhere(torch.stack([logits.exp().sum(-1), right]), self.group)
        return (total.log() - right).sum()

    def chunk(self, index: int, x: Float[Tensor, "batch time dim"]) -> Float[Tensor, "batch time dim"]:
        """The layers of one chunk."""
        per = self.config.layers // self.plan.chunks
        for i in range(index * per, index * per + per):
            if self.plan.recompute:
                with set_checkpoint_early_stop(False):  # or the last all-reduce would be left out
                    x = checkpoint(self.layers[str(i)], x, use_reentrant=False)
            else:
                x = self.layers[str(i)](x)
        return x


def drawn_weights(config: DenseConfig, seed: int) -> dict[str, Tensor]:
    """Weights of the whole model by name, the same on every rank."""
    alone = ParallelPlan()
    whole, draw = Decoder(config, alone, {"tp": 0, "dp": 0, "pp": 0}, {}), torch.Generator().manual_seed(seed)
    found = {}
    for name, p in whole.named_parameters():
        noise = torch.randn(p.shape, generator=draw, dtype=torch.float64) * config.dim**-0.5
        found[name] = (1 + 0.1 * noise if p.dim() == 1 else noise).to(p.dtype)
    return found


class Trainer3D:
    """This rank of a plan, with its model, its gradients and its part of the optimiser; every rank makes one.

    Args:
        weights: of the whole model, by name: see `drawn_weights`.

    Attributes:
        model: this rank's part.
        most: the most passes that were in flight on this stage.

    Raises:
        InputError: the plan does not fit the model or the world.
    """

    def __init__(self, config: DenseConfig, plan: ParallelPlan, weights: dict[str, Tensor], lr: float = 1e-3):
        plan.check(config, dist.get_world_size())
        self.config, self.plan, self.most = config, plan, 0
        grid = RankGrid({"tp": plan.tp, "dp": plan.dp, "pp": plan.pp})
        self.at = grid.coords(dist.get_rank())
        self.pipe = grid.group(dist.get_rank(), "pp")
        sizes = {"tp": plan.tp, "dp": plan.dp}
        self.groups = {name: grid.process_group(name) if size > 1 else None for name, size in sizes.items()}
        self.groups["ends"] = self._ends(grid)
        self.model = Decoder(config, plan, self.at, self.groups)
        self.order = orders(plan)[self.at["pp"]]
        self.flat, self.grad = self._flatten(weights)
        k = len(self.flat) // plan.dp if plan.zero else len(self.flat)
        self.own = slice(self.at["dp"] * k, self.at["dp"] * k + k) if plan.zero else slice(None)
        self.part = nn.Parameter(self.flat[self.own])  # a view: what the optimiser writes is written there
        self.optimizer = torch.optim.AdamW([self.part], lr=lr)

    def _ends(self, grid: RankGrid) -> Group:
        """The first and the last stage, which have the embedding both."""
        if self.plan.pp == 1:
            return None
        pairs = [[group[0], group[-1]] for group in grid.groups("pp")]
        made = [dist.new_group(pair) for pair in pairs]
        return next((group for pair, group in zip(pairs, made, strict=True) if dist.get_rank() in pair), None)

    def _flatten(self, weights: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """All parameters as views of one tensor, and their gradients of another, filled up for dp to divide them."""
        parameters = dict(self.model.named_parameters())
        n = sum(p.numel() for p in parameters.values())
        whole = -(-n // self.plan.dp) * self.plan.dp if self.plan.zero else n
        flat = torch.zeros(whole, dtype=DTYPES[self.config.width])
        grad, at = torch.zeros_like(flat), 0
        for name, p in parameters.items():
            flat[at : at + p.numel()] = self.model.cut(name, weights[name]).reshape(-1)
            p.data, p.grad = flat[at : at + p.numel()].view_as(p), grad[at : at + p.numel()].view_as(p)
            at += p.numel()
        return flat, grad

    def step(self, tokens: Int64[Tensor, "batch time_plus_1"]) -> float:
        """A step on the tokens of all ranks; this rank's share of the loss, which is 0 before the last stage."""
        self.grad.zero_()
        loss = self.accumulate(tokens)
        if self.groups["ends"] is not None:
            dist.all_reduce(self.model.embedding.grad, group=self.groups["ends"])
        if self.plan.dp == 1:
            self.part.grad = self.grad[self.own]
        elif self.plan.zero:
            self.part.grad = torch.empty_like(self.part.data)
            dist.reduce_scatter(self.part.grad, list(self.grad.chunk(self.plan.dp)), group=self.groups["dp"])
        else:
            dist.all_reduce(self.grad, group=self.groups["dp"])
            self.part.grad = self.grad
        self.optimizer.step()
        if self.plan.dp > 1 and self.plan.zero:
            dist.all_gather(list(self.flat.chunk(self.plan.dp)), self.part.data.clone(), group=self.groups["dp"])
        return loss

    def accumulate(self, tokens: Int64[Tensor, "batch time_plus_1"]) -> float:
        """All passes of a step, in the order of the stage; gradients are left where they belong."""
        plan, config = self.plan, self.config
        if tuple(tokens.shape) != (plan.batch, config.time + 1):
            raise InputError(
                f"tokens has shape {tuple(tokens.shape)} but must be ({plan.batch}, {config.time + 1}): "
                f"micro_batch * accum * dp rows of time + 1"
            )
        mine = tokens.unflatten(0, (plan.dp, plan.accum, plan.micro_batch))[self.at["dp"]]
        n, total = tokens[:, 1:].numel(), 0.0
        held: dict[tuple[int, int], tuple[Tensor | None, Tensor]] = {}
        sending: list[tuple[Any, Tensor]] = []
        for work in self.order:
            key = (work.chunk, work.micro)
            if not work.backward:
                x = self._received(work)
                y = self.model.embed(mine[work.micro, :, :-1]) if x is None else x.requires_grad_()
                y = self.model.chunk(work.chunk, y)
                if work.chunk == plan.chunks - 1:
                    y = self.model.loss(y, mine[work.micro, :, 1:]) / n
                    total += float(y.detach())
                held[key] = (x, y)
                self.most = max(self.most, len(held))
                sending += self._sent(work, y)
            else:
                x, y = held.pop(key)
                y.backward(self._received(work))
                sending += self._sent(work, None if x is None else x.grad)
        for pending, _ in sending:  # each with its tensor, which must not go before it is sent
            pending.wait()
        return total

    def _tag(self, work: Pass) -> int:
        """Of what a pass makes: no two messages of a step have the same."""
        return (work.backward * self.plan.chunks + work.chunk) * self.plan.accum + work.micro

    def _received(self, work: Pass) -> Tensor | None:
        before = work.before(self.plan.chunks)
        if before is None:
            return None
        x = torch.empty(self.plan.micro_batch, self.config.time, self.config.dim, dtype=self.flat.dtype)
        if self.plan.pp > 1:
            dist.recv(x, self.pipe[before.chunk % self.plan.pp], tag=self._tag(before))
        return x

    def _sent(self, work: Pass, x: Tensor | None) -> Iterator[tuple[Any, Tensor]]:
        after = work.after(self.plan.chunks)
        if after is not None and x is not None:
            x = x.detach().contiguous()
            yield dist.isend(x, self.pipe[after.chunk % self.plan.pp], tag=self._tag(work)), x

    def held(self) -> dict[str, int]:
        """Bytes that are there: of weights, of gradients, and of the optimiser's moments after a step."""
        moments = [t for state in self.optimizer.state.values() for t in state.values() if t.dim()]
        return {name: sum(t.numel() * t.element_size() for t in tensors) for name, tensors in (
            ("weights", [self.flat]), ("gradients", [self.grad]), ("states", moments)
        )}  # fmt: skip


def train_3d(
    config: DenseConfig, plan: ParallelPlan, steps: int = 5, seed: int = 0, lr: float = 1e-3
) -> dict[str, Any]:
    """Trains on drawn tokens, for `run_processes(train_3d, plan.world, config, plan)`.

    Returns:
        "loss" of each step, of all ranks; "weights" of this rank by name; "held", see `Trainer3D.held`; "most" passes
        in flight; "at", this rank's place.
    """
    trainer = Trainer3D(config, plan, drawn_weights(config, seed), lr)
    losses = []
    for tokens in drawn_tokens(config, plan.batch, steps, seed):
        total = torch.tensor(trainer.step(tokens), dtype=torch.float64)
        if plan.world > 1:
            if trainer.at["tp"]:
                total.zero_()  # ranks of tp have the same loss
            dist.all_reduce(total)
        losses.append(float(total))
    weights = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    return {"loss": losses, "weights": weights, "held": trainer.held(), "most": trainer.most, "at": trainer.at}


def drawn_tokens(config: DenseConfig, batch: int, steps: int, seed: int) -> Int64[Tensor, "steps batch time_plus_1"]:
    """Tokens of which the next is often the last but one, so that there is something to learn."""
    draw = torch.Generator().manual_seed(seed + 1)
    found = torch.randint(config.vocab, (steps, batch, config.time + 1), generator=draw)
    again = torch.rand(found.shape, generator=draw) < 0.7
    for t in range(2, config.time + 1):
        found[..., t] = torch.where(again[..., t], found[..., t - 2], found[..., t])
    return found
