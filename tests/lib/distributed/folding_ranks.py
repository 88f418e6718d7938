"""What the tests of folded models run in processes: several layouts of one world, each beside one process."""

import copy
from collections.abc import Mapping

import torch
import torch.distributed as dist

from workbench.errors import InputError
from workbench.lib.core.capacity import Capacity
from workbench.lib.core.distributed.wire import counted
from workbench.lib.core.experts import GLUExperts
from workbench.lib.core.models import DecoderLM
from workbench.lib.core.moe import MoELayer
from workbench.lib.core.routers import LinearRouter
from workbench.lib.core.routing import Context
from workbench.lib.distributed.parallel_folding import FoldedDecoder, FoldedMesh, trained

VOCAB, D, HEADS, E, HIDDEN, TIME, ROWS = 17, 16, 4, 8, 8, 16, 8


def whole(dtype: torch.dtype, capacity: Capacity | None = None, layers: int = 1) -> DecoderLM:
    torch.manual_seed(0)

    def layer(_: int) -> MoELayer:
        router = LinearRouter(D, E, top_k=2, coefficients={"lbl": 0.1})
        torch.nn.init.normal_(router.projection.weight, std=0.5)  # decided choices, and uneven ones
        return MoELayer(router, GLUExperts(E, D, HIDDEN), capacity_factor=capacity)

    return DecoderLM(VOCAB, D, layers, HEADS, layer, TIME).to(dtype)


def batches(steps: int) -> torch.Tensor:
    return torch.randint(VOCAB, (steps, ROWS, TIME + 1), generator=torch.Generator().manual_seed(1))


def compared(layouts: list[tuple[Mapping[str, int], dict]], dtype: torch.dtype, layers: int) -> list[dict]:
    """Three steps of `trained` for each layout with its options, with a max_norm that clips."""
    model, tokens = whole(dtype, layers=layers), batches(3)
    return [
        trained(sizes, copy.deepcopy(model), tokens, lr=0.01, max_norm=0.5, **options) for sizes, options in layouts
    ]


def dropped(layouts: list[Mapping[str, int]]) -> list[dict]:
    """With places for half the pairs: of the sequence as one process has them, of each rank's own not."""
    found = []
    for sizes in layouts:
        own = {}
        for drop in ("sequence", "local"):
            model = whole(torch.float64, Capacity(0.5))
            own[drop] = trained(sizes, model, batches(1), drop=drop)["gaps"]["gradient"]
        found.append(own)
    return found


def scopes(sizes: Mapping[str, int]) -> dict[str, float]:
    """Balance loss of a layer by its scope, and what one process has for the tokens of each scope."""
    model = whole(torch.float64)
    mesh = FoldedMesh(dist.get_world_size(), **sizes).connect()
    x = torch.randn(8 * mesh.world, D, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    router = model.blocks[0].ffn.router
    routing = router(x.split(8)[dist.get_rank()], None)
    found = {}
    for balance in ("local", "sequence", "global"):
        share = FoldedDecoder(model, mesh, balance=balance).balance_share(routing).detach()
        dist.all_reduce(share)
        parts = {"local": mesh.world, "sequence": mesh.layout.dp, "global": 1}[balance]
        alone = [router(part, None).losses["lbl"] for part in x.chunk(parts)]
        found[balance] = abs(float(share - sum(alone) / parts))
        found[f"{balance} value"] = float(share)
    return found


def wired(sizes: Mapping[str, int], form: str) -> dict:
    """Bytes of a forward and a backward pass of one layer beside what they should be, summed over the ranks."""
    model = whole(torch.float64)
    folded = FoldedDecoder(model, FoldedMesh(dist.get_world_size(), **sizes), form=form)
    m, away, pairs = folded.mesh.layout, 0, 0
    tokens = batches(1)[0]
    own = folded.dispatchers[0].dispatch

    def dispatch(x, routing, training):
        nonlocal away, pairs
        per = E // m.ep
        away, pairs = int((routing.expert // per != folded.at["ep"]).sum()), routing.expert.numel()
        return own(x, routing, training)

    folded.dispatchers[0].dispatch = dispatch
    with counted() as traffic:
        folded.loss(tokens).backward()
    sent = torch.tensor([traffic.of["all_to_all"].bytes, away, pairs], dtype=torch.float64) if traffic.of else None
    sent = torch.zeros(3, dtype=torch.float64) if sent is None else sent
    dist.all_reduce(sent)
    row, rows, world = 8 * D, ROWS * TIME, m.world
    there_and_back = 4  # there and back, and the same for the gradients
    experts = there_and_back * row * (float(sent[1]) + float(sent[2]) * (m.etp - 1))
    experts += 8 * (E // m.ep) * ((m.ep - 1) + m.ep * (m.etp - 1)) * world
    attention = there_and_back * row * rows * (m.tp - 1)  # gathered and summed, each with its adjoint
    keys = 2 * 2 * row * rows * (m.cp - 1)  # keys and values of this rank's heads: D / tp of T / cp
    return {"sent": float(sent[0]), "formula": experts + attention + keys}


def refused() -> list[str]:
    said = []
    for sizes, change in (
        ({"tp": 2}, lambda model: None),
        ({"ep": 2}, lambda model: None),
        ({"tp": 2}, lambda model: setattr(model.blocks[0].attention, "n_heads", 3)),
        (
            {"etp": 2},
            lambda model: setattr(model.blocks[0].ffn.experts, "down", torch.nn.Parameter(torch.ones(E, D, 7))),
        ),
        ({"pp": 2}, lambda model: None),
        ({"cp": 2}, lambda model: model.blocks[0].ffn.router.coefficients.update(z=0.1)),
        ({}, lambda model: setattr(model.blocks[0], "ffn", torch.nn.Identity())),
    ):
        model = whole(torch.float32)
        change(model)
        options = {"balance": "all"} if sizes == {"tp": 2} and not said else {"drop": "all"} if len(said) == 1 else {}
        try:
            FoldedDecoder(model, FoldedMesh(2, **sizes), **options)
        except InputError as error:
            said.append(str(error))
    folded = FoldedDecoder(whole(torch.float32), FoldedMesh(2, tp=2))
    for tokens in (torch.zeros(1, 3, dtype=torch.int64), torch.zeros(0, 4).long(), torch.zeros(1, TIME + 2).long()):
        try:
            folded.own(tokens)
        except InputError as error:
            said.append(str(error))
    return said


def evaluated() -> dict:
    """In evaluation mode with places of its own, beside the whole model; and what is frozen in both."""
    model = whole(torch.float64, Capacity(0.5, evaluation=8.0))
    model.blocks[0].ffn.experts.down.requires_grad_(False)
    folded, tokens = FoldedDecoder(model, FoldedMesh(2, tp=2, ep=2)), batches(1)[0]
    found = {"frozen": [name for name, p in folded.named_parameters() if not p.requires_grad]}
    for training in (True, False):
        context = Context()
        logits = model.train(training)(tokens[:, :-1], context)
        alone = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()) + context.aux
        total = folded.train(training).loss(tokens).detach()
        dist.all_reduce(total)
        found[training] = (float(total), float(alone.detach()))
    folded.loss(tokens).backward()
    folded.reduce()
    found["norm"] = float(folded.clip(1.0))
    return found


def eight() -> dict:
    """All that is asked of eight processes, in one start."""
    return {
        "double": compared(
            [
                ({"tp": 2, "cp": 2, "ep": 8}, {}),
                ({"tp": 2, "etp": 2, "ep": 2}, {"form": "allgather"}),
                ({"ep": 4}, {}),
                ({"tp": 4, "ep": 8}, {}),
                ({"tp": 2, "cp": 4, "etp": 2, "ep": 4}, {}),
            ],
            torch.float64,
            layers=1,
        ),
        "single": compared([({"tp": 2, "cp": 2, "ep": 8}, {}), ({"tp": 2, "etp": 2, "ep": 2}, {})], torch.float32, 2),
        "dropped": dropped([{"tp": 2, "cp": 4, "ep": 8}, {"tp": 4, "cp": 2, "etp": 2, "ep": 4}]),
        "scopes": scopes({"tp": 2, "cp": 2, "ep": 4}),
        "wired": [wired({"tp": 2, "cp": 2, "ep": 8}, "alltoall"), wired({"tp": 2, "etp": 2, "ep": 2}, "alltoall")],
    }
