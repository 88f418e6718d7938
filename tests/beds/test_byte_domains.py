"""Bytes by domain: what is held out and what is shared."""

from itertools import islice

import torch

from workbench.beds.byte_domains import DOMAINS, TEXT, facts, sums, texts

SPLITS = ("train", "validation", "test")


def test_domains_have_what_their_splits_promise():
    asked = {split: {line.split("=")[0] for line in islice(sums(split), 3000)} for split in SPLITS}
    assert not any(asked[a] & asked[b] for a in asked for b in asked if a < b)
    for line in islice(sums("test"), 50):
        question, answer = line.strip().split("=")
        assert eval(question) % 97 == int(answer)
    assert {*islice(facts("test"), 2000)} == {*islice(facts("train"), 2000)}
    public, own = texts(65_536)
    assert public.domains == TEXT and own.domains == DOMAINS
    for name in TEXT:  # owners have text that the public model was not trained on
        halves = [source.splits["train"][name] for source in (public, own)]
        assert abs(len(halves[0]) - len(halves[1])) <= 1 and not torch.equal(halves[0][:1000], halves[1][:1000])
