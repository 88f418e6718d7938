"""Checkpoints of several processes: resumed bit-equal, by other numbers of them, or refused in words."""

import shutil
from pathlib import Path

import pytest
import torch

from tests.lib.core.distributed import layouts
from workbench.errors import InputError
from workbench.lib.core import sidecar
from workbench.lib.core.distributed.layouts import LAYOUTS
from workbench.lib.core.distributed.processes import RankError, run_processes
from workbench.sealed import sweep


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("written")


@pytest.fixture(scope="module")
def two(written: Path) -> list[dict]:
    """By rank and (layout, "stopped" or "resumed") the weights in the end; the checkpoints stay in `written`."""
    return run_processes(layouts.each, 2, {layout: written / layout for layout in LAYOUTS}, ["stopped", "resumed"])


@pytest.fixture(scope="module")
def four(two: list[dict], written: Path) -> list[dict]:
    return run_processes(layouts.each, 4, {layout: written / layout for layout in LAYOUTS}, ["resumed"])


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name].double() - b[name].double()).abs().max()) for name in a)


def by_one(function, folder: Path) -> dict:
    try:
        return function(None, folder)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_training_goes_on_bit_for_bit_and_with_other_numbers_of_processes(
    layout: str, two: list[dict], four: list[dict], written: Path
):
    for found in two:
        whole, again = found[layout, "stopped"], found[layout, "resumed"]
        assert whole.keys() == again.keys() and all(torch.equal(value, again[name]) for name, value in whole.items())
    whole = two[0][layout, "stopped"]
    assert distance(whole, four[3][layout, "resumed"]) <= 1e-12
    assert distance(whole, by_one(layouts.resumed, written / layout)) <= 1e-12
    files = {path.name for path in (written / layout / "step-00000002").iterdir()}
    assert files == {sidecar.SIDECAR, *(f"shard-0000{i}-model-00001-of-00001.safetensors" for i in (1, 2))}


def test_what_one_process_has_written_several_go_on_with(written: Path):
    whole = by_one(layouts.stopped, written / "one")
    _, found = run_processes(layouts.each, 2, dict.fromkeys(("sharded", "experts"), written / "one"), ["resumed"])
    for layout in ("sharded", "experts"):
        assert distance(whole, found[layout, "resumed"]) <= 1e-12


@pytest.mark.usefixtures("two")
def test_what_does_not_fit_is_refused_and_not_cast(written: Path):
    found, _ = run_processes(layouts.misfits, 2, written / "data")
    assert "is of the layout 'data' but this training is of the layout 'sharded'" in found["layout"]
    assert "its 'position' is torch.float64 [16, 16] but must be torch.float32 [16, 16]" in found["dtype"]
    assert "is torch.float64 [4, 16, 16] but must be torch.float64 [4, 32, 16]" in found["shape"]
    assert "it has no 'blocks.2." in found["layers"]
    with pytest.raises(InputError, match="it has 'position', which the model has not"):
        by_one(layouts.into_one_without_positions, written / "data")


@pytest.mark.parametrize("who", [0, 1])
def test_a_rank_killed_while_it_writes_leaves_the_checkpoint_before(who: int, tmp_path: Path):
    with pytest.raises(RankError, match=f"rank {who} of 2 was ended by SIGKILL"):
        run_processes(layouts.killed_while_writing, 2, tmp_path, who)
    assert sidecar.newest(tmp_path).content["step"] == 1
    sweep(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_where_one_rank_cannot_write_all_say_so(tmp_path: Path):
    for said in run_processes(layouts.full_disk, 2, tmp_path):
        assert "step-00000002 cannot be written: rank 1" in said and "No space left" in said
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


@pytest.mark.usefixtures("two")
def test_a_damaged_missing_or_added_shard_is_seen(tmp_path: Path, written: Path):
    shutil.copytree(written / "data", tmp_path / "data")
    written = tmp_path
    folder = written / "data" / "step-00000002"
    strange = folder / "shard-00009-model-00001-of-00001.safetensors"
    strange.write_bytes((folder / "shard-00001-model-00001-of-00001.safetensors").read_bytes())
    with pytest.raises(ValueError, match=r"shard-00009-.* is none of its files"):
        sidecar.newest(written / "data")
    strange.unlink()
    with (folder / "shard-00002-model-00001-of-00001.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\xff")
    with pytest.raises(ValueError, match=r"shard-00002-.* is damaged"):
        sidecar.newest(written / "data")
    (folder / "shard-00002-model-00001-of-00001.safetensors").unlink()
    with pytest.raises(ValueError, match=r"no checkpoint in .* can be used: .* No such file .*shard-00002-"):
        sidecar.newest(written / "data")
