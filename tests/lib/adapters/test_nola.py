"""NOLA: what trains and what is saved is the coefficients and the seeds; made again or kept, the basis is the same."""

import copy

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from workbench.errors import InputError
from workbench.kernels import dispatch
from workbench.lib.adapters.nola import NOLALinear, RandomMixture
from workbench.lib.core.adapt import adapt, load_adapter

X = torch.randn(9, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def layer(shake: bool = True, **options) -> NOLALinear:
    torch.manual_seed(0)
    made = NOLALinear(nn.Linear(6, 10), **{"rank": 3, "k": 5} | options).double()
    for p in made.experts.parameters() if shake else ():
        nn.init.normal_(p)
    return made


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 4)).double()


def test_it_is_the_formula():
    """A loop over the matrices."""
    ours = layer(alpha=6.0, k_b=7)
    a = ours.experts.a.extra() / 6**0.5
    for c, g in zip(ours.experts.a.coefficients, ours.experts.a.basis(), strict=True):
        a = a + c * g / 5**0.5
    b = sum(c * g / 7**0.5 for c, g in zip(ours.experts.b.coefficients, ours.experts.b.basis(), strict=True))
    torch.testing.assert_close(ours(X), ours.base(X) + 2.0 * X @ a.T @ b.T)
    torch.testing.assert_close(ours.fixed_update(), 2.0 * b @ a)


@pytest.mark.parametrize(("dtype", "off"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
def test_a_kept_basis_and_one_made_again_are_the_same(dtype, off):
    results = []
    for cache in (False, True):
        ours = layer(k=20, cache=cache).to(dtype)
        with dispatch.recording() as seen:
            y = ours(X.to(dtype))
            y.sin().sum().backward()
        assert len(seen) == (3 if cache else 5)  # A0 and both bases, or A0, both sums and both gradients
        results.append([y, *(p.grad for p in ours.experts.parameters())])
    for made, kept in zip(*results, strict=True):
        torch.testing.assert_close(made, kept, atol=off, rtol=off)


def test_what_is_kept_follows_the_seed_and_the_type():
    mixture = RandomMixture((2, 3), 4, cache=True)
    first = mixture.basis()
    assert mixture.basis() is first
    mixture.seed.fill_(7)
    assert not torch.equal(mixture.basis(), first)
    plain = RandomMixture((2, 3), 4)
    plain.load_state_dict(mixture.state_dict(), assign=True)
    assert torch.equal(plain.basis(), mixture.basis())
    other = copy.deepcopy(mixture)
    assert other._kept is None and torch.equal(other.basis(), mixture.basis())
    assert mixture.double().basis().dtype == torch.float64
    with torch.inference_mode():
        RandomMixture.basis(other.double())
    nn.init.ones_(other.coefficients)
    other().sum().backward()  # what was kept in inference mode serves a backward pass
    torch.testing.assert_close(other.coefficients.grad, other.basis().flatten(1).sum(1) / 2)


def test_layers_and_factors_have_seeds_of_their_own():
    adapted = adapt(small(), "nola", rank=2, k=3)
    seeds = [int(mixture.seed) for la in adapted.layers.values() for mixture in (la.experts.a, la.experts.b)]
    assert len(set(seeds)) == 4


@pytest.mark.parametrize(("rank", "widths"), [(1, (6, 10)), (4, (6, 10)), (4, (40, 30))])
def test_trained_numbers_depend_on_neither_rank_nor_width(rank, widths):
    made = NOLALinear(nn.Linear(*widths), rank, 5, k_b=7).requires_grad_()
    assert sum(p.numel() for p in made.experts.parameters()) == 12


def test_a_saved_adapter_is_the_coefficients_and_the_seeds(tmp_path):
    adapted = adapt(small(), "nola", rank=3, k=5)
    for p in adapted.parameters():
        nn.init.normal_(p)
    before = torch.get_rng_state()
    y = adapted.model(X)
    y.sum().backward()
    assert torch.equal(torch.get_rng_state(), before)
    tensors = load_file(adapted.save(tmp_path / "nola") / "adapter.safetensors")
    assert sum(t.numel() * t.element_size() for t in tensors.values()) == 2 * 2 * (5 * 8 + 8)
    torch.manual_seed(99)
    assert torch.equal(load_adapter(small(), tmp_path / "nola").model(X), y)


def test_a_small_file_may_stand_for_a_large_basis(tmp_path):
    """Three million numbers of basis, of which none is in the file."""
    model = nn.Sequential(nn.Linear(256, 256))
    adapted = adapt(model, "nola", rank=8, k=768)
    adapted.save(tmp_path / "nola")
    adapted.remove()
    assert load_adapter(model, tmp_path / "nola").report()["trained"] == 2 * 768


def test_it_starts_as_the_layer_with_a_gradient_of_b_alone():
    ours = layer(shake=False)
    assert torch.equal(ours(X), ours.base(X)) and not ours.fixed_update().any()
    ours(X).sin().sum().backward()
    assert not ours.experts.a.coefficients.grad.any() and ours.experts.b.coefficients.grad.all()


def test_enough_random_matrices_are_any_lora():
    ours = layer(k=18, k_b=30, rank=3)
    for mixture, wanted in ((ours.experts.a, torch.randn(18).double()), (ours.experts.b, torch.randn(30).double())):
        found = torch.linalg.solve(mixture.basis().flatten(1).T, wanted) * mixture.k**0.5
        mixture.coefficients.data = found
        torch.testing.assert_close(mixture().flatten(), wanted, atol=1e-8, rtol=1e-8)


def test_the_rank_is_all_of_r_from_fewer_numbers_than_lora_needs():
    ours = layer(rank=4, k=5)
    assert torch.linalg.matrix_rank(ours.fixed_update()) == 4 and 2 * 5 < 4 * (6 + 10)


def test_gradients_are_those_of_finite_differences():
    ours = layer()

    def output(a, b):
        return torch.func.functional_call(
            ours, {"experts.a.coefficients": a, "experts.b.coefficients": b}, (X,), strict=False
        )

    parts = [p.detach().clone().requires_grad_() for p in (ours.experts.a.coefficients, ours.experts.b.coefficients)]
    assert torch.autograd.gradcheck(output, parts)


def test_merged_back_it_is_the_same_function():
    adapted = adapt(small(), "nola", rank=3, k=5)
    for p in adapted.parameters():
        nn.init.normal_(p)
    y = adapted.model(X)
    torch.testing.assert_close(adapted.merge_back()(X), y, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("options", [{"k": 0}, {"k_b": 0}])
def test_wrong_numbers_are_named(options):
    with pytest.raises(InputError, match=f"^{next(iter(options))} is 0 but must be at least 1"):
        adapt(small(), "nola", rank=2, **options)
