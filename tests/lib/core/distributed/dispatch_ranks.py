"""What the tests of the dispatcher and of gradients run in processes, each beside one process that has it all."""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from workbench.errors import InputError
from workbench.lib.core.capacity import Capacity
from workbench.lib.core.distributed.dispatcher import FORMS, TokenDispatcher
from workbench.lib.core.distributed.gradients import GradientSet, clip_gradients, reduce_gradients
from workbench.lib.core.distributed.grids import RankGrid
from workbench.lib.core.distributed.rows import all_to_all, gathered, sizes_of, summed
from workbench.lib.core.distributed.wire import counted
from workbench.lib.core.experts import GLUExperts
from workbench.lib.core.routing import Routing

E, D, H, K = 8, 6, 4, 2
ROWS = (3, 0, 5, 2)  # of each rank; one has none


def drawn() -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, experts and weights of all ranks; nobody asks for expert 3, and all for one of the first four."""
    draw, n = torch.Generator().manual_seed(0), sum(ROWS)
    x = torch.randn(n, D, generator=draw, dtype=torch.float64)
    near = torch.tensor([0, 1, 2])[torch.randint(3, (n, 1), generator=draw)]
    far = 4 + torch.randint(4, (n, 1), generator=draw)
    return x, torch.cat([near, far], 1), torch.rand(n, K, generator=draw, dtype=torch.float64)


def own_rows(whole: Tensor) -> Tensor:
    return whole.split(ROWS)[dist.get_rank()]


def whole_bank() -> GLUExperts:
    torch.manual_seed(0)
    return GLUExperts(E, D, H).double()


def local_bank(experts: list[int], part: int, parts: int) -> GLUExperts:
    """These experts, of their hidden units one part of `parts`."""
    bank, h = whole_bank(), H // parts
    units = torch.arange(part * h, (part + 1) * h)
    own = GLUExperts(len(experts), D, h).double()
    own.gate_up.data = bank.gate_up.data[experts][:, torch.cat([units, H + units])].contiguous()
    own.down.data = bank.down.data[experts][:, :, units].contiguous()
    return own


def gap(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max()) if a.numel() else 0.0


def layouts() -> list[dict]:
    """For every layout and form, the largest differences from one process, and what was counted."""
    found = []
    for sizes in ({"etp": 1, "ep": 4}, {"etp": 2, "ep": 2}, {"etp": 4, "ep": 1}):
        grid = RankGrid(sizes)
        at, groups = grid.coords(dist.get_rank()), {axis: grid.process_group(axis) for axis in sizes}
        per = E // sizes["ep"]
        mine = list(range(at["ep"] * per, (at["ep"] + 1) * per))
        for form in FORMS:
            found.append({"sizes": sizes, "form": form} | layout(groups, form, mine, at["etp"], sizes["etp"]))
    return found


def layout(groups: dict, form: str, mine: list[int], part: int, parts: int) -> dict:
    x, expert, weight = drawn()
    bank = whole_bank()
    whole = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
    y = bank(whole[0], Routing.fixed(expert, whole[1], E))
    y.square().sum().backward()
    own = [own_rows(part_).clone().requires_grad_() for part_ in (x, weight)]
    local = local_bank(mine, part, parts)
    dispatcher = TokenDispatcher(E, groups["ep"], groups["etp"], form=form)
    with counted() as traffic:
        sent = dispatcher.dispatch(own[0], Routing.fixed(own_rows(expert), own[1], E))
        out = dispatcher.combine(local(sent.rows, sent.routing), sent)
    out.square().sum().backward()
    h = H // parts
    units = torch.arange(part * h, (part + 1) * h)
    routed = torch.bincount(expert.flatten(), minlength=E)
    taken = own_rows(expert).flatten()
    return {
        "y": gap(out, own_rows(y)),
        "x.grad": gap(own[0].grad, own_rows(whole[0].grad)),
        "weight.grad": gap(own[1].grad, own_rows(whole[1].grad)),
        "gate_up.grad": gap(local.gate_up.grad, bank.gate_up.grad[mine][:, torch.cat([units, H + units])]),
        "down.grad": gap(local.down.grad, bank.down.grad[mine][:, :, units]),
        "counts": torch.equal(sent.counts, routed[mine]) and len(sent.rows) == int(routed[mine].sum()),
        "away": int((~torch.isin(taken, torch.tensor(mine))).sum()),
        "bytes": {kind: each.bytes for kind, each in traffic.of.items()},
    }


def conserves() -> dict:
    """Experts that do nothing give back what came, with weights that sum to one."""
    x, expert, _ = drawn()
    found = {}
    for form in FORMS:
        dispatcher = TokenDispatcher(E, dist.group.WORLD, form=form)
        halves = Routing.fixed(own_rows(expert), torch.full((ROWS[dist.get_rank()], K), 0.5, dtype=torch.float64), E)
        sent = dispatcher.dispatch(own_rows(x), halves)
        found[form] = torch.equal(dispatcher.combine(sent.rows, sent), own_rows(x))
        none = TokenDispatcher(E, dist.group.WORLD, form=form)
        nobody = Routing.fixed(expert[:0], torch.empty(0, K), E)
        sent = none.dispatch(x[:0].float(), nobody)
        found[form] &= none.combine(sent.rows, sent).shape == (0, D) and not int(sent.counts.sum())
        ragged = torch.zeros(ROWS[dist.get_rank()], E, dtype=torch.bool)
        ragged[1:, 5] = True  # a token without experts, others with one
        sent = dispatcher.dispatch(own_rows(x), Routing.ragged(ragged, torch.ones_like(ragged, dtype=torch.float64)))
        back = dispatcher.combine(sent.rows, sent)
        found[form] &= torch.equal(back[1:], own_rows(x)[1:]) and not bool(back[:1].any())
    return found


def drops() -> dict:
    """What is kept of one sequence, however it is split: (form, policy, scope, split) -> (pairs,) of the sequence."""
    n, found = 24, {}
    draw = torch.Generator().manual_seed(1)
    expert = torch.stack([torch.randperm(E, generator=draw)[:K] for _ in range(n)])
    expert[6:12, 0] = 0  # crowded in one place, so that places of a rank's own are other ones
    weight, x = torch.rand(n, K, generator=draw, dtype=torch.float64), torch.randn(n, D, generator=draw).double()
    world = dist.get_world_size()
    groups = {r: RankGrid.filled(world, {"sequence": r, "copy": None}).process_group("sequence") for r in (2, 4)}
    groups[1] = dist.new_subgroups_by_enumeration([[rank] for rank in range(world)])[0]
    for policy in ("probability", "position"):
        for scope in ("sequence", "local"):
            for split, group in groups.items():
                at = group.rank()
                rows = slice(at * n // split, (at + 1) * n // split)
                dispatcher = TokenDispatcher(
                    E, group, capacity=Capacity(1.0, policy), sequence=group if scope == "sequence" else None
                )
                sent = dispatcher.dispatch(x[rows], Routing.fixed(expert[rows], weight[rows], E))
                kept = gathered(sent.given.kept.long(), [n * K // split] * split, group)
                found[policy, scope, split] = (kept.tolist(), sizes_of(len(sent.rows), group))
    return found


def refusals() -> list[str]:
    world, said = dist.group.WORLD, []
    calls = [
        lambda: TokenDispatcher(6, world),
        lambda: TokenDispatcher(8, world, form="both"),
        lambda: TokenDispatcher(8, world, sequence=world),
        lambda: TokenDispatcher(8, world, sequence=world, capacity=Capacity(1.0, "random")),
        lambda: TokenDispatcher(8).dispatch(
            torch.ones(2, 3), Routing.fixed(torch.zeros(3, 1).long(), torch.ones(3, 1), 8)
        ),
        lambda: reduce_gradients([], ranks=0),
        lambda: clip_gradients([], 0.0),
    ]
    for call in calls:
        try:
            call()
        except InputError as error:
            said.append(str(error))
    return said


def adjoints() -> dict[str, float]:
    """<A x, g> - <x, A* g>, both summed over the ranks, and what a gradient sends beside what it should."""
    rank, world, group = dist.get_rank(), dist.get_world_size(), dist.group.WORLD
    draw = torch.Generator().manual_seed(rank)
    give = [(rank + to) % 3 for to in range(world)]
    take = [(rank + source) % 3 for source in range(world)]
    sizes = [2 + other for other in range(world)]
    cases = {
        "all_to_all": (sum(give), lambda x: all_to_all(x, give, take, group)),
        "gathered": (sizes[rank], lambda x: gathered(x, sizes, group)),
        "summed": (sum(sizes), lambda x: summed(x, sizes, group)),
    }
    found = {}
    for name, (n, call) in cases.items():
        x = torch.randn(n, 3, generator=draw, dtype=torch.float64, requires_grad=True)
        y = call(x)
        g = torch.randn(y.shape, generator=draw, dtype=torch.float64)
        (back,) = torch.autograd.grad(y, x, g)
        if name == "all_to_all":  # the same with the sizes swapped
            by_hand = torch.empty_like(x)
            dist.all_to_all_single(by_hand, g, give, take)
            assert torch.equal(back, by_hand)
        sides = torch.stack([(y * g).sum().detach(), (x * back).sum().detach()])
        dist.all_reduce(sides)
        found[name] = float((sides[0] - sides[1]).abs() / sides[0].abs())
    return found


def clips(max_norm: float) -> dict:
    """Norm and gradients of parameters that all copy, that pairs copy, or that are split, beside one process."""
    rank, grid = dist.get_rank(), RankGrid({"ep": 2, "edp": 2})
    ep, edp, at = grid.process_group("ep"), grid.process_group("edp"), grid.coords(dist.get_rank())
    draw = torch.Generator().manual_seed(0)
    dense, experts = (torch.randn(4, 5, generator=draw, dtype=torch.float64) for _ in range(2))  # gradient by rank
    own = [nn.Parameter(torch.zeros(5, dtype=torch.float64)), nn.Parameter(torch.zeros(5, dtype=torch.float64))]
    idle = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    own[0].grad, own[1].grad = dense[rank].clone(), experts[rank].clone()
    if rank == 0:
        idle.grad = torch.ones(2, dtype=torch.float64)
    sets = [GradientSet([own[0], idle], copies=dist.group.WORLD), GradientSet([own[1]], copies=edp, parts=ep)]
    reduce_gradients(sets, ranks=4)
    norm = clip_gradients(sets, max_norm)
    whole = [nn.Parameter(torch.zeros(5, dtype=torch.float64)) for _ in range(3)] + [nn.Parameter(idle.data.clone())]
    for p, g in zip(whole, [dense.sum(0), experts[[0, 2]].sum(0), experts[[1, 3]].sum(0), torch.ones(2)], strict=True):
        p.grad = g.double() / 4
    expected = nn.utils.clip_grad_norm_(whole, max_norm)
    mine = [whole[0], whole[1 + at["ep"]], whole[3]]
    gaps = [gap(p.grad, q.grad) for p, q in zip([own[0], own[1], idle], mine, strict=True)]
    return {"norm": abs(float(norm - expected)), "gaps": max(gaps), "clipped": bool(norm > max_norm)}


def everything() -> dict:
    """All of these in one start of the processes."""
    calls = (layouts, conserves, drops, refusals, adjoints)
    return {call.__name__: call() for call in calls} | {"clips": [clips(norm) for norm in (0.1, 100.0)]}
