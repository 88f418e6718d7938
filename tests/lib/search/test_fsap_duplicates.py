"""The hash without whitespace: what it sees, what it does not, and the file that keeps it."""

import pytest

from workbench.errors import InputError
from workbench.lib.search.fsap_duplicates import KEYS, Dedup, name_key, token_key, tree_key, ws_hash

CODE = "def f(x):\n    for i in range(3):\n        x = x + i\n    return x\n"
LAYOUTS = {
    "two for four": "def f(x):\n  for i in range(3):\n    x = x + i\n  return x\n",
    "tabs": CODE.replace("    ", "\t"),
    "blank lines": CODE.replace("\n", "\n\n"),
    "no spaces round operators": CODE.replace(" = x + i", "=x+i"),
    "spaces in brackets": CODE.replace("range(3)", "range( 3 )"),
}
OTHERS = {
    "a comment": CODE.replace("3):", "3):  # thrice"),
    "a renamed variable": CODE.replace("i in", "j in").replace("+ i", "+ j"),
    "a number": CODE.replace("3", "4"),
}
MOVED = CODE.replace("        x = x + i\n    return x", "        x = x + i\n        return x")
SPACED = ("print('a b')\n", "print('ab')\n")


@pytest.mark.parametrize("what", LAYOUTS)
def test_the_hash_is_the_same_in_every_layout(what: str):
    assert LAYOUTS[what] != CODE and all(
        key(LAYOUTS[what]) == key(CODE) for name, key in KEYS.items() if name != "text"
    )
    assert KEYS["text"](LAYOUTS[what]) != KEYS["text"](CODE)


@pytest.mark.parametrize("what", OTHERS)
def test_the_hash_is_another_one_for_any_other_character(what: str):
    assert ws_hash(OTHERS[what]) != ws_hash(CODE) and token_key(OTHERS[what]) != token_key(CODE)


def test_what_the_other_keys_see_of_that():
    assert tree_key(OTHERS["a comment"]) == tree_key(CODE) != tree_key(OTHERS["a renamed variable"])
    assert name_key(OTHERS["a renamed variable"]) == name_key(CODE) != name_key(OTHERS["a number"])
    swapped = "def f(a, b):\n    return a - b\n", "def f(a, b):\n    return b - a\n"
    assert name_key(swapped[0]) != name_key(swapped[1]), "which name stands where matters"


@pytest.mark.parametrize("pair", [(CODE, MOVED), SPACED], ids=["a level of indentation", "the spaces of a string"])
def test_the_known_false_merge_is_confirmed_by_tokens(pair: tuple[str, str]):
    first, second = pair
    assert ws_hash(first) == ws_hash(second) and tree_key(first) != tree_key(second)
    lax, strict = Dedup(), Dedup(strict=True)
    assert lax.add(first) and not lax.add(second) and lax.false_merges == 0 and len(lax) == 1
    assert strict.add(first) and strict.add(second) and strict.false_merges == 1 and len(strict) == 2
    assert not strict.add(second) and not strict.add(first) and strict.false_merges == 1


def test_a_text_without_tokens_is_its_own_hash():
    strict = Dedup(strict=True)
    assert strict.add("(((") and not strict.add("( ( (")
    for key in (token_key, tree_key, name_key):
        with pytest.raises(InputError, match="code"):
            key("(((")


@pytest.mark.parametrize("strict", [False, True])
def test_what_was_seen_is_kept_in_a_file(strict: bool, tmp_path):
    path = tmp_path / "seen.json"
    first = Dedup([OTHERS["a number"]], path, strict)
    assert first.add(CODE) and not first.add(LAYOUTS["tabs"])
    again = Dedup(path=path, strict=strict)
    assert len(again) == 2 and not again.add(CODE) and again.add("x = 1\n")
    with pytest.raises(InputError, match=f"strict is {not strict} but"):
        Dedup(path=path, strict=not strict)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"strict": false, "seen": 3}'])
def test_a_file_of_something_else_is_refused(text: str, tmp_path):
    path = tmp_path / "seen.json"
    path.write_text(text)
    with pytest.raises(InputError, match="is no file of hashes"):
        Dedup(path=path)
    assert path.read_text() == text
