"""MoSA: pieces that have nothing in common, one tensor that trains as E copies would, and an adapter in the end."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from workbench.beds import shifted_digits as bed
from workbench.errors import InputError
from workbench.lib.adapters.mosa import (
    Beside,
    BottleneckAdapter,
    MaskedAdamW,
    MoSA,
    MoSAAdapter,
    SparseExpertLinear,
    TwoPasses,
    consistency,
    mosa_loss,
    random_partition,
)
from workbench.lib.core.train import TrainConfig, train

SHARES = ("down", "up", None)
X = torch.randn(9, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
Y = torch.randn(9, 12, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def adapter(experts: int = 3, share: str | None = None, shake: bool = True, **options) -> MoSAAdapter:
    torch.manual_seed(0)
    made = MoSAAdapter(12, 5, experts, share, **{"dropout": 0.0} | options).double()
    for p in made.parameters() if shake else ():
        nn.init.normal_(p, std=0.5)
    return made


def draws(made: MoSAAdapter, n: int) -> list[tuple[int, int]]:
    torch.manual_seed(5)
    return [made.draw() for _ in range(n)]


# -- the pieces


@pytest.mark.parametrize("experts", [1, 2, 3, 4, 7])
@pytest.mark.parametrize(("mode", "axis"), [("all", None), ("row", 1), ("column", 0)])
def test_pieces_cover_everything_once_and_are_of_one_size(mode, axis, experts):
    part = random_partition((10, 9), experts, mode, torch.Generator().manual_seed(0))
    assert part.dtype == torch.uint8 and part.shape == (10, 9)
    of = torch.stack([part == e for e in range(experts)]).long()
    assert (of.sum(0) == 1).all()
    sizes = of.flatten(1).sum(1) if axis is None else of.sum(axis + 1)
    assert int(sizes.max() - sizes.min()) <= 1 and int(sizes.min()) > 0


def test_pieces_are_random_and_of_the_generator_alone():
    first, again = (random_partition((8, 8), 4, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, random_partition((8, 8), 4, generator=torch.Generator().manual_seed(4)))
    made = adapter(4)
    assert not torch.equal(made.down.part, made.up.part.T)


def test_one_tensor_and_a_byte_an_entry_hold_all_experts():
    one, four = (MoSAAdapter(64, 8, experts, share="down").state_dict() for experts in (1, 4))
    assert {name for name in four if four[name].shape != one[name].shape} == {"up.biases"}
    assert four["up.part"].element_size() == 1 and four["up.initial"].shape == ()
    whole = MoSAAdapter(64, 8, 4, share=None)
    assert whole.down.initial.shape == whole.down.weight.shape and whole.up.initial.shape == ()


# -- what an expert is


@pytest.mark.parametrize("share", SHARES)
def test_an_expert_has_trained_values_on_its_piece_and_initial_ones_elsewhere(share):
    made = adapter(share=share, shake=False)
    start = made.down.weight.detach().clone()
    for p in made.parameters():
        nn.init.normal_(p)
    for layer, initial in ((made.down, start), (made.up, torch.zeros_like(made.up.weight))):
        for e in range(layer.n_experts):
            weight, bias = layer.expert(e)
            assert torch.equal(weight[layer.part == e], layer.weight[layer.part == e])
            assert torch.equal(weight[layer.part != e], initial[layer.part != e])
            assert torch.equal(bias, layer.biases.view(layer.n_experts, -1)[e])
            (grad,) = torch.autograd.grad(weight.sin().sum(), layer.weight)
            assert grad[layer.part == e].all() and not grad[layer.part != e].any()


@pytest.mark.parametrize("share", SHARES)
def test_the_merged_one_is_the_mean_of_the_experts(share):
    made = adapter(share=share)
    for layer in (made.down, made.up):
        every = [layer.expert(e) for e in range(layer.n_experts)]
        for mean, parts in zip(layer.mean(), zip(*every, strict=True), strict=True):
            torch.testing.assert_close(mean, torch.stack(parts).mean(0))
        merged = layer.merge()
        assert type(merged) is nn.Linear and torch.equal(merged.weight, layer.mean()[0])
    torch.testing.assert_close(made.eval()(X), made.merge()(X))


def test_with_a_common_down_projection_it_says_the_mean_of_what_they_say_and_without_it_does_not():
    for share, same in (("down", True), ("up", False), (None, False)):
        made = adapter(share=share).eval()
        pairs = [(a, b) for a in range(made.down.n_experts) for b in range(made.up.n_experts)]
        mean = torch.stack([made(X, pair) for pair in pairs]).mean(0)
        assert torch.allclose(made(X), mean, atol=1e-12) == same
        assert same or float((made(X) - mean).detach().abs().max()) > 1e-3


def test_the_union_is_not_divided_and_one_expert_is_taken_by_its_number():
    layer = adapter().up
    assert torch.equal(layer.merge("union").weight, layer.weight)
    torch.testing.assert_close(layer.merge("union").weight, 3 * layer.merge().weight)  # it starts at 0
    for e in range(3):
        torch.testing.assert_close(layer.merge(e)(torch.ones(2, 5).double()), layer(torch.ones(2, 5).double(), e))


# -- the draws


def test_each_projection_of_each_block_draws_for_itself():
    made = adapter(4)
    drawn = torch.tensor(draws(made, 400))
    counts = torch.zeros(4, 4).index_put((drawn[:, 0], drawn[:, 1]), torch.tensor(1.0), accumulate=True)
    assert counts.min() > 0 and counts.max() < 60  # all pairs, about 25 times each
    model = nn.Sequential(*(Beside(nn.Identity(), adapter(4)) for _ in range(3))).train()
    for _ in range(20):
        model(X).sum().backward()
        reached = [(set(b.adapter.down.reached), set(b.adapter.up.reached)) for b in model]
        if len({str(pair) for pair in reached}) == 3:
            break
        MaskedAdamW(model).zero_grad()
    else:
        raise AssertionError("the blocks always draw alike")


def test_draws_are_of_the_generator_that_is_given():
    torch.manual_seed(0)
    drawn = []
    for seed in (1, 1, 2):
        made = MoSAAdapter(12, 5, 8, None, generator=torch.Generator().manual_seed(seed))
        before = torch.get_rng_state()
        drawn.append([made.draw() for _ in range(20)])
        assert torch.equal(torch.get_rng_state(), before)
    assert drawn[0] == drawn[1] != drawn[2]


def test_evaluation_draws_nothing_and_training_does():
    made = adapter(4)
    torch.manual_seed(0)
    assert torch.equal(made.eval()(X), made(X))
    made.train()
    assert any(not torch.equal(made(X), made(X)) for _ in range(5))


# -- training


def copies(made: MoSAAdapter, pairs: list[tuple[int, int]], lr: float, decay: float) -> tuple[list, list]:
    """Full matrices of every expert, trained by torch's AdamW with masked gradients; an expert not drawn has none."""
    state = {}
    for name, layer in (("down", made.down), ("up", made.up)):
        start = layer.weight.detach().clone() if layer.initial.ndim or layer.n_experts == 1 else None
        weights = [
            nn.Parameter(torch.zeros_like(layer.weight) if start is None else start.clone())
            for _ in range(layer.n_experts)
        ]
        biases = [nn.Parameter(torch.zeros_like(layer.biases[: layer.out_features])) for _ in weights]
        state[name] = weights, biases, layer.part, [w.detach().clone() for w in weights]
    norm = copy.deepcopy(made.norm)
    matrices = [w for name in state for w in state[name][0]]
    vectors = [*norm.parameters(), *(b for name in state for b in state[name][1])]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}], lr=lr
    )
    for pair in pairs:
        optimizer.zero_grad()
        hidden = norm(X)
        for name, e in zip(("down", "up"), pair, strict=True):
            weights, biases, part, _ = state[name]
            hidden = F.linear(hidden, weights[e], biases[e])
            hidden = F.gelu(hidden) if name == "down" else hidden
        (made.scale * hidden - Y).square().mean().backward()
        for weights, _, part, _ in state.values():
            for e, w in enumerate(weights):
                if w.grad is not None:
                    w.grad *= part == e
        optimizer.step()
        for weights, _, part, starts in state.values():
            for e, w in enumerate(weights):
                w.data = torch.where(part == e, w.data, starts[e])  # what is outside is not decayed
    return [state[name][0] for name in state], [state[name][1] for name in state]


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("share", SHARES)
def test_one_tensor_trains_as_copies_would(share, decay):
    made = adapter(3, share, shake=False).train()
    pairs = draws(made, 20)
    weights, biases = copies(made, pairs, 0.05, decay)
    optimizer = MaskedAdamW(made, 0.05, weight_decay=decay)
    for pair in pairs:
        optimizer.zero_grad()
        (made(X, pair) - Y).square().mean().backward()
        optimizer.step()
    for layer, ws, bs in zip((made.down, made.up), weights, biases, strict=True):
        for e in range(layer.n_experts):
            weight, bias = layer.expert(e)
            torch.testing.assert_close(weight, ws[e].detach(), atol=1e-10, rtol=1e-10)
            torch.testing.assert_close(bias, bs[e].detach(), atol=1e-10, rtol=1e-10)
    assert float(made.up.weight.detach().abs().max()) > 0.1


def test_what_is_not_drawn_keeps_values_moments_and_steps():
    made = adapter(3, "down", shake=False).train()
    optimizer = MaskedAdamW(made, 0.05, weight_decay=0.5)
    for pair in ((0, 0), (0, 1), (0, 2)):
        (made(X, pair) - Y).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    before = copy.deepcopy((made.up.weight.data, optimizer.state[made.up.weight]))
    for _ in range(2):
        (made(X, (0, 1)) - Y).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)  # zeros that would go on moving a piece by its momentum
    after, idle = (made.up.weight.data, optimizer.state[made.up.weight]), made.up.part != 1
    assert torch.equal(after[0][idle], before[0][idle]) and (after[0] != before[0])[~idle].all()
    for name in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(after[1][name][idle], before[1][name][idle])
    assert before[1]["step"].tolist() == [1, 1, 1] and after[1]["step"].tolist() == [1, 3, 1]
    (made(X, (0, 1)) - Y).square().mean().backward()
    optimizer.zero_grad()
    assert not made.up.reached  # of a step that was not made nothing is left


def test_two_passes_move_both_pieces_and_no_third():
    made = adapter(3, "down", shake=False).train()
    optimizer = MaskedAdamW(made, 0.05)
    ((made(X, (0, 0)) - Y).square().mean() + (made(X, (0, 2)) - Y).square().mean()).backward()
    with torch.no_grad():
        made(X, (0, 1))  # nobody learns from that
    optimizer.step()
    moved = made.up.weight.detach() != 0
    assert moved[made.up.part != 1].all() and not moved[made.up.part == 1].any()


@pytest.mark.parametrize("share", SHARES)
def test_one_expert_is_the_ordinary_adapter_to_the_last_bit(share):
    """With dropout, and torch's own AdamW."""
    ours = adapter(1, share, shake=False, dropout=0.3).float().train()
    plain = copy.deepcopy(ours).merge().train()
    groups = [[p for p in plain.parameters() if (p.ndim > 1) == large] for large in (True, False)]
    theirs = torch.optim.AdamW([{"params": groups[0], "weight_decay": 0.1}, {"params": groups[1]}], lr=0.02)
    theirs.param_groups[1]["weight_decay"] = 0.0
    mine = MaskedAdamW(ours, 0.02, weight_decay=0.1)
    for step in range(20):
        for model, optimizer in ((ours, mine), (plain, theirs)):
            torch.manual_seed(step)
            optimizer.zero_grad()
            (model(X.float()) - Y.float()).square().mean().backward()
            optimizer.step()
    assert torch.equal(ours.down.weight, plain.down.weight) and torch.equal(ours.up.weight, plain.up.weight)
    assert torch.equal(ours.down.biases, plain.down.bias) and torch.equal(ours.norm.weight, plain.norm.weight)
    assert torch.equal(ours.eval()(X.float()), plain.eval()(X.float())) and plain.up.weight.abs().max() > 0.1


def test_it_goes_on_from_a_state_dict_bit_for_bit():
    def stepped(made, optimizer, pairs):
        for pair in pairs:
            optimizer.zero_grad()
            (made(X, pair) - Y).square().mean().backward()
            optimizer.step()

    whole = adapter(3).train()
    pairs, optimizer = draws(whole, 12), MaskedAdamW(whole, 0.05)
    part = copy.deepcopy(whole)
    stepped(whole, optimizer, pairs)
    first = MaskedAdamW(part, 0.05)
    stepped(part, first, pairs[:5])
    rest, second = copy.deepcopy(part), None
    second = MaskedAdamW(rest, 0.05)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    stepped(rest, second, pairs[5:])
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), rest.parameters(), strict=True))


# -- consistency


def test_consistency_is_the_formula_symmetric_and_reaches_both():
    one, other = (torch.randn(6, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    p, q = one.softmax(-1), other.softmax(-1)
    both = ((q * (q / p).log()).sum(-1) + (p * (p / q).log()).sum(-1)).mean() / 2
    found = consistency(one, other)
    torch.testing.assert_close(found, both)
    assert torch.equal(found, consistency(other, one)) and found > 0 and consistency(one, one) == 0
    grads = torch.autograd.grad(found, (one, other))
    # of KL(sg t || s) by the logits of s: s - t, a half of the mean
    torch.testing.assert_close(grads[0], (p - q).detach() / 12)
    torch.testing.assert_close(grads[1], (q - p).detach() / 12)


def test_the_loss_is_of_two_passes_and_without_dropout_one_expert_agrees_with_itself():
    task = bed.task(0, images=40)
    batch = task.batch("train", 8, torch.Generator().manual_seed(0))
    for experts, agrees in ((1, True), (4, False)):
        torch.manual_seed(0)
        mosa = MoSA(bed.ResidualMLP(), bed.TARGETS, bed.WIDTH, 4, experts=experts, dropout=0.0)
        for p in mosa.optimizer(0.1).param_groups[0]["params"]:
            nn.init.normal_(p)
        mosa.model.train()
        loss, context = TwoPasses(task.data).loss(mosa.model, batch)
        assert (float(context.aux.detach()) == 0) == agrees
        if agrees:
            torch.testing.assert_close(loss, task.loss(mosa.model, batch)[0])
            double, _ = mosa_loss(mosa.model, batch.inputs, batch.targets, w_add=1.0)
            torch.testing.assert_close(double, 2 * loss)


# -- on a model


def test_on_a_model_it_starts_as_the_model_and_trains_what_it_put_there():
    torch.manual_seed(0)
    model = bed.ResidualMLP()
    images, before = torch.rand(5, 1, 8, 8), copy.deepcopy(model)
    mosa = MoSA(model, bed.TARGETS, bed.WIDTH, 4, experts=4)
    assert list(mosa.layers) == [f"blocks.{i}" for i in range(bed.BLOCKS)]
    assert torch.equal(model.train()(images), before(images))
    task = TwoPasses(bed.task(0, images=40).data)
    train(model, task, TrainConfig(3, 8, lr=0.1, eval_every=None), optimizer=mosa.optimizer(0.1))
    assert not torch.equal(model.eval()(images), before(images))
    for name, p in before.named_parameters():
        there = name if not name.startswith("blocks.") else name[:9] + "block." + name[9:]
        assert torch.equal(model.get_parameter(there), p)


def test_merged_it_is_as_large_and_as_fast_as_the_ordinary_adapter_and_says_the_same():
    made = {}
    for experts in (1, 4):
        torch.manual_seed(0)
        mosa = MoSA(bed.ResidualMLP(), bed.TARGETS, bed.WIDTH, 4, experts=experts, share=None)
        for p in mosa.optimizer(0.1).param_groups[0]["params"]:
            nn.init.normal_(p)
        images = torch.rand(5, 1, 8, 8)
        said = mosa.model.eval()(images)
        trained = mosa.report()
        model = mosa.merge()
        assert not any(isinstance(module, SparseExpertLinear) for module in model.modules())
        assert all(isinstance(layer, BottleneckAdapter) and not layer.training for layer in mosa.layers.values())
        torch.testing.assert_close(model(images), said)
        with FlopCounterMode(display=False) as counter:
            model(images)
        made[experts] = (
            mosa.report(),
            counter.get_total_flops(),
            {name: p.shape for name, p in model.named_parameters()},
        )
        assert trained["trained"] - made[experts][0]["trained"] == bed.BLOCKS * (experts - 1) * (bed.WIDTH + 4)
        with pytest.raises(InputError, match="merged already"):
            mosa.merge()
    assert made[1] == made[4]


def test_a_block_in_two_places_has_one_adapter():
    block = nn.Sequential(nn.Linear(6, 6))
    model = nn.Sequential(block, nn.Tanh(), block)
    mosa = MoSA(model, ["0", "2"], 6, 2, experts=2)
    assert model[0] is model[2] and list(mosa.layers) == ["0"] and isinstance(model[0], Beside)


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda: MoSAAdapter(4, 2, 2, scale=float("nan")), "dropout, scale are 0.1, nan but must be"),
        (lambda: MoSAAdapter(4, 2, 2, dropout=1.0), "dropout, scale are 1.0, 0.1"),
        (lambda: random_partition((2, 2), 5), "experts is 5 but must be between 1 and 4"),
        (lambda: random_partition((40, 40), 300), "experts is 300 but must be between 1 and 256"),
        (lambda: random_partition((3, 9), 4, "column"), "experts is 4 but must be between 1 and 3"),
        (lambda: random_partition((3, 9), 0), "experts is 0"),
        (lambda: random_partition((3, 9), 2, "rows"), "mode 'rows' is unknown; did you mean 'row'"),
        (lambda: MoSAAdapter(8, 2, 2, share="dwn"), "share 'dwn' is unknown; did you mean 'down'"),
        (lambda: MoSAAdapter(8, 0, 2), "bottleneck is 0"),
        (lambda: adapter(3)(X, (0, 3)), "expert is 3 but must be between 0 and 2"),
        (lambda: adapter(3)(X, (-1, 0)), "expert is -1"),
        (lambda: adapter(3).merge("sum"), "of 'sum' is unknown"),
        (lambda: MoSA(bed.ResidualMLP(), "block.*", 64, 4, experts=2), r"targets is 'block\.\*' but matches no module"),
        (
            lambda: MoSA(MoSA(bed.ResidualMLP(), "blocks.1", 64, 4, experts=2).model, "blocks.2", 64, 4, experts=2),
            r"model has adapters already, at blocks\.1",
        ),
    ],
)
def test_wrong_input_is_named(build, said):
    with pytest.raises(InputError, match=said):
        build()
