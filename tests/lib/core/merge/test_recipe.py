"""mergekit's recipes: by hand, beside mergekit itself where WORKBENCH_PEERS names a Python that has it, and refused.

python -m venv mk && mk/bin/pip install mergekit==0.1.5
WORKBENCH_PEERS=mk/bin/python pytest tests/lib/core/merge/test_recipe.py
"""

import os
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from workbench.cli import main
from workbench.errors import InputError
from workbench.lib.core.merge.files import open_models, write_model
from workbench.lib.core.merge.recipe import LONGEST, read_recipe

NAMES = ("embed.weight", *(f"layers.{i}.{part}.weight" for i in range(3) for part in ("attn", "mlp")), "norm.weight")


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """With the models base, one and two: each weight is 0, 1 or 2."""
    monkeypatch.chdir(tmp_path)
    for i, name in enumerate(("base", "one", "two")):
        Path(name).mkdir()
        save_file({n: torch.full((2, 3), float(i)) for n in NAMES}, f"{name}/model.safetensors")
    return tmp_path


def merged(text: str, out: str = "out") -> dict[str, torch.Tensor]:
    Path("recipe.yml").write_text(text)
    recipe = read_recipe("recipe.yml")
    write_model(open_models(recipe.base, recipe.experts), recipe, recipe.base, out)
    return {n: t for file in Path(out).glob("*.safetensors") for n, t in load_file(file).items()}


def values(text: str) -> list[float]:
    found = merged(text)
    assert all((tensor == tensor.flatten()[0]).all() for tensor in found.values())
    return [round(float(found[name].flatten()[0]), 5) for name in NAMES]


TWO = (
    "{merge_method: METHOD, base_model: base, "
    "models: [{model: one, parameters: {ONE}}, {model: two, parameters: {TWO}}]"
)


def two(method: str, one: str, other: str, more: str = "") -> str:
    return TWO.replace("METHOD", method).replace("ONE", one).replace("TWO", other) + (f", {more}}}" if more else "}")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (two("task_arithmetic", "weight: 1", "weight: 0.5"), [2.0] * 8),
        (two("task_arithmetic", "weight: 1", "weight: 1", "parameters: {normalize: true, lambda: 3}"), [4.5] * 8),
        (two("task_arithmetic", "weight: 1", "weight: -1", "parameters: {normalize: true}"), [-1.0] * 8),
        # the recipe's weight is for models without one
        (two("task_arithmetic", "", "weight: 1", "parameters: {weight: 3}"), [5.0] * 8),
        # over the layers; what is in none has the first
        (two("task_arithmetic", "weight: [0, 1, 4]", "weight: 0"), [0, 0, 0, 1, 1, 4, 4, 0]),
        (two("task_arithmetic", "weight: [0, 1]", "weight: 0"), [0, 0, 0, 0.5, 0.5, 1, 1, 0]),
        (
            two("task_arithmetic", "weight: [{filter: attn, value: [1, 2]}, {value: 5}]", "weight: 0"),
            [5, 1, 5, 1.5, 5, 2, 5, 5],
        ),
        # a filter that takes nothing leaves it to the recipe
        (
            two("task_arithmetic", "weight: {filter: mlp, value: 7}", "weight: 0", "parameters: {weight: 1}"),
            [1, 1, 7, 1, 7, 1, 7, 1],
        ),
        (two("ties", "weight: 1", "weight: 1", "parameters: {density: 0.5, int8_mask: true}"), [1.5] * 8),
        (two("ties", "weight: 1", "weight: 3", "parameters: {normalize: false}"), [7.0] * 8),
        (two("dare_linear", "weight: 1e-1", "weight: 1"), [2.1] * 8),
        (two("dare_ties", "weight: 1", "weight: 1", "parameters: {normalize: true, density: 1.0}"), [1.5] * 8),
        ("{merge_method: linear, models: [{model: one}, {model: two}], parameters: {weight: 1}}", [1.5] * 8),
        (
            "{merge_method: linear, models: [{model: one, parameters: {weight: 2}}, "
            "{model: two, parameters: {weight: 1}}], "
            "parameters: {normalize: false}, dtype: float32, tokenizer_source: base}",
            [4.0] * 8,
        ),
    ],
)
def test_what_a_recipe_says_is_what_comes_out(folder, text, expected):
    assert values(text) == expected


def test_densities_of_each_model_are_its_own(folder):
    for name, rows in (("one", [4.0, 1, -2, 3]), ("two", [-1.0, 2, 1, 5])):
        save_file({"a": torch.tensor(rows)}, folder / name / "model.safetensors")
    save_file({"a": torch.zeros(4)}, folder / "base" / "model.safetensors")
    out = merged(two("ties", "density: 0.5, weight: 1", "density: 0.25, weight: 2"))["a"]
    torch.testing.assert_close(out, torch.tensor([4.0, 0, 0, 13 / 3]))  # (3 + 2 * 5) / (1 + 2)
    out = merged(two("ties", "density: 0.01, weight: 1", "density: 1, weight: 1", ""), "second")["a"]
    torch.testing.assert_close(out, torch.tensor([4.0, 2, 1, 5]))  # of a very small share one is left


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("merge_method: ties\nslices: []", "line 2: slices is not done"),
        ("merge_method: ties\nmodels: []\nbase_model: b\ntokenizer: {}", "line 4: tokenizer is not done"),
        ("merge_method: tise\nmodels: []", "line 1: merge_method 'tise' is unknown; did you mean 'ties'"),
        ("merge_method: slerp\nmodels: []", "line 1: merge_method 'slerp' is unknown"),
        ("merge_method: ties\nmodles: []", "line 2: key 'modles' is unknown; did you mean 'models'"),
        ("merge_method: ties\nbase_model: b\nmodels:\n - model: a\n   parameters:\n    wieght: 1", "line 6: .*wieght"),
        ("merge_method: ties\nbase_model: b\nmodels:\n - model: a\n   parameters:\n    normalize: true", "line 6:"),
        ("merge_method: ties\nbase_model: b\nmodels:\n - model: a\n   weight: 1", "line 5: key of a model 'weight'"),
        ("merge_method: ties\nmodels: [{model: a}]", "base_model is missing, which ties needs"),
        ("merge_method: ties\nbase_model: a\nmodels: [{model: a}]", "line 3: models has only the base"),
        ("merge_method: ties\nbase_model: b\nmodels: [{model: a}, {model: a}]", "line 3: models has a twice"),
        ("merge_method: ties\nbase_model: b\nmodels: []", "line 3: models is empty"),
        ("merge_method: ties\nbase_model: b", "models is missing"),
        ("merge_method: ties\nbase_model: b\nmodels: {model: a}", "line 3: models must be a list"),
        ("merge_method: linear\nbase_model: b\nmodels: [{model: a}]", "line 2: base_model of linear must be one of"),
        ("merge_method: linear\nmodels: [{model: a+b}]", r"line 2: model 'a\+b' is a model and a LoRA"),
        ("merge_method: linear\nmodels: [{model: a}]\ntokenizer_source: union", "line 3: tokenizer_source must"),
        ("merge_method: linear\nmodels: [{model: a}]\ndtype: int4", "line 3: dtype 'int4' is unknown"),
        ("merge_method: linear\nmodels: [{model: a}]\nparameters: {weight: yes}", "line 3: weight is 'yes' but"),
        ("merge_method: linear\nmodels: [{model: a}]\nparameters: {weight: .inf}", "must be a finite number"),
        ("merge_method: linear\nmodels: [{model: a}]\nparameters: {weight: [1, b]}", "must be a finite number"),
        ("merge_method: linear\nmodels: [{model: a}]\nparameters: {weight: []}", "weight is an empty list"),
        ("merge_method: linear\nmodels: [{model: a}]\nparameters: {weight: [{filter: a}]}", "each with a value"),
        ("merge_method: linear\nmodels: [{model: a}]\nparameters: {normalize: 1}", "must be true or false"),
        ("merge_method: ties\nbase_model: b\nmodels: [{model: a}]\nparameters: {rescale: true}", "line 4: rescale is"),
        ("a: &x [1]\nb: [*x, *x]", "has an alias"),
        ("merge_method: linear\nmerge_method: ties", "line 2: .* twice"),
        ("[" * 5000, "is no YAML"),
        ("a: !!python/object/apply:os.system [ls]", "key 'a' is unknown"),
        ("", "must be keys with values"),
        ("- a", "must be keys with values"),
        ("a: b: c", "is no YAML"),
        ("\x00", "is no YAML"),
        ("#" * (LONGEST + 1), "bytes but must have at most"),
    ],
)  # fmt: skip
def test_what_is_not_done_is_refused_by_key_and_line(tmp_path, text, message):
    (tmp_path / "recipe.yml").write_text(text)
    with pytest.raises(InputError, match=message):
        read_recipe(tmp_path / "recipe.yml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (two("ties", "weight: 1", "density: 1"), "ties needs weight for embed.weight"),
        (two("ties", "weight: 1", "weight: 1", "parameters: {density: 0}"), "density is 0.0 but must be above 0"),
        (two("ties", "weight: 1", "weight: -1"), "weights below 0 are not done for ties"),
        (two("dare_ties", "weight: 1", "weight: -1"), "weights below 0 are not done for dare_ties"),
        (
            two("dare_linear", "weight: 1, density: 0.5", "weight: 1, density: 0.4"),
            "densities .* are not done for dare",
        ),
        (two("ties", "weight: 1", "weight: 1", "dtype: bfloat16"), "line 1: the dtype is torch.bfloat16 but must be"),
        (two("ties", "weight: 1", "weight: [{filter: attn, value: 1}]"), "ties needs weight for embed.weight"),
    ],
)
def test_what_only_the_models_show_leaves_nothing(folder, text, message):
    with pytest.raises(InputError, match=message):
        merged(text)
    assert not Path("out").exists()


def test_the_shell_takes_a_recipe(folder, capsys):
    Path("recipe.yml").write_text(two("task_arithmetic", "weight: 1", "weight: 1"))
    assert main(["merge", "--recipe", "recipe.yml", "--out", "out"]) == 0
    assert capsys.readouterr().out.startswith("out: task_arithmetic of 2 experts, 1 files, ")
    assert (load_file("out/model.safetensors")["embed.weight"] == 3).all()
    for words in (["base", "one"], ["--method", "ties"], ["-p", "density", "1"], ["--exclude", "*"], ["--adapter"]):
        assert main(["merge", *words, "--recipe", "recipe.yml", "--out", "other"]) == 2
        assert "--recipe goes with --out and --json alone" in capsys.readouterr().err
    assert main(["merge", "--recipe", "none.yml", "--out", "other"]) == 2 and not Path("other").exists()


GRADIENT = "weight: [0.1, 1, 0.3]"
FILTERS = "weight: [{filter: self_attn, value: [0, 1]}, {filter: mlp, value: [1, 0.2, 0.7]}, {value: 0.5}]"
BESIDE = [
    ("linear", "weight: 1", "weight: 3", "base_model: base", False),
    ("task_arithmetic", "weight: 1", "weight: 1", "", True),
    ("task_arithmetic", GRADIENT, FILTERS, "parameters: {normalize: true, lambda: 0.7}", True),
    ("task_arithmetic", GRADIENT, "weight: -0.5", "parameters: {density: 0.2}", True),
    ("ties", "weight: 1", "weight: 1", "parameters: {density: 0.3}", True),
    ("ties", f"{GRADIENT}, density: [0.2, 0.9]", f"{FILTERS}, density: 1.0", "parameters: {int8_mask: true}", True),
    ("ties", "weight: 0.3", "weight: 1", "parameters: {density: 0.001, normalize: false, lambda: 1.3}", True),
    ("dare_linear", GRADIENT, FILTERS, "parameters: {normalize: true}", True),
    ("dare_ties", GRADIENT, FILTERS, "", True),
    ("dare_ties", "weight: 1", "weight: 2", "parameters: {normalize: true, rescale: false}", True),
]
SCRIPT = """
import sys, yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import MergeOptions, run_merge
for i in range(int(sys.argv[1])):
    config = MergeConfiguration.model_validate(yaml.safe_load(open(f"{i}.yml")))
    run_merge(config, f"theirs{i}", MergeOptions(copy_tokenizer=False, write_model_card=False, quiet=True))
"""


def test_recipes_give_what_mergekit_gives(tmp_path, monkeypatch):
    """mergekit 0.1.5, float32, a Llama of three layers."""
    python = os.environ.get("WORKBENCH_PEERS")
    if not python:
        pytest.skip("WORKBENCH_PEERS names no Python that has mergekit")
    transformers = pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=31, tie_word_embeddings=False, **sizes)
    for seed, name in enumerate(("base", "one", "two")):
        torch.manual_seed(seed)
        transformers.LlamaForCausalLM(config).save_pretrained(name)
    recipes = []
    for method, one, other, more, based in BESIDE:
        text = two(method, one, other, "dtype: float32" + (f", {more}" if more and based else ""))
        recipes.append(text if based else text.replace(" base_model: base,", ""))
    for i, text in enumerate(recipes):
        Path(f"{i}.yml").write_text(text)
    done = subprocess.run([python, "-c", SCRIPT, str(len(recipes))], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    for i, text in enumerate(recipes):
        ours = merged(text, f"ours{i}")
        theirs = {n: t for file in Path(f"theirs{i}").glob("*.safetensors") for n, t in load_file(file).items()}
        assert ours.keys() == theirs.keys()
        worst = max((ours[name] - theirs[name]).abs().max() for name in ours)
        assert worst < 1e-6, (text, worst)
        print(f"{text}: {worst:.1e}")
