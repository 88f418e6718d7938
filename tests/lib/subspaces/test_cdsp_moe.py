"""CDSP-MoE: experts as units of one feed-forward, the game with a lag, and what reaches the links."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from workbench.errors import InputError
from workbench.lib.core.routing import Context
from workbench.lib.core.train import TrainConfig
from workbench.lib.subspaces.cdsp_moe import (
    VARIANTS,
    CDSPMoELayer,
    GradientBuffer,
    SubspaceTopology,
    aligned_cosine,
    cdsp_layers,
    conflict_loss,
    two_speeds,
)

D, BASE, E, TASKS = 8, 36, 9, 3


def x_of(seed: int = 0, n: int = 40) -> Tensor:
    return torch.randn(n, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def layer_of(shake: float = 0.5, **options) -> CDSPMoELayer:
    """A layer in float64 whose links are spread, so that all territories differ in strength."""
    torch.manual_seed(0)
    layer = CDSPMoELayer(D, BASE, E, **{"n_tasks": TASKS} | options).double()
    with torch.no_grad():
        layer.topology.logits += shake * torch.randn(E, E, dtype=torch.float64)
        layer.topology.logits.fill_diagonal_(4.0)
    return layer


def tasks_of(n: int = 40) -> Context:
    return Context(domain=torch.arange(n) % TASKS)


def backward(layer: CDSPMoELayer, x: Tensor, target: Tensor | None = None) -> Context:
    """One forward and backward of the task's loss alone."""
    context = tasks_of(len(x))
    y = layer(x, context)
    layer.zero_grad()
    (y - (x_of(99, len(x)) if target is None else target)).square().mean().backward()
    return context


@torch.no_grad()
def written_out(layer: CDSPMoELayer, x: Tensor, task: Tensor | None) -> Tensor:
    """The card's formulas, token by token."""
    sigma, block = torch.sigmoid(layer.topology.logits), BASE // E
    router, rows = layer.router, []
    for n, row in enumerate(x):
        normed = F.layer_norm(row, (D,), router.norm.weight, router.norm.bias)
        vector = torch.zeros(16, dtype=x.dtype) if task is None else router.tasks.weight[task[n]]
        logits = router.projection.weight @ torch.cat([normed, vector]) + router.projection.bias
        chosen = sorted(range(E), key=lambda e: -float(logits[e]))[:2]
        weights = torch.softmax(logits[chosen], 0)
        y = torch.zeros(D, dtype=x.dtype)
        for weight, i in zip(weights, chosen, strict=True):
            influence = torch.stack([sigma[i, n // block] for n in range(BASE)])
            units = sorted(range(BASE), key=lambda n: (-float(influence[n]), n))[: layer.topology.rank]
            hidden = F.silu(layer.backbone.up.weight[units] @ row)
            y = y + weight * influence[units].mean() * (layer.backbone.down.weight[:, units] @ hidden)
        rows.append(y)
    return torch.stack(rows)


@pytest.mark.parametrize("rank", [None, 5, 36])
def test_the_layer_is_what_is_written(rank):
    layer = layer_of(rank=rank).eval()
    for task in (None, tasks_of().domain):
        torch.testing.assert_close(layer(x_of(), Context(domain=task)), written_out(layer, x_of(), task))


def test_with_all_units_and_full_strength_every_expert_is_the_dense_feed_forward():
    layer = layer_of(rank=BASE).eval()
    with torch.no_grad():
        layer.topology.logits.fill_(60.0)
    dense = layer.backbone(x_of())
    torch.testing.assert_close(layer(x_of()), dense)
    with torch.no_grad():
        nn.init.normal_(layer.router.projection.weight, std=3.0)
    torch.testing.assert_close(layer(x_of()), dense)  # whatever the router says


def test_with_its_own_territory_alone_it_is_a_mixture_of_separate_experts():
    layer = layer_of(rank=BASE // E).eval()
    with torch.no_grad():
        layer.topology.logits.fill_(-60.0).fill_diagonal_(60.0)
    routing, x = layer.router(x_of(), Context()), x_of()
    ups, downs = layer.backbone.up.weight.split(BASE // E), layer.backbone.down.weight.split(BASE // E, 1)
    expected = sum(routing.dense()[:, e, None] * (F.silu(x @ ups[e].T) @ downs[e].T) for e in range(E))
    torch.testing.assert_close(layer(x), expected)


# -- the cosine of what is shared


def test_aligned_cosine_by_hand():
    generator = torch.Generator().manual_seed(0)
    ga, gb = torch.randn(2, 3, D, generator=generator, dtype=torch.float64)
    one, other = torch.tensor([4, 1, 9]), torch.tensor([7, 2, 3])
    assert aligned_cosine(ga, one, gb, other) == 0  # nothing is shared
    assert aligned_cosine(ga, one, -ga, one).item() == pytest.approx(-1)
    order = torch.tensor([2, 0, 1])
    whole = aligned_cosine(ga, one, gb, one)
    torch.testing.assert_close(whole, F.cosine_similarity(ga.flatten(), gb.flatten(), dim=0))
    torch.testing.assert_close(aligned_cosine(ga, one, gb[order], one[order]), whole)
    one_shared = aligned_cosine(ga, one, gb, torch.tensor([7, 9, 3]))
    torch.testing.assert_close(one_shared, F.cosine_similarity(ga[2], gb[1], dim=0))
    assert aligned_cosine(torch.zeros_like(ga), one, gb, one) == 0


def test_the_buffer_measures_all_pairs_and_no_overlap_is_undefined():
    layer = layer_of()
    backward(layer, x_of())
    layer.buffer.turn()
    read, cosines = layer.buffer.read(), layer.buffer.cosines(BASE)
    pairs = defined = 0
    for i in range(E):
        for j in range(E):
            shared = i in read and j in read and set(read[i][1].tolist()) & set(read[j][1].tolist())
            pairs, defined = pairs + 1, defined + bool(shared)
            assert cosines[i, j].isnan() == (not shared)
            if shared:
                torch.testing.assert_close(cosines[i, j], aligned_cosine(*read[i], *read[j]))
    assert 0 < defined < pairs


# -- the lag


def test_the_loss_depends_on_the_step_before_and_on_now_only_by_who_is_active():
    layer = layer_of(p_task_drop=0.0, top_k=4)
    first = backward(layer, x_of(1))
    assert first.calls[layer][0].parts["conflict"] == 0
    losses = []
    for seed in (2, 3):
        other = copy.deepcopy(layer)
        assert bool((other.router(x_of(seed, 400), tasks_of(400)).counts > 0).all())  # all are active in either batch
        losses.append(backward(other, x_of(seed, 400)).calls[other][0].parts["conflict"])
    assert losses[0] == losses[1] > 0
    layer.buffer.turn()
    few = torch.zeros(E, dtype=torch.bool)
    few[:2] = True
    every = conflict_loss(layer.topology, layer.buffer, torch.ones(E, dtype=torch.bool))
    assert 0 <= conflict_loss(layer.topology, layer.buffer, few) < every
    torch.testing.assert_close(10 * every, losses[0])  # times its coefficient


def test_forwards_without_a_backward_read_the_same_and_add_up():
    layer = layer_of(p_task_drop=0.0)
    backward(layer, x_of(1))
    parts = []
    for seed in (2, 3):
        context = tasks_of()
        parts.append((layer(x_of(seed), context) - x_of(99)).square().mean())
        assert context.calls[layer][0].parts["conflict"] > 0
    layer.zero_grad()
    sum(parts).backward()
    both = layer.buffer.gradient.clone()
    apart = torch.zeros_like(both)
    for seed in (2, 3):
        other = layer_of(p_task_drop=0.0)
        backward(other, x_of(seed))
        apart += other.buffer.gradient
    torch.testing.assert_close(both, apart)


def test_captured_gradients_add_up_to_the_gradient_of_the_backbone():
    """Of every slot: the released code keeps that of the last top-K slot alone, and loses the rest."""
    layer = layer_of(top_k=3)
    backward(layer, x_of(1))
    total = torch.zeros(BASE, D, dtype=torch.float64)
    for e in range(E):
        total.index_add_(0, layer.buffer.units[e], layer.buffer.gradient[e])
    torch.testing.assert_close(total, layer.backbone.up.weight.grad)
    assert total.abs().sum() > 0


def test_evaluation_neither_captures_nor_forgets():
    layer = layer_of()
    backward(layer, x_of(1))
    before = copy.deepcopy(dict(layer.buffer.named_buffers()))
    layer.eval()
    backward(layer, x_of(2))
    for name, value in layer.buffer.named_buffers():
        assert torch.equal(value, before[name]), name


def test_a_shuffled_lag_has_the_same_gradients_of_other_experts():
    layer = layer_of()
    backward(layer, x_of(1))
    true = {i: layer.buffer.gradient[i].clone() for i in layer.buffer.seen.nonzero()[:, 0].tolist()}
    layer.buffer.turn(shuffle=True)
    read = layer.buffer.read()
    assert set(read) == set(true)
    source = {i: next(j for j in true if torch.equal(true[j], read[i][0])) for i in read}
    assert sorted(source.values()) == sorted(true) and all(i != j for i, j in source.items())


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_plays_the_same_game(reentrant):
    plain, stored = layer_of(p_task_drop=0.0), layer_of(p_task_drop=0.0)
    for step in range(3):
        for layer in (plain, stored):
            context, x = tasks_of(), x_of(step).requires_grad_()
            call = (lambda x, layer=layer, context=context: layer(x, context)) if layer is plain else None
            y = call(x) if call else checkpoint(layer, x, context, use_reentrant=reentrant)
            layer.zero_grad()
            ((y - x_of(99)).square().mean() + context.aux).backward()
        for (name, p), q in zip(plain.named_parameters(), stored.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, msg=name)
    torch.testing.assert_close(plain.buffer.gradient, stored.buffer.gradient)


def test_a_layer_that_is_saved_and_loaded_goes_on_with_the_same_game():
    layer, other = layer_of(), layer_of(shake=0.1)
    backward(layer, x_of(1))
    other.load_state_dict(layer.state_dict())
    found = []
    for each in (layer, other):
        torch.manual_seed(5)
        found.append(backward(each, x_of(2)).calls[each][0].parts["conflict"])
    assert found[0] == found[1] > 0


# -- what reaches what


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_conflict_reaches_the_links_alone_and_by_the_formula(variant):
    layer = layer_of(variant=variant, p_task_drop=0.0)
    with torch.no_grad():
        layer.topology.logits[0, 1:4] = -0.5  # below the cut-off of "code"
    backward(layer, x_of(1))
    context = tasks_of()
    layer(x_of(2), context)
    layer.zero_grad()
    context.calls[layer][0].parts["conflict"].backward()
    assert [name for name, p in layer.named_parameters() if p.grad is not None] == ["topology.logits"]
    conflict = (-layer.buffer.cosines(BASE)).clamp(min=0).nan_to_num(0).fill_diagonal_(0)
    sigma = layer.topology.strengths().detach()
    slope = (layer.topology.logits >= 1e-3).double() if variant == "code" else sigma * (1 - sigma)
    torch.testing.assert_close(layer.topology.logits.grad, 10 * slope * conflict)
    assert conflict[0, 1:4].sum() > 0 and conflict.sum() > 0


def test_the_task_reaches_the_links_by_the_strengths_alone():
    layer = layer_of().eval()
    layer(x_of()).square().sum().backward()
    assert layer.topology.logits.grad.abs().sum() > 0
    select = layer.topology.select

    def detached():
        units, strength = select()
        return units, strength.detach()

    layer.zero_grad()
    layer.topology.select = detached
    layer(x_of()).square().sum().backward()
    assert layer.topology.logits.grad is None
    assert layer.backbone.up.weight.grad.abs().sum() > 0


def test_regularisation_pulls_where_its_variant_says():
    for variant, sign in (("readme", 1), ("code", 1), ("ours", -1)):
        topology = SubspaceTopology(4, 16).double()
        with torch.no_grad():
            topology.logits.fill_(-5.0)  # links that are as good as cut
        (gradient,) = torch.autograd.grad(topology.regularisation(variant), topology.logits)
        # a step against the gradient: |A| smaller, so sigma(A) back towards 1/2; of "ours" further down
        assert bool((gradient * sign < 0).all()), variant
    strengths = torch.sigmoid(torch.tensor(-5.0, dtype=torch.float64))
    expected = 1e-4 * 5.0 + 1e-3 * strengths * (1 - strengths)
    torch.testing.assert_close(topology.regularisation("readme").detach(), expected)


# -- topology


def test_units_are_whole_territories_with_the_own_one():
    layer = layer_of()
    units, strength = layer.topology.select()
    block, roots = BASE // E, math.isqrt(E)
    for i, own in enumerate(units.tolist()):
        assert len(set(own)) == layer.topology.rank == roots * block
        territories = {n // block for n in own}
        assert len(territories) == roots and i in territories
        best = set(layer.topology.logits[i].topk(roots).indices.tolist())
        assert territories == best
    assert bool(((strength > 0) & (strength < 1)).all())
    overlap = layer.topology.overlap()
    assert torch.equal(overlap.diagonal(), torch.ones(E, dtype=torch.float64)) and torch.equal(overlap, overlap.T)


def test_ties_are_broken_by_the_number_of_the_unit():
    topology = SubspaceTopology(4, 16)
    with torch.no_grad():
        topology.logits.fill_(0.0)
    assert topology.select()[0].tolist() == [list(range(8))] * 4


def test_without_tasks_and_with_all_of_them_dropped_is_the_same():
    dropped, blind = layer_of(p_task_drop=1.0), layer_of(p_task_drop=0.0)
    assert torch.equal(dropped(x_of(), tasks_of()), blind(x_of(), Context()))
    assert torch.equal(dropped.eval()(x_of(), tasks_of()), blind.eval()(x_of(), tasks_of()))  # in training alone


def test_tasks_are_dropped_by_sample():
    layer = layer_of(p_task_drop=0.5)
    told = []
    layer.router.register_forward_pre_hook(lambda module, inputs: told.append(inputs[1].domain))
    layer(x_of(n=400).view(100, 4, D), Context(domain=torch.ones(400, dtype=torch.int64)))
    rows = told[0].view(100, 4)
    assert bool((rows == rows[:, :1]).all()) and 30 < int((rows[:, 0] < 0).sum()) < 70


def test_links_learn_faster_and_without_decay():
    layer = layer_of()
    optimizer = two_speeds(layer, TrainConfig(1, weight_decay=0.01))
    (links,) = [group for group in optimizer.param_groups if group.get("lr_scale") == 10.0]
    assert links["params"] == [layer.topology.logits] and links["weight_decay"] == 0
    every = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(every) == sorted(id(p) for p in layer.parameters())
    layer.topology.logits.requires_grad_(False)
    assert len(two_speeds(layer, TrainConfig(1)).param_groups) == 2
    assert list(cdsp_layers(nn.ModuleDict({"a": layer}))) == ["a"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"d_base": 35}, "d_base is 35 but must be divisible by n_experts = 9"),
        ({"rank": 37}, "rank is 37 but must be between 1 and d_base = 36"),
        ({"rank": 0}, "rank is 0"),
        ({"variant": "redme"}, "did you mean 'readme'"),
        ({"p_task_drop": 1.5}, "p_task_drop is 1.5"),
        ({"conflict": -1.0}, "conflict is -1.0"),
        ({"top_k": 10}, "top_k is 10"),
        ({"n_tasks": -1}, "n_tasks and d_task are -1"),
        ({"balance": {"cv": 1.0}}, "balance loss 'cv' is unknown"),
    ],
)
def test_bad_options_are_refused(options, said):
    with pytest.raises(InputError, match=said):
        CDSPMoELayer(**{"d_model": D, "d_base": BASE, "n_experts": E} | options)


@pytest.mark.parametrize("task", [torch.full((40,), TASKS), torch.zeros(39, dtype=torch.int64), torch.full((40,), -2)])
def test_tasks_that_are_none_are_refused(task):
    for training in (True, False):
        with pytest.raises(InputError, match="must hold a task from 0 to 2, or -1"):
            layer_of(p_task_drop=0.0).train(training)(x_of(), Context(domain=task))


def test_a_buffer_reads_what_was_captured_and_is_cleared():
    buffer = GradientBuffer(3, 2, D)
    doubled = torch.randn(3, 2, D, requires_grad=True) * 1
    buffer.hook(doubled, torch.tensor([[0, 1], [2, 3], [5, 1]]), torch.tensor([False, False, True]))
    (doubled[2] * 3).sum().backward()
    assert buffer.read() == {}
    buffer.turn()
    assert not buffer.seen.any() and not buffer.gradient.any()
    ((expert, (gradient, units)),) = buffer.read().items()
    assert expert == 2 and units.tolist() == [5, 1] and torch.equal(gradient, torch.full((2, D), 3.0))
    buffer.turn()
    assert set(buffer.read()) == {2}  # nothing was captured since
