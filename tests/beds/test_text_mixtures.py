"""Documents without labels and junk among them, the clusters of these, and models that go on with a mixture."""

import random

import numpy as np
import pytest
import torch

from workbench.beds.text_mixtures import (
    JUNK,
    KINDS,
    LENGTH,
    NATURAL,
    PURPOSE,
    MixedText,
    Trainer,
    clusters,
    discovered,
    documents,
    held_out,
    kinds,
    purity,
)
from workbench.errors import InputError

COUNT, INITIAL = 240, 12
SETTINGS = {"documents": COUNT, "seq_len": 32, "batch_size": 8, "eval_batches": 1, "proxy": (16, 1, 10, 6, 3e-3)}


@pytest.fixture(scope="module")
def trainer() -> Trainer:
    return Trainer.of(kinds(COUNT), PURPOSE, SETTINGS, "proxy")


def even(trainer: Trainer) -> torch.Tensor:
    return torch.full_like(trainer.source.share, 1 / len(trainer.source.share))


def test_documents_have_their_kinds_in_their_shares_and_junk_is_a_text_in_another_order():
    made = documents(COUNT)
    assert len(made.texts) == COUNT and {len(text) for text in made.texts} == {LENGTH}
    assert (np.bincount(made.kind) / COUNT).tolist() == pytest.approx([*NATURAL.values()])
    assert made.junk.sum() == round(JUNK * COUNT)
    whole = {name: held_out(COUNT).splits["train"][name].numpy().tobytes() for name in KINDS}
    for text, kind, junk in zip(made.texts, made.kind, made.junk, strict=True):
        assert (text in whole[KINDS[kind]]) != junk


def test_no_document_is_held_out_text():
    for split in ("validation", "test"):
        held = held_out(COUNT).splits[split]
        pieces = [held[name].numpy().tobytes()[start : start + 200] for name in KINDS for start in (0, 1000)]
        assert not any(piece in text for text in documents(COUNT).texts for piece in pieces)


def test_pruning_takes_most_junk_and_hardly_any_text_and_clusters_are_mostly_of_a_kind():
    found = purity(clusters(1200, 60, 1.2), documents(1200))
    assert found["junk_kept"] < 0.05 and found["text_pruned"] < 0.05 and found["purity"] > 0.85


def test_domains_hold_the_documents_of_their_clusters_with_the_kind_of_every_byte():
    source, found, made = discovered(COUNT, INITIAL, 0.9), clusters(COUNT, INITIAL, 0.9), documents(COUNT)
    assert len(source.texts) == len(found) and torch.allclose(source.share, found.share)
    for k, (name, text) in enumerate(source.texts.items()):
        inside = found.members(k)
        assert text.numpy().tobytes() == b"".join(made.texts[i] for i in inside)
        assert source.kinds[name].tolist() == np.repeat(made.kind[inside], LENGTH).tolist()


def test_the_three_kinds_are_without_junk():
    source = kinds(COUNT)
    assert tuple(source.texts) == KINDS
    assert sum(map(len, source.texts.values())) == LENGTH * (COUNT - documents(COUNT).junk.sum())


def test_a_batch_is_drawn_by_the_weights_and_close_mixtures_share_its_rows(trainer: Trainer):
    def batch(weights, seed=1):
        return trainer.task(weights).batch("train", 400, torch.Generator().manual_seed(seed))

    one = batch([0.5, 0.5, 0.0])
    counts = one.domain.bincount(minlength=3)
    assert counts[2] == 0 and abs(int(counts[0]) - 200) < 3 * 10
    assert torch.equal(one.inputs[:, 1:], one.targets[:, :-1])
    rows, near = (
        {tuple(row) for row in batch(weights).inputs.tolist()} for weights in ([0.5, 0.5, 0], [0.48, 0.52, 0])
    )
    assert len(rows & near) > 0.95 * len(rows)  # in another order
    assert torch.equal(batch([0.5, 0.5, 0.0]).inputs, one.inputs)
    assert not torch.equal(batch([0.5, 0.5, 0.0], seed=2).inputs, one.inputs)


def test_the_metric_is_for_the_purpose(trainer: Trainer):
    model = trainer.warm()
    found = trainer.task(even(trainer)).evaluate(model, "test", 1)
    assert found["bits_per_byte"] == pytest.approx(sum(PURPOSE[k] * found[f"bits_per_byte/{k}"] for k in KINDS))
    only = MixedText(kinds(COUNT), even(trainer), held_out(COUNT), {"docs": 1.0}, 32).evaluate(model, "test", 1)
    assert only["bits_per_byte"] == pytest.approx(found["bits_per_byte/docs"])


def test_a_mixture_goes_on_from_the_warm_start_and_one_seed_is_one_number(trainer: Trainer):
    before = trainer.judged(trainer.warm())
    after = trainer.score(even(trainer), 0)
    assert after < before
    assert trainer.score(even(trainer), 0) == after and trainer.score(even(trainer), 1) != after
    assert trainer.judged(trainer.warm()) == before  # which is not changed by that


def test_an_expert_is_the_model_of_one_domain(trainer: Trainer):
    only = trainer.learn([0.0, 1.0, 0.0], 3).state_dict()
    for _ in range(2):  # trained, and from the cache
        expert = trainer.expert(1, 3).state_dict()
        assert all(torch.equal(value, only[name]) for name, value in expert.items())


def test_weights_that_are_no_mixture_of_the_domains_are_refused(trainer: Trainer):
    with pytest.raises(InputError, match="domain 'doc' is unknown; did you mean 'docs'"):
        trainer.task({"doc": 1.0})
    with pytest.raises(InputError, match="weights has a sum of"):
        trainer.score([0.5, 0.0, 0.0], 0)


def test_random_order_is_drawn_from_a_generator_of_its_own():
    random.seed(1)
    documents.cache_clear()
    first = documents(COUNT).texts
    random.seed(2)
    documents.cache_clear()
    assert documents(COUNT).texts == first
