"""`workbench merge`: what it prints, what it refuses, and that what it says is there is there."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from workbench.cli import main
from workbench.lib.core.merge.adapters import LowRankDeltas, read_deltas


@pytest.fixture
def shell(capsys, monkeypatch, tmp_path):
    """In a folder with a base, two experts and two adapters."""
    monkeypatch.chdir(tmp_path)
    for i, name in enumerate(("base", "one", "two")):
        (tmp_path / name).mkdir()
        save_file({"a.weight": torch.full((4, 6), float(i)), "head": torch.ones(2) * i}, f"{name}/model.safetensors")
        (tmp_path / name / "config.json").write_text("{}")
    for i, name in enumerate(("left", "right")):
        LowRankDeltas({"a": (torch.ones(2 + i, 6), torch.ones(4, 2 + i), 0.5)}).save(tmp_path / name)

    def call(words: str) -> tuple[int, str, str]:
        status = main(["merge", *(word.replace("_", " ") for word in words.split())])
        return (status, *capsys.readouterr())

    return call


def test_models_are_merged_and_what_was_written_is_said(shell, tmp_path):
    status, out, err = shell("base one two --method task-arithmetic -p weights [1,_0.5] --exclude head --out merged")
    assert (status, err) == (0, "") and out.startswith("merged: task-arithmetic of 2 experts, 2 files, ")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert (merged["a.weight"] == 2).all() and (merged["head"] == 0).all()
    status, out, _ = shell("base one --method average --out second --json")
    assert status == 0 and json.loads(out) == {
        "folder": "second",
        "method": "average",
        "options": {},
        "base": "base",
        "experts": ["one"],
        "files": ["model.safetensors", "config.json"],
        "bytes": sum(path.stat().st_size for path in (tmp_path / "second").iterdir()),
    }


def test_adapters_become_weights_or_an_adapter(shell, tmp_path):
    assert shell("base left right two --method task-arithmetic --out full")[0] == 0
    assert (load_file("full/model.safetensors")["a.weight"] == 1.0 + 1.5 + 2).all()
    assert shell("base left right --method average --adapter --out sum")[0] == 0
    assert shell("base left right --method average --adapter --rank 1 --out cut --json")[0] == 0
    for name, rank in (("sum", 4), ("cut", 1)):
        (deltas,) = read_deltas([tmp_path / name])
        assert len(deltas["a"][0]) == rank
        torch.testing.assert_close(deltas.dense("a"), torch.full((4, 6), 1.25))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("base one --method avrage --out out", "did you mean 'average'"),
        ("base one --method average -p wieghts [1] --out out", "wieghts"),
        ("base one --method average -p weights [1] -p weights [1] --out out", "given twice"),
        ("base one --method average -p weights [1,_2] --out out", "one for each of 1 experts"),
        ("base one --method average -p weights no --out out", "weights"),
        ("base one --method average --out two", "'two' but must be new"),
        ("base one --out out", "--method is missing"),
        ("base --method average --out out", "at least one EXPERT"),
        ("base none --method average --out out", "none does not exist"),
        ("base one --method average", "--out"),
        ("base one --method average --rank 2 --out out", "give --adapter"),
        ("base left --method average --adapter --rank 0 --out out", "rank is 0"),
        ("base left --method average --adapter --exclude head --out out", "neither --include nor"),
        ("base left one --method average --adapter --out out", "one"),
        ("base one --method average --exclude nothing --out out", "exclude 'nothing' is unknown"),
        ("base one --method average --out base/config.json/out", "cannot be written"),
        ("base one --method task-arithmetic -p scale 1e300 --out out", "comes out of the merge"),
        ("base left --method task-arithmetic -p scale 1e300 --adapter --out out", "not finite"),
        ("base one --method regmean -p grams [1] --out out", "grams[0] must hold tensors"),
    ],
)
def test_wrong_input_is_one_line_and_leaves_nothing(shell, tmp_path, words, message):
    status, out, err = shell(words)
    assert (status, out) == (2, "") and err.startswith("workbench: error: ") and err.count("\n") == 1
    assert message in err and not (tmp_path / "out").exists()


def test_ctrl_c_says_that_nothing_is_there(shell, tmp_path, monkeypatch):
    def stops(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("workbench.lib.core.merge.files.write_tensors", stops)
    assert shell("base one --method average --out out") == (130, "", "workbench: interrupted: nothing is at out\n")
    assert not (tmp_path / "out").exists()
