"""`workbench compress`, and what it has written loaded again: whole or not at all, equal outputs or what is wrong."""

import io
import json
import os
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import workbench
from workbench.cli import main
from workbench.errors import InputError
from workbench.lib.core import factored_files
from workbench.lib.core.budget import count_params
from workbench.lib.core.factored import LowRankLinear, find_linears, merge_back
from workbench.lib.core.factored_files import SIDECAR, TENSORS, load_factored
from workbench.lib.low_rank.welore import solve_threshold, spectra

TOKENS = torch.arange(12).view(2, 6)


def bert():
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    return BertModel(BertConfig(vocab_size=50, max_position_embeddings=16, **sizes))


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_positions": 16, "n_embd": 32, "n_layer": 2, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(vocab_size=50, **sizes))


def save(made, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    torch.manual_seed(0)
    model = made().to(dtype).eval()
    for layer in find_linears(model)[0].values():  # spectra that fall, each in its own way
        decay = 0.5 + 0.5 * torch.rand(())
        left, values, right = torch.linalg.svd(layer.weight.detach().float(), full_matrices=False)
        layer.weight.data.copy_((left * values * decay ** torch.arange(len(values))) @ right)
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    return folder


def words(model: Path, out: Path, *more: str) -> list[str]:
    """Of the command; what is given last counts."""
    return ["compress", str(model), "--method", "welore", "--reduce", "0.4", "--out", str(out), *more]


@pytest.fixture(scope="module", params=[(bert, torch.float32), (gpt2, torch.bfloat16)], ids=["bert", "gpt2"])
def compressed(request, tmp_path_factory) -> tuple[Path, Path, dict]:
    made, dtype = request.param
    root = tmp_path_factory.mktemp("compressed")
    before = save(made, root / "before", dtype)
    out = root / "after"
    with redirect_stdout(io.StringIO()) as said:
        assert main(words(before, out, "--reduce", "0.6", "--json")) == 0
    return before, out, json.loads(said.getvalue())


def test_it_loads_again_as_the_truncations_and_the_report_is_true(compressed):
    from transformers import AutoModel, AutoModelForCausalLM

    before, out, said = compressed
    kind = AutoModelForCausalLM if "GPT2" in (before / "config.json").read_text() else AutoModel
    dense = kind.from_pretrained(before, dtype="auto").eval()
    params = count_params(dense)
    found = spectra(dense)
    ranks = solve_threshold(found, 0.6).ranks
    low = json.loads((out / SIDECAR).read_text())["layers"]
    assert said["ranks"] == ranks and said["tau"] == pytest.approx(solve_threshold(found, 0.6).tau)
    assert low and low == {name: rank for name, rank in ranks.items() if rank < len(found[name]) / 2}
    for name, layer in find_linears(dense)[0].items():
        if name in low:
            u, s, v = torch.linalg.svd(layer.weight.detach().double(), full_matrices=False)
            cut = ((u[:, : low[name]] * s[: low[name]]) @ v[: low[name]]).to(layer.weight.dtype)
            layer.weight.copy_(cut) if type(layer) is nn.Linear else layer._module[0].weight.data.copy_(cut.T)
    model = workbench.load_factored(out)
    assert not model.training and type(model) is type(dense)
    assert {name for name, m in model.named_modules() if isinstance(m, LowRankLinear)} == set(low)
    assert {p.dtype for p in model.parameters()} == {p.dtype for p in dense.parameters()}
    close = {"atol": 1e-5, "rtol": 1e-4} if dense.dtype == torch.float32 else {"atol": 0.05, "rtol": 0.05}
    torch.testing.assert_close(model(TOKENS)[0], dense(TOKENS)[0], **close)
    assert (said["params_before"], said["params"]) == (params, count_params(model))
    assert said["bytes"] == (out / TENSORS).stat().st_size < said["bytes_before"]
    assert said["bytes_before"] == (before / "model.safetensors").stat().st_size
    assert sorted(said["files"]) == sorted(file.name for file in out.iterdir())
    assert (out / "tokenizer.json").read_text() == "{}" and not (out / "model.safetensors").exists()


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def test_transformers_refuses_the_folder_and_reads_it_merged(compressed, tmp_path):
    _, out, _ = compressed
    model = load_factored(out)
    kind = type(model)
    with pytest.raises(OSError, match="no file named"):
        kind.from_pretrained(out)
    y = model(TOKENS)[0]
    merge_back(model).save_pretrained(tmp_path)
    close = {"atol": 1e-5, "rtol": 1e-4} if model.dtype == torch.float32 else {"atol": 0.05, "rtol": 0.05}
    torch.testing.assert_close(kind.from_pretrained(tmp_path, dtype="auto").eval()(TOKENS)[0], y, **close)


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.up, self.down = nn.Embedding(20, 16), nn.Linear(16, 40), nn.Linear(40, 16, bias=False)

    def forward(self, tokens):
        return self.down(self.up(self.embedding(tokens)).relu())


def plain(path: Path) -> Plain:
    torch.manual_seed(0)
    model = Plain()
    model.up.weight.data = model.up.weight.data @ torch.diag(0.6 ** torch.arange(16.0))
    save_file(model.state_dict(), path)
    return model


def test_a_file_is_compressed_by_names_and_loads_into_a_model(tmp_path, capsys):
    model = plain(tmp_path / "plain.safetensors")
    out = tmp_path / "out"
    assert main(words(tmp_path / "plain.safetensors", out)) == 0
    said = capsys.readouterr().out
    assert "1 of 2 matrices in factors" in said and f"load_factored({str(out)!r}, model)" in said
    loaded = load_factored(out, Plain())
    assert isinstance(loaded.up, LowRankLinear) and type(loaded.down) is nn.Linear
    assert loaded.up.rank == load_file(out / TENSORS)["up.v"].shape[0]
    u, s, v = torch.linalg.svd(model.up.weight, full_matrices=False)
    rank = loaded.up.rank
    model.up.weight.copy_((u[:, :rank] * s[:rank]) @ v[:rank])
    torch.testing.assert_close(loaded(TOKENS), model(TOKENS))
    with pytest.raises(InputError, match=r"has no config\.json of transformers"):
        load_factored(out)
    with pytest.raises(InputError, match=r"does not fit the model: up is no linear layer of the model; "):
        load_factored(out, nn.Sequential(nn.Linear(2, 2)))
    more = ("--method", "uniform", "--targets", "up", "--targets", "d*", "--rho", "0.3")
    assert main(words(tmp_path / "plain.safetensors", tmp_path / "uniform", *more)) == 0
    assert "2 of 2 matrices" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--reduce", "0.97"), "reduction is 0.97 but must be between 0 and 0.9375: each of 2 matrices keeps a rank"),
        (("--reduce", "0.05"), "--reduce is 0.05 but at that no matrix loses more than 0.5 of its rank"),
        (("--reduce", "0"), "argument --reduce: is '0' but must be a share above 0 and below 1"),
        (("--reduce", "half"), "argument --reduce: is 'half' but must be a share"),
        (("--reduce", "nan"), "argument --reduce: is 'nan' but must be a share"),
        (("--rho", "1"), "--rho is 1.0 but must be at least 0 and below 1"),
        (("--method", "welor"), "--method 'welor' is unknown; did you mean 'welore'?"),
        (("--targets", "side"), "targets 'side' is unknown"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_leaves_nothing(more, message, tmp_path, capsys):
    plain(tmp_path / "plain.safetensors")
    assert main(words(tmp_path / "plain.safetensors", tmp_path / "out", *more)) == 2
    assert message in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["plain.safetensors"]


def test_a_folder_that_is_there_a_pickle_and_a_model_of_no_known_kind_are_refused(tmp_path, capsys):
    plain(tmp_path / "plain.safetensors")
    (tmp_path / "old.bin").write_bytes(b"x")
    (tmp_path / "odd").mkdir()
    plain(tmp_path / "odd" / "model.safetensors")

    def said(model: str, out: str = "new") -> str:
        argv = [
            "compress",
            str(tmp_path / model),
            "--method",
            "welore",
            "--reduce",
            "0.4",
            "--out",
            str(tmp_path / out),
        ]
        assert main(argv) == 2
        return capsys.readouterr().err

    assert "must be new: something is there" in said("plain.safetensors", "odd")
    assert "a pickle may run what it likes" in said("old.bin")
    assert "does not exist" in said("nothing")
    assert "has no config.json of transformers" in said("odd")
    (tmp_path / "odd" / "config.json").write_text('{"architectures": ["NoSuchModel"]}')
    assert "of which transformers has no model" in said("odd")
    assert sorted(os.listdir(tmp_path)) == ["odd", "old.bin", "plain.safetensors"]


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch, capsys):
    plain(tmp_path / "plain.safetensors")
    monkeypatch.setattr(factored_files, "SIDECAR", "no/such/folder")  # after the tensors are written
    assert main(words(tmp_path / "plain.safetensors", tmp_path / "out")) == 2
    assert "cannot be written, and is not there" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["plain.safetensors"]


def test_a_stop_in_the_middle_leaves_nothing(tmp_path, monkeypatch, capsys):
    plain(tmp_path / "plain.safetensors")

    def stop(weight, rank):
        raise KeyboardInterrupt

    monkeypatch.setattr(factored_files, "truncated", stop)
    assert main(words(tmp_path / "plain.safetensors", tmp_path / "out")) == 130
    assert f"interrupted: nothing is at {tmp_path / 'out'}" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["plain.safetensors"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / SIDECAR).unlink(), "must hold factors"),
        (lambda folder: (folder / SIDECAR).write_text("{"), "damaged or half-written"),
        (lambda folder: change(folder, format=2), "has format 2 but this workbench reads up to 1"),
        (lambda folder: change(folder, layers={"up": "4"}), "layers of factored.json must be names with their ranks"),
        (lambda folder: change(folder, layers={"up": 3}), r"does not fit the model: up\.u is \(40, \d\) but must be"),
        (lambda folder: change(folder, layers={"up": 99}), r"does not fit the model: up\.u is \(40, \d\) but must be"),
        (lambda folder: change(folder, layers={}), r"does not fit the model: up\.weight is missing; up\."),
        (lambda folder: (folder / TENSORS).write_bytes(b"12345678"), "the SHA-256 of factored.safetensors"),
    ],
)
def test_a_damaged_folder_says_so_and_the_model_stays(damage, message, tmp_path):
    plain(tmp_path / "plain.safetensors")
    assert main(words(tmp_path / "plain.safetensors", tmp_path / "out")) == 0
    damage(tmp_path / "out")
    model = Plain()
    with pytest.raises(InputError, match=message):
        load_factored(tmp_path / "out", model)
    assert type(model.up) is nn.Linear


def change(folder: Path, **values) -> None:
    sidecar = json.loads((folder / SIDECAR).read_text())
    (folder / SIDECAR).write_text(json.dumps(sidecar | values))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.up, self.head = nn.Embedding(20, 16), nn.Linear(16, 16), nn.Linear(16, 20, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        return self.head(self.up(self.embedding(tokens)))


@pytest.mark.parametrize("stored", ["embedding", "head", "both"])
def test_tied_weights_are_tied_again_by_whatever_name_the_file_has_them(stored, tmp_path):
    there = Tied()
    names = {"embedding": "head.weight", "head": "embedding.weight"}
    state = {name: tensor.clone() for name, tensor in there.state_dict().items() if name != names.get(stored)}
    save_file(state, tmp_path / "m.safetensors")
    assert main(words(tmp_path / "m.safetensors", tmp_path / "out", "--targets", "up", "--reduce", "0.6")) == 0
    model = load_factored(tmp_path / "out", Tied())
    assert model.head.weight is model.embedding.weight and torch.equal(model.head.weight, there.head.weight)
    there.up.weight.copy_(model.up.merged())
    torch.testing.assert_close(model(TOKENS), there(TOKENS))


def test_what_a_model_generates_by_is_loaded_with_it(tmp_path):
    from transformers import GenerationConfig

    save(gpt2, tmp_path / "before")
    GenerationConfig(eos_token_id=[3, 4], max_new_tokens=7, pad_token_id=3).save_pretrained(tmp_path / "before")
    assert main(words(tmp_path / "before", tmp_path / "out", "--reduce", "0.6")) == 0
    config = load_factored(tmp_path / "out").generation_config
    assert (config.eos_token_id, config.max_new_tokens, config.pad_token_id) == ([3, 4], 7, 3)
