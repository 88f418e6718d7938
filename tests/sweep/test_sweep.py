"""A diverse and quick part of the sweep is as in the table; `python -m tests.sweep adapters --check` compares it all.

Under another version of transformers than the table's, an architecture may be another: only failures are looked for.
"""

import pytest

from tests.sweep import table
from tests.sweep.__main__ import lacking
from tests.sweep.adapters import ADAPTERS, FILE, REFUSALS, RIGHT, row
from tests.sweep.models import NotBuilt, build

WHOLE = ("llama", "mamba", "mixtral")
ONE = (
    "bamba", "bert", "deepseek_v3", "eomt", "falcon", "glm4v_vision", "gpt2", "gte", "higgs_audio_v2", "mobilebert",
    "mpt", "nllb-moe", "opt", "poolformer", "seed_oss", "siglip_text_model", "swin", "switch_transformers", "t5", "vit",
    "wavlm",
)  # fmt: skip
"""Each with one of the adapters, in turn."""

PART = dict.fromkeys(WHOLE, tuple(ADAPTERS)) | {n: (list(ADAPTERS)[i % len(ADAPTERS)],) for i, n in enumerate(ONE)}
PART |= {"axk2": ("flexmore",)}


@pytest.mark.parametrize("name", PART)
def test_an_adapter_is_right_on_the_architecture_or_refused_as_in_the_table(name):
    version, kept = table.read(FILE)
    found = {name: row(name, PART[name])}
    assert table.failures(found) == []
    if version == table.version():
        assert table.differences(found, kept) == []


def test_the_table_has_no_third_outcome_and_holds_the_part():
    _, kept = table.read(FILE)
    assert table.failures(kept) == []
    outcomes = {cell for row in kept.values() for slug, cell in row.items() if slug != "class"}
    allowed = {RIGHT, *(f"refused: {kind}" for kind in REFUSALS.values())}
    assert outcomes == allowed and kept.keys() >= PART.keys()
    assert sum(len(row) > 1 for row in kept.values()) > 450
    assert [name for name, row in kept.items() if lacking(row, tuple(ADAPTERS))] == []
    assert len({kept[name].get(slug) for name, slugs in PART.items() for slug in slugs} - {None}) > 1


def test_an_architecture_is_the_same_twice():
    first, second = build("mixtral"), build("mixtral")
    assert first[1].keys() == second[1].keys()
    state = second[0].state_dict()
    assert all(bool((value == state[key]).all()) for key, value in first[0].state_dict().items())


def test_an_outcome_that_may_not_be_is_a_failure_and_one_that_changed_a_difference(tmp_path):
    rows = {"a": {"class": "A", "lora": "right", "mhr": "wrong: another start"}, "b": {"class": "not built: why"}}
    rows["c"] = {"class": "C", "mhr": "right"}
    table.write(tmp_path / "t.tsv", rows, ("class", "lora", "mhr", "new"))
    version, kept = table.read(tmp_path / "t.tsv")
    assert version == table.version() and kept == rows
    lacks = [lacking(kept.get(name), ("lora", "mhr", "new")) for name in "abcd"]
    assert lacks == [["new"], [], ["lora", "new"], ["lora", "mhr", "new"]]
    assert table.failures(kept) == ["a mhr: wrong: another start"]
    found = {"a": rows["a"] | {"lora": "refused: no linear layer"}, "b": rows["b"]}
    assert len(table.differences(found, kept)) == 1 and table.differences(rows, kept) == []
    assert table.counts(kept.values()) == {"right": 2, "wrong: another start": 1, "not built": 1}
    with pytest.raises(NotBuilt, match="no registry"):
        build("siglip_text_model")
