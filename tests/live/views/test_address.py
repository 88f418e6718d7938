"""What a page reads from its address: what is known is taken, what is not is named, and nothing else is looked at."""

import pytest

from workbench.errors import InputError
from workbench.live import guard
from workbench.live.views import address

KNOWN = {"size": ("small", "smoke"), "method": ("ties", "average")}


@pytest.mark.parametrize(
    ("asked", "given", "said"),
    [
        ({}, {}, ""),
        ({"size": "smoke", "theme": "dark"}, {"size": "smoke", "theme": "dark"}, ""),
        ({"size": "smoke", "method": "tis"}, {"size": "smoke"}, "method 'tis' is unknown; did you mean 'ties'"),
        ({"theme": "green", "other": "x"}, {}, ""),
        ({"size": "", "method": "x"}, {}, "size '' is unknown"),
    ],
)
def test_what_is_known_is_taken_and_what_is_not_is_named(monkeypatch, asked, given, said):
    monkeypatch.setattr(guard, "asked", lambda: asked)
    found, wrong = address.chosen(KNOWN)
    assert found == given and wrong.startswith(said) and bool(wrong) == bool(said)


def test_an_address_that_cannot_be_read_chooses_nothing(monkeypatch):
    def refuse():
        raise InputError("the address is not UTF-8")

    monkeypatch.setattr(guard, "asked", refuse)
    assert address.chosen(KNOWN) == ({}, "the address is not UTF-8")
