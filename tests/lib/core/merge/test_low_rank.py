"""Thin and joint SVD, Procrustes, and the pools: each is what its formula says, and undone exactly."""

from functools import partial

import pytest
import torch

from tests.draws import draw
from workbench.errors import InputError
from workbench.lib.core.merge.low_rank import (
    factored_svd,
    joint_svd,
    of_positions,
    of_units,
    polar,
    positions,
    procrustes,
    thin_svd,
    units,
)

drawn = partial(draw, dtype=torch.float64)


def lora(seed, rank=3, scale=2.0, d_in=7, d_out=5):
    return drawn(rank, d_in, seed=seed), drawn(d_out, rank, seed=seed + 100), scale


def dense(a, b, scale):
    return scale * b @ a


def close(a, b, tolerance=1e-10):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (6, 6)])
def test_a_thin_svd_is_the_best_of_its_rank_and_its_signs_are_settled(shape):
    x = drawn(*shape)
    u, s, v = thin_svd(x)
    close((u * s) @ v, x)
    u, s, v = thin_svd(x, 2)
    assert (u.shape, s.shape, v.shape) == ((shape[0], 2), (2,), (2, shape[1]))
    close((x - (u * s) @ v).square().sum(), torch.linalg.svdvals(x)[2:].square().sum())
    assert all(column[column.abs().argmax()] > 0 for column in u.T)
    minus = thin_svd(-x, 2)
    close(minus[0], u), close(minus[2], -v)


def test_the_svd_of_factors_is_that_of_their_product():
    for a, b, scale in (lora(1), lora(2, rank=7, d_in=7, d_out=5), lora(3, scale=-0.5)):
        whole, parts = thin_svd(dense(a, b, scale), 3), factored_svd((a, b, scale), 3)
        for one, other in zip(whole, parts, strict=True):
            close(one, other, 1e-9)


def test_a_joint_svd_gives_back_each_matrix_in_one_basis():
    matrices = [drawn(5, 2, seed=i) @ drawn(2, 7, seed=i + 9) for i in range(2)]
    for side in ("left", "right"):
        basis, s, blocks = joint_svd(matrices, side=side)
        assert len(s) == 4 and len(blocks) == 2  # two of rank 2
        for matrix, block in zip(matrices, blocks, strict=True):
            close((basis * s) @ block if side == "left" else (block * s) @ basis, matrix)
        together = torch.cat(blocks, 1) if side == "left" else torch.cat(blocks).T
        close(together @ together.T, torch.eye(4, dtype=torch.float64))
    assert len(joint_svd([torch.zeros(4, 3)] * 2)[1]) == 1
    assert joint_svd(matrices, 3)[1].shape == (3,)
    uneven = [drawn(5, 2), drawn(5, 6, seed=1)]
    assert [block.shape[1] for block in joint_svd(uneven)[2]] == [2, 6]


def test_procrustes_finds_the_rotation_and_no_other_is_nearer():
    fixed, rotation = drawn(9, 4), polar(drawn(4, 4, seed=1))
    close(rotation @ rotation.T, torch.eye(4, dtype=torch.float64))
    close(procrustes(fixed @ rotation.T, fixed), rotation)
    moving = drawn(9, 4, seed=2)
    best = (moving @ procrustes(moving, fixed) - fixed).square().sum()
    for seed in range(50):
        assert best <= (moving @ polar(drawn(4, 4, seed=seed + 10)) - fixed).square().sum()


def test_pools_hold_every_number_once_and_are_undone():
    loras = [lora(i, scale=s) for i, s in enumerate((2.0, -0.5, 1.0))]
    pool = positions(loras)
    assert pool.shape == (5 + 7, 3, 3)
    for i, given in enumerate(loras):
        close(dense(*of_positions(pool[:, :, i], 5)), dense(*given))
    loras[1] = lora(1, rank=2, scale=-0.5)
    pool, owner = units(loras)
    assert pool.shape == (8, 12) and owner.tolist() == [0, 0, 0, 1, 1, 2, 2, 2]
    for i, given in enumerate(loras):
        close(dense(*of_units(pool[owner == i], 7)), dense(*given))
    close(dense(*of_units(pool, 7)), sum(dense(*given) for given in loras))


def test_half_precision_is_computed_in_float32():
    u, _, v = thin_svd(drawn(4, 3).bfloat16())
    assert u.dtype == v.dtype == torch.float32
    assert units([tuple(x.half() if torch.is_tensor(x) else x for x in lora(0))])[0].dtype == torch.float32


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: thin_svd(drawn(3, 4), 0), "rank is 0 but must be between 1 and the smaller width, 3"),
        (lambda: thin_svd(drawn(3, 4), 4), "rank is 4"),
        (lambda: joint_svd([]), "shapes none but must share their rows"),
        (lambda: joint_svd([drawn(3, 4), drawn(2, 4)]), r"\(3, 4\), \(2, 4\) but must share their rows"),
        (lambda: joint_svd([drawn(3, 4), drawn(3, 5)], side="right"), "must share their columns"),
        (lambda: procrustes(drawn(3, 2), drawn(3, 3)), r"moving has shape \(3, 2\)"),
        (lambda: positions([lora(0), lora(1, rank=2)]), "ranks 3, 2 but must have one rank"),
        (lambda: positions([]), "shapes none"),
        (lambda: units([lora(0), lora(1, d_in=6)]), "with the same I and O"),
        (lambda: units([(drawn(2, 7), drawn(5, 3), 1.0)]), r"A \(2, 7\) B \(5, 3\)"),
        (lambda: units([lora(0), (lora(1)[0] * float("nan"), lora(1)[1], 1.0)]), r"loras\[1\] holds numbers"),
    ],
)
def test_what_does_not_fit_is_named(call, message):
    with pytest.raises(InputError, match=message):
        call()
