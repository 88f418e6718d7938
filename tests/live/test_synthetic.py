"""The synthetic run: every recorded name, and numbers that belong together."""

import numpy as np
import pytest

from tests.live.synthetic import CADENCE, synthetic_meta, synthetic_steps, write_synthetic_run
from workbench.live.store import Run, RunWriter


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    return Run(
        write_synthetic_run(folder, n_steps=201, n_layers=2, n_experts=6, top_k=2, domains=("a", "b"), n_tokens=500)
    )


def test_it_holds_every_name_at_its_cadence(run):
    assert run.status.state == "finished" and run.last_step == 200
    layers = [layer["name"] for layer in run.meta["model"]["layers"]]
    first, second = layers
    for kind in ("load", "importance", "load_by_domain", "dropped"):
        assert np.diff(run.steps(f"{kind}/{second}")).tolist() == [CADENCE["routing"]] * 20
    for kind in ("coactivation", "transition"):
        assert run.steps(f"{kind}/{first}").tolist() == [0, 50, 100, 150, 200]
    assert run.tensor(f"transition/{second}") is None  # there is no next layer
    for matrix, shape in run.meta["model"]["matrices"].items():
        for what in ("weight", "update", "gradient"):
            values = run.tensor(f"spectrum/{what}/{matrix}")[1]
            assert values.shape == (min(shape),) and (np.diff(values) <= 0).all() and (values > 0).all()
    for group in run.meta["model"]["groups"]:
        assert run.tensors(f"conflict/{group}")[1].shape == (3, 3, 2, 2)
    assert run.steps("train/loss").tolist() == list(range(201))
    assert run.scalars("valid/loss/b")[0].tolist() == [0]
    confidence = run.scalars(f"router/{first}/confidence")[1]
    assert ((confidence > 1 / 6) & (confidence < 1)).all()


def test_the_counts_of_a_step_agree(run):
    loads, importance = run.tensors("load/blocks.0.ffn")[1], run.tensors("importance/blocks.0.ffn")[1]
    assert (loads.sum(axis=1) == 500 * 2).all()
    np.testing.assert_allclose(importance.sum(axis=1), 1, rtol=1e-5)
    np.testing.assert_array_equal(run.tensors("load_by_domain/blocks.0.ffn")[1].sum(axis=1), loads)
    pairs = run.tensor("coactivation/blocks.0.ffn", 50)[1]
    np.testing.assert_array_equal(pairs, pairs.T)
    np.testing.assert_array_equal(np.diag(pairs), loads[5])
    np.testing.assert_array_equal(pairs.sum(axis=1), 2 * loads[5])  # K = 2: each token of i has one partner
    step = run.tensor("transition/blocks.0.ffn", 50)[1]
    np.testing.assert_array_equal(step.sum(axis=1), 2 * loads[5])
    np.testing.assert_array_equal(step.sum(axis=0), 2 * run.tensor("load/blocks.1.ffn", 50)[1])
    tokens = run.tensors("tokens/blocks.0.ffn")[1]
    assert tokens.shape == (3, 6, 256)
    assert (tokens[1:].sum(axis=(1, 2)) >= 10 * 500 * 2).all()  # ten batches, and evaluations


def test_the_same_seed_gives_the_same_run(tmp_path):
    found = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run = Run(write_synthetic_run(tmp_path / name, n_steps=11, n_layers=1, seed=seed))
        found.append(run.tensors("load/blocks.0.ffn")[1].tolist())
    assert found[0] == found[1] != found[2]


def test_top_1_has_no_coactivation(tmp_path):
    run = Run(write_synthetic_run(tmp_path / "run", n_steps=1, n_layers=2, top_k=1))
    assert run.names("coactivation/") == [] and len(run.names("transition/")) == 1


def test_it_can_be_watched_while_it_goes(tmp_path):
    meta = synthetic_meta(30, 1, 4, 2, 0, ("a",))
    with RunWriter.create(tmp_path / "run", meta) as writer:
        steps = synthetic_steps(writer, 30, n_layers=1, n_experts=4, domains=("a",))
        for _ in range(12):
            next(steps)
        with Run(writer.folder) as run:
            assert run.status.state == "running" and run.last_step == 11
            assert run.steps("load/blocks.0.ffn").tolist() == [0, 10]
