"""`workbench search neas`: from a shell, for a time, and on from where it was."""

import json

import pytest

from workbench.cli import main
from workbench.errors import InputError
from workbench.studies.search import neas_search
from workbench.studies.search.neas_search import search


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(neas_search.NeasSearch.__init__, "__defaults__", (0, None, 4))


def test_the_same_command_goes_on(home, capsys):
    picture = home / "front.html"
    picture.parent.mkdir(parents=True, exist_ok=True)
    words = ["search", "neas", "--budget", "0.02", "--max-macs", "60000", "--json"]
    assert main(words) == 0
    first = json.loads(capsys.readouterr().out)
    assert main([*words, "--html", str(picture)]) == 0
    second = json.loads(capsys.readouterr().out)
    assert second["kept"] == first["rated"] < second["rated"] and not second["ended"]
    assert all(point["cost"] <= 60000 for point in second["front"])
    assert (
        home / "searches" / "neas-0-60000" / "rated.jsonl"
    ).is_file() and "What neas has found" in picture.read_text()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nease"], "nease"),
        (["rmoe"], "system that searches 'rmoe' is unknown. Allowed: "),
        (["neas", "--max-macs", "5"], "max_macs is 5 but no ensemble of 2 paths meets it"),
        (["neas", "--budget", "0"], "must be a number of minutes above 0"),
        (["neas", "--html", "x.txt"], "--html is 'x.txt'"),
    ],
)
def test_what_cannot_be_searched_is_one_line(words, said, home, capsys):
    assert main(["search", *words]) == 2
    assert said in capsys.readouterr().err and not (home / "searches").exists()


def test_a_limit_is_refused_before_anything_is_trained():
    with pytest.raises(InputError, match="the cheapest has"):
        search(0, 100)
