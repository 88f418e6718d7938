"""Which path runs: by device, by request, never in silence; and what importing an operator brings along."""

import importlib
import subprocess
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from workbench.errors import InputError
from workbench.kernels import (
    RoutePlan,
    block_gate_topk,
    block_sparse_attention,
    column_topk,
    dct2_rows,
    dispatch,
    gather_columns,
    gather_sum,
    moe_mlp,
    native,
    newton_schulz,
)

operator = importlib.import_module("workbench.kernels.block_sparse_attention")

ALL = ("reference", "cpu", "triton")
CPU, GPU, META, OTHER = (torch.device(name) for name in ("cpu", "cuda", "meta", "mps"))


def test_the_device_decides_unless_a_backend_is_named(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert dispatch.choose("op", None, CPU, ALL) == "cpu"
    assert dispatch.choose("op", None, GPU, ALL) == "triton"
    assert dispatch.choose("op", None, OTHER, ALL) == dispatch.choose("op", None, META, ALL) == "reference"
    assert dispatch.choose("op", None, CPU, ("reference", "triton")) == "reference"
    assert dispatch.choose("op", "reference", GPU, ALL) == "reference"


def test_a_backend_that_cannot_do_it_is_an_error(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(InputError, match="backend of op 'tritn' is unknown; did you mean 'triton'"):
        dispatch.choose("op", "tritn", CPU, ALL)
    with pytest.raises(InputError, match="backend is 'cpu' but op got tensors on cuda"):
        dispatch.choose("op", "cpu", GPU, ALL)
    monkeypatch.setattr(dispatch, "find_spec", lambda name: object())
    with pytest.raises(
        InputError, match="must be on a GPU, or on the CPU in a process started with TRITON_INTERPRET=1"
    ):
        dispatch.choose("op", "triton", CPU, ALL)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert dispatch.choose("op", "triton", CPU, ALL) == "triton"
    monkeypatch.setattr(dispatch, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="the package triton is not installed"):
        dispatch.choose("op", "triton", GPU, ALL)


@pytest.fixture
def no_compiler(monkeypatch):
    """As on a machine without a C compiler; what was built before is forgotten, and found again afterwards."""
    monkeypatch.setenv("CC", "no-such-compiler")
    for cache in (native.obstacle, native.library, native._flags):
        cache.cache_clear()
    yield
    for cache in (native.obstacle, native.library, native._flags):
        cache.cache_clear()


def test_the_native_path_is_for_float32_on_a_processor():
    available = ("reference", "cpu", "native")
    assert dispatch.choose("op", None, CPU, available, torch.float32, operator.NATIVE) == "native"
    assert dispatch.choose("op", None, CPU, available, torch.float64, operator.NATIVE) == "cpu"
    assert dispatch.choose("op", None, META, available, torch.float32, operator.NATIVE) == "reference"
    assert dispatch.choose("op", "native", CPU, available, torch.float32, operator.NATIVE) == "native"
    with pytest.raises(InputError, match="backend is 'native' but op got tensors of"):
        dispatch.choose("op", "native", CPU, available, torch.float64, operator.NATIVE)
    with pytest.raises(InputError, match="backend is 'native' but op got tensors on cuda"):
        dispatch.choose("op", "native", GPU, available, torch.float32, operator.NATIVE)


def test_without_a_compiler_the_cpu_path_runs_and_is_recorded(no_compiler):
    x = torch.randn(10, 2, 4)
    with dispatch.recording() as seen:
        chosen = block_gate_topk(x, x, 4, 2)
        block_sparse_attention(x, x, x, chosen)
    assert seen == [("block_gate_topk", "cpu"), ("block_sparse_attention", "cpu")]
    with pytest.raises(InputError, match="there is no C compiler 'no-such-compiler'"):
        block_gate_topk(x, x, 4, 2, backend="native")


def test_the_record_says_which_path_ran():
    plan = RoutePlan.build(torch.tensor([0, 1]), 2, top_k=1)
    x, w1, w2 = torch.randn(2, 4, requires_grad=True), torch.randn(2, 8, 4), torch.randn(2, 4, 4)
    with dispatch.recording() as outer:
        moe_mlp(x, w1, w2, plan, torch.ones(2), backend="grouped_mm").sum().backward()
        with dispatch.recording() as inner:
            gather_sum(torch.randn(2, 4), plan, backend="reference")
    gather_sum(torch.randn(2, 4), plan)
    assert inner == [("gather_sum", "reference")]
    assert outer == [("moe_mlp", "grouped_mm"), ("moe_mlp.backward", "grouped_mm"), *inner]
    assert dispatch.last_backend("moe_mlp.backward") == "grouped_mm"
    assert dispatch.last_backend("gather_sum") == "cpu"
    assert dispatch.last_backend("never") is None


def test_operators_run_where_triton_and_transformers_are_missing_and_know_nothing_of_the_library():
    code = """
import sys
sys.modules['triton'] = sys.modules['transformers'] = None  # importing them fails
import torch
from workbench.kernels import RoutePlan, moe_mlp, gather_sum, topk_softmax, register_transformers
weights = torch.ones(1, 8, 4), torch.ones(1, 4, 4)
moe_mlp(torch.ones(1, 4), *weights, RoutePlan.build(torch.tensor([0]), 1, top_k=1), torch.ones(1))
assert {'workbench.kernels.moe_mlp.cpu', 'workbench.kernels.moe_mlp.native'} & set(sys.modules)
wrong = [name for name in sys.modules if name.startswith('workbench.lib') or name.endswith('.triton')]
assert not [name for name in wrong if name.startswith('workbench')], wrong
"""
    subprocess.run([sys.executable, "-c", code], check=True)


class Named(TorchDispatchMode):
    """Keeps the names of the operators that torch is asked for."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.name())
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("newton_schulz", newton_schulz),
        ("dct_rows", dct2_rows),
        ("column_topk", lambda x: column_topk(x, 3)[1]),
        ("gather_columns", lambda x: gather_columns(x, torch.tensor([2, 0]))),
    ],
)
def test_past_its_registration_an_operator_is_called_only_where_nobody_looks_on(name, call):
    x = torch.randn(6, 9, generator=torch.Generator().manual_seed(0))
    assert not dispatch.unseen(x)  # autograd does
    registered = call(x)
    with torch.no_grad():
        assert dispatch.unseen(x) and not dispatch.unseen(torch.nn.Parameter(x))
        with dispatch.recording() as ran:
            assert torch.equal(call(x), registered)
        assert [op for op, _ in ran] == [name]
        with Named() as seen:
            assert torch.equal(call(x), registered)
        assert f"workbench::{name}" in seen.names
