"""The page of verdicts in a real browser, from a file and without a network; and what it says of whom."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

import workbench.verdicts
from workbench.catalogue import Method, MethodTable
from workbench.errors import InputError
from workbench.lib.measures.statistics import paired_interval
from workbench.studies.core import Study, StudyResult
from workbench.studies.rows import Row, Rows
from workbench.studies.sheets import NotUsed
from workbench.studies.verdicts import NOT_REPRODUCED, NOT_RESOLVED, REPRODUCED, Judgement
from workbench.verdicts import page, write_page

NASTY = "<b>&\"</b><img src=x onerror=alert(1)>'</script>$total"


def run(arm, seed, settings) -> Row:
    return Row(arm, seed, 1200, 600, 3 * 10**9, 40, (1.0 + 0.1 * seed**2) if arm == NASTY else 0.5)


def judged(verdict: str) -> Callable[[Rows, dict], Judgement]:
    def judge(rows, settings) -> Judgement:
        return Judgement.on(paired_interval(rows.of(NASTY), rows.of("other")), verdict, f"Because {NASTY}.")

    return judge


def system(slug: str, family: str, **more) -> Method:
    return Method(slug, f"The title of {slug}", family, 2024, "arXiv:2401.00001", f"A claim of {slug}.", **more)


def study(row: Method, verdict: str, seeds: int) -> Study:
    presets = {preset: {"seeds": seeds} for preset in ("smoke", "small")}
    return Study(row, NASTY, NASTY, True, f"Rule {NASTY}.", presets, (NASTY, "other"), run, judged(verdict), NASTY)


#: In the order of the catalogue: three verdicts, one of them on a single seed, one with no result kept, one planned.
SYSTEMS = [
    replace(system("good", "routing"), title=NASTY, claim=NASTY, paper=f"arXiv:{NASTY}"),
    system("bad", "routing"),
    system("single", "lora_experts"),
    system("waiting", "lora_experts"),
    system("later", "merging", status="planned", kind=None, example=None),
]
VERDICTS = {"good": (REPRODUCED, 3), "bad": (NOT_REPRODUCED, 3), "single": (NOT_RESOLVED, 1), "waiting": ("", 2)}


@pytest.fixture(scope="module")
def studies() -> dict[str, Study]:
    return {row.slug: study(row, *VERDICTS[row.slug]) for row in SYSTEMS if row.ready}


@pytest.fixture(scope="module")
def results(studies: dict[str, Study]) -> dict[str, StudyResult]:
    return {slug: studies[slug].execute("smoke") for slug in ("good", "bad", "single")}


@pytest.fixture(autouse=True)
def catalogue(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workbench.verdicts, "methods", lambda: MethodTable(SYSTEMS))


@pytest.fixture
def visit(browser, tmp_path: Path, results, studies) -> Iterator[Callable]:
    """Opens the page from a file. Nothing may be asked of a network, and nothing may go wrong in the console."""
    wrong, asked, contexts = [], [], []
    file = tmp_path / "verdicts.html"
    write_page(file, results, studies)

    def open_page(scheme: str = "light", width: int = 1280, hash: str = ""):
        context = browser.new_context(color_scheme=scheme, viewport={"width": width, "height": 800}, offline=True)
        contexts.append(context)
        tab = context.new_page()
        tab.on("request", lambda request: asked.append(request.url))
        tab.on("console", lambda message: wrong.append(message.text) if message.type in ("error", "warning") else None)
        tab.on("pageerror", lambda error: wrong.append(str(error)))
        tab.on("dialog", lambda dialog: wrong.append(dialog.message))
        tab.goto(file.as_uri() + hash)
        tab.wait_for_selector("#forest .main-svg")
        return tab

    yield open_page
    for context in contexts:
        context.close()
    assert [url for url in asked if url.partition("#")[0] != file.as_uri()] == []
    assert wrong == []


def shown(tab) -> list[str]:
    return tab.locator(".system:visible").evaluate_all("nodes => nodes.map(node => node.id)")


def rows(tab) -> list[str]:
    """The rows of the forest that are drawn, from the top."""
    return tab.locator("#forest .ytick text").evaluate_all(
        "nodes => nodes.sort((a, b) => a.getBoundingClientRect().y - b.getBoundingClientRect().y)"
        ".map(node => node.textContent)"
    )


def choose(tab, state: str) -> None:
    tab.locator(".choice", has_text=state).click()


def paper(tab) -> str:
    return tab.evaluate("document.getElementById('forest')._fullLayout.paper_bgcolor")


@pytest.mark.browser
def test_every_system_is_listed_with_what_became_of_it(visit):
    tab = visit()
    assert shown(tab) == ["good", "bad", "single", "waiting", "later"]
    states = [
        "● reproduced",
        "✖ not reproduced",
        "◇ not resolved at this scale",
        "– stands, no result kept",
        "· planned",
    ]
    assert tab.locator(".verdict").all_inner_texts() == states
    assert rows(tab) == ["good", "bad", "single"]
    assert "4 of 5" in tab.locator("header p").inner_text()
    assert "3 were tested: 1 reproduced, 1 not reproduced, 1 not resolved" in tab.locator("header p").inner_text()
    assert tab.locator("#count").inner_text() == "5 of 5 systems"


@pytest.mark.browser
def test_filters_by_text_family_and_verdict_narrow_list_and_forest(visit, until):
    tab = visit()
    tab.fill("#words", "title OF bad")
    assert shown(tab) == rows(tab) == ["bad"]
    tab.fill("#words", "")
    tab.select_option("#family", "lora_experts")
    assert shown(tab) == ["single", "waiting"] and rows(tab) == ["single"]
    choose(tab, "stands, no result kept")
    assert shown(tab) == ["waiting"]
    assert tab.locator("#effects").is_hidden() and tab.locator("#none").is_hidden()
    tab.fill("#words", "no such system")
    assert shown(tab) == [] and tab.locator("#none").is_visible()
    assert tab.locator("#count").inner_text() == "0 of 5 systems"
    tab.get_by_role("button", name="Clear").click()
    until(lambda: len(shown(tab)) == 5)
    assert rows(tab) == ["good", "bad", "single"]


@pytest.mark.browser
def test_a_verdict_that_nothing_has_cannot_be_asked_for_and_several_can(visit):
    tab = visit()
    assert tab.get_by_label("not testable here").is_disabled()
    choose(tab, "planned")
    choose(tab, "not resolved at this scale")
    assert shown(tab) == ["single", "later"]


@pytest.mark.browser
def test_a_system_opens_by_the_keyboard_to_its_rule_arms_seeds_figure_and_places(visit):
    tab = visit()
    tab.locator("#bad summary").focus()
    tab.keyboard.press("Enter")
    tab.wait_for_selector("#bad .figure .main-svg")
    text = tab.locator("#bad dl").inner_text()
    for part in ("Rule, fixed before the runs", "1,200", "3 (0 to 2), at the smoke preset", "claimed is above 0"):
        assert part in text
    for place in ("workbench/lib/routing/bad.py", "workbench/studies/routing/bad.py", "notebooks/01_routing.ipynb"):
        assert place in text
    assert tab.locator("#bad tbody tr").count() == 2


@pytest.mark.browser
def test_what_has_no_result_is_not_given_one(visit):
    tab = visit()
    tab.locator("#waiting summary").click()
    text = tab.locator("#waiting dl").inner_text()
    assert "Rule, fixed" in text and "2 seeds at the small preset" in text and "workbench study waiting" in text
    assert tab.locator("#waiting .effect").inner_text() == "" and tab.locator("#waiting .figure").count() == 0
    tab.locator("#later summary").click()
    assert "once it stands" in tab.locator("#later dl").inner_text()
    assert tab.locator("#single .effect").inner_text() == "+0.5 no interval"


@pytest.mark.browser
def test_a_click_on_a_row_of_the_forest_opens_its_study(visit):
    tab = visit()
    box = tab.locator("#forest .ytick text", has_text="bad").bounding_box()
    tab.mouse.click(box["x"] + 200, box["y"] + box["height"] / 2)
    tab.wait_for_selector("#bad[open] .main-svg")
    assert tab.evaluate("document.activeElement.parentElement.id") == "bad"


@pytest.mark.browser
def test_an_address_with_a_slug_opens_that_system(visit):
    assert visit(hash="#bad").locator(".system[open]").get_attribute("id") == "bad"


@pytest.mark.browser
def test_what_looks_like_markup_is_shown_as_text(visit):
    tab = visit()
    tab.locator("#good summary").click()
    tab.wait_for_selector("#good .figure .main-svg")
    assert tab.locator("#good .name b").inner_text() == tab.locator("#good .claim").inner_text() == NASTY
    assert tab.locator("#good td").first.inner_text() == NASTY
    for part in (f"Rule {NASTY}.", f"Because {NASTY}."):
        assert part in tab.locator("#good dl").inner_text()
    assert NASTY in tab.locator("#good .figure .gtitle").text_content()
    assert NASTY in tab.locator("#good .figure .ytick text").all_text_contents()
    assert tab.locator("img").count() == 0


@pytest.mark.browser
@pytest.mark.parametrize(
    ("scheme", "colour", "other"), [("light", "#ffffff", "#161b21"), ("dark", "#161b21", "#ffffff")]
)
def test_the_theme_is_the_readers_own_until_another_is_chosen(visit, scheme, colour, other):
    tab = visit(scheme)
    assert paper(tab) == colour
    tab.select_option("#theme", {"light": "dark", "dark": "light"}[scheme])
    assert paper(tab) == other
    cards = {"#ffffff": "rgb(255, 255, 255)", "#161b21": "rgb(22, 27, 33)"}
    assert tab.evaluate("getComputedStyle(document.getElementById('filter')).backgroundColor") == cards[other]


@pytest.mark.browser
def test_a_narrow_page_does_not_scroll_sideways(visit):
    tab = visit(width=360)
    tab.locator("#bad summary").click()
    tab.wait_for_selector("#bad .figure .main-svg")
    assert tab.evaluate("document.documentElement.scrollWidth") == 360
    assert "asinh" in tab.locator("#forest .xtitle").text_content()


def test_one_page_is_one_text_and_a_theme_that_is_none_is_refused(results, studies):
    assert page(results, studies) == page(results, studies)
    assert 'data-theme="dark"' in page(results, studies, theme="dark")
    data = page(results, studies).partition('id="figures">')[2].partition("</script>")[0]
    assert "<" not in data and json.loads(data).keys() == {"light", "dark"}  # no text of a figure ends the element
    with pytest.raises(InputError, match="theme 'drak' is unknown; did you mean 'dark'"):
        page(results, studies, theme="drak")


def test_a_page_without_a_result_has_no_forest(studies):
    text = page({}, studies)
    assert 'id="effects" aria-label="Effects against what is claimed" hidden' in text
    assert "None has a result here yet" in text


def test_a_stored_result_of_another_version_is_named_and_not_shown(monkeypatch, results, studies):
    def load_result(slug):
        if slug == "bad":
            raise InputError("slug 'bad' has a stored result that is of version 1")
        return results[slug]

    monkeypatch.setattr("workbench.studies.core.load_study", studies.get)
    monkeypatch.setattr("workbench.studies.core.load_result", load_result)
    monkeypatch.setattr("workbench.studies.stored.results", lambda: [row for row in SYSTEMS if row.slug in results])
    monkeypatch.setattr(workbench.verdicts, "methods", lambda **_: MethodTable(row for row in SYSTEMS if row.ready))
    with pytest.warns(NotUsed, match="'bad' has a stored result that is of version 1"):
        found, all_studies = workbench.verdicts.packaged()
    assert found.keys() == {"good", "single"} and all_studies == studies
