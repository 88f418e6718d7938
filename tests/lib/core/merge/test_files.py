"""Merges from files to files: laid out as the base, in little memory, and whole or not there."""

import copy
import errno
import gc
import json
import os
import resource
import shutil
import tracemalloc
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import workbench
from workbench import sealed
from workbench.cli import main
from workbench.errors import InputError
from workbench.lib.core.merge import Pieces, TaskVectors, make_merger, merge, merged_state
from workbench.lib.core.merge.adapters import LowRankDeltas, concatenate, read_deltas
from workbench.lib.core.merge.files import open_models, write_model

WEIGHTS = [0.25, 1.5]


def tensors(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "embed.weight": torch.randn(30, 8, generator=generator),
        "layer.0.weight": torch.randn(8, 8, generator=generator).bfloat16(),
        "layer.1.weight": torch.randn(4, 8, generator=generator),
        "layer.1.bias": torch.randn(4, generator=generator, dtype=torch.float64),
        "steps": torch.tensor([7]),
        "none": torch.zeros(0, 3),
    }


def model(folder: Path, seed: int, shards: int = 1) -> Path:
    """A folder as transformers writes them, with what else belongs to a model."""
    folder.mkdir()
    state = tensors(seed)
    names = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    names = ["model.safetensors"] if shards == 1 else names
    weight_map = {name: names[i * shards // len(state)] for i, name in enumerate(state)}
    for file in names:
        held = {name: state[name] for name in state if weight_map[name] == file}
        save_file(held, folder / file, metadata={"format": "pt"})
    if shards > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps({"seed": seed}))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text("{}")
    for unwanted in ("pytorch_model.bin", "optimizer.pt", ".gitattributes"):
        (folder / unwanted).write_text("x")
    return folder


@pytest.fixture
def folders(tmp_path) -> list[Path]:
    return [
        model(tmp_path / name, seed, shards) for seed, (name, shards) in enumerate([("base", 3), ("a", 1), ("b", 2)])
    ]


def read(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def written(folders, out, merger=None) -> list[Path]:
    merger = merger or make_merger("task-arithmetic", {"weights": WEIGHTS})
    return write_model(open_models(folders[0], folders[1:]), merger, folders[0], out)


def test_the_result_is_what_python_gives_in_the_files_of_the_base(folders, tmp_path):
    told = []
    vectors = open_models(folders[0], folders[1:])
    merger = make_merger("task-arithmetic", {"weights": WEIGHTS})
    files = write_model(vectors, merger, folders[0], tmp_path / "out", lambda *said: told.append(said))
    expected = merge(tensors(0), [tensors(1), tensors(2)], "task-arithmetic", weights=WEIGHTS)
    found = read(tmp_path / "out")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
    base = {path.relative_to(folders[0]) for path in folders[0].rglob("*") if path.is_file()}
    unwanted = {Path("pytorch_model.bin"), Path("optimizer.pt"), Path(".gitattributes")}
    assert {path.relative_to(tmp_path / "out") for path in files} == base - unwanted
    for file in folders[0].glob("*.safetensors"):
        assert load_file(tmp_path / "out" / file.name).keys() == load_file(file).keys()
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {"seed": 0}
    total = sum(tensor.numel() for tensor in expected.values())
    assert told[-1][:2] == (total, total) and [said[0] for said in told] == sorted(said[0] for said in told)


def test_a_lone_file_gives_a_folder_with_that_file(folders, tmp_path):
    files = [folder / "model.safetensors" for folder in (folders[1], folders[1])]
    assert written(files, tmp_path / "out", make_merger("average", {})) == [tmp_path / "out" / "model.safetensors"]
    assert torch.equal(read(tmp_path / "out")["embed.weight"], tensors(1)["embed.weight"])


def test_an_adapter_is_an_expert_whose_update_is_added(folders, tmp_path):
    """To full weights, through any method; turned where the base is; in float32 though the weight is bfloat16."""
    torch.manual_seed(0)
    deltas = LowRankDeltas({
        "layer.0": (torch.randn(2, 8), torch.randn(8, 2), 0.5),
        "layer.1": (torch.randn(2, 8), torch.randn(4, 2), 0.5),
    })  # fmt: skip
    deltas.save(tmp_path / "adapter")
    vectors = open_models(folders[0], [tmp_path / "adapter", folders[1]])
    base, other = tensors(0), tensors(1)
    for name in ("layer.0", "layer.1"):
        tau = vectors.deltas(f"{name}.weight")
        torch.testing.assert_close(tau[0], deltas.dense(name), atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(tau[1], other[f"{name}.weight"].float() - base[f"{name}.weight"].float())
    written([folders[0], tmp_path / "adapter", folders[1]], tmp_path / "out")
    expected = merge(base, [deltas.added_to(base), other], "task-arithmetic", weights=WEIGHTS)
    for name in ("embed.weight", "layer.1.weight", "layer.1.bias"):
        torch.testing.assert_close(read(tmp_path / "out")[name], expected[name])


def test_folders_of_adapters_are_experts_of_a_base_in_memory_too(tmp_path):
    """One rule for state dicts, modules, files and LoRA folders, of peft and our own."""
    base = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4))
    save_file(base.state_dict(), tmp_path / "base.safetensors")
    model = copy.deepcopy(base)
    adapted = workbench.adapt(model, "lora", targets="*", rank=2)
    for p in adapted.parameters():
        nn.init.normal_(p)
    adapted.save(tmp_path / "own")
    (own,) = read_deltas([tmp_path / "own"])
    lora = LowRankDeltas({"0": (torch.randn(3, 4), torch.randn(6, 3), 0.5)})
    lora.save(tmp_path / "peft")
    expert = {name: value + 1 for name, value in base.state_dict().items()}
    state = base.state_dict()
    expected = TaskVectors(state, [own.added_to(state), lora.added_to(state), expert])
    expected = merged_state(expected, make_merger("average", {}))
    for given in (base, base.state_dict(), tmp_path / "base.safetensors", str(tmp_path / "base.safetensors")):
        merged = workbench.merge(given, [str(tmp_path / "own"), tmp_path / "peft", expert], "average")
        assert merged.keys() == expected.keys()
        for name in merged:
            torch.testing.assert_close(merged[name], expected[name], rtol=0, atol=1e-6)


def test_an_adapter_made_on_other_weights_is_refused(tmp_path, capsys):
    base = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4))
    other = copy.deepcopy(base)
    other[2].bias.data[1] += 1
    adapted = workbench.adapt(other, "lora", targets="*", rank=2)
    adapted.save(tmp_path / "adapter")
    save_file(base.state_dict(), tmp_path / "base.safetensors")
    (deltas,) = read_deltas([tmp_path / "adapter"])
    for call in (
        lambda: workbench.merge(base, [tmp_path / "adapter"], "average"),
        lambda: open_models(tmp_path / "base.safetensors", [tmp_path / "adapter"]),
        lambda: deltas.added_to(base.state_dict()),
        lambda: concatenate([deltas, deltas], [0.5, 0.5]).added_to(base.state_dict()),
    ):
        with pytest.raises(InputError, match="was made on layers with other weights"):
            call()
    words = ["merge", str(tmp_path / "base.safetensors"), str(tmp_path / "adapter"), "--method", "average"]
    for more in ([], ["--adapter"]):
        assert main([*words, *more, "--out", str(tmp_path / "out")]) == 2
        assert "was made on layers with other weights" in capsys.readouterr().err and not (tmp_path / "out").exists()
    adapted.remove()
    assert workbench.merge(other, [tmp_path / "adapter"], "average")
    save_file(other.state_dict(), tmp_path / "other.safetensors")
    words[1] = str(tmp_path / "other.safetensors")
    assert main([*words, "--out", str(tmp_path / "out")]) == 0
    sidecar = json.loads((tmp_path / "adapter" / "adapter.json").read_text())
    del sidecar["layers"]  # as it was written before: in which order the digest was made is not known
    (tmp_path / "adapter" / "adapter.json").write_text(json.dumps(sidecar))
    assert workbench.merge(base, [tmp_path / "adapter"], "average")


def test_all_that_does_not_fit_is_said_at_once_of_adapters_and_models(folders, tmp_path):
    for name, layer in (("one", "layer.7"), ("two", "layer.8")):
        LowRankDeltas({layer: (torch.ones(1, 8), torch.ones(8, 1), 1.0)}).save(tmp_path / name)
    state = read(folders[1])
    del state["layer.1.bias"]
    save_file(state, folders[1] / "model.safetensors")
    with pytest.raises(InputError, match=r"layer\.7\.weight.*layer\.8\.weight.*has no layer\.1\.bias"):
        open_models(folders[0], [tmp_path / "one", folders[1], tmp_path / "two"])


def test_slices_of_an_update_are_its_parts(tmp_path):
    """Of packed experts too, in either direction, from anywhere to anywhere."""
    layers = {f"m.{e}.up_proj": (torch.randn(2, 5), torch.randn(3, 2), 1.0) for e in range(4)}
    deltas = LowRankDeltas(layers, packed=("m.up_proj",))
    for shape in ((4, 3, 5), (4, 5, 3)):
        full = deltas.added_to({"m.up_proj": torch.zeros(shape)})["m.up_proj"]
        for e in range(4):
            dense = deltas.dense(f"m.{e}.up_proj")
            torch.testing.assert_close(full[e], dense if shape[1] == 3 else dense.T)
        placed = deltas.placed({"m.up_proj": shape})["m.up_proj"]
        for start in range(0, 60, 7):
            for stop in range(start, 61, 6):
                torch.testing.assert_close(placed.rows(start, stop), full.flatten()[start:stop])


class Live(TorchDispatchMode):
    """The most bytes of tensors that are alive at once, of those that operations make."""

    def __init__(self):
        super().__init__()
        self.sizes, self.users, self.now, self.most = {}, {}, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor)
        return out

    def _count(self, tensor):
        storage = tensor.untyped_storage()
        key = storage.data_ptr()
        if key not in self.sizes:
            self.sizes[key], self.users[key] = storage.nbytes(), 0
            self.now += self.sizes[key]
            self.most = max(self.most, self.now)
        self.users[key] += 1
        weakref.finalize(tensor, self._gone, key)

    def _gone(self, key):
        self.users[key] -= 1
        if not self.users[key]:
            self.now -= self.sizes.pop(key)


@pytest.mark.parametrize("method", ["average", "task-arithmetic"])
def test_no_more_than_three_tensors_of_the_largest_size_are_in_memory(tmp_path, method):
    """Counted by what torch's operations and Python allocate; the models are 40 and more times larger than a piece."""
    largest, folders = 3 * 2**20, []
    for seed in range(5):
        folder = tmp_path / str(seed)
        folder.mkdir()
        for shard in range(2):
            state = {f"{shard}.{i}": torch.full((1024, 3 * 1024), float(seed)) for i in range(2)}
            save_file(state, folder / f"model-{shard}.safetensors")
        folders.append(folder)
    del state
    gc.collect()
    tracemalloc.start()
    try:
        with Live() as live:
            written(folders, tmp_path / "out", make_merger(method, {}))
        buffers = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    expected = 2.5 if method == "average" else 10.0
    assert all((tensor == expected).all() for tensor in read(tmp_path / "out").values())
    assert 2**18 * 4 * 4 < live.most + buffers < 3 * largest * 4, (live.most, buffers)


def test_what_is_there_is_not_replaced(folders, tmp_path):
    for there in (folders[1], folders[1] / "config.json"):
        before = sorted(folders[1].iterdir())
        with pytest.raises(InputError, match="must be new"):
            written(folders, there)
        assert sorted(folders[1].iterdir()) == before
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(InputError, match="must be new"):
        written(folders, tmp_path / "link")


class Stops(Pieces):
    """Gives up at the third piece."""

    def __init__(self, error):
        self.error, self.done = error, 0

    def piece(self, tau, place, facts):
        self.done += 1
        if self.done == 3:
            raise self.error
        return tau.sum(0)


def test_a_merge_that_stops_leaves_nothing(folders, tmp_path, monkeypatch):
    before = sorted(os.listdir(tmp_path))
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    for error in (KeyboardInterrupt(), full, MemoryError()):
        with pytest.raises(type(error)):
            written(folders, tmp_path / "out", Stops(error))
        assert sorted(os.listdir(tmp_path)) == before

    def fails(*args, **options):
        raise full

    for place, name in ((shutil, "copytree"), (sealed, "_flush"), (os, "rename")):
        with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
            patch.setattr(place, name, fails)
            written(folders, tmp_path / "out")
        assert sorted(os.listdir(tmp_path)) == before
    written(folders, tmp_path / "out")


def test_a_write_that_fails_in_the_middle_of_a_file_leaves_nothing(folders, tmp_path):
    """The system itself refuses: no file may be longer than what a shard's first tensors take."""
    before, (soft, hard) = sorted(os.listdir(tmp_path)), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (600, hard))
    try:
        with pytest.raises(OSError):
            written(folders, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sorted(os.listdir(tmp_path)) == before


def test_what_cannot_be_read_is_refused_in_words(folders, tmp_path):
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "pytorch_model.bin").write_text("x")
    adapter = LowRankDeltas({"layer.7": (torch.ones(1, 8), torch.ones(8, 1), 1.0)}).save(tmp_path / "adapter")
    for path, words in [
        (pickled, r"no safetensors file, only pytorch_model\.bin: a pickle"),
        (pickled / "pytorch_model.bin", "is no safetensors file"),
        (tmp_path / "none", "does not exist"),
        (adapter, r"does not fit the adapter: no weight 'layer\.7\.weight'"),
    ]:
        with pytest.raises(InputError, match=words):
            open_models(folders[0], [path])
    with pytest.raises(InputError, match="is an adapter but must be a model"):
        open_models(adapter, [folders[1]])
    with pytest.raises(InputError, match=r"none.*none.*only pytorch_model"):
        open_models(tmp_path / "none", [tmp_path / "none", pickled])
    (folders[0] / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(InputError, match=r"lacks model-00002-of-00003\.safetensors, which its index names"):
        open_models(folders[0], folders[1:])
    (folders[1] / "model.safetensors").write_bytes((folders[1] / "model.safetensors").read_bytes()[:-9])
    with pytest.raises(InputError, match="cannot be read as safetensors"):
        open_models(folders[2], [folders[1]])


def test_experts_that_do_not_fit_are_refused_before_anything_is_written(folders, tmp_path):
    state = read(folders[1])
    del state["layer.1.bias"]
    state["embed.weight"], state["layer.0.weight"] = torch.zeros(31, 8), state["layer.0.weight"].float()
    save_file(state, folders[1] / "model.safetensors")
    with pytest.raises(InputError, match=r"(?s)embed\.weight of shape.*vocabulary.*float32") as caught:
        written(folders, tmp_path / "out")
    assert "layer.1.bias" in str(caught.value) and not (tmp_path / "out").exists()
    state = read(folders[2])
    state["embed.weight"][3, 4] = float("nan")
    save_file(state, tmp_path / "nan.safetensors")
    with pytest.raises(InputError, match="1 weights that are not finite"):
        written([folders[0], tmp_path / "nan.safetensors"], tmp_path / "out", make_merger("average", {}))
    assert not (tmp_path / "out").exists()


def test_integers_that_a_model_has_not_are_the_base_s(folders, tmp_path):
    """Older files have buffers, such as numbers of positions, that newer ones leave out."""
    state = read(folders[1])
    without = {name: tensor for name, tensor in state.items() if name != "steps"}
    save_file(without, folders[1] / "model.safetensors")
    written(folders, tmp_path / "out")
    assert read(tmp_path / "out")["steps"] == 7
    written([folders[1], folders[0], folders[2]], tmp_path / "other")
    assert "steps" not in read(tmp_path / "other")


def test_transformers_loads_what_is_written(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24
    )
    models = []
    for seed in range(3):
        torch.manual_seed(seed)
        models.append(transformers.BertForMaskedLM(config).eval())
        models[-1].save_pretrained(tmp_path / str(seed), max_shard_size="20KB")
    assert len(list((tmp_path / "0").glob("*.safetensors"))) > 1
    written([tmp_path / "0", tmp_path / "1", tmp_path / "2"], tmp_path / "out", make_merger("average", {}))
    loaded = transformers.BertForMaskedLM.from_pretrained(tmp_path / "out").eval()
    states = [one.state_dict() for one in models]
    mean = {name: (states[1][name] + states[2][name]) / 2 for name in states[0] if states[0][name].is_floating_point()}
    for name, tensor in mean.items():
        torch.testing.assert_close(loaded.state_dict()[name], tensor, atol=1e-6, rtol=1e-6)
    ids = torch.arange(8)[None]
    models[0].load_state_dict(mean, strict=False)
    torch.testing.assert_close(loaded(ids).logits, models[0](ids).logits, atol=1e-5, rtol=1e-5)
