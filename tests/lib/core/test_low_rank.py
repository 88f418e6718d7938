"""The bank of low-rank experts: its paths against the plain formula, and its ways in and out."""

import pytest
import torch

from workbench.errors import InputError
from workbench.lib.core.low_rank import PATHS, LowRankExperts, fitting_rank
from workbench.lib.core.routing import Routing

N, D_IN, D_OUT, E, R = 11, 7, 5, 4, 3


def bank(seed: int = 0, **options) -> LowRankExperts:
    torch.manual_seed(seed)
    made = LowRankExperts(E, D_IN, D_OUT, R, **options).double()
    torch.nn.init.normal_(made.b)
    made.scale.uniform_(0.5, 2)
    return made


def routing(kind: str) -> Routing:
    torch.manual_seed(1)
    logits = torch.randn(N, E, dtype=torch.float64, requires_grad=True)
    probs = logits.softmax(-1)
    if kind == "fixed":
        weights, indices = probs.topk(2, dim=-1)
        made = Routing.fixed(indices, weights, E, logits=logits)
    else:  # a token without any expert, an expert without any token
        mask = torch.rand(N, E) < 0.5
        mask[3], mask[:, 2] = False, False
        made = Routing.ragged(mask, probs, logits=logits)
        if kind == "capacity":
            made.kept = torch.rand(made.expert.numel()) < 0.6
    return made


@pytest.mark.parametrize("kind", ["fixed", "ragged", "capacity"])
@pytest.mark.parametrize("path", [*PATHS, None])
def test_every_path_is_the_sum_over_the_experts_in_value_and_gradients(kind, path):
    def gradients(compute):
        made, routed = bank(), routing(kind)
        x = torch.randn(N, D_IN, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).requires_grad_()
        y = compute(made, x, routed)
        (y * torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view_as(y)).sum().backward()
        return y, x.grad, made.a.grad, made.b.grad, routed.logits.grad

    def formula(made, x, routed):
        gates = routed.dense()
        return sum(gates[:, e, None] * (x @ made.delta(e).T) for e in range(E))

    for found, expected in zip(gradients(lambda b, x, r: b(x, r, path)), gradients(formula), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-10)


def test_a_new_bank_changes_nothing_and_unused_experts_get_no_gradient():
    fresh = LowRankExperts(E, D_IN, D_OUT, R).double()
    assert not fresh(torch.randn(N, D_IN, dtype=torch.float64), routing("fixed")).any()
    for path in PATHS:
        made = bank()
        made(torch.randn(N, D_IN, dtype=torch.float64), routing("ragged"), path).sum().backward()
        assert not made.a.grad[2].any() and not made.b.grad[2].any() and made.a.grad[0].any()


def test_a_bank_with_gates_is_one_lora_whose_ranks_are_gated():
    made, routed, x = bank(), routing("fixed"), torch.randn(N, D_IN, dtype=torch.float64)
    gates = (routed.dense() * made.scale).repeat_interleave(R, dim=1)
    one = (x @ made.a.reshape(E * R, D_IN).T * gates) @ made.b.permute(0, 2, 1).reshape(E * R, D_OUT)
    torch.testing.assert_close(made(x, routed), one)
    torch.testing.assert_close(made.outputs(x), torch.stack([x @ made.delta(e).T for e in range(E)], 1))


def test_merged_parameters_are_the_mixture_only_for_one_expert():
    made, x = bank(), torch.randn(2, D_IN, dtype=torch.float64)
    for weights, same in ((torch.tensor([[0.0, 1, 0, 0], [0, 0, 0, 1]]), True), (torch.full((2, E), 0.25), False)):
        a, b = made.merged(weights.double())
        merged = torch.einsum("ni,nri,nor->no", x, a, b)
        mixed = torch.einsum("ne,neo->no", weights.double(), made.outputs(x))
        assert torch.allclose(merged, mixed) is same


def test_loras_of_different_ranks_become_one_bank_and_stay_what_they_are():
    loras = [(torch.randn(r, D_IN), torch.randn(D_OUT, r), s) for r, s in ((1, 2.0), (3, 0.5))]
    made = LowRankExperts.from_loras(loras)
    for e, (a, b, scale) in enumerate(loras):
        torch.testing.assert_close(made.delta(e), scale * b @ a)
    x = torch.randn(N, D_IN)
    even = Routing.fixed(torch.arange(2).expand(N, 2), torch.ones(N, 2), 2)
    made(x, even).square().sum().backward()
    assert not made.a.grad[0, 1:].any() and not made.b.grad[0, :, 1:].any()  # the padding stays zero


def test_the_best_experts_of_a_full_update_are_its_truncated_svd():
    deltas = torch.randn(2, D_OUT, D_IN, dtype=torch.float64)
    made = LowRankExperts.from_deltas(deltas, [2, 5]).double()
    s = torch.linalg.svdvals(deltas[0])
    assert (made.delta(0) - deltas[0]).norm().item() == pytest.approx(s[2:].norm().item())
    torch.testing.assert_close(made.delta(1), deltas[1])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: LowRankExperts(2, 4, 8, 5), "rank is 5 but must be between 1 and the layer's smaller width, 4"),
        (lambda: LowRankExperts(0, 4, 8, 2), "n_experts, d_in, d_out are 0, 4, 8 but must all be at least 1"),
        (lambda: LowRankExperts.from_loras([]), "loras is empty"),
        (
            lambda: LowRankExperts.from_loras(
                [(torch.ones(1, 3), torch.ones(2, 1), 1.0), (torch.ones(1, 4), torch.ones(2, 1), 1.0)]
            ),
            "same I and O",
        ),
        (
            lambda: LowRankExperts.from_deltas(torch.ones(2, 3, 3), [1]),
            "ranks has 1 entries but must have one for each of 2",
        ),
        (
            lambda: LowRankExperts.from_deltas(torch.ones(1, 3, 3), [4]),
            "ranks holds 4 but each must be between 1 and 3",
        ),
        (
            lambda: bank()(torch.ones(N, D_IN, dtype=torch.float64), routing("fixed"), "dens"),
            "path 'dens' is unknown; did you mean 'dense'",
        ),
    ],
)
def test_wrong_input_is_named(call, message):
    with pytest.raises(InputError, match=message):
        call()


def test_the_default_rank_fits_any_layer():
    assert fitting_rank(None, torch.nn.Linear(64, 32)) == 8
    assert fitting_rank(None, torch.nn.Linear(4, 32)) == 4
    assert fitting_rank(16, torch.nn.Linear(4, 32)) == 16  # asked for: the bank says what is allowed
