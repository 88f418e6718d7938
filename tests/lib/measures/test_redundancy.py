"""How alike experts are: closed forms, what the measures do not see, and their null."""

import pytest
import torch

from workbench.lib.measures.redundancy import mean_pair, output_cka, output_cosine


def outputs(experts: int = 3, tokens: int = 50, dim: int = 4, seed: int = 0) -> torch.Tensor:
    return torch.randn(experts, tokens, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_cosines_are_those_of_torch_and_of_copies_and_opposites():
    x = outputs()
    found = output_cosine(torch.cat([x, 2 * x[:1], -x[:1]]))
    expected = torch.cosine_similarity(x[0], x[1], dim=-1).mean()
    torch.testing.assert_close(found[0, 1], expected)
    torch.testing.assert_close(found[0, 3:], torch.tensor([1.0, -1.0], dtype=torch.float64))
    torch.testing.assert_close(found, found.T)
    torch.testing.assert_close(found.diagonal(), torch.ones(5, dtype=torch.float64))


def test_a_token_that_an_expert_says_nothing_of_counts_for_none_of_its_pairs():
    x = outputs()
    x[1, :20] = 0
    found = output_cosine(x)
    torch.testing.assert_close(found[0, 1], torch.cosine_similarity(x[0, 20:], x[1, 20:], dim=-1).mean())
    torch.testing.assert_close(found[0, 2], output_cosine(outputs())[0, 2])
    x[1] = 0
    found = output_cosine(x)
    assert found[1].isnan().all() and found[0, 2].isfinite()
    torch.testing.assert_close(mean_pair(found), found[0, 2])


def test_cka_is_the_formula_with_gram_matrices():
    x = outputs()
    centre = torch.eye(50, dtype=torch.float64) - 1 / 50
    k, other = (centre @ y @ y.T @ centre for y in x[:2])
    torch.testing.assert_close(output_cka(x).value[0, 1], (k * other).sum() / (k.norm() * other.norm()))


def test_cka_sees_no_rotation_scale_or_shift_and_cosine_does():
    x = outputs(1)[0]
    turn = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)).Q
    both = torch.stack([x, 3 * x @ turn + 5])
    assert output_cka(both).value[0, 1].item() == pytest.approx(1)
    assert abs(output_cosine(both)[0, 1].item()) < 0.9


def test_the_null_of_cka_is_its_mean_over_shuffles_of_the_tokens():
    x = outputs(2, tokens=12)
    found = output_cka(x)
    generator = torch.Generator().manual_seed(2)
    shuffled = [
        output_cka(torch.stack([x[0], x[1, torch.randperm(12, generator=generator)]])).value[0, 1] for _ in range(4000)
    ]
    assert found.null[0, 1].item() == pytest.approx(float(torch.stack(shuffled).mean()), rel=0.02)
    assert found.null[0, 1] > 0.2  # of twelve tokens


def test_an_expert_that_says_the_same_of_all_tokens_has_no_cka_and_leading_axes_are_kept():
    x = outputs()
    x[2] = x[2, :1]
    assert output_cka(x).value[2].isnan().all() and output_cka(x).value[0, 1].isfinite()
    layers = torch.stack([outputs(), outputs(seed=1)])
    for measure in (output_cosine, lambda y: output_cka(y).value, lambda y: output_cka(y).null):
        torch.testing.assert_close(measure(layers), torch.stack([measure(part) for part in layers]))
    assert mean_pair(output_cosine(layers)).shape == (2,)


def test_the_mean_over_pairs_leaves_the_diagonal_out():
    assert mean_pair(torch.tensor([[1.0, 0.2, 0.4], [0.2, 1.0, 0.6], [0.4, 0.6, 1.0]])).item() == pytest.approx(0.4)
