"""The description of what a run records: every series has one, it is right, and nobody writes a name of their own."""

import ast

import numpy as np
import pytest

from tests.live.synthetic import write_synthetic_run
from workbench.catalogue import PACKAGE
from workbench.live import records
from workbench.live.recipe import Recipe
from workbench.live.records import (
    AGREEMENT,
    BY_MODALITY,
    DEPTH,
    DEPTH_TEXT,
    DIVISIONS,
    FORM,
    FORM_TABLE,
    LOAD,
    LOSS,
    RANK_LOAD,
    RANK_SECONDS,
    RANK_SENT,
    RANK_WAITING,
    RECORDS,
    SPECTRUM,
    TRAIN,
    VALIDATION,
    find,
    on_validation,
)
from workbench.live.store import Run
from workbench.live.trainer import train_run

SIZES = {"d_model": 16, "n_layers": 2, "n_heads": 2, "n_experts": 4, "d_hidden": 8, "capacity_factor": 1.0}
SHORT = {"domains": ["docs", "names"], "cap": 8192, "seq_len": 16, "batch_size": 4, "steps": 13, "eval_every": 6}


@pytest.fixture(scope="module", params=["trained", "synthetic"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("run") / request.param
    if request.param == "trained":
        train_run(Recipe.from_dict(SIZES | SHORT), folder)
    else:
        write_synthetic_run(folder, 13, n_layers=2, n_experts=4, domains=("docs", "names"), n_tokens=64)
    return Run(folder)


def test_every_series_is_recorded_as_described(run: Run):
    meta = run.meta["model"]
    sizes = {"E": 4, "E'": 4, "D": 2, "M": 2, "V": 256, "R": 5, "N": 256}
    assert [layer["n_experts"] for layer in meta["layers"]] == [4, 4]
    for name in run.names():
        record = find(name)
        assert record is not None and record != TRAIN, f"{name} has no description"
        assert run.dtype(name) == record.dtype, name
        if record.dtype:
            of_matrix = record in (SPECTRUM, *(by.gradients for by in DIVISIONS.values()))
            n = {"n": min(meta["matrices"][record.of(name)[-1]])} if of_matrix else {}
            if record == AGREEMENT:
                n = {"L": len(meta["pools"][record.of(name)[0]])}
            if record == FORM_TABLE:
                layer, what = record.of(name)
                n = dict(zip("mk", meta["forms"][layer][what], strict=True))
            assert run.tensor(name)[1].shape == tuple((sizes | n).get(size, size) for size in record.shape), name


def test_every_series_is_recorded_when_described(run: Run):
    """By steps of the cadences that the run names: 10, 50, 100, and that of its evaluations."""
    cadence, last = run.meta["cadence"], run.last_step
    due = {kind: [step for step in range(last + 1) if step % every == 0] for kind, every in cadence.items()}
    due["step"] = list(range(last + 1))
    if run.meta["recipe"].get("eval_every"):
        due["evaluation"] = [5, 11, 12]  # after so many steps made, and at the end
    for name in run.names():
        assert run.steps(name).tolist() == due[find(name).cadence], name


def test_every_description_is_of_something_that_is_recorded(run: Run):
    depths = {DEPTH, DEPTH_TEXT, on_validation(DEPTH), on_validation(DEPTH_TEXT)}
    by = BY_MODALITY
    modal = {by.load, on_validation(by.load), by.coactivation, by.conflict, by.gradients}
    synthetic = run.meta["recipe"].get("name") == "synthetic"
    ranks = {RANK_LOAD, RANK_SECONDS, RANK_SENT, RANK_WAITING}
    others = set() if synthetic else {FORM, FORM_TABLE, AGREEMENT} | depths | modal | ranks
    assert {find(name) for name in run.names()} == set(RECORDS) - {TRAIN} - others


def test_a_name_is_read_back():
    assert LOAD.name("blocks.0.ffn") == "load/blocks.0.ffn" and LOSS.name() == "train/loss"
    assert LOAD.of("load/blocks.0.ffn") == ("blocks.0.ffn",) and LOSS.of("train/loss") == ()
    assert LOAD.name("") == "load/model"  # a layer that is the whole model
    assert SPECTRUM.of(SPECTRUM.name("weight", "head")) == ("weight", "head")
    for of in ((), ("a", "b")):
        with pytest.raises(ValueError, match="zip"):
            LOAD.name(*of)


@pytest.mark.parametrize(
    ("name", "record"),
    [
        ("valid/load/blocks.0.ffn", on_validation(LOAD)),
        ("valid/loss/docs", VALIDATION),
        ("valid/loads", VALIDATION),
        ("train/loss", LOSS),
        ("train/temperature", TRAIN),
        ("load", None),
        ("overload/blocks.0.ffn", None),
    ],
)
def test_a_name_is_of_the_record_it_says(name: str, record: records.Record | None):
    assert find(name) == record


def test_a_description_goes_through_json_and_says_what_it_means():
    assert LOSS.as_dict() == {
        "pattern": "train/loss",
        "cadence": "step",
        "dtype": None,
        "shape": None,
        "meaning": "task loss of the training batch, in the unit that meta names, nats in a run of ours",
    }
    assert LOAD.as_dict()["shape"] == ["E"] and np.dtype(LOAD.dtype) == np.uint32
    assert all(record.meaning for record in RECORDS)
    assert len({record.pattern for record in RECORDS}) == len(RECORDS)


def spelled_out(source: str) -> list[str]:
    """The strings of a program, without its docstrings, that begin as the name of a series does."""
    tree = ast.parse(source)
    words = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    heads = tuple({f"{record.pattern.partition('/')[0]}/" for record in RECORDS})
    strings = [node for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    return [node.value for node in strings if node.value.startswith(heads) and id(node) not in words]


def test_no_name_is_spelled_out_but_in_the_description():
    files = [path for part in (PACKAGE, PACKAGE.parent / "apps") for path in part.rglob("*.py")]
    found = {str(path): spelled_out(path.read_text(encoding="utf-8")) for path in files}
    assert found.pop(records.__file__)
    assert {path: names for path, names in found.items() if names} == {}


def test_a_name_that_is_spelled_out_is_seen():
    source = '"""load/a"""\nrun.tensors(f"load/{layer}")\nrun.scalars("train/loss")'
    assert sorted(spelled_out(source)) == ["load/", "train/loss"]
