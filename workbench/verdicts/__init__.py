"""The page of verdicts: every system with its claim and what became of it, as one file that needs nothing else.

    workbench verdicts --html verdicts.html

The text of the page is written here and reads without JavaScript; page.js filters it and draws the figures, with the
plotly.js that the package carries. Whatever is not from this file is escaped (`_text`).
"""

import json
import math
import warnings
from collections.abc import Iterable, Mapping
from html import escape
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING

from workbench import __version__
from workbench.catalogue import FAMILIES, PACKAGE, Method, methods
from workbench.errors import InputError
from workbench.figures.forest import SYMBOLS, forest_figure, standardised, verdict_colour
from workbench.figures.study import study_figure
from workbench.figures.theme import FONT, THEMES, theme_named
from workbench.sealed import sealed_file

if TYPE_CHECKING:
    from workbench.studies.core import Study
    from workbench.studies.result import StudyResult

HERE = Path(__file__).parent
PLOTLY = PACKAGE / "live" / "views" / "plotly-cartesian.min.js"
NOT_RUN, PLANNED = "stands, no result kept", "planned"
MARKS = {verdict: mark for verdict, (_, mark) in SYMBOLS.items()} | {NOT_RUN: "–", PLANNED: "·"}


def packaged() -> tuple[dict[str, "StudyResult"], dict[str, "Study"]]:
    """The results that travel with the package, and the studies of all systems that stand, by slug."""
    from workbench.studies import core, stored
    from workbench.studies.sheets import NotUsed

    studies = {row.slug: core.load_study(row.slug) for row in methods(status="ready")}
    results = {}
    for found in stored.results():
        try:
            results[found.slug] = core.load_result(found.slug)
        except InputError as error:
            warnings.warn(str(error), NotUsed, stacklevel=2)
    return results, studies


def page(results: Mapping[str, "StudyResult"], studies: Mapping[str, "Study"], *, theme: str | None = None) -> str:
    """The page as HTML.

    Args:
        results: slug -> result. A system that stands and has none is shown as having no result kept.
        studies: slug -> study of every system that stands; see `workbench.studies.core.load_study`.
        theme: "light" or "dark" to begin with; None is the reader's own.
    """
    if theme is not None:
        theme_named(theme)
    rows = methods()
    shown = {row.slug: results[row.slug].to_dict() for row in rows if row.slug in results}
    states = {row.slug: shown[row.slug]["verdict"] if row.slug in shown else _state(row) for row in rows}
    figures = {
        name: {
            "forest": _plot(forest_figure(list(shown.values()), theme=name)),
            "studies": {slug: _plot(study_figure(result, theme=name)) for slug, result in shown.items()},
        }
        for name in THEMES
    }
    return Template((HERE / "page.html").read_text(encoding="utf-8")).substitute(
        theme=theme or "",
        style=_variables() + (HERE / "page.css").read_text(encoding="utf-8"),
        version=_text(__version__),
        counted=_counted(states),
        families="".join(f'<option value="{family}">{_text(_words(family))}</option>' for family in FAMILIES),
        verdicts="".join(_choice(state, list(states.values()).count(state)) for state in MARKS),
        total=len(rows),
        forest_hidden="" if shown else "hidden",
        systems="\n".join(_system(row, states[row.slug], results.get(row.slug), studies.get(row.slug)) for row in rows),
        figures=json.dumps(figures, separators=(",", ":")).replace("<", r"\u003c"),
        plotly=PLOTLY.read_text(encoding="utf-8").replace("</script", r"<\/script"),
        script=(HERE / "page.js").read_text(encoding="utf-8"),
    )


def write_page(path: Path, results: Mapping[str, "StudyResult"], studies: Mapping[str, "Study"]) -> None:
    """Write the page to a file, whole or not at all."""
    content = page(results, studies)
    with sealed_file(path) as unfinished:
        unfinished.write_text(content, encoding="utf-8")


def _state(row: Method) -> str:
    return NOT_RUN if row.ready else PLANNED


def _plot(figure) -> dict:
    return json.loads(figure.to_json())


def _counted(states: Mapping[str, str]) -> str:
    """The page in one sentence."""
    told = [state for state in states.values() if state in SYMBOLS]
    counts = [f"<b>{told.count(verdict)}</b> {verdict}" for verdict in SYMBOLS if verdict in told]
    ready = sum(state != PLANNED for state in states.values())
    become = f"The claims of {len(told)} were tested: {', '.join(counts)}." if told else "None has a result here yet."
    return f"<b>{ready}</b> of {len(states)} published systems stand here. {become}"


def _choice(state: str, count: int) -> str:
    disabled = "" if count else " disabled"
    return (
        f'<label class="choice"><input type="checkbox" name="verdict" value="{_text(state)}"{disabled}>'
        f"<span>{_mark(state)} {_text(state)} <small>{count}</small></span></label>"
    )


def _system(row: Method, state: str, result: "StudyResult | None", study: "Study | None") -> str:
    """One system: a line that opens to everything that is known of it."""
    searched = " ".join((row.slug, row.title, _words(row.family), str(row.year), row.paper, row.claim, state))
    parts = {"Tested here": _text(study.tested)} if study is not None and study.tested else {}
    parts |= {} if result is None else _told(result)
    if study is not None:
        parts["Rule, fixed before the runs"] = _text(study.rule)
        note = study.power and study.power.note(study, result.preset if result else "small")
        parts |= {"Number of seeds": _text(note.removeprefix("Seeds: "))} if note else {}
    figure = ""
    if result is not None:
        parts["Arms"] = _table(result.table())
        figure = (
            f'<div class="figure" style="height: {150 + 30 * len(result.rows.arms)}px" role="img" '
            f'aria-label="Every seed of every arm of {_text(row.slug)}; their means are in the table"></div>'
        )
    elif study is not None:
        small = study.presets["small"]
        parts["Arms"] = _text(f"{', '.join(study.arms_of(small))}; {small['seeds']} seeds at the small preset")
    parts["Where"] = _where(row)
    return (
        f'<details class="system" id="{_text(row.slug)}" data-family="{row.family}" data-verdict="{_text(state)}" '
        f'data-text="{_text(searched.lower())}">\n<summary><span class="name"><b>{_text(row.title)}</b>'
        f"<small>{_text(row.slug)} · {_text(_words(row.family))} · {row.year}</small></span>"
        f'<span class="verdict">{_mark(state)} {_text(state)}</span>'
        f'<span class="effect">{_raw(result) if result is not None else ""}</span>'
        f'<span class="claim">{_text(row.claim)}</span></summary>\n<dl>'
        + "".join(f"<dt>{name}</dt><dd>{content}</dd>" for name, content in parts.items())
        + f"{figure}</dl></details>"
    )


def _raw(result: "StudyResult") -> str:
    low, high = result.judgement.ci
    interval = f"[{low:+.3g}, {high:+.3g}]" if math.isfinite(high - low) else "no interval"
    return f"{result.judgement.effect:+.3g} {interval}"


def _told(result: "StudyResult") -> dict[str, str]:
    """What was found, on how many seeds, and where the effect should lie."""
    judgement, seeds = result.judgement, result.seeds
    level = f" ({judgement.level:.0%})" if math.isfinite(judgement.ci[0]) else ""
    effect = standardised(result.to_dict())
    place = "It has no place on the axis above." if effect is None else f"On the axis above: {effect.estimate:+.3g}."
    span = f"{seeds[0]} to {seeds[-1]}" if len(seeds) > 1 else f"{seeds[0]}"
    return {
        "Found": _text(judgement.reason),
        "Effect": _text(f"{_raw(result)}{level}; claimed is {_region(*result.claimed)}. {place}"),
        "Seeds": _text(f"{len(seeds)} ({span}), at the {result.preset} preset"),
    }


def _region(low: float, high: float) -> str:
    if math.isfinite(low) and math.isfinite(high):
        return f"between {low:.3g} and {high:.3g}"
    return f"above {low:.3g}" if math.isfinite(low) else f"below {high:.3g}"


def _table(lines: list[dict[str, str]]) -> str:
    def cells(tag: str, values: Iterable[str]) -> str:
        return "<tr>" + "".join(f"<{tag}>{_text(value)}</{tag}>" for value in values) + "</tr>"

    body = "".join(cells("td", line.values()) for line in lines)
    return f'<div class="scroll"><table><thead>{cells("th", lines[0])}</thead><tbody>{body}</tbody></table></div>'


def _where(row: Method) -> str:
    places = {"paper": _paper(row.paper)}
    if row.ready:
        study = f"workbench/studies/{row.family}/{row.slug.replace('-', '_')}.py"
        places |= {"method": _code(row.object_path()), "study": _code(study), "notebook": _code(row.notebook)}
        places |= {"run it": _code(f"workbench study {row.slug} --preset small")}
    else:
        places |= {"method": f"{_code(row.object_path())}, once it stands"}
    return "<br>".join(f'<span class="place">{name}</span> {place}' for name, place in places.items())


def _paper(paper: str) -> str:
    kind, _, number = paper.partition(":")
    if kind.lower() != "arxiv":
        return _text(paper)
    return f'<a href="https://arxiv.org/abs/{_text(number)}" target="_blank" rel="noopener">{_text(paper)}</a>'


def _code(text: str) -> str:
    return f"<code>{_text(text)}</code>"


def _mark(state: str) -> str:
    return f'<i class="mark" data-verdict="{_text(state)}" aria-hidden="true">{MARKS[state]}</i>'


def _words(family: str) -> str:
    return family.replace("_", " ")


def _text(value: object) -> str:
    return escape(str(value), quote=True)


def _variables() -> str:
    """The colours of both themes: the reader's own unless the page is told another."""
    light, dark = (
        f"--page: {theme.page}; --card: {theme.card}; --ink: {theme.ink}; --muted: {theme.muted}; "
        f"--line: {theme.grid}; --accent: {theme.accent}; color-scheme: {theme.name}; "
        + " ".join(f"--verdict-{i}: {verdict_colour(verdict, theme)};" for i, verdict in enumerate(SYMBOLS))
        for theme in THEMES.values()
    )
    marks = "\n".join(
        f'.mark[data-verdict="{verdict}"] {{ color: var(--verdict-{i}); }}' for i, verdict in enumerate(SYMBOLS)
    )
    return (
        f":root {{ {light} --font: {FONT}; }}\n"
        f"@media (prefers-color-scheme: dark) {{ :root:not([data-theme=light]) {{ {dark} }} }}\n"
        f":root[data-theme=dark] {{ {dark} }}\n{marks}\n"
    )
