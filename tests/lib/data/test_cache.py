"""The cache of parsed data: what comes out is what went in, or it is made again."""

import json
import os
import pickle

import pytest
import torch

from workbench.lib.data import cache


@pytest.fixture
def build():
    """A builder that counts its calls."""

    def build():
        build.calls += 1
        return {"a": torch.arange(100, dtype=torch.uint8), "b": torch.tensor([[1.5, -2.0]])}, {"rows": 100, "of": ["x"]}

    build.calls = 0
    return build


def the_file(home):
    (path,) = (home / "data" / "cache").iterdir()
    return path


def same(found, built):
    return found[1] == built[1] and all(torch.equal(found[0][name], built[0][name]) for name in built[0])


def test_a_second_call_reads_what_the_first_one_wrote(build, home):
    first, second = cache.cached("set", "raw", build), cache.cached("set", "raw", build)
    assert build.calls == 1
    assert same(first, second)
    assert second[0]["b"].dtype == torch.float32
    assert the_file(home).name.startswith("set-")


def test_another_input_or_other_code_is_built_anew(build, monkeypatch):
    cache.cached("set", "raw", build)
    cache.cached("set", "other raw", build)
    assert build.calls == 2
    monkeypatch.setattr(cache, "code_version", lambda: "later code")
    cache.cached("set", "raw", build)
    assert build.calls == 3


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[:5],
        lambda content: content[:60],
        lambda content: content[:-1],
        lambda content: content + b"\0",
        lambda content: content[:-1] + bytes([content[-1] ^ 1]),
        lambda content: b"\xff" * len(content),
        lambda content: b"\x02" + bytes(7) + b"{}" + content,
        lambda content: pickle.dumps({"a": list(range(100))}),
    ],
    ids=["empty", "no header", "half a header", "cut", "longer", "one bit", "noise", "no metadata", "a pickle"],
)
def test_a_damaged_file_is_built_again_and_mended(build, home, damage):
    built = cache.cached("set", "raw", build)
    path = the_file(home)
    path.write_bytes(damage(path.read_bytes()))
    assert cache.read(path) is None
    assert same(cache.cached("set", "raw", build), built)
    assert build.calls == 2
    assert same(cache.read(path), built)


def test_nothing_is_ever_unpickled(build, home):
    class Trap:
        def __reduce__(self):
            return (pytest.fail, ("a pickle was executed",))

    cache.cached("set", "raw", build)
    the_file(home).write_bytes(pickle.dumps(Trap()))
    cache.cached("set", "raw", build)


def test_where_the_cache_cannot_be_written_data_are_parsed_each_time(build, home):
    home.parent.mkdir(exist_ok=True)
    home.write_text("a file where the folder should be")
    assert same(cache.cached("set", "raw", build), cache.cached("set", "raw", build))
    assert build.calls == 2


def test_an_interrupted_write_leaves_nothing(build, home, monkeypatch):
    def interrupted(source, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cache.cached("set", "raw", build)
    assert list((home / "data" / "cache").iterdir()) == []


def test_the_file_is_plain_safetensors_with_a_readable_manifest(build, home):
    from safetensors import safe_open

    cache.cached("set", "raw", build)
    with safe_open(the_file(home), "pt") as opened:
        assert json.loads(opened.metadata()["manifest"]) == {"rows": 100, "of": ["x"]}
        assert torch.equal(opened.get_tensor("a"), torch.arange(100, dtype=torch.uint8))
