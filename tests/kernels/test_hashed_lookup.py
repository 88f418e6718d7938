"""Hashed lookups on their CPU paths: EmbeddingBag's sums, equal bits, threads, updates in place, what is refused."""

import pytest
import torch
from torch import nn

from tests.draws import draw
from workbench.errors import InputError
from workbench.kernels import Lookups, dispatch, hashed_lookup, threads
from workbench.kernels.hashed_lookup import BY_ID, COLUMNS, native
from workbench.kernels.hashed_lookup.reference import hashed, mixed
from workbench.kernels.memory import saved_bytes

PATHS = ("reference", "native")
SIZES = (7, 40, 5)
POOLED = Lookups(
    table=(0, 1, 1, 2, 0),
    first=(0, 0, 3, 0, 1),
    count=(7, 40, 30, 5, 6),
    salt=(3, 0, 2**63 - 1, BY_ID, BY_ID),
    field=(0, 1, 1, 2, 2),
    slot=(0, 0, 1, 1, 2),
)
LOOKUPS = list(zip(*(getattr(POOLED, name) for name in COLUMNS), strict=True))
ops = torch.ops.workbench


def problem(n=50, dim=5, dtype=torch.float32):
    tables = [draw(size, dim, dtype=dtype, seed=i).requires_grad_() for i, size in enumerate(SIZES)]
    ids = torch.randint(-(2**63), 2**63 - 1, (n, 3), generator=torch.Generator().manual_seed(0))
    ids[:, 2] %= 5
    return tables, ids


def by_ids(sizes):
    fields, one = tuple(range(len(sizes))), (0,) * len(sizes)
    return Lookups(fields, one, tuple(sizes), (BY_ID,) * len(sizes), fields, fields)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("mean", [False, True])
def test_by_hand(path, mean):
    tables, ids = problem(dtype=torch.float64 if path == "reference" else torch.float32)
    out = hashed_lookup(tables, ids, POOLED, mean=mean, backend=path)
    assert dispatch.last_backend("hashed_lookup") == path
    for i, row in enumerate(ids.tolist()):
        slots = {}
        for t, first, count, salt, field, slot in LOOKUPS:
            value = row[field] if salt == BY_ID else (splitmix(row[field], salt) >> 1) % count
            slots.setdefault(slot, []).append(tables[t][first + value])
        parts = [torch.stack(each).mean(0) if mean else torch.stack(each).sum(0) for each in slots.values()]
        torch.testing.assert_close(out[i], torch.cat(parts))


def splitmix(value: int, salt: int) -> int:
    """In Python's integers."""
    full = 2**64 - 1
    x = value + 0x9E3779B97F4A7C15 * (salt + 1) & full
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & full
    x = (x ^ x >> 27) * 0x94D049BB133111EB & full
    return x ^ x >> 31


def test_the_hash_is_splitmix64():
    """The first outputs of the generator from state 0, as its authors' program prints them."""
    state = torch.zeros(1, dtype=torch.int64)
    words = [int(mixed(state, salt)) & (2**64 - 1) for salt in range(3)]
    assert words == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


@pytest.mark.parametrize("count", [1, 2, 3, 2**16 + 1, 2**30 - 35, 2**30])
def test_remainders_are_exact_for_any_number_of_rows(count, compiler):
    """Of the 4 GiB of the largest table next to nothing is touched, so that the system gives next to no memory."""
    ids = torch.randint(-(2**63), 2**63 - 1, (200, 1), generator=torch.Generator().manual_seed(1))
    lookups = Lookups((0,), (0,), (count,), (5,), (0,), (0,))
    _, rows = ops.hashed_lookup([torch.empty(count, 1)], ids, lookups.flat(), False, "native")
    assert torch.equal(rows[:, 0], hashed(ids[:, 0], 5, count))


@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("dim", [1, 5, 8, 15, 16, 17, 40])
def test_paths_agree_to_the_last_bit(dim, mean, compiler):
    tables, ids = problem(dim=dim)
    ours, theirs = (hashed_lookup(tables, ids, POOLED, mean=mean, backend=path) for path in ("native", "reference"))
    assert torch.equal(ours, theirs)
    grad = draw(*ours.shape, seed=9)
    grads = (torch.autograd.grad(y, tables, grad) for y in (ours, theirs))
    assert all(torch.equal(*pair) for pair in zip(*grads, strict=True))
    assert dispatch.last_backend("hashed_lookup") == "reference"


@pytest.mark.parametrize("path", PATHS)
def test_one_lookup_a_field_is_an_embedding_each(path):
    sizes, ids = (4, 9, 3), torch.stack([torch.arange(12) % size for size in (4, 9, 3)], 1)
    parts = [nn.Embedding(size, 6) for size in sizes]
    tables = [part.weight for part in parts]
    expected = torch.cat([part(ids[:, f]) for f, part in enumerate(parts)], 1)
    out = hashed_lookup(tables, ids, by_ids(sizes), backend=path)
    grad = draw(*out.shape)
    assert torch.equal(out, expected)
    pairs = zip(*(torch.autograd.grad(y, tables, grad) for y in (out, expected)), strict=True)
    assert all(torch.equal(*pair) for pair in pairs)


@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_values_of_one_field_are_a_bag(mode):
    bag, ids = nn.EmbeddingBag(30, 4, mode=mode), torch.randint(30, (20, 5))
    same = (0,) * 5
    lookups = Lookups(same, same, (30,) * 5, (BY_ID,) * 5, tuple(range(5)), same)
    for path in PATHS:
        out = hashed_lookup([bag.weight], ids, lookups, mean=mode == "mean", backend=path)
        torch.testing.assert_close(out, bag(ids))


def test_gradients_of_any_order():
    tables, ids = problem(6, 3, torch.float64)
    for mean in (False, True):
        assert torch.autograd.gradcheck(lambda *t: hashed_lookup(t, ids, POOLED, mean=mean), tables)  # noqa: B023
        assert torch.autograd.gradgradcheck(lambda *t: hashed_lookup(t, ids, POOLED, mean=mean), tables)  # noqa: B023


@pytest.mark.parametrize("path", PATHS)
def test_rows_are_moved_in_the_backward_pass_and_no_others(path):
    tables, ids = problem(n=3)
    out = hashed_lookup(tables, ids, POOLED, mean=True, lr=0.5, backend=path)
    grad, before = draw(*out.shape), [t.detach().clone() for t in tables]
    dense = torch.autograd.grad(hashed_lookup(tables, ids, POOLED, mean=True, backend=path), tables, grad)
    assert torch.equal(out, hashed_lookup(tables, ids, POOLED, mean=True, backend=path))
    versions = [t._version for t in tables]
    out.backward(grad)
    for table, was, step, version in zip(tables, before, dense, versions, strict=True):
        assert table.grad is None and table._version > version
        torch.testing.assert_close(table.detach(), was - 0.5 * step)
        still = ~step.any(1)
        assert still.any() or len(table) < 10
        assert torch.equal(table.detach()[still], was[still])


def test_threads_change_no_bit(monkeypatch, compiler):
    monkeypatch.setattr(native, "WORTH", 1)
    tables, ids = problem(n=67, dim=20)
    shared, share = [], threads.share
    monkeypatch.setattr(threads, "share", lambda parts, *rest: (shared.append(len(parts)), share(parts, *rest)))
    found, before = [], torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            out = hashed_lookup(tables, ids, POOLED)
            found.append([out, *torch.autograd.grad(out, tables, torch.ones_like(out))])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(*pair) for other in found[1:] for pair in zip(found[0], other, strict=True))
    assert shared == ([2, 2, 3, 3] if threads._controls() else [])


def test_only_places_are_kept_and_nothing_is_made_beside_the_result(compiler):
    tables, ids = problem(n=400, dim=16)
    made = []

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            made.extend(t.numel() for t in torch.utils._pytree.tree_leaves(result) if isinstance(t, torch.Tensor))
            return result

    with Largest():
        out = hashed_lookup(tables, ids, POOLED)
    assert max(made) == out.numel() == 400 * 3 * 16  # five lookups a row
    assert saved_bytes(lambda: hashed_lookup(tables, ids, POOLED), tables) == 8 * 400 * 5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_added_wide_and_rounded_once(dtype):
    tables, ids = problem(dtype=dtype)
    wide = [t.detach().float().requires_grad_() for t in tables]
    out, exact = (hashed_lookup(given, ids, POOLED, mean=True) for given in (tables, wide))
    assert out.dtype == dtype and torch.equal(out, exact.to(dtype))
    grad = draw(*out.shape, dtype=dtype, seed=3)
    grads = torch.autograd.grad(out, tables, grad), torch.autograd.grad(exact, wide, grad.float())
    assert all(torch.equal(a, b.to(dtype)) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("path", PATHS)
def test_registration_and_compilation(path):
    tables, ids = problem(n=4)
    flat = POOLED.flat()
    torch.library.opcheck(ops.hashed_lookup.default, (tables, ids, flat, True, path))
    rows = ops.hashed_lookup(tables, ids, flat, True, path)[1]
    torch.library.opcheck(ops.hashed_gather.default, (tables, rows, flat, True, path))
    grad, plain = draw(4, 15).requires_grad_(), [t.detach() for t in tables]
    torch.library.opcheck(ops.hashed_scatter.default, (grad, rows, flat, SIZES, 5, True, path))
    torch.library.opcheck(ops.hashed_update.default, (plain, grad.detach(), rows, flat, True, -0.5, path))
    compiled = torch.compile(
        lambda *t: hashed_lookup(t, ids, POOLED, backend=path), fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(compiled(*tables), hashed_lookup(tables, ids, POOLED, backend=path))


@pytest.mark.parametrize("path", PATHS)
def test_views_nothing_and_what_is_not_a_number(path):
    tables, ids = problem()
    expected = hashed_lookup(tables, ids, POOLED, backend=path)
    apart = [torch.stack([t.detach(), t.detach()], -1)[..., 0] for t in tables]
    assert torch.equal(hashed_lookup(apart, ids.T.contiguous().T, POOLED, backend=path), expected)
    none = hashed_lookup(tables, ids[:0], POOLED, backend=path)
    assert none.shape == (0, 15) and not any(g.any() for g in torch.autograd.grad(none.sum(), tables))
    with torch.no_grad():
        tables[2][1] = torch.nan
    out = hashed_lookup(tables, ids, POOLED, backend=path)
    assert torch.equal(out[:, 5:10].isnan().all(1), ids[:, 2] == 1) and not out[:, :5].isnan().any()


def test_wrong_input_is_named(compiler):
    tables, ids = problem()
    rows = ops.hashed_lookup(tables, ids, POOLED.flat(), False, "native")[1]
    apart = [torch.stack([t.detach(), t.detach()], -1)[..., 0].requires_grad_() for t in tables]
    far, under = ids.clone(), ids.clone()
    far[3, 2], under[7, 2] = 5, -1
    with pytest.raises(InputError, match=r"have .* entries but must have as many each"):
        Lookups((0,), (0,), (1,), (0,), (0, 1), (0,))

    def lookups(**changes):
        given = {"table": (0, 1), "first": (0, 0), "count": (7, 40), "salt": (0, 0), "field": (0, 1), "slot": (0, 1)}
        return Lookups(**(given | changes))

    for path in PATHS:
        for wrong, said in ((far, "ids of field 2 are from 0 to 5 but must be from 0 to 4"), (under, "from -1 to 4")):
            with pytest.raises(InputError, match=said):
                hashed_lookup(tables, wrong, POOLED, backend=path)
        other = rows.clone()
        other[2, 1] = 40
        with pytest.raises(InputError, match=r"rows of lookup 1 are from .* to 40 but must be from 0 to 39"):
            ops.hashed_gather(tables, other, POOLED.flat(), False, path)
        with pytest.raises(InputError, match="rows of lookup 1"):
            ops.hashed_scatter(draw(50, 15), other, POOLED.flat(), SIZES, 5, False, path)
    for call, message in [
        (lambda: hashed_lookup([], ids, POOLED), "tables are none but must be at least one"),
        (lambda: hashed_lookup(tables, ids.int(), POOLED), "ids are torch.int32 of shape .* must be torch.int64"),
        (lambda: hashed_lookup(tables, ids[0], POOLED), r"ids are torch.int64 of shape \(3,\)"),
        (lambda: hashed_lookup([t.long() for t in tables], ids, POOLED), "a table is torch.int64"),
        (lambda: hashed_lookup([*tables[:2], tables[2][:, :2]], ids, POOLED), "tables are 5 and 2 wide"),
        (lambda: hashed_lookup(tables, ids.to("meta"), POOLED), "ids are on meta but must be on cpu"),
        (lambda: hashed_lookup(tables, ids, lookups(table=(0, 3))), "table 3 but must be in one of 3"),
        (lambda: hashed_lookup(tables, ids, lookups(count=(8, 1))), "rows 0 to 7 of table 0 but must be .* its 7"),
        (lambda: hashed_lookup(tables, ids, lookups(first=(-1, 0))), "rows -1 to 5"),
        (lambda: hashed_lookup(tables, ids, lookups(count=(0, 1))), "rows 0 to -1"),
        (lambda: hashed_lookup(tables, ids, lookups(salt=(-2, 0))), "has salt -2"),
        (lambda: hashed_lookup(tables, ids, lookups(field=(0, 3))), "field 3 but must have .* one of 3 fields"),
        (lambda: hashed_lookup(tables, ids, lookups(slot=(0, 2))), r"slots of the lookups are \[0, 2\]"),
        (lambda: hashed_lookup(tables, ids, lookups(slot=(1, 1))), "must ascend from 0"),
        (lambda: hashed_lookup(tables, ids, POOLED, lr=-1.0), "lr is -1.0 but must be finite"),
        (lambda: hashed_lookup(tables, ids, POOLED, backend="cuda"), "backend of hashed_lookup 'cuda' is unknown"),
        (lambda: hashed_lookup([t.double() for t in tables], ids, POOLED, backend="native"), "must be torch.float32"),
        (lambda: ops.hashed_lookup(tables, ids, [0, 0, 7], False, "native"), "lookups have 3 numbers"),
        (lambda: ops.hashed_gather(tables, rows[:, 1:], POOLED.flat(), False, "native"), "must be .*: of each lookup"),
        (
            lambda: ops.hashed_scatter(draw(50, 14), rows, POOLED.flat(), SIZES, 5, False, "native"),
            "grad is .* but must",
        ),
        (lambda: ops.hashed_scatter(draw(50, 15), rows, POOLED.flat(), (-1, 40, 5), 5, False, "native"), "sizes are"),
        (lambda: hashed_lookup(apart, ids, POOLED, lr=0.1).sum().backward(), "tables must be contiguous, because"),
    ]:
        with pytest.raises(InputError, match=message):
            call()
