"""The bench of the keys: what it takes for a method of a network, how it counts duplicates, and its record."""

from workbench.bench import validation
from workbench.lib.search.fsap_duplicates import KEYS

LONG = "".join(f"        x = x + {i}\n" for i in range(validation.LEAST))
FILE = f"""import torch.nn as nn

class One(nn.Module):
    def short(self, x):
        return x

    # a comment between
    def forward(self, x):
{LONG}        return x

class Two:
    def forward(self, x):
{LONG}        return x

class Three(SomePreTrainedModel):
    @property
    def forward(self, x):
{LONG}        return x
"""


def test_methods_are_those_of_networks_that_are_long_enough(tmp_path):
    path = tmp_path / "file.py"
    path.write_text(FILE)
    first, second = validation.methods(path)
    assert first == second and first.startswith("def forward(self, x):\n    x = x + 0\n") and "comment" not in first


def test_duplicates_are_counted_by_key():
    code = "def f(x):\n    for k in x:\n        x = k\n    return x\n"
    codes = [
        code, code, code.replace("    ", "  "), code.replace("x = k", "x = k  # one"), code.replace("k", "j"),
        code.replace("    return", "        return"),
    ]  # fmt: skip
    found = validation.duplicates(codes)
    assert {name: found[name] for name in ("text", "whitespace", "tokens", "tree")} == {
        "text": 1, "whitespace": 3, "tokens": 2, "tree": 3,
    }  # fmt: skip
    assert (found["both"], found["missed"], found["merged"], found["codes"]) == (2, 1, 1, 6)


def test_a_small_record_has_what_is_kept():
    found = validation.record(timed=2, rounds=1, code={"torch": "nn/modules/linear.py"}, pattern="nn/**/*.py")
    assert found["files"] == 2 and set(found["seconds"]) == {*KEYS, "pattern", "parse"}
    assert all(value > 0 for value in found["seconds"].values()) and len(found["sized"]) == len(validation.SIZES)
    assert found["methods"]["codes"] > 3 and "torch" in found["where"]
    text = "a =  1\n"
    assert validation.CONTESTANTS["pattern"](text) == KEYS["whitespace"](text)


def test_a_package_that_is_not_there_has_no_sources():
    assert validation.sources("no_such_package", "*.py") == []
