"""STABLE-RPS: every number as many weights, the same from any scale of the array, the dense network at m = n."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from workbench.errors import InputError
from workbench.kernels.shared_store.reference import negative
from workbench.lib.core.checkpoint import load, save
from workbench.lib.sharing.stable_rps import (
    Compressed,
    GradScaler,
    HashMapper,
    RandomFoldMapper,
    RoastTileMapper,
    SharedConv2d,
    SharedEmbedding,
    SharedLinear,
    SharedParameterStore,
    compress_model,
    expand,
)

MAPPERS = (RandomFoldMapper(), HashMapper(), RoastTileMapper(2, 3))
WIDTHS = (8, 16, 4)  # 192 weights


def perceptron() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4)).double()


def compressed(compression=0.25, mapper=None, std=0.05, seed=5, **options) -> Compressed:
    """The same numbers, in units of std, for every std."""
    made = compress_model(perceptron(), compression, mapper, std=std, seed=seed, **options)
    with torch.no_grad():
        unit = torch.randn(made.store.m, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        made.store.weight.copy_(unit * std)
    return made


def fit(model: nn.Module, form: str | None = None, make=None, steps: int = 25, division=None) -> nn.Module:
    generator = torch.Generator().manual_seed(3)
    x, y = (torch.randn(32, width, generator=generator, dtype=torch.float64) for width in (8, 4))
    make = make or (lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9))
    optimizer = make(model.parameters())
    if form is not None:
        GradScaler(model, form).attach(optimizer)
    for _ in range(steps):
        optimizer.zero_grad()
        F.mse_loss(model(x), y).backward()
        if division is not None:
            division(model)
        optimizer.step()
    return model


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.flatten() for p in (model[0].weight, model[2].weight)]).detach()


@pytest.mark.parametrize("m", [1, 2, 48, 50, 190, 191, 192])
@pytest.mark.parametrize("seed", [0, -7, 2**62])
def test_every_number_has_as_many_weights_rounded_up_or_down(m, seed):
    store = SharedParameterStore(m, seed=seed)
    store.register((16, 8), 1.0)
    store.register((4, 16), 2.0)
    loads = store.finalize().loads()
    assert loads.sum() == 192 and set(loads.tolist()) <= {192 // m, -(-192 // m)}


def test_other_mappers_are_not_so_even_and_tiles_are_runs():
    """Hashed loads are Poisson. Every tile of a matrix reads a run of the array, the cut ones at the edge too."""
    store = SharedParameterStore(100, seed=1, mapper=HashMapper())
    store.register((100, 100), 1.0)
    loads = store.finalize().loads().double()
    assert loads.mean() == 100 and 70 < loads.var() < 140
    index = RoastTileMapper(4, 3).index(torch.tensor(9), 17, (10, 7), 20)
    assert index.min() >= 0 and index.max() < 20
    for row in range(0, 10, 4):
        for column in range(0, 7, 3):
            tile = index[row : row + 4, column : column + 3]
            expected = torch.arange(4)[: len(tile), None] * 3 + torch.arange(3)[: tile.shape[1]]
            assert torch.equal(tile - tile[0, 0], expected)
    starts = RoastTileMapper(1, 2).index(torch.tensor(9), 0, (500, 2), 4)[:, 0]
    assert set(starts.tolist()) == {0, 1, 2}  # the last number of the array is reached


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_with_as_many_numbers_as_weights_it_is_the_dense_network(decay):
    """With momentum, and with weight decay, from the same weights."""

    def make(params):
        return torch.optim.SGD(params, lr=0.05, momentum=0.9, weight_decay=decay)

    shared = compressed(1)
    dense = fit(expand(shared.model), make=make)
    torch.testing.assert_close(weights(fit(shared.model, "mean", make)), weights(dense), atol=1e-12, rtol=0)


@pytest.mark.parametrize("form", ["mean", "squares"])
@pytest.mark.parametrize("mapper", MAPPERS, ids=str)
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_the_scale_of_the_array_does_not_matter(form, mapper, decay):
    def make(params):
        return torch.optim.SGD(params, lr=0.05, momentum=0.9, weight_decay=decay)

    small, large = (weights(fit(compressed(0.25, mapper, std).model, form, make)) for std in (0.01, 1.0))
    torch.testing.assert_close(small, large, atol=1e-12, rtol=0)


def by_first_power(model: nn.Module) -> None:
    """A scaling of degree one, as v2 to v4 of the code are."""
    store = next(m for m in model.modules() if isinstance(m, SharedParameterStore))
    store.weight.grad /= store.scaling("squares").sqrt()


def decay_in_the_loss(model: nn.Module) -> None:
    store = next(m for m in model.modules() if isinstance(m, SharedParameterStore))
    store.weight.grad += 0.1 * store.weight.detach()


@pytest.mark.parametrize(("form", "division"), [(None, None), (None, by_first_power), ("mean", decay_in_the_loss)])
def test_without_the_scaling_or_with_another_it_does(form, division):
    small, large = (weights(fit(compressed(std=std).model, form, division=division, steps=5)) for std in (0.2, 1.0))
    assert (small - large).abs().max() > 1e-3


def test_weights_of_a_number_move_by_the_mean_of_their_gradients():
    shared = compressed(seed=6)
    before, dense = weights(shared.model), expand(shared.model)
    fit(shared.model, "squares", lambda params: torch.optim.SGD(params, lr=1.0), steps=1)
    fit(dense, None, lambda params: torch.optim.SGD(params, lr=0.0), steps=1)
    grads = torch.cat([dense[i].weight.grad.flatten() for i in (0, 2)])
    index = torch.cat([shared.model[i].shared.index().flatten() for i in (0, 2)])
    scale = torch.cat([shared.model[i].shared.scale.expand(shared.model[i].shared.numel) for i in (0, 2)])
    sign = before.sign() * shared.store.weight.detach()[index].sign()
    # least squares: the step in M is the mean of the steps in g theta / lambda, each weighed by lambda squared
    sums = torch.zeros(48).double().index_add_(0, index, sign * scale * grads)
    squares = torch.zeros(48).double().index_add_(0, index, scale**2)
    # M has moved already, so its signs are of before by the weights alone
    torch.testing.assert_close((weights(shared.model) - before).abs(), (scale * (sums / squares)[index]).abs())


def test_adam_does_not_see_the_scaling_but_the_scale():
    def make(params):
        return torch.optim.Adam(params, lr=1e-3, eps=1e-30)

    scaled, plain = (weights(fit(compressed().model, form, make)) for form in ("mean", None))
    torch.testing.assert_close(scaled, plain, atol=1e-10, rtol=0)
    other = weights(fit(compressed(std=0.5).model, "mean", make))
    assert (other - plain).abs().max() > 1e-3


@pytest.mark.parametrize("mapper", MAPPERS, ids=str)
def test_gradients_of_the_array_are_folded_from_those_of_the_weights(mapper):
    shared = compressed(mapper=mapper)
    dense = expand(shared.model)
    for model in (shared.model, dense):
        fit(model, None, lambda params: torch.optim.SGD(params, lr=0.0), steps=1)
    folded = torch.zeros_like(shared.store.weight)
    for ours, theirs in zip(shared.model, dense, strict=True):
        if isinstance(ours, SharedLinear):
            made = ours.shared
            (row,) = torch.autograd.grad(made(), shared.store.weight, theirs.weight.grad)
            folded += row
            signs = torch.autograd.functional.jacobian(made.of, torch.ones(48).double()).flatten(0, 1)
            torch.testing.assert_close(row, signs.T @ theirs.weight.grad.flatten())
            assert (signs != 0).sum(1).eq(1).all() and torch.equal(signs.abs().amax(1), made.scale.expand(len(signs)))
    torch.testing.assert_close(shared.store.weight.grad, folded)
    assert torch.autograd.gradcheck(shared.model[0].shared.of, torch.randn(48).double().requires_grad_())


@pytest.mark.parametrize("mapper", MAPPERS, ids=str)
def test_layers_are_those_with_the_weights_they_make(mapper):
    torch.manual_seed(0)
    model = nn.ModuleDict(
        {
            "embed": nn.Embedding(11, 6, padding_idx=3),
            "conv": nn.Conv2d(4, 6, 3, padding=1, groups=2, stride=2, padding_mode="circular"),
            "linear": nn.Linear(6, 5, bias=False),
        }
    )
    nn.init.normal_(model["embed"].weight)
    compress_model(model, 0.3, mapper)
    assert [type(layer) for layer in model.values()] == [SharedEmbedding, SharedConv2d, SharedLinear]
    dense = expand(model)
    ids, images, x = torch.randint(11, (2, 9)), torch.randn(2, 4, 7, 7), torch.randn(3, 1, 6)
    ids[0, 0] = 3
    for name, given in (("embed", ids), ("conv", images), ("linear", x)):
        expected = dense[name](given)
        if name == "embed":  # a dense table keeps a row of zeros there
            expected = expected.masked_fill((ids == 3)[..., None], 0.0)
        torch.testing.assert_close(model[name](given), expected)
        assert type(dense[name]) in (nn.Embedding, nn.Conv2d, nn.Linear) and dense[name].weight.is_leaf


def test_what_is_stored_does_not_depend_on_the_width():
    stored = set()
    for width in (50, 100):
        store = SharedParameterStore(30)
        model = nn.Sequential(SharedLinear(store, 4, width, bias=False), SharedLinear(store, width, 4, bias=False))
        store.finalize()
        stored.add(sum(p.numel() for p in model.parameters()))
        assert model[0].weight.shape == (width, 4) and "weight" not in dict(model[0].named_parameters(recurse=False))
    assert stored == {30}


def test_the_report_counts_what_is_kept_and_what_is_computed():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8 * 4, 10), nn.Linear(10, 2))
    made = compress_model(model, 0.1, min_size=30, skip="3")
    found = made.report(torch.randn(2, 3, 4, 4))
    assert found["weights"] == 216 and found["stored"] == 21 and found["layers"] == 1
    assert made.shared == {"0": (8, 3, 3, 3)}
    assert found["left_out"] == {"3": "skipped", "4": "20 numbers, fewer than 30"}
    total = 216 + 8 + 16 + 330 + 22
    assert found["parameters"] == {"before": total, "after": total - 216 + 21}
    dense = 2 * 2 * (4 * 216 + 320 + 20)
    assert found["flops"] == {"before": dense, "after": dense + 216}
    assert model[1].training  # as it was


@pytest.mark.parametrize("mapper", [RandomFoldMapper(), HashMapper()], ids=str)
def test_sketches_are_unbiased(mapper):
    """<theta, x> by way of 10 numbers instead of 40, over 10,000 draws, with the variance that collisions give.

    A draw is 40 weights of one seed that no other draw has.
    """
    theta, x = (torch.randn(40, generator=torch.Generator().manual_seed(i)).double() for i in (0, 1))
    m, draws, seed = 10, 10_000, torch.tensor(3)
    index = mapper.index(seed, 0, (draws, 40), m)
    sign = 1 - 2 * negative(seed, 0, draws * 40).view(draws, 40).double()
    memory = torch.zeros(draws, m).double().scatter_add_(1, index, sign * theta)
    found = (memory.gather(1, index) * sign) @ x
    meet = (torch.ones(40, 40) - torch.eye(40)).double()
    if isinstance(mapper, RandomFoldMapper):  # weights of one partition never meet
        part = torch.arange(40) // m
        meet *= part[:, None] != part
    variance = float((meet * (torch.outer(theta**2, x**2) + torch.outer(theta * x, theta * x))).sum()) / m
    assert abs(found.mean() - theta @ x) < 3 * math.sqrt(variance / draws)
    assert found.var() == pytest.approx(variance, rel=0.06)


def test_tied_weights_stay_tied_and_count_once():
    torch.manual_seed(0)
    model = nn.ModuleDict({"embed": nn.Embedding(12, 8), "mix": nn.Linear(8, 8), "head": nn.Linear(8, 12, bias=False)})
    model["head"].weight = model["embed"].weight
    made = compress_model(model, 0.5)
    assert made.report()["weights"] == 12 * 8 + 64
    assert model["head"].shared is model["embed"].shared
    dense = expand(model)
    assert dense["head"].weight is dense["embed"].weight and torch.equal(dense["head"].weight, model["embed"].weight)


def test_a_layer_in_two_places_is_one():
    layer = nn.Linear(4, 4)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    assert compress_model(model, 0.5).report()["weights"] == 16
    assert model[0] is model[2] and isinstance(model[2], SharedLinear)
    single = nn.Linear(4, 4)
    assert compress_model(single, 0.5).model is single and single(torch.randn(4)).shape == (4,)


@pytest.mark.parametrize("mapper", MAPPERS, ids=str)
def test_a_state_dict_has_all_of_it(mapper):
    """Seed and scales too: another draw takes them on, also where its places were made already."""
    first, second = compressed(mapper=mapper), compress_model(perceptron(), 0.25, mapper, std=0.3, seed=99)
    x = torch.randn(3, 8).double()
    scaler = GradScaler(second.model)
    assert not torch.equal(second.model(x), first.model(x))
    before = scaler.gamma(second.store)
    assert scaler.gamma(second.store) is before
    second.model.load_state_dict(first.model.state_dict())
    assert torch.equal(second.model(x), first.model(x))
    assert torch.equal(scaler.gamma(second.store), first.store.scaling())
    assert not torch.equal(scaler.gamma(second.store), before)
    other = copy.deepcopy(first.model)
    assert torch.equal(other(x), first.model(x)) and other[0].shared.store is other[2].shared.store
    assert other[0].shared.store is not first.store


def test_training_goes_on_from_a_checkpoint_bit_for_bit(tmp_path):
    def start():
        model = compressed().model
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        GradScaler(model).attach(optimizer)
        return model, optimizer

    def go(model, optimizer, steps):
        for step in steps:
            x = torch.randn(16, 8, generator=torch.Generator().manual_seed(step)).double()
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()

    whole, part, rest = start(), start(), start()
    go(*whole, range(8))
    go(*part, range(4))
    save(tmp_path, 4, *part)
    assert load(tmp_path, *rest).step == 4
    go(*rest, range(4, 8))
    for name, value in whole[0].state_dict().items():
        assert torch.equal(value, rest[0].state_dict()[name]), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_model_of_another_type(dtype):
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    compress_model(model, 0.2).model.to(dtype)
    y = model(torch.randn(5, 6, dtype=dtype))
    y.sum().backward()
    assert y.dtype == model[0].weight.dtype == model[0].shared.store.weight.grad.dtype == dtype
    GradScaler(model).apply_()


def test_what_is_watched_is_the_matrix():
    model = compressed().model
    ((name, parameter, pick),) = model[0].made_matrices()
    assert (name, parameter) == ("weight", model[0].shared.store.weight)
    assert torch.equal(pick(parameter), model[0].weight)


def test_a_scaled_step_with_a_closure_is_refused():
    model = compressed().model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = GradScaler(model).attach(optimizer)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for call in (lambda: optimizer.step(lambda: 0.0), lambda: optimizer.step(closure=lambda: 0.0)):
        with pytest.raises(InputError, match="closure is given, and makes gradients after the scaling"):
            call()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    handle.remove()
    optimizer.step(lambda: 0.0)


def tied_to(other: nn.Module) -> nn.Module:
    model = nn.ModuleDict({"embed": nn.Embedding(12, 8), "other": other})
    other.weight = model["embed"].weight
    return model


def test_wrong_input_is_named():
    frozen = nn.Linear(3, 3).requires_grad_(False)
    done = compressed().model
    store = SharedParameterStore(3)
    store.register((2, 2), 1.0)
    ready = SharedParameterStore(3)
    ready.register((2, 2), 1.0)
    ready.finalize()
    zero = nn.Linear(3, 3)
    nn.init.zeros_(zero.weight)
    for call, message in [
        (lambda: compress_model(perceptron(), 0.001), r"compression is 0.001, which leaves 0.192 of 192 numbers"),
        (lambda: compress_model(perceptron(), 1.5), "compression is 1.5 but must be above 0 and at most 1"),
        (lambda: compress_model(perceptron(), 0.0), "compression is 0.0 but must be above 0 and at most 1"),
        (lambda: compress_model(perceptron(), math.nan), "compression is nan but must be above 0"),
        (lambda: compress_model(perceptron(), 0.5, skip="head"), "skip 'head' is unknown.*Allowed: 0, 2"),
        (lambda: compress_model(perceptron(), 0.5, skip="*"), r"no layer to share \(0: skipped; 2: skipped\)"),
        (lambda: compress_model(perceptron(), 0.5, min_size=1000), "0: 128 numbers, fewer than 1000"),
        (lambda: compress_model(nn.ReLU(), 0.5), "no layer to share"),
        (lambda: compress_model(frozen, 0.5), "frozen"),
        (lambda: compress_model(zero, 0.5), "sigma is 0.0 but must be above 0"),
        (lambda: compress_model(done, 0.5), "has shared weights already"),
        (lambda: compress_model(tied_to(nn.Bilinear(8, 1, 12)), 0.5), "'embed' is tied to 'other.weight'"),
        (lambda: compress_model(tied_to(nn.Linear(8, 12)), 0.5, skip="other"), "'embed' is tied to 'other.weight'"),
        (lambda: compress_model(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).double()), 0.5), "must be of one type"),
        (lambda: compress_model(perceptron(), 0.1, RoastTileMapper(8, 8)), "m is 19 but must be at least the 64"),
        (lambda: compress_model(perceptron(), 0.5, std=0.0), "std is 0.0 but must be above 0"),
        (lambda: compress_model(perceptron(), 0.5, seed=2**63), "seed is 9223372036854775808 but must be"),
        (lambda: SharedParameterStore(0), "m is 0 but must be at least 1"),
        (lambda: RoastTileMapper(0, 4), "rows, columns are 0, 4 but must be at least 1"),
        (lambda: ready.register((2,), 1.0), r"shape \(2,\) cannot be registered: the store is finalized with 4"),
        (lambda: SharedParameterStore(9).finalize(), "m is 9 but must be at most the 0 weights"),
        (lambda: store.register((2, 0), 1.0), r"shape is \(2, 0\) but must have at least one number"),
        (lambda: store.weights[0](), "the store is not finalized"),
        (lambda: ready.weights[0].of(torch.zeros(4)), r"has shape \(4,\) but must have \(3,\)"),
        (lambda: ready.scaling("v2"), "form 'v2' is unknown"),
        (lambda: GradScaler(done, "v2"), "form 'v2' is unknown"),
        (lambda: GradScaler(perceptron()), "without a SharedParameterStore"),
        (lambda: expand(perceptron()), "without shared weights"),
        (lambda: SharedEmbedding(SharedParameterStore(3), 4, 2, max_norm=1.0), "max_norm, sparse"),
    ]:
        with pytest.raises(InputError, match=message):
            call()


def test_a_refused_model_stays_as_it_was():
    model = tied_to(nn.Linear(8, 12))
    before = {name: (type(m), dict(m._parameters)) for name, m in model.named_modules()}
    with pytest.raises(InputError):
        compress_model(model, 1e-9)
    assert {name: (type(m), dict(m._parameters)) for name, m in model.named_modules()} == before
    with pytest.raises((RuntimeError, InputError), match="size mismatch"):  # another m at resume
        compressed(0.5).model.load_state_dict(compressed(0.25).model.state_dict())


def test_safetensors_has_the_store_once_and_a_model_loads_from_it(tmp_path):
    from safetensors.torch import load_file, save_file

    def tied(seed: int) -> nn.Module:
        model = nn.Sequential(nn.Embedding(11, 8), nn.Linear(8, 8), nn.Linear(8, 11, bias=False))
        model[2].weight = model[0].weight
        return compress_model(model, 0.4, seed=seed).model

    there, here = tied(5), tied(6)
    save_file(there.state_dict(), tmp_path / "m.safetensors")
    state = load_file(tmp_path / "m.safetensors")
    assert sum(name.endswith("store.weight") for name in state) == 1 and sum(n.endswith("scale") for n in state) == 2
    here.load_state_dict(state)
    assert torch.equal(here(torch.arange(11)), there(torch.arange(11)))
    every = {f"2.{name[2:]}": tensor for name, tensor in state.items() if name.startswith("0.")}
    every |= {f"1.{name[2:]}": tensor for name, tensor in state.items() if ".store." in name} | state
    tied(7).load_state_dict(every)  # as files had it before
    with pytest.raises(RuntimeError, match=r"store\.weight"):
        here.load_state_dict({name: tensor for name, tensor in state.items() if not name.endswith("store.weight")})


def test_a_padded_row_is_zero_in_the_plain_table_too_and_not_in_the_head_that_was_tied_to_it():
    model = nn.Sequential(nn.Embedding(11, 8, padding_idx=3), nn.Linear(8, 11, bias=False))
    model[1].weight = model[0].weight
    shared = compress_model(model, 0.4).model
    dense = expand(shared)
    assert not dense[0].weight[3].any() and dense[1].weight[3].all()
    torch.testing.assert_close(dense(torch.arange(11)), shared(torch.arange(11)))
