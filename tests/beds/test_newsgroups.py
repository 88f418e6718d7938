"""Adapters on real weights and text: MiniLM, and posts of four newsgroups. Skipped where they cannot be fetched."""

import pytest
import torch
from torch.nn import functional as F

from workbench.beds import newsgroups as bed
from workbench.errors import InputError
from workbench.lib.core.adapt import adapt, load_adapter
from workbench.lib.core.train import TrainConfig, train
from workbench.lib.data import fetch, store

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def task():
    try:
        bed.fetch()
    except InputError as error:
        pytest.skip(f"MiniLM or the newsgroups cannot be fetched: {error}")
    return bed.make_task(bed.GROUPS[2:6], rows=24, length=32)


@pytest.fixture(scope="module")
def weights(task):
    return bed.base(task, decay=1e-3).state_dict()  # not yet at the end of what there is to learn


@pytest.fixture
def model(task, weights):
    made = bed.TextClassifier(encoder(), task.n_classes).eval()
    made.load_state_dict(weights)
    return made


def encoder():
    folder = store.folder(bed.MINILM) / bed.FOLDER
    return transformers.AutoModel.from_pretrained(folder, add_pooling_layer=False)


def test_the_weights_are_those_that_were_published_and_they_know_the_subjects(task, model, weights):
    theirs = encoder().state_dict()
    assert all(torch.equal(weights[f"encoder.{name}"], value) for name, value in theirs.items())
    assert task.data.splits["train"][0].shape == (4 * 24, 32) and len(set(task.data.splits["test"][1].tolist())) == 4
    assert task.evaluate(model, "test")["accuracy"] > 0.5  # one in four by chance


@pytest.mark.parametrize(("slug", "options"), [("lora", {"rank": 4}), ("smora", {"rank": 8, "active_rank": 2})])
def test_an_adapted_encoder_learns_its_text_and_comes_back_from_its_file(task, model, weights, slug, options, tmp_path):
    x, y = (part[:24] for part in task.data.splits["train"])

    def loss() -> float:
        with torch.no_grad():
            return float(F.cross_entropy(model.eval()(x), y))

    before = loss()
    torch.manual_seed(0)
    adapted = adapt(model, slug, f"{bed.ENCODER}.*.dense", **options)
    assert len(adapted.layers) == 6 * 3
    train(
        model, task, TrainConfig(8, 16, lr=3e-3, warmup=0, weight_decay=0.0, seed=0), optimizer=adapted.optimizer(3e-3)
    )
    after = loss()
    assert after < 0.9 * before
    adapted.save(tmp_path / "adapter")
    adapted.remove()
    assert loss() == pytest.approx(before, abs=1e-6)
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
    load_adapter(model, tmp_path / "adapter")
    assert loss() == pytest.approx(after, abs=1e-6)


def test_what_is_being_downloaded_is_not_swept_by_another_fetch(empty_home, monkeypatch):
    there = []

    def download(source, into):
        into.mkdir()
        fetch.get("python")  # which needs nothing, and sweeps
        there.append((source, into.is_dir()))
        raise InputError("no network")

    monkeypatch.setattr(fetch, "download", download)
    monkeypatch.setattr(fetch, "intact", lambda row: row.name != bed.MINILM.name)
    with pytest.raises(InputError, match="no network"):
        bed.fetch()
    assert there == [(bed.MINILM.source, True)]
