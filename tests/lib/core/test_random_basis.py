"""The seeded basis: the published generator, the same numbers in any pieces, and sums that store none of it."""

import subprocess
import sys

import pytest
import torch

from workbench.lib.core.random_basis import philox, random_basis, uniform

SEED = torch.tensor(0x0123456789ABCDEF)


def test_the_generator_gives_its_published_answers():
    """The first of Random123's known answers: counter and key of zeros."""
    zero = philox(torch.tensor(0), torch.tensor(0))
    assert zero.tolist() == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


def test_words_are_those_of_the_rounds_in_whole_numbers():
    """Against Python's integers, which never wrap round; keys and counters of all 64 bits, signs among them."""
    word, draws = 2**32 - 1, torch.randint(-(2**63), 2**63 - 1, (20, 2), generator=torch.Generator().manual_seed(0))
    for counter, key in draws.tolist():
        c, k = [counter & word, counter >> 32 & word, 0, 0], [key & word, key >> 32 & word]
        for _ in range(10):
            low, high = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
            c = [high >> 32 ^ c[1] ^ k[0], high & word, low >> 32 ^ c[3] ^ k[1], low & word]
            k = [(k[0] + 0x9E3779B9) & word, (k[1] + 0xBB67AE85) & word]
        assert philox(torch.tensor(counter), torch.tensor(key)).tolist() == c


def test_numbers_are_the_same_in_any_pieces_and_types_and_in_another_process():
    whole = uniform(SEED, 0, 101)
    for start, count in ((0, 1), (3, 5), (4, 8), (97, 4), (50, 0)):
        assert torch.equal(uniform(SEED, start, count), whole[start : start + count])
    assert torch.equal(uniform(SEED, 0, 101, torch.float64), whole.double())
    far = 2**34 + 3  # of which the counter takes more than 32 bits
    assert not torch.equal(uniform(SEED, far, 8), uniform(SEED, 3, 8))
    code = (
        "import torch; from workbench.lib.core.random_basis import uniform; "
        f"print(uniform(torch.tensor({int(SEED)}), 7, 5).tolist())"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert eval(said) == whole[7:12].tolist()


def test_numbers_are_uniform_and_not_correlated():
    draws = uniform(SEED, 0, 2**16, torch.float64)
    assert -1 <= draws.min() < -0.999 and 0.999 < draws.max() < 1
    assert abs(draws.mean()) < 4 / (3 * 2**16) ** 0.5
    assert draws.square().mean() == pytest.approx(1 / 3, abs=0.005)
    assert abs((draws[1:] * draws[:-1]).mean()) < 4 / 3 / 2**8
    assert len(draws.unique()) > 0.99 * len(draws)


@pytest.mark.parametrize("chunk", [1, 7, 24, 100])
def test_sums_and_gradients_are_those_of_the_stored_basis(chunk):
    c = torch.randn(24, dtype=torch.float64, requires_grad=True)
    stored = uniform(SEED, 0, 24 * 15, torch.float64).view(24, 3, 5)
    ours, theirs = random_basis(c, SEED, (3, 5), chunk), torch.einsum("k,kij->ij", c, stored)
    torch.testing.assert_close(ours, theirs)
    for y in (ours, theirs):
        y.sin().sum().backward(retain_graph=True)
    torch.testing.assert_close(c.grad, 2 * torch.autograd.grad(theirs.sin().sum(), c)[0])
    assert torch.autograd.gradcheck(lambda c: random_basis(c, SEED, (3, 5), chunk), c)


def test_no_more_than_a_chunk_is_kept_and_torchs_generator_stays():
    saved, made, before = [], [], torch.get_rng_state()
    c = torch.randn(50, requires_grad=True, generator=torch.Generator().manual_seed(0))

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            made.extend(t.numel() for t in torch.utils._pytree.tree_leaves(result) if isinstance(t, torch.Tensor))
            return result

    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t), Largest():
        random_basis(c, SEED, (10, 20), chunk=5).sum().backward()
    assert sum(saved) <= len(c) + 1
    assert max(made) <= 5 * 10 * 20 + 4  # words of whole counters
    assert torch.equal(torch.get_rng_state(), before)
