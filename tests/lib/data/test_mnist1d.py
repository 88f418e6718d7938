"""MNIST-1D: the published set, made here."""

import numpy as np
import pytest
import torch

from workbench.lib import data
from workbench.lib.data import mnist1d


def test_the_first_signals_are_those_of_the_release():
    x, y = mnist1d.generate(20)
    # from `make_dataset` of mnist1d 0.0.2.post1 with num_samples = 20
    np.testing.assert_allclose(
        x[0, :4], [0.5017545241917002, 0.4971994996653548, 0.1870514468867219, -0.15804933119056214], atol=1e-12
    )
    assert y.tolist() == [4, 8, 2, 2, 8, 1, 3, 6, 7, 0, 4, 0, 5, 5, 7, 3, 9, 1, 9, 6]


def test_the_set_has_its_published_shape_and_is_normalised():
    found = data.load("mnist-1d")
    x = torch.cat([part for part, _ in found.splits.values()])
    y = torch.cat([part for _, part in found.splits.values()])
    assert x.shape == (5000, 40) and (x.dtype, y.dtype) == (torch.float32, torch.int64)
    assert torch.bincount(y).tolist() == [500] * 10
    assert float(x.mean()) == pytest.approx(0, abs=1e-6)
    assert float(x.std(correction=0)) == pytest.approx(1, abs=1e-6)
    assert found.manifest["mnist-1d"]["rows"] == 5000
    again = data.load("mnist-1d")  # from the cache
    assert torch.equal(again.splits["test"][0], found.splits["test"][0])
    assert not torch.equal(data.load("mnist-1d", fold=1).splits["test"][0][:9], found.splits["test"][0][:9])


def test_curves_start_at_zero_with_a_deviation_of_a_sixth():
    shapes = mnist1d.curves()
    assert shapes.shape == (10, 12)
    np.testing.assert_array_equal(shapes[:, 0], 0)
    np.testing.assert_allclose(shapes.std(axis=1), 1 / 6)


def test_another_seed_is_another_set_and_numpys_own_generator_is_left_alone():
    np.random.seed(3)  # noqa: NPY002
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    first, again, other = (mnist1d.generate(20, seed)[0] for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 0.1
    np.testing.assert_array_equal(np.random.get_state()[1], before)  # noqa: NPY002


def test_resampling_is_linear():
    np.testing.assert_allclose(mnist1d.resample(np.array([0.0, 1.0, 4.0]), 5), [0, 0.5, 1, 2.5, 4])
