"""What the native paths share: how a C file is built, kept and found again, and the arithmetic of tile.h."""

import stat
import sys
from ctypes import c_long

import pytest
import torch

from workbench.kernels import native

PRODUCT = """
#include "tile.h"
int rows(void) { return ROWS; }
void multiply(long n, long depth, long step, const float *a, const float *b, float *c, int add)
{
    const float *a_rows[ROWS];
    float *c_rows[ROWS];
    for (long i = 0; i < ROWS; i++) {
        a_rows[i] = step == 1 ? a + i * depth : a + i;
        c_rows[i] = c + i * n;
    }
    tile(n, depth, a_rows, step, b, n, c_rows, add);
}
void vectors(long n, const float *x, float *power, float *sum, float *most)
{
    for (long i = 0; i < n; i += LANES) {
        vec at = *(const vec *)(x + i);
        *(vec *)(power + i) = power_of_two(at);
        for (long j = 0; j < LANES; j++) {
            sum[i + j] = total(at);
            most[i + j] = largest_lane(at);
        }
    }
}
int lanes(void) { return LANES; }
"""


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "product" / "native.c"
    path.parent.mkdir()
    path.write_text(PRODUCT)
    return path


@pytest.mark.parametrize("transposed", [False, True])
def test_a_tile_is_a_product_of_any_number_of_vectors(source, transposed):
    library = native.library(source)
    rows, lanes = library.rows(), library.lanes()
    for n in (lanes * vectors for vectors in range(1, 11)):
        for depth in (1, 7, 64):
            a, b, before = torch.randn(rows, depth), torch.randn(depth, n), torch.randn(rows, n)
            laid = a.T.contiguous() if transposed else a
            step = c_long(rows if transposed else 1)
            for add in (0, 1):
                c = before.clone()
                library.multiply(c_long(n), c_long(depth), step, *map(native.address, (laid, b, c)), add)
                assert torch.allclose(c, before * add + a @ b, atol=1e-5)


def test_powers_sums_and_maxima_of_vectors(source):
    library = native.library(source)
    x = torch.cat(
        [torch.linspace(-126, 127, 16000), torch.tensor([-1e30, -torch.inf] * 8), torch.full((16,), torch.nan)]
    )
    power, total, most = (torch.empty_like(x) for _ in range(3))
    library.vectors(c_long(len(x)), *map(native.address, (x, power, total, most)))
    true = x[:16000].double().exp2()
    assert ((power[:16000] - true) / true).abs().max() < 2e-7
    assert (power[16000:16016] <= 2.0**-126).all() and power[16016:].isnan().all()
    by_lane = x[:16000].view(-1, library.lanes())
    assert torch.allclose(total[:16000].view_as(by_lane), by_lane.sum(1, keepdim=True), rtol=1e-6)
    assert torch.equal(most[:16000].view_as(by_lane), by_lane.amax(1, keepdim=True).expand_as(by_lane))


def test_a_file_is_compiled_once_and_again_when_it_changes(source, home, monkeypatch):
    native.library.cache_clear()
    calls = []
    compile = native._compile
    monkeypatch.setattr(native, "_compile", lambda *args: (calls.append(args), compile(*args)))
    assert native.library(source).rows() == native.library(source).rows()
    native.library.cache_clear()  # as in the next process
    native.library(source)
    assert len(calls) == 1 and [path.suffix for path in (home / "native").iterdir()] == [".so"]
    native.library.cache_clear()
    source.write_text(PRODUCT.replace("return ROWS", "return -1"))
    assert native.library(source).rows() == -1
    assert len(calls) == 2


def test_a_torn_library_is_built_again(source, home):
    native.library.cache_clear()
    native.library(source)
    (kept,) = (home / "native").iterdir()
    kept.unlink()  # what is loaded stays as it is
    kept.write_bytes(b"torn")
    native.library.cache_clear()
    assert native.library(source).rows() > 0
    assert kept.stat().st_size > 1000


def test_a_file_the_compiler_refuses_is_an_obstacle_that_is_told(source, home):
    source.write_text("no C at all")
    assert "the C compiler failed" in native.obstacle(source)
    with pytest.raises(native.NoCompiler, match="error"):
        native.library(source)
    assert not (home / "native").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="folders have other rights there")
def test_a_home_that_cannot_be_written_is_no_obstacle(source, home):
    home.mkdir(exist_ok=True)
    (home / "native").write_text("a file where the folder would be")
    home.chmod(stat.S_IRUSR | stat.S_IXUSR)
    native.library.cache_clear()
    try:
        assert native.library(source).rows() > 0
    finally:
        home.chmod(stat.S_IRWXU)


def test_a_compiler_that_hangs_is_given_up(source, tmp_path, monkeypatch):
    slow = tmp_path / "slow-cc"
    slow.write_text("#!/bin/sh\nexec sleep 60\n")
    slow.chmod(stat.S_IRWXU)
    monkeypatch.setenv("CC", str(slow))
    monkeypatch.setattr(native, "SECONDS", 0.2)
    native._flags.cache_clear()
    try:
        assert "did not run" in native.obstacle(source)
    finally:
        native._flags.cache_clear()
