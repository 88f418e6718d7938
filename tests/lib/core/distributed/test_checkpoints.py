"""Checkpoints of several processes: resumed bit-equal, by other numbers of them, or refused in words."""

from pathlib import Path

import pytest
import torch

from tests.lib.core.distributed import layouts
from workbench.lib.core import sidecar
from workbench.lib.core.distributed.layouts import LAYOUTS
from workbench.lib.core.distributed.processes import RankError, run_processes
from workbench.sealed import sweep


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("written")


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name].double() - b[name].double()).abs().max()) for name in a)


def by_one(function, folder: Path) -> dict:
    try:
        return function(None, folder)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_training_goes_on_bit_for_bit_and_with_other_numbers_of_processes(layout: str, written: Path):
    whole = run_processes(layouts.stopped, 2, layout, written / layout)
    again = run_processes(layouts.resumed, 2, layout, written / layout)
    for rank in (0, 1):
        assert all(torch.equal(value, again[rank][name]) for name, value in whole[rank].items())
    assert distance(whole[0], run_processes(layouts.resumed, 4, layout, written / layout)[3]) <= 1e-12
    assert distance(whole[0], by_one(layouts.resumed, written / layout)) <= 1e-12
    files = {path.name for path in (written / layout / "step-00000002").iterdir()}
    assert files == {sidecar.SIDECAR, *(f"shard-0000{i}-model-00001-of-00001.safetensors" for i in (1, 2))}


def test_what_one_process_has_written_several_go_on_with(written: Path):
    whole = by_one(layouts.stopped, written / "one")
    for layout in ("sharded", "experts"):
        assert distance(whole, run_processes(layouts.resumed, 2, layout, written / "one")[1]) <= 1e-12


def test_what_does_not_fit_is_refused_and_not_cast(written: Path):
    if not (written / "data").exists():
        run_processes(layouts.stopped, 2, "data", written / "data")
    found, _ = run_processes(layouts.misfits, 2, written / "data")
    assert "is of the layout 'data' but this training is of the layout 'sharded'" in found["layout"]
    assert "its 'position' is torch.float64 [16, 16] but must be torch.float32 [16, 16]" in found["dtype"]
    assert "is torch.float64 [4, 16, 16] but must be torch.float64 [4, 32, 16]" in found["shape"]
    assert "it has no 'blocks.2." in found["layers"]


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


def test_a_damaged_or_added_shard_is_seen(tmp_path: Path, written: Path):
    if not (written / "data").exists():
        run_processes(layouts.stopped, 2, "data", written / "data")
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
