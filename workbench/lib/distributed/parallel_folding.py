"""MoE Parallel Folding: attention and experts laid over the same ranks by two grids of their own (2504.14960).

    mesh = FoldedMesh(8, tp=2, cp=2, ep=8)      # attention 2 x 2 x 2 (tp, cp, dp), experts 1 x 8 x 1 (etp, ep, edp)
    model = FoldedDecoder(whole, mesh)          # on each of 8 processes: this rank's part of the same DecoderLM
    model.loss(tokens).backward()               # tokens of the whole batch; a rank's share of its mean loss
    model.reduce()
    norm = model.clip(1.0)

Tokens are rows: attention splits a batch over tp x cp x dp so that no two ranks have the same row (the residual stream
is split along the sequence, over cp and within that over tp), and the dispatcher takes the rows from wherever they are
to the experts of a grid etp x ep x edp. So experts need not be carved out of dp: 8 experts on 8 ranks go with tp = 8.
Before, tp held for experts too and ep had to divide dp: then that takes 64 ranks. Stages (pp) are the same in both.

What runs here is one stage (pp = 1); what a step takes, with more of them too, `folding_model` reckons.

Tensor letters: B batch, T time, t this rank's part of it, D model width, H expert hidden width, E experts.
"""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from workbench.catalogue import Method
from workbench.errors import InputError, unknown
from workbench.lib.core.attention import Attention
from workbench.lib.core.distributed.dispatcher import TokenDispatcher
from workbench.lib.core.distributed.gradients import GradientSet, clip_gradients, reduce_gradients
from workbench.lib.core.distributed.grids import RankGrid
from workbench.lib.core.distributed.rows import Group, gathered, ranks_of, summed
from workbench.lib.core.distributed.wire import counted
from workbench.lib.core.experts import GLUExperts
from workbench.lib.core.models import DecoderLM
from workbench.lib.core.moe import MoELayer
from workbench.lib.core.routers import TopKRouter
from workbench.lib.core.routing import Context, Routing
from workbench.lib.distributed.folding_layouts import Layout
from workbench.lib.distributed.folding_model import best, drawn

METHOD = Method(
    slug="parallel-folding",
    title="MoE Parallel Folding: Heterogeneous Parallelism Mappings for Efficient Large-Scale MoE Training",
    family="distributed",
    year=2025,
    paper="arXiv:2504.14960",
    claim="Separate rank grids for attention and experts on the same devices allow faster mappings without changing "
    "the result.",
    objects=("FoldedMesh", "FoldedDecoder", "trained", "simulate"),
    kind="simulator",
)

SCOPES = ("local", "sequence", "global")


class FoldedMesh:
    """Two grids over the same W ranks: attention tp x cp x dp x pp, experts etp x ep x edp x pp, the first fastest.

    Args:
        world: W.
        tp, cp, pp: tensor, context and pipeline parallel sizes of attention; dp takes the rest.
        etp, ep: tensor and expert parallel sizes of the experts; edp takes the rest.
        n_experts: E, which ep must divide; None: not checked.

    Raises:
        InputError: sizes that do not fit; the message has all those that do.
    """

    def __init__(
        self, world: int, tp: int = 1, cp: int = 1, pp: int = 1, etp: int = 1, ep: int = 1, n_experts: int | None = None
    ):
        for name, size in {"world": world, "tp": tp, "cp": cp, "pp": pp, "etp": etp, "ep": ep}.items():
            if isinstance(size, bool) or size < 1:
                raise InputError(f"{name} is {size!r} but must be a whole number of ranks, at least 1")
        self.layout = Layout.fitted(world, tp, cp, pp, etp, ep, n_experts)
        self.world = world
        self.attention = RankGrid({"tp": tp, "cp": cp, "dp": self.layout.dp, "pp": pp})
        self.experts = RankGrid({"etp": etp, "ep": ep, "edp": self.layout.edp, "pp": pp})
        self._groups: dict[str, Group] = {}

    def __repr__(self) -> str:
        return f"FoldedMesh({self.layout})"

    def connect(self) -> "FoldedMesh":
        """Makes the process groups; all ranks must do so together."""
        made: dict[str, Group] = {}
        for grid, names in (
            (self.attention, ("tp", "cp", "tp cp", "cp dp")),
            (self.experts, ("etp", "ep", "edp", "etp ep")),
        ):
            for name in names:
                groups = grid.groups(name.split())
                if str(groups) not in made:  # a group costs connections: none for one rank alone, nor the same twice
                    made[str(groups)] = grid.process_group(name.split()) if len(groups[0]) > 1 else None
                self._groups[name] = made[str(groups)]
        self._groups["all"] = (
            self.attention.process_group(("tp", "cp", "dp")) if self.layout.pp > 1 else dist.group.WORLD
        )
        return self

    def group(self, name: str) -> Group:
        """A process group by its axes, None for this rank alone: "tp", "cp", "tp cp" (who splits a sequence), "cp dp",
        "etp", "ep", "edp", "etp ep", or "all" of a stage."""
        if name not in self._groups:
            raise unknown("group", name, self._groups) if self._groups else InputError(f"{self} is not connected")
        return self._groups[name]


class FoldedDecoder(nn.Module):
    """This rank's part of a `DecoderLM` with `MoELayer`s of SwiGLU experts. It computes what the whole one does.

    The names of its parameters are those of the whole, and `part_of` cuts any state dict of the whole to this rank.

    Args:
        whole: the model, the same on all ranks; it is copied. Heads are split over tp, experts over ep, hidden units of
            each expert over etp. The capacity of its layers is kept.
        mesh: see `FoldedMesh`; it is connected here if it is not.
        form: of the `TokenDispatcher`.
        drop: whose places a capacity counts, "sequence" or "local": of the rows of all ranks that split a batch over
            tp x cp, or of this rank's own.
        balance: what the balance loss counts loads over: "global", all tokens, as the whole model does; "sequence", the
            tokens of the ranks that split a batch over tp x cp; "local", this rank's.

    Raises:
        InputError: a model, or a size, that cannot be split so.
    """

    def __init__(
        self,
        whole: DecoderLM,
        mesh: FoldedMesh,
        *,
        form: str = "alltoall",
        drop: str = "sequence",
        balance: str = "global",
    ):
        super().__init__()
        if mesh.layout.pp > 1:
            raise InputError(f"pp is {mesh.layout.pp} but must be 1: one stage runs here")
        if balance not in SCOPES:
            raise unknown("balance", balance, SCOPES)
        if drop not in SCOPES[:2]:
            raise unknown("drop", drop, SCOPES[:2])
        _check(whole, mesh.layout)
        self.mesh = mesh if mesh._groups else mesh.connect()
        rank = dist.get_rank()
        self.at = mesh.attention.coords(rank) | mesh.experts.coords(rank)
        self.chunk = self.at["tp"] + mesh.layout.tp * self.at["cp"]  # which part of the sequence
        self.seq_len = whole.seq_len
        self.balance = balance
        body = copy.deepcopy(whole)
        parameters = dict(whole.named_parameters())
        for name, value in self.part_of(parameters).items():
            owner, _, last = name.rpartition(".")
            own = nn.Parameter(value.detach().clone(), parameters[name].requires_grad)
            setattr(body.get_submodule(owner), last, own)
        self.embedding, self.position, self.blocks, self.norm = body.embedding, body.position, body.blocks, body.norm
        self.dispatchers = [
            TokenDispatcher(
                block.ffn.n_experts,
                mesh.group("ep"),
                mesh.group("etp"),
                form=form,
                capacity=block.ffn.capacity,
                sequence=mesh.group("tp cp") if drop == "sequence" and block.ffn.capacity is not None else None,
            )
            for block in self.blocks
        ]

    def part_of(self, whole: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """This rank's part of tensors by the names of the whole model: of its state dict, or of its gradients."""
        return {name: cut(value, self.mesh.layout, self.at) for name, value in whole.items() for cut in [_cut(name)]}

    def own(self, tokens: Int64[Tensor, "batch time"]) -> Int64[Tensor, "rows part"]:
        """This rank's part of a batch of T columns: rows by dp, columns by cp and tp."""
        m = self.mesh.layout
        columns = tokens.shape[1]
        if tokens.shape[0] % m.dp or columns % (m.cp * m.tp) or not tokens.numel() or columns > self.seq_len:
            raise InputError(
                f"tokens has shape {tuple(tokens.shape)} but must have rows in dp = {m.dp} equal parts and columns in "
                f"cp * tp = {m.cp * m.tp}, of which there are at most seq_len = {self.seq_len}"
            )
        rows, part = tokens.shape[0] // m.dp, tokens.shape[1] // (m.cp * m.tp)
        return tokens[self.at["dp"] * rows :][:rows, self.chunk * part :][:, :part]

    def forward(self, own: Int64[Tensor, "batch part"]) -> tuple[Float[Tensor, "part batch vocab"], Tensor]:
        """Logits of this rank's tokens, time first, and its share of the weighted balance losses."""
        part = own.shape[1]
        x = self.embedding(own.T)  # (t, B, D): rows of time, so that ranks are put together along the first axis
        if self.position is not None:
            x = x + self.position[self.chunk * part :][:part, None]
        aux = x.new_zeros(())
        for block, dispatcher in zip(self.blocks, self.dispatchers, strict=True):
            x = x + self._attend(block.attention, block.attention_norm(x))
            y, share = self._experts(block.ffn, dispatcher, block.ffn_norm(x).flatten(0, 1))
            x, aux = x + y.view_as(x), aux + share
        return self.norm(x) @ self.embedding.weight.T, aux

    def loss(self, tokens: Int64[Tensor, "batch time_plus_1"]) -> Float[Tensor, ""]:
        """This rank's share of the loss of a whole batch, mean cross-entropy of the next token and balance losses.

        The sum over all ranks is the loss of one process.
        """
        targets = self.own(tokens[:, 1:]).T
        logits, aux = self(self.own(tokens[:, :-1]))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum") / tokens[:, 1:].numel() + aux

    def gradient_sets(self) -> list[GradientSet]:
        """Parameters by which ranks copy them and which split them."""
        kinds: dict[str, list[nn.Parameter]] = {"all": [], "tp": [], "experts": []}
        for name, p in self.named_parameters():
            kinds["experts" if ".experts." in name else "tp" if ".attention." in name else "all"].append(p)
        group = self.mesh.group
        return [
            GradientSet(kinds["all"], copies=group("all")),  # norms and routers too: ranks of tp have other rows
            GradientSet(kinds["tp"], copies=group("cp dp"), parts=group("tp")),
            GradientSet(kinds["experts"], copies=group("edp"), parts=group("etp ep")),
        ]

    def reduce(self) -> None:
        """After `backward`: every rank gets the gradients of the whole model, of its part of the parameters."""
        reduce_gradients(self.gradient_sets())

    def clip(self, max_norm: float) -> Tensor:
        """Then: clips by the norm of the whole model's gradient, and returns it."""
        return clip_gradients(self.gradient_sets(), max_norm)

    def _attend(self, attention: Attention, x: Float[Tensor, "part batch dim"]) -> Float[Tensor, "part batch dim"]:
        """Attention of this rank's heads over its rows of cp, to the keys of all; summed over the heads of tp."""
        m, group = self.mesh.layout, self.mesh.group
        sizes = [len(x)] * m.tp
        rows = gathered(x, sizes, group("tp"))  # (T / cp, B, D)
        width = x.shape[-1] // attention.n_heads
        q, k, v = attention.qkv(rows).unflatten(-1, (3, -1, width)).unbind(2)
        k, v = gathered(torch.stack([k, v], 1), [len(rows)] * m.cp, group("cp")).unbind(1)
        place = torch.arange(len(k))
        seen = place <= (self.at["cp"] * len(rows) + torch.arange(len(rows)))[:, None]
        q, k, v = (part.permute(1, 2, 0, 3) for part in (q, k, v))  # (B, heads, time, width)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        return summed(attention.out(y.permute(2, 0, 1, 3).flatten(2)), sizes, group("tp"))

    def _experts(
        self, layer: MoELayer, dispatcher: TokenDispatcher, x: Float[Tensor, "n dim"]
    ) -> tuple[Tensor, Tensor]:
        routing = layer.router(x, None)
        sent = dispatcher.dispatch(x, routing, self.training)
        y = dispatcher.combine(layer.experts(sent.rows, sent.routing), sent)
        coefficient = layer.router.coefficients.get("lbl", 0.0)
        return y, coefficient * self.balance_share(routing)

    def balance_share(self, routing: Routing) -> Float[Tensor, ""]:
        """This rank's share of the balance loss E sum_e f_e P_e: loads f of the scope, probabilities of its own rows.

        The sum over the ranks of a scope is the scope's loss, and that over all ranks the mean over scopes.
        """
        m = self.mesh.layout
        group, scopes = {
            "local": (None, self.mesh.world),
            "sequence": (self.mesh.group("tp cp"), m.dp),
            "global": (self.mesh.group("all"), 1),
        }[self.balance]
        counts = routing.counts
        if ranks_of(group) > 1:
            dist.all_reduce(counts, group=group)
        share = counts.to(routing.probs.dtype) / counts.sum()
        tokens = routing.n_tokens * ranks_of(group)
        return routing.n_experts * (share * routing.probs.sum(0)).sum() / (tokens * scopes)


def _check(whole: DecoderLM, m: Layout) -> None:
    for layer, block in enumerate(whole.blocks):
        attention, ffn = block.attention, block.ffn
        if type(attention) is not Attention or not attention.causal or attention.rope:
            raise InputError(f"layer {layer} has {attention} but must have Attention(causal=True) without rope")
        if attention.n_heads % m.tp:
            raise InputError(f"tp is {m.tp} but must divide the {attention.n_heads} heads of layer {layer}")
        if not (isinstance(ffn, MoELayer) and isinstance(ffn.experts, GLUExperts) and ffn.shared is None):
            raise InputError(f"layer {layer} has {type(ffn).__name__} but must have an MoELayer of GLUExperts alone")
        if not isinstance(ffn.router, TopKRouter) or ffn.router.bias is not None:
            raise InputError(f"layer {layer} has {ffn.router} but must have a router of tokens without a bias")
        if set(ffn.router.coefficients) - {"lbl"}:
            raise InputError(f"layer {layer} has losses {list(ffn.router.coefficients)} but only 'lbl' is split here")
        if ffn.n_experts % m.ep:
            raise InputError(f"ep is {m.ep} but must divide the {ffn.n_experts} experts of layer {layer}")
        if ffn.experts.down.shape[2] % m.etp:
            raise InputError(
                f"etp is {m.etp} but must divide the {ffn.experts.down.shape[2]} hidden units of an expert"
            )


def _cut(name: str) -> Callable[[Tensor, Layout, Mapping[str, int]], Tensor]:
    """How a parameter of the whole is cut for a rank."""
    if name.endswith("attention.qkv.weight"):  # (3 D, D): of q, k and v each the rows of this rank's heads
        return lambda w, m, at: w.unflatten(0, (3, m.tp, -1))[:, at["tp"]].flatten(0, 1)
    if name.endswith("attention.out.weight"):  # (D, D): their columns
        return lambda w, m, at: w.unflatten(1, (m.tp, -1))[:, at["tp"]]
    if name.endswith("experts.gate_up"):  # (E, 2 H, D): of gate and up each this slice's units
        return lambda w, m, at: _mine(w, m, at).unflatten(1, (2, m.etp, -1))[:, :, at["etp"]].flatten(1, 2)
    if name.endswith("experts.down"):  # (E, D, H)
        return lambda w, m, at: _mine(w, m, at).unflatten(2, (m.etp, -1))[:, :, at["etp"]]
    return lambda w, m, at: w


def _mine(w: Tensor, m: Layout, at: Mapping[str, int]) -> Tensor:
    return w.unflatten(0, (m.ep, -1))[at["ep"]]


def trained(
    sizes: Mapping[str, int],
    whole: DecoderLM,
    batches: Int64[Tensor, "steps batch time_plus_1"],
    lr: float = 1e-3,
    max_norm: float = 1.0,
    **options: Any,
) -> dict[str, Any]:
    """Trains a folded model beside the whole one, for `run_processes(trained, world, sizes, whole, batches)`.

    Args:
        sizes: of the `FoldedMesh`, without the world.
        options: of the `FoldedDecoder`.

    Returns:
        "loss" of each step, of all ranks; "bytes" that this rank sent in the last one, by collective; "gaps", the
        largest differences from the whole model, trained here by itself: of losses, of gradients (before they are
        clipped), of their norms and of the parameters in the end.
    """
    model = FoldedDecoder(whole, FoldedMesh(dist.get_world_size(), **sizes), **options)
    optimizers = [torch.optim.AdamW(each.parameters(), lr=lr) for each in (model, whole)]
    gaps, losses = dict.fromkeys(("loss", "gradient", "norm", "parameter"), 0.0), []
    for tokens in batches:
        for optimizer in optimizers:
            optimizer.zero_grad()
        with counted() as traffic:
            share = model.loss(tokens)
            share.backward()
            model.reduce()
        total = share.detach().clone()
        dist.all_reduce(total)
        context = Context()
        alone = F.cross_entropy(whole(tokens[:, :-1], context).flatten(0, 1), tokens[:, 1:].flatten()) + context.aux
        alone.backward()
        there = model.part_of({name: p.grad.clone() for name, p in whole.named_parameters()})
        gaps["gradient"] = max(gaps["gradient"], _gap({name: p.grad for name, p in model.named_parameters()}, there))
        norms = model.clip(max_norm), nn.utils.clip_grad_norm_(whole.parameters(), max_norm)
        losses.append(float(total))
        gaps["loss"] = max(gaps["loss"], abs(losses[-1] - float(alone.detach())))
        gaps["norm"] = max(gaps["norm"], abs(float(norms[0] - norms[1])))
        for optimizer in optimizers:
            optimizer.step()
    gaps["parameter"] = _gap(dict(model.named_parameters()), model.part_of(dict(whole.named_parameters())))
    return {"loss": losses, "gaps": gaps, "bytes": {kind: sent.bytes for kind, sent in traffic.of.items()}}


def _gap(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    return max(float((a[name] - b[name]).detach().abs().max()) for name in a)


def simulate(seed: int) -> dict[str, Any]:
    """The fastest layout of a drawn model on drawn hardware, with folding and without; see `drawn`."""
    config, cluster, world = drawn(seed)
    found = {name: best(config, cluster, world, folded=name == "folded") for name in ("folded", "coupled")}
    return {"basis": cluster.basis, "model": config.name, "world": world} | {
        name: {"layout": str(report.layout), "step_seconds": report.seconds, "mfu": report.mfu}
        for name, report in found.items()
    }


def example() -> Callable[[int], dict[str, Any]]:
    return simulate
