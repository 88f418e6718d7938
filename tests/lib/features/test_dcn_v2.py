"""DCN-V2: degree, forms that are one another, parameters, and what its models refuse."""

from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

from workbench.errors import InputError
from workbench.lib.core.budget import count_params
from workbench.lib.core.observe import observing
from workbench.lib.features.dcn_v2 import (
    DCNV2,
    KINDS,
    CrossLayer,
    CrossMixLayer,
    CrossNetwork,
    FieldEmbeddings,
    VectorCrossLayer,
    block_norms,
)

D = 6


def rows(n: int = 5, d: int = D) -> torch.Tensor:
    return torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def network(kind: str, layers: int = 2, **options) -> CrossNetwork:
    torch.manual_seed(0)
    made = CrossNetwork(D, layers, kind, **options).double()
    for name, p in made.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(p)
    return made


@pytest.mark.parametrize("kind", ["full", "low_rank", "v1", "mix"])
@pytest.mark.parametrize("layers", [1, 2, 3])
def test_so_many_layers_are_a_polynomial_of_one_degree_more(kind: str, layers: int):
    """Finite differences along t x_0: those of one order more vanish. A gate would be no polynomial, so K = 1."""
    made = network(kind, layers, **({"activation": "identity", "n_experts": 1} if kind == "mix" else {}))
    x = rows(1)
    with torch.no_grad():
        values = torch.cat([made(t * x) for t in torch.arange(layers + 3, dtype=torch.float64)])
    orders = [values]
    for _ in range(layers + 2):
        orders.append(orders[-1].diff(dim=0))
    assert float(orders[layers + 2].abs().max()) < 1e-7 * float(values.abs().max())
    assert float(orders[layers + 1].abs().max()) > 1e-4 * float(values.abs().max())


def test_values_by_hand():
    made, x = network("full", 1), rows()
    nn.init.eye_(made.layers[0].weight), nn.init.zeros_(made.layers[0].bias)
    assert torch.allclose(made(x), x * x + x)
    for layer in (still := network("full", 3)).layers:
        nn.init.zeros_(layer.weight), nn.init.zeros_(layer.bias)
    assert torch.equal(still(x), x) and torch.equal(network("full", 0)(x), x)
    scaled = CrossLayer(D, diag_scale=0.5).double()
    nn.init.zeros_(scaled.weight)
    assert torch.allclose(scaled(x, x), 0.5 * x * x + x)


def test_rows_of_ones_are_the_first_dcn():
    full, v1, x = CrossLayer(D).double(), VectorCrossLayer(D).double(), rows()
    with torch.no_grad():
        full.weight.copy_(v1.weight.expand(D, D))
    assert torch.allclose(full(x, 2 * x), v1(x, 2 * x))


def test_full_rank_is_full_and_one_expert_is_low_rank():
    low, full, x = CrossLayer(D, D).double(), CrossLayer(D).double(), rows()
    with torch.no_grad():
        full.weight.copy_(low.matrix())
    assert torch.allclose(low(x, 2 * x), full(x, 2 * x))
    mix, low = CrossMixLayer(D, 3, 1, "identity").double(), CrossLayer(D, 3).double()
    with torch.no_grad():
        low.u.copy_(mix.u[0]), low.v.copy_(mix.v[0]), mix.c.copy_(torch.eye(3))
        mix.bias.normal_(), low.bias.copy_(mix.bias[0])
    assert torch.allclose(mix(x, 2 * x), low(x, 2 * x))


def test_experts_that_are_equal_need_no_gate_and_a_loop_says_the_same():
    made, x = CrossMixLayer(D, 3, 4).double(), rows()
    nn.init.normal_(made.bias)
    looped = sum(
        made.gates(x).softmax(-1)[:, i : i + 1]
        * x
        * (torch.tanh(torch.tanh(2 * x @ made.v[i].T) @ made.c[i].T) @ made.u[i].T + made.bias[i])
        for i in range(4)
    )
    gate = made.gates(2 * x).softmax(-1)
    again = sum(
        gate[:, i : i + 1]
        * x
        * (torch.tanh(torch.tanh(2 * x @ made.v[i].T) @ made.c[i].T) @ made.u[i].T + made.bias[i])
        for i in range(4)
    )
    assert torch.allclose(made(x, 2 * x), again + 2 * x)
    assert not torch.allclose(looped, again)  # the gate is of the layer's input
    with torch.no_grad():
        for p in (made.u, made.v, made.c, made.bias):
            p.copy_(p[:1].expand_as(p))
    before = made(x, 2 * x)
    nn.init.normal_(made.gates.weight)
    assert torch.allclose(made(x, 2 * x), before)


def test_each_layer_has_a_gate_of_its_own_and_announces_it():
    made, x = network("mix", 3, rank=2, n_experts=3), rows()
    assert len({layer.gates.weight.data_ptr() for layer in made.layers}) == 3
    with observing(made.layers) as seen:
        made(x)
    gates = [said[0][0].weights for said in seen.values()]
    assert all(gate.shape == (5, 3) and torch.allclose(gate.sum(1), torch.ones(5).double()) for gate in gates)
    assert not torch.allclose(gates[0], gates[1])


def test_one_layer_is_any_quadratic_form():
    form = torch.randn(D, D, dtype=torch.float64)
    layer, x = CrossLayer(D).double(), rows(20)
    with torch.no_grad():
        layer.weight.copy_(form)
    assert torch.allclose((layer(x, x) - x).sum(1), torch.einsum("bi,ij,bj->b", x, form, x))


def test_parameters_are_those_of_the_formulas():
    d, r, k, count = 8, 3, 4, 2
    expected = {
        "full": count * (d * d + d),
        "low_rank": count * (2 * d * r + d),
        "mix": count * (k * (2 * d * r + r * r + d) + k * d),
        "v1": count * 2 * d,
    }
    assert {kind: count_params(CrossNetwork(d, count, kind, r, k)) for kind in KINDS} == expected


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_and_a_batch_of_one(kind: str):
    made = network(kind, 2, **({"rank": 2} if kind in ("low_rank", "mix") else {}))
    x = rows(2).requires_grad_()
    assert torch.autograd.gradcheck(made, (x,))
    assert made(x[:1]).shape == (1, D) and torch.allclose(made(x)[:1], made(x[:1]))


def test_a_matrix_starts_as_large_as_it_would_alone():
    torch.manual_seed(0)
    made = CrossMixLayer(64, 32, 8)
    for stack in (made.u, made.v, made.c):
        assert float(stack.detach().std()) == pytest.approx(stack.shape[-1] ** -0.5, rel=0.1)


@pytest.mark.parametrize("structure", ["stacked", "parallel"])
def test_a_click_model(structure: str):
    torch.manual_seed(0)
    model = DCNV2(FieldEmbeddings((5, 7), 3), CrossNetwork(8, 2), n_dense=2, deep=(4,), structure=structure)
    ids, dense = torch.tensor([[0, 6], [4, 1], [2, 2]]), torch.randn(3, 2)
    assert model(ids, dense=dense).shape == (3,) and model(ids[:1], dense=dense[:1]).shape == (1,)
    assert float(torch.cat([t.weight.detach().flatten() for t in model.embedding.tables]).abs().max()) <= 0.05
    assert DCNV2(FieldEmbeddings((5, 7), 4), CrossNetwork(8, 1), deep=())(ids).shape == (3,)


def test_block_norms_find_the_cross_that_is_there():
    weight = torch.zeros(6, 6)
    weight[0:2, 2:5] = 3.0
    found = block_norms(weight, (2, 3, 1))
    assert found.shape == (3, 3) and float(found[0, 1]) == pytest.approx((9 * 6) ** 0.5) and found.count_nonzero() == 1


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda: CrossLayer(4, 5), "rank 5"),
        (lambda: CrossLayer(4, diag_scale=-1.0), "diag_scale is -1.0"),
        (lambda: CrossNetwork(4, -1), "n_layers is -1"),
        (lambda: CrossNetwork(4, 1, "cubic"), "cubic"),
        (lambda: CrossMixLayer(4, 2, 0), "n_experts is 0"),
        (lambda: CrossMixLayer(4, 2, 2, "relu"), "relu"),
        (lambda: CrossMixLayer(4, 2, 2, gate="max"), "max"),
        (lambda: FieldEmbeddings((), 4), "sizes is"),
        (lambda: FieldEmbeddings((3, 4))(torch.tensor([[0, 4]])), "field 1 are from 4 to 4"),
        (lambda: FieldEmbeddings((3, 4))(torch.tensor([[-1, 0]])), "field 0 are from -1 to -1"),
        (lambda: FieldEmbeddings((3, 4))(torch.tensor([[0]])), "ids have 1 fields"),
        (lambda: DCNV2(FieldEmbeddings((3,), 4), CrossNetwork(5, 1)), "cross is 5 wide"),
        (lambda: DCNV2(FieldEmbeddings((3,), 4), CrossNetwork(4, 1), structure="mixed"), "mixed"),
        (lambda: DCNV2(FieldEmbeddings((3,), 4), CrossNetwork(5, 1), 1)(torch.zeros(1, 1).long()), "dense has 0"),
        (
            lambda: DCNV2(FieldEmbeddings((3,), 4), CrossNetwork(5, 1), 1)(
                torch.zeros(1, 1).long(), dense=torch.full((1, 1), torch.nan)
            ),
            "NaN",
        ),
        (lambda: block_norms(torch.eye(3), (1, 1)), "widths are"),
    ],
)
def test_what_does_not_fit_is_refused(build, said: str):
    with pytest.raises(InputError, match=said):
        build()


# -- the same weights in public libraries, skipped where they are not installed


def cross_file(package: str, path: str) -> ModuleType:
    """A package's file by itself: the packages as a whole want what no cross layer needs."""
    found = find_spec(package)
    if found is None:
        pytest.skip(f"{package} is not installed")
    spec = spec_from_file_location(f"{package}_crosses", Path(found.submodule_search_locations[0]) / path)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tied(layers: int = 3, rank: int = 2, n_experts: int = 3) -> CrossNetwork:
    """A mixture as two libraries have it: one gate for all layers, and one bias for a layer's experts."""
    made = network("mix", layers, rank=rank, n_experts=n_experts)
    with torch.no_grad():
        for layer in made.layers:
            layer.bias.copy_(layer.bias[:1].expand_as(layer.bias))
            layer.gates.weight.copy_(made.layers[0].gates.weight)
    return made


@torch.no_grad()
def test_torchrec_makes_the_same_crosses():
    """torchrec 1.9.2."""
    peer, x = cross_file("torchrec", "modules/crossnet.py"), rows()
    full, ours = peer.CrossNet(D, 3).double(), network("full", 3)
    for i, layer in enumerate(ours.layers):
        full.kernels[i].copy_(layer.weight), full.bias[i].copy_(layer.bias[:, None])
    assert torch.allclose(full(x), ours(x), rtol=1e-10, atol=1e-12)
    low, ours = peer.LowRankCrossNet(D, 3, low_rank=2).double(), network("low_rank", 3, rank=2)
    for i, layer in enumerate(ours.layers):
        low.W_kernels[i].copy_(layer.u), low.V_kernels[i].copy_(layer.v), low.bias[i].copy_(layer.bias)
    assert torch.allclose(low(x), ours(x), rtol=1e-10, atol=1e-12)
    vector, ours = peer.VectorCrossNet(D, 3).double(), network("v1", 3)
    for i, layer in enumerate(ours.layers):
        vector.kernels[i].copy_(layer.weight.T), vector.bias[i].copy_(layer.bias[:, None])
    assert torch.allclose(vector(x), ours(x), rtol=1e-10, atol=1e-12)
    mix = peer.LowRankMixtureCrossNet(D, 3, num_experts=3, low_rank=2, activation=torch.tanh).double()
    ours = tied()
    for i, layer in enumerate(ours.layers):
        mix.U_kernels[i].copy_(layer.u), mix.V_kernels[i].copy_(layer.v), mix.C_kernels[i].copy_(layer.c)
        mix.bias[i].copy_(layer.bias[0][:, None])
    for k, gate in enumerate(mix.gates):
        gate.weight.copy_(ours.layers[0].gates.weight[k : k + 1])
        if gate.bias is not None:
            gate.bias.zero_()
    assert torch.allclose(mix(x), ours(x), rtol=1e-10, atol=1e-12)


@torch.no_grad()
def test_fuxictr_makes_the_same_crosses():
    """FuxiCTR 2.3.10; of a batch of one its mixture loses the first dimension, ours does not."""
    peer, x = cross_file("fuxictr", "pytorch/layers/interactions/cross_net.py"), rows()
    full, ours = peer.CrossNetV2(D, 3).double(), network("full", 3)
    for theirs, layer in zip(full.cross_layers, ours.layers, strict=True):
        theirs.weight.copy_(layer.weight), theirs.bias.copy_(layer.bias)
    assert torch.allclose(full(x), ours(x), rtol=1e-10, atol=1e-12)
    mix, ours = peer.CrossNetMix(D, 3, low_rank=2, num_experts=3).double(), tied()
    for i, layer in enumerate(ours.layers):
        mix.U_list[i].copy_(layer.u), mix.V_list[i].copy_(layer.v.transpose(1, 2)), mix.C_list[i].copy_(layer.c)
        mix.bias[i].copy_(layer.bias[0][:, None])
    for k, gate in enumerate(mix.gating):
        gate.weight.copy_(ours.layers[0].gates.weight[k : k + 1])
    assert torch.allclose(mix(x), ours(x), rtol=1e-10, atol=1e-12)
    assert ours(x[:1]).shape == (1, D)


def test_a_mixture_with_gates_of_its_own_is_another_network():
    """What the libraries tie makes a difference: so their mixture is ours only where it is tied."""
    free, both, x = network("mix", 3, rank=2, n_experts=3), tied(), rows()
    assert not torch.allclose(free(x), both(x))
