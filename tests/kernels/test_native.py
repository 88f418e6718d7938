"""What the native paths share: how a C file is built, kept and found again, and the arithmetic of tile.h."""

import itertools
import os
import stat
import sys
from ctypes import c_long

import pytest
import torch

from tests.fuzz import plans
from tests.fuzz.harness import try_all
from workbench.errors import InputError
from workbench.kernels import native
from workbench.kernels.block_sparse_attention import native as attention
from workbench.kernels.block_sparse_attention.index import BlockIndex
from workbench.kernels.moe_mlp import native as experts
from workbench.kernels.native.cases import INDEX, PLAN, calls
from workbench.kernels.native.sanitize import sanitize
from workbench.kernels.plan import RoutePlan

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


@pytest.mark.parametrize("share", [0.0, 0.99])
def test_a_library_that_was_cut_short_is_built_again(source, home, share):
    native.library.cache_clear()
    native.library(source)
    (kept,) = (home / "native").iterdir()
    content = kept.read_bytes()
    kept.unlink()  # what is loaded stays as it is
    kept.write_bytes(content[: int(len(content) * share)])
    native.library.cache_clear()
    assert native.library(source).rows() > 0
    assert [path.read_bytes() for path in (home / "native").iterdir()] == [content]


def test_another_library_of_that_name_is_not_loaded(source, home):
    native.library.cache_clear()
    native.library(source)
    (kept,) = (home / "native").iterdir()
    source.write_text(PRODUCT.replace("return ROWS", "return -1"))
    native.library.cache_clear()
    native.library(source)
    (other,) = set((home / "native").iterdir()) - {kept}
    other.replace(kept)
    source.write_text(PRODUCT)
    native.library.cache_clear()
    assert native.library(source).rows() > 0


def test_what_is_kept_is_the_persons_own(source, home):
    native.library.cache_clear()
    before = os.umask(0)
    try:
        native.library(source)
    finally:
        os.umask(before)
    for path in (home / "native", *(home / "native").iterdir()):
        assert not path.stat().st_mode & 0o077


@pytest.mark.parametrize("whose", ["writable by others", "another person's"])
def test_a_folder_that_others_may_write_is_not_used(source, home, monkeypatch, whose):
    native.library.cache_clear()
    native.library(source)
    folder = home / "native"
    (kept,) = folder.iterdir()
    kept.unlink()
    if whose == "writable by others":
        folder.chmod(0o770)
    elif os.geteuid() == 0:
        os.chown(folder, 1, -1)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: folder.stat().st_uid + 1)
    native.library.cache_clear()
    with pytest.warns(UserWarning, match="may be written by others, so no compiled code is taken from it"):
        assert native.library(source).rows() > 0
    assert not [*folder.iterdir()]


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


def test_calls_that_cannot_be_are_refused_on_every_path(tmp_path):
    tally = try_all(itertools.islice(plans.cases(tmp_path, seed=1), 40))
    assert not tally.faults and tally.refused["plans"] > 10


def test_c_and_python_say_the_same_of_a_plan_and_of_an_index(compiler):
    """The two ways to look at one: whatever the form allows, both take it or both refuse it."""
    seen = {"taken": 0, "refused": 0}
    for call in itertools.islice(calls(seed=2), 800):
        given = call.arguments
        if any(isinstance(x, torch.Tensor) and not x.ndim for x in given.values()):
            continue
        if "order" in given and "x" in given:
            made = RoutePlan(*(given[name] for name in PLAN), len(given["x"]), len(given["w1"]), given["top_k"])
            form, fits = made.require_form, experts.fits
        elif "block_size" in given and "rows" in given:
            made = BlockIndex(given["block_size"], *(given[name] for name in INDEX))
            form, fits = lambda made=made, q=given["q"]: made.require_form(*q.shape[:2]), attention.fits
        else:
            continue
        try:
            form()
        except (InputError, TypeError, IndexError):  # q, x or w1 may be what is no tensor of theirs
            continue
        try:
            made._require_values()
            says = "taken"
        except InputError:
            says = "refused"
        assert fits(made) == (says == "taken"), call.name
        seen[says] += 1
    assert min(seen.values()) > 10


def test_the_sanitizers_find_nothing():
    try:
        findings = sanitize(28, seed=1)
    except InputError as error:
        if "has no" in str(error) or "no C compiler" in str(error):
            pytest.skip(str(error))
        raise
    assert findings.found == () and findings.sound == 14 and findings.refused > 5
