"""The table of conventions beside the libraries themselves.

peft is installed with the `hf` extra. mergekit and fusion_bench are looked for here and then in the Python that
WORKBENCH_PEERS names, as in

    python -m venv peers && peers/bin/pip install mergekit==0.1.5 fusion_bench==0.2.33
    WORKBENCH_PEERS=peers/bin/python python -m pytest tests/lib/core/merge/test_conventions.py
"""

import importlib.util
import inspect
import os
import subprocess
from functools import cache
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import workbench
from tests.lib.core.merge import peers
from workbench.lib.core.merge import merger_class
from workbench.lib.core.merge.conventions import CONVENTIONS, VERSIONS, Convention, table
from workbench.lib.core.merge.trimmed import Dare
from workbench.lib.core.merge.vectors import Place

State = dict[str, Tensor]
SHAPES = {"a": (6, 5), "b": (9,)}
SEED = 3
NOT_BY_SIGN = ("fisher", "regmean", "tsv-m")  # these are tried on the cases of random models alone


def random_models(n: int) -> tuple[State, list[State]]:
    generator = torch.Generator().manual_seed(5)
    made = [{name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()} for _ in range(n + 1)]
    return made[0], made[1:]


def from_zero(*rows: list[float]) -> tuple[State, list[State]]:
    """Models whose changes are these rows, and these rows enlarged: no two magnitudes of an expert are equal."""
    experts = [{"a": torch.tensor([row]), "b": 1.7 * torch.tensor(row)} for row in rows]
    return {name: torch.zeros_like(x) for name, x in experts[0].items()}, experts


#: case -> (base, experts), weights, density
CASES = {
    "random": (random_models(3), [1.0, 1.0, 1.0], 0.4),
    "weighted": (random_models(3), [1.0, 0.5, 2.0], 0.4),
    "copies": (from_zero([1.0, -2.0, 3.0, 4.0, 0.1], [1.0, -2.0, 3.0, 4.0, 0.1]), [1.0, 1.0], 0.8),
    "tie to plus": (from_zero([2.0, 1.1, 1.2, 3.0, 0.1], [-2.0, 1.3, 1.4, 3.1, 0.2]), [1.0, 1.0], 0.8),
    "tie to minus": (from_zero([2.0, -1.1, -1.2, -3.0, 0.1], [-2.0, -1.3, -1.4, -3.1, 0.2]), [1.0, 1.0], 0.8),
    "ties alone": (from_zero([2.0, -1.1, 3.0, 4.0, 0.1], [-2.0, 1.1, -3.0, -4.0, -0.1]), [1.0, 1.0], 0.8),
    "tiny": (from_zero([1.0, -2.0, 3.0, 4.0, 0.1], [-4.0, 1.0, 0.5, 0.25, 0.2]), [1.0, 1.0], 0.01),
}
MEASURED = ("random", "weighted")  # cases with Fisher diagonals and grams


def positive(name: str, i: int) -> Tensor:
    return torch.rand(SHAPES[name], generator=torch.Generator().manual_seed(100 + i)) + 0.1


def gram(i: int) -> Tensor:
    x = torch.randn(40, 5, generator=torch.Generator().manual_seed(200 + i))
    return x.T @ x / 40


def masks(case: str, name: str) -> Tensor:
    """What DARE keeps here, (n, *shape), for the peer to keep too."""
    (base, experts), _, density = CASES[case]
    size = base[name].numel()
    kept = Dare(density, seed=SEED).kept(torch.ones(len(experts), size), Place(name, 0, size, 0))
    return kept.view(len(experts), *base[name].shape)


def given() -> State:
    """All cases, as `peers` reads them."""
    tensors = {}
    for case, ((base, experts), weights, density) in CASES.items():
        tensors |= {f"{case}/base/{name}": x for name, x in base.items()}
        tensors |= {f"{case}/{i}/{name}": x for i, expert in enumerate(experts) for name, x in expert.items()}
        tensors |= {f"{case}/mask/{i}/{k}": masks(case, k)[i].contiguous() for i in range(len(experts)) for k in base}
        tensors |= {f"{case}/weights": torch.tensor(weights), f"{case}/density": torch.tensor(density).double()}
        if case in MEASURED:
            tensors |= {f"{case}/fisher/{i}/{k}": positive(k, i) for i in range(len(experts)) for k in base}
            tensors |= {f"{case}/gram/{i}/a": gram(i) for i in range(len(experts))}
    return tensors


@cache
def made_by(peer: str) -> State | str:
    """What the peer makes of all cases, or its error; the test is skipped where no Python has it."""
    if importlib.util.find_spec(peer):
        if version(peer) < VERSIONS[peer]:
            pytest.skip(f"{peer} is {version(peer)}, the table is of {VERSIONS[peer]}")
        return peers.run(peer, given())
    python = os.environ.get("WORKBENCH_PEERS")
    if not python:
        pytest.skip(f"{peer} is not installed, and WORKBENCH_PEERS names no Python that has it")
    with TemporaryDirectory() as folder:
        paths = [str(Path(folder) / name) for name in ("in.safetensors", "out.safetensors")]
        save_file(given(), paths[0])
        done = subprocess.run([python, peers.__file__, peer, *paths], capture_output=True, text=True, timeout=300)
        if "ModuleNotFoundError" in done.stderr and peer in done.stderr.splitlines()[-1]:
            pytest.skip(f"{python} has no {peer}")
        if done.returncode:
            return done.stderr[-2000:]
        return load_file(paths[1])


def ours(row: Convention, case: str) -> State:
    """The same by `workbench.merge`."""
    (base, experts), weights, density = CASES[case]
    takes = inspect.signature(merger_class(row.method)).parameters
    options = dict(row.options)
    if row.weighted and "weights" in takes:
        options["weights"] = weights
    if "density" in takes:
        size = sum(x.numel() for x in base.values())
        options["density"] = (int(density * size) + row.more + 0.5) / size if row.more else density
    if "seed" in takes and "rescale" in takes:
        options["seed"] = SEED
    if row.method == "fisher":
        options["fishers"] = [{name: positive(name, i) for name in base} for i in range(len(experts))]
    if row.method == "regmean":
        options |= {"grams": [{"a": gram(i)} for i in range(len(experts))], "off_diagonal": 0.7}
        base, *experts = [{"a.weight": state["a"], "b": state["b"]} for state in (base, *experts)]
    merged = workbench.merge(base, experts, row.method, **options)
    return {name.removesuffix(".weight"): x for name, x in merged.items()}


def theirs(row: Convention, case: str) -> State:
    made = made_by(row.peer)
    assert not isinstance(made, str), made
    return {name: made[f"{case}/{row.call}/{name}"] for name in CASES[case][0][0]}


def cases_of(row: Convention) -> list[str]:
    cases = [case for case in CASES if row.weighted or case != "weighted"]
    return [case for case in cases if case in MEASURED] if row.method in NOT_BY_SIGN else cases


def name_of(row: Convention) -> str:
    return f"{row.peer}-{row.call}"


@pytest.mark.parametrize("row", CONVENTIONS, ids=name_of)
def test_the_peer_makes_what_the_table_says(row: Convention):
    for case in cases_of(row):
        found, expected = ours(row, case), theirs(row, case)
        for name in expected:
            torch.testing.assert_close(found[name], expected[name], rtol=2e-5, atol=2e-5, msg=f"{case}, {name}")


@pytest.mark.parametrize("row", [row for row in CONVENTIONS if row.method not in NOT_BY_SIGN], ids=name_of)
def test_what_the_table_says_of_copies_ties_and_tiny_densities_is_so_here(row: Convention):
    """Of the options here, which are the peer's by the test above, whether it is installed or not."""
    (_, experts), *_ = CASES["copies"]
    merged, change = ours(row, "copies")["b"], experts[0]["b"]
    if row.method.startswith("dare"):  # a copy may be dropped while the other stays
        merged = workbench.merge(*CASES["copies"][0], row.method, **row.options, density=1.0)["b"]
    assert merged[:4].tolist() == pytest.approx((row.copies * change[:4]).tolist())
    if row.tie and row.method == "ties":
        signs = [ours(row, case)["b"][0].sign().item() for case in ("tie to plus", "tie to minus", "ties alone")]
        assert signs == {"plus": [1, 1, 1], "either": [1, -1, -1]}[row.tie]
    if row.tiny is not None:
        kept = [int((ours(row, "tiny")[name] != 0).sum()) for name in ("a", "b")]
        assert kept == ([0, 2] if row.options["scope"] == "global" else [2 * row.tiny] * 2)  # one of each expert


def test_the_table_has_every_option_that_differs():
    rows = table()
    assert len(rows) == len(CONVENTIONS) and len({(row["peer"], row["call"]) for row in rows}) == len(rows)
    assert all(row["here"].startswith("merge(") for row in rows)
    by = {name: {row.options.get(name) for row in CONVENTIONS if name in row.options} for name in ("scope", "elect")}
    assert by == {"scope": {"tensor", "global"}, "elect": {"values", "weighted", "signs", None}}
