"""What is merged of models, what does not fit, and models larger than memory."""

import copy
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import workbench
from workbench.errors import InputError
from workbench.kernels.memory import peak_bytes
from workbench.lib.core.merge import TaskVectors, make_merger, sources, vectors
from workbench.lib.core.merge.compare import sign_conflict, task_cosines, total_cosine
from workbench.lib.core.merge.sinks import write_merged
from workbench.lib.core.merge.trimmed import threshold

State = dict[str, Tensor]


def state(seed: int, dtype: torch.dtype = torch.float32) -> State:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"embed": (10, 4), "layer.weight": (6, 4), "layer.bias": (6,), "empty": (0, 4), "scalar": ()}
    made = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    return made | {"steps": torch.tensor(seed), "mask": torch.tensor([True, seed % 2 == 0])}


def saved(folder: Path, **states: State) -> dict[str, Path]:
    paths = {name: folder / f"{name}.safetensors" for name in states}
    for name, made in states.items():
        save_file(made, paths[name], metadata={"format": "pt"})
    return paths


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_deltas_are_differences_in_float32_or_float64_and_apply_adds_them(dtype: torch.dtype):
    base, experts = state(0, dtype), [state(1, dtype), state(2, dtype)]
    tau = TaskVectors(base, experts)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert tau.names == ["embed", "layer.weight", "layer.bias", "empty", "scalar"] and (tau.n, tau.size) == (2, 71)
    deltas = {name: tau.deltas(name) for name in tau.names}
    for name, delta in deltas.items():
        assert torch.equal(delta, torch.stack([e[name].to(wide) - base[name].to(wide) for e in experts]))
    assert torch.equal(tau.flat(), torch.cat([delta.reshape(2, -1) for delta in deltas.values()], 1))
    applied = tau.apply({name: delta[1] for name, delta in deltas.items()})
    for name in base:
        expected = experts[1][name] if name in deltas else base[name]
        assert applied[name].dtype == base[name].dtype and list(applied) == list(base)
        torch.testing.assert_close(applied[name].to(torch.float64), expected.to(torch.float64), rtol=1e-6, atol=1e-6)


def test_pieces_are_every_weight_once_whatever_their_size(monkeypatch: pytest.MonkeyPatch):
    tau = TaskVectors(state(0), [state(1), state(2)])
    flat = tau.flat()
    monkeypatch.setattr(vectors, "PIECE", 7)
    found = list(tau.pieces())
    assert torch.equal(torch.cat([piece for _, piece in found], 1), flat)
    assert max(piece.shape[1] for _, piece in found) == 7 and all(piece.shape[0] == 2 for _, piece in found)
    assert [place.whole.start for place, _ in found] == sorted(place.whole.start for place, _ in found)


def test_a_threshold_is_of_all_tensors_whatever_their_types():
    """Also where one of them is float64, or all are narrow, or one expert is elsewhere."""
    for dtypes in (["float32", "float32"], ["bfloat16", "bfloat16"], ["float32", "float64"], ["bfloat16", "float32"]):
        kinds = [getattr(torch, name) for name in dtypes]
        generator = torch.Generator().manual_seed(0)
        models = [{f"{i}": torch.randn(9, generator=generator).to(k) for i, k in enumerate(kinds)} for _ in range(3)]
        tau = TaskVectors(models[0], models[1:])
        expected = tau.flat().abs().sort(1, descending=True).values[:, 4].tolist()
        assert [threshold(tau, i, tau.names, 5) for i in range(2)] == expected


@pytest.mark.parametrize("method", ["average", "ties", "dare", "dare-ties", "knots", "tsv-m"])
def test_files_folders_modules_and_states_are_merged_alike_in_pieces_or_not(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    base, a, b = state(0), state(1), state(2)
    expected = workbench.merge(base, [a, b], method)
    paths = saved(tmp_path, base=base, a=a)
    (tmp_path / "parts").mkdir()
    saved(tmp_path / "parts", one={"embed": b["embed"], "steps": b["steps"]})
    saved(tmp_path / "parts", two={name: value for name, value in b.items() if name not in ("embed", "steps")})
    given = (str(paths["base"]), [paths["a"], tmp_path / "parts"])
    merged = workbench.merge(*given, method)
    out = write_merged(TaskVectors(*given), make_merger(method, {}), tmp_path / "out.safetensors", {"format": "pt"})
    written = load_file(out)
    for name, value in expected.items():
        assert torch.equal(merged[name], value) and torch.equal(written[name], value)
    assert merged.keys() == written.keys() == expected.keys()
    if method != "dare" and method != "dare-ties":  # whose draws are a piece's
        monkeypatch.setattr(vectors, "PIECE", 5)
        again = workbench.merge(*given, method)
        torch.testing.assert_close(again, merged, rtol=1e-6, atol=1e-7)


def test_everything_that_does_not_fit_is_said_at_once():
    base, a, b = state(0), state(1), state(2)
    a["embed"] = torch.zeros(11, 4)
    a["layer.bias"] = a["layer.bias"].double()
    del a["scalar"]
    b["layer.weight"] = torch.zeros(4, 6)
    b["more"] = torch.zeros(3)
    b["steps"] = b["steps"].float()
    with pytest.raises(InputError) as error:
        TaskVectors(base, [a, b])
    for part in (
        "experts[0] has embed of shape (11, 4), the base (10, 4), as with another vocabulary",
        "experts[0] has layer.bias as torch.float64, the base as torch.float32",
        "experts[0] has no scalar",
        "experts[1] has layer.weight of shape (4, 6), the base (6, 4);",
        "experts[1] has more, which the base has not",
        "experts[1] has steps as torch.float32, the base as torch.int64",
    ):
        assert part in str(error.value)
    fits = TaskVectors(base, [a], exclude=["embed", "layer.bias", "scalar"])
    assert fits.names == ["layer.weight", "empty"]


def test_many_mismatches_are_counted():
    base = {f"{i}": torch.zeros(1) for i in range(100)}
    with pytest.raises(InputError, match="and 76 more"):
        TaskVectors(base, [{}])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"experts": []}, "experts is empty"),
        ({"experts": state(1)}, "experts is a dict but must be a list"),
        ({"experts": [3]}, r"experts\[0\] is a int but must be a state dict, a module, or the path"),
        ({"experts": [{"embed": 1.0}]}, r"experts\[0\] must hold tensors by name, but 'embed' is a float"),
        ({"experts": [{1: torch.zeros(3)}]}, r"experts\[0\] must hold tensors by name, but 1 is no name"),
        ({"base": {}}, "base holds no tensors"),
        ({"experts": [{"embed": torch.zeros(3, device="meta")}]}, "'embed' is on the meta device"),
        ({"experts": [{"embed": torch.zeros(3, 3).to_sparse()}]}, "'embed' is torch.sparse_coo"),
        ({"include": "lyer.*"}, "include 'lyer.*' is unknown"),
        ({"exclude": "head"}, "exclude 'head' is unknown"),
        ({"include": "steps"}, "no floating tensor"),
        ({"base": "nowhere.safetensors"}, "nowhere.safetensors cannot be read as safetensors"),
    ],
)
def test_wrong_input_is_refused(arguments: dict, message: str):
    with pytest.raises(InputError, match=message):
        TaskVectors(**{"base": state(0), "experts": [state(1)]} | arguments)


def test_complex_weights_are_refused():
    base = {"w": torch.zeros(3, dtype=torch.complex64)}
    with pytest.raises(InputError, match=r"base has w as torch\.complex64"):
        TaskVectors(base, [base])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("method", ["average", "ties", "tsv-m"])
def test_a_weight_that_is_not_finite_is_refused_by_name(value: float, method: str):
    for where in (0, 2):
        models = [state(0), state(1), state(2)]
        models[where]["layer.weight"][1, 2] = value
        label = "base" if where == 0 else r"experts\[1\]"
        with pytest.raises(InputError, match=rf"layer\.weight of {label} has 1 weights .* the first at 6 "):
            workbench.merge(models[0], models[1:], method)
    models[2]["embed"] = models[0]["embed"]
    assert workbench.merge(models[0], models[1:], method, exclude="layer.weight")


def test_a_difference_too_large_for_float32_is_refused():
    with pytest.raises(InputError, match="w differs between experts and base by more"):
        workbench.merge({"w": torch.full((2,), -3e38)}, [{"w": torch.full((2,), 3e38)}], "average")


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(10, 4), nn.Linear(4, 10, bias=False)
        self.head.weight = self.embed.weight


@pytest.mark.parametrize("method", ["task-arithmetic", "ties", "dare", "pcb", "tsv-m"])
@pytest.mark.parametrize(
    ("dtype", "size"),
    [
        (torch.float16, 3e4),
        (torch.float8_e4m3fn, 200.0),
        (torch.bfloat16, 3e38),
        (torch.float32, 3e38),
        (torch.float64, 8e307),
    ],
)
def test_a_merge_that_the_dtype_cannot_hold_is_refused(tmp_path: Path, method: str, dtype: torch.dtype, size: float):
    """An infinite or NaN weight would be in the file, and nobody would know."""
    base = {"w": torch.zeros(4, 4, dtype=dtype)}
    experts = [{"w": torch.linspace(-size, size, 16, dtype=torch.float64).view(4, 4).to(dtype)}] * 2
    merger = make_merger(method, {"scale": 50.0})
    with pytest.raises(InputError, match=rf"w comes out of the merge with .* {dtype} cannot hold"):
        workbench.merge(base, experts, method, scale=50.0)
    with pytest.raises(InputError, match="comes out of the merge"):
        write_merged(TaskVectors(base, experts), merger, tmp_path / "out.safetensors")
    assert not list(tmp_path.iterdir())
    with pytest.raises(InputError, match="comes out of the merge"):
        TaskVectors(base, experts).apply({"w": torch.full((4, 4), float("nan"))})
    whole = workbench.merge(base, experts, "average")["w"]
    assert torch.equal(whole.double(), experts[0]["w"].double())


@pytest.mark.parametrize("method", ["average", "ties", "pcb"])
def test_weights_of_a_byte_are_merged_in_float32(method: str):
    narrow = [{"w": torch.linspace(-i, i, 16).view(4, 4).to(torch.float8_e4m3fn)} for i in (1, 2, 3)]
    wide = [{"w": model["w"].float()} for model in narrow]
    found, expected = (workbench.merge(models[0], models[1:], method)["w"] for models in (narrow, wide))
    assert found.dtype == torch.float8_e4m3fn and torch.equal(found.float(), expected.to(found.dtype).float())


def test_tied_weights_are_merged_once_and_stay_tied(tmp_path: Path):
    torch.manual_seed(0)
    base, a, b = Tied(), Tied(), Tied()
    tau = TaskVectors(base, [a, b])
    assert tau.names == ["embed.weight"] and tau.size == 40
    merged = workbench.merge(base, [a, b], "average")
    assert merged["head.weight"].data_ptr() == merged["embed.weight"].data_ptr()
    torch.testing.assert_close(merged["embed.weight"], (a.embed.weight + b.embed.weight).detach() / 2)
    applied = tau.apply({"embed.weight": torch.ones(10, 4)})
    assert applied["head.weight"] is applied["embed.weight"]
    # a file has them once, by either name, and so has what is written
    paths = saved(tmp_path, a={"head.weight": a.embed.weight.detach()}, b={"embed.weight": b.embed.weight.detach()})
    assert torch.equal(workbench.merge(base, list(paths.values()), "average")["head.weight"], merged["head.weight"])
    out = write_merged(TaskVectors(base, [a, b]), make_merger("average", {}), tmp_path / "out.safetensors")
    assert torch.equal(load_file(out)["embed.weight"], merged["embed.weight"]) and len(load_file(out)) == 1
    assert workbench.merge(paths["b"], [a, b], "average").keys() == {"embed.weight"}


def test_an_expert_whose_tied_weights_came_apart_is_refused():
    base, apart = Tied(), {name: value.clone() for name, value in Tied().state_dict().items()}
    TaskVectors(base, [apart])
    apart["head.weight"] += 1
    with pytest.raises(InputError, match=r"has head\.weight and embed.weight apart, which the base has tied"):
        TaskVectors(base, [apart])
    with pytest.raises(InputError, match=r"part head\.weight and embed.weight, which are tied"):
        TaskVectors(base, [base], exclude="head.*")


def test_views_of_one_tensor_that_are_no_ties_are_merged_each():
    whole = torch.arange(8.0)
    base = {"a": whole[:4], "b": whole[4:], "c": whole[::2]}
    expert = {name: value + 1 for name, value in base.items()}
    merged = workbench.merge(base, [expert], "average")
    assert all(torch.equal(merged[name], expert[name]) for name in base)


def test_strided_weights_are_merged_as_they_are_seen():
    torch.manual_seed(0)
    base, expert = torch.randn(4, 6), torch.randn(6, 4)
    merged = workbench.merge({"w": base.T}, [{"w": expert}], "average")["w"]
    torch.testing.assert_close(merged, expert)


def test_a_damaged_file_is_refused_and_one_cut_short_too(tmp_path: Path):
    path = saved(tmp_path, a=state(1))["a"]
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(InputError, match="cannot be read as safetensors"):
        TaskVectors(state(0), [path])
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="a folder without a safetensors file"):
        TaskVectors(state(0), [tmp_path / "empty"])
    saved(tmp_path / "empty", a=state(1), b={"embed": torch.zeros(1)})
    with pytest.raises(InputError, match=r"has embed twice, in a\.safetensors and b.safetensors"):
        TaskVectors(state(0), [tmp_path / "empty"])


def test_a_merge_that_fails_leaves_what_was_there(tmp_path: Path):
    out = tmp_path / "out.safetensors"
    out.write_text("before")
    bad = state(1)
    bad["scalar"] = torch.tensor(float("nan"))  # the last to be read
    with pytest.raises(InputError, match="scalar"):
        write_merged(TaskVectors(state(0), [bad]), make_merger("average", {}), out)
    assert out.read_text() == "before" and list(tmp_path.iterdir()) == [out]


LARGE = 2**24  # weights of a tensor, 64 MiB: large beside the pieces of six models


@pytest.fixture(scope="module")
def large() -> Iterator[list[Path]]:
    """A base and five experts in files, each little more than one large tensor."""
    generator = torch.Generator().manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"m{i}.safetensors" for i in range(6)]
        for path in paths:
            sizes = {"first": 100, "large": LARGE, "last": 1000}
            save_file({name: torch.randn(size, generator=generator) for name, size in sizes.items()}, path)
        yield paths


@pytest.mark.parametrize("method", ["average", "ties", "dare-ties", "pcb-merging"])
def test_a_merge_of_files_needs_less_than_three_of_the_largest_tensor(large: list[Path], method: str):
    """Read whole, six models would be six of it."""
    out = large[0].with_name("out.safetensors")

    def once():
        write_merged(TaskVectors(large[0], large[1:]), make_merger(method, {}), out)

    once()  # what is compiled and imported at first is not the merge's
    peak = peak_bytes(once)
    if peak is None:
        pytest.skip("the system does not say")
    assert 2**20 < peak < 3 * 4 * LARGE


def test_reading_a_slice_reads_no_more_than_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = saved(tmp_path, a={"w": torch.arange(1000.0), "v": torch.zeros(5)})["a"]
    source = sources.open_source(path, "a")
    read = []
    opened = Path.open

    class Counting:
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def seek(self, place):
            self.file.seek(place)

        def readinto(self, data):
            read.append(len(data))
            return self.file.readinto(data)

    monkeypatch.setattr(Path, "open", lambda self, mode="r": Counting(opened(self, mode, buffering=0)))
    assert source.read("w", 10, 14).tolist() == [10, 11, 12, 13] and read == [16]
    assert source.read("w", 998, 2000).tolist() == [998, 999] and source.read("w", 5, 5).shape == (0,)


def test_a_file_written_has_the_header_that_safetensors_reads(tmp_path: Path):
    base = state(0, torch.bfloat16)
    out = write_merged(TaskVectors(base, [base]), make_merger("average", {}), tmp_path / "out.safetensors", {"a": "b"})
    content = out.read_bytes()
    size = int.from_bytes(content[:8], "little")
    assert size % 8 == 0 and json.loads(content[8 : 8 + size])["__metadata__"] == {"a": "b"}
    for name, value in load_file(out).items():
        assert value.dtype == base[name].dtype and torch.equal(value, base[name])


def test_models_on_their_way_are_not_changed():
    base, a = state(0), state(1)
    before = copy.deepcopy((base, a))
    tau = TaskVectors(base, [a])
    tau.flat().add_(1)
    tau.apply({"embed": torch.ones(10, 4)})["steps"] += 5
    workbench.merge(base, [a], "ties")["steps"] += 5
    assert all(torch.equal(x[name], y[name]) for x, y in zip((base, a), before, strict=True) for name in x)
    with pytest.raises(InputError, match="name 'steps' is unknown"):
        tau.apply({"steps": torch.tensor(1)})


def test_cosines_and_conflicts_of_signs():
    base = {"a": torch.zeros(4, 1), "b": torch.zeros(2)}
    experts = [
        {"a": torch.tensor([[1.0], [2.0], [0.0], [3.0]]), "b": torch.tensor([1.0, 0.0])},
        {"a": torch.tensor([[-1.0], [2.0], [5.0], [3.0]]), "b": torch.tensor([0.0, 1.0])},
    ]
    tau = TaskVectors(base, experts)
    assert sign_conflict(tau)["a"] == pytest.approx(1 / 3) and sign_conflict(tau)["b"] != sign_conflict(tau)["b"]
    cosines = task_cosines(tau)
    assert cosines["b"].tolist() == [[1, 0], [0, 1]]
    assert cosines["a"][0, 1].item() == pytest.approx(12 / (14 * 39) ** 0.5)
    assert total_cosine(tau)[0, 1].item() == pytest.approx(12 / (15 * 40) ** 0.5)
