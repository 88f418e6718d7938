"""Recall of pairs: what is an answer, which bytes are whose, and a base that is trained once."""

import pytest
import torch

from workbench.beds.pair_recall import FIRST_KEY, FIRST_VALUE, KEYS, VALUES, PairRecall, base, distances, pair_recall
from workbench.paths import home as home_folder

SMOKE = {"lr": 5e-3, "n_heads": 4, "spacing": 12, "steps": 6, "batch_size": 4, "d_model": 16, "d_hidden": 16}
SMOKE |= {"n_layers": 2, "cap": 65_536, "profiled": (32, 64), "unseen": 96}


@pytest.fixture(scope="module")
def recall() -> PairRecall:
    return pair_recall(SMOKE)


def test_pairs_are_recalled_and_only_what_came_before_is_an_answer(recall):
    tokens, answers = recall.rows("test", 8, 64, torch.Generator().manual_seed(0))
    assert tokens.shape == answers.shape == (8, 64) and answers.any(1).all() and not answers[:, 0].any()
    back = distances(tokens)
    for b in range(8):
        said, place = {}, {}
        for t, byte in enumerate(tokens[b].tolist()):
            if byte < FIRST_VALUE:
                assert not answers[b, t] and back[b, t] == 0
                continue
            value, key = byte - FIRST_VALUE, int(tokens[b, t - 1]) - FIRST_KEY
            assert key == value // VALUES  # a value follows its key, and a key has one value in a text
            assert bool(answers[b, t]) is (key in said) and said.get(key, value) == value
            assert back[b, t] == (t - place[key] if key in said else 0)
            said[key], place[key] = value, t


def test_text_keeps_clear_of_the_bytes_of_the_pairs(recall):
    for text in recall.text.values():
        assert int(text.max()) < FIRST_VALUE
        assert not ((text >= FIRST_KEY) & (text < FIRST_KEY + KEYS)).any()


def test_the_base_is_trained_once_and_the_same_from_its_file(recall):
    first = base(recall, 7, SMOKE)
    files = {
        path: path.stat().st_mtime_ns for path in (home_folder() / "models").glob("pair-recall-base-*.safetensors")
    }
    assert files
    again = base(recall, 7, SMOKE)
    assert {path: path.stat().st_mtime_ns for path in files} == files
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in first.state_dict().items())
    other = base(recall, 8, SMOKE)
    assert not torch.equal(other.embedding.weight, first.embedding.weight)
    damaged = max(files, key=files.get)
    damaged.write_bytes(damaged.read_bytes()[:-1])
    repaired = base(recall, 7, SMOKE)
    assert all(torch.equal(value, repaired.state_dict()[name]) for name, value in first.state_dict().items())


def test_evaluation_leaves_the_model_in_its_mode(recall):
    model = base(recall, 7, SMOKE).train()
    first = recall.evaluate(model, "test")
    assert recall.evaluate(model, "test") == first and 0 <= first["recall"] <= 1
    assert all(module.training for module in model.modules())
