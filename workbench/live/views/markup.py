"""HTML of the pages: whatever a run, a model or a data set says goes into it as text, here and nowhere else."""

from collections.abc import Iterable
from html import escape


class Markup(str):
    """HTML that is meant as such."""


def html(template: str, **values: object) -> Markup:
    """``template`` with ``values`` in its braces, as text unless they are `Markup` themselves."""
    return Markup(template.format(**{name: as_html(value) for name, value in values.items()}))


def as_html(value: object) -> Markup:
    """A value as HTML that shows it."""
    return value if isinstance(value, Markup) else Markup(escape(str(value)))


def joined(parts: Iterable[object], between: str = "") -> Markup:
    """Parts one after the other."""
    return Markup(between.join(map(as_html, parts)))


def table(title: str, small: str, heads: Iterable[object], rows: Iterable[Iterable[object]]) -> Markup:
    """A table with its title, a smaller line below that, and a line of headings."""

    def line(tag: str, cells: Iterable[object]) -> Markup:
        return html("<tr>{cells}</tr>", cells=joined(html(f"<{tag}>{{cell}}</{tag}>", cell=cell) for cell in cells))

    return html(
        "<table><caption>{title}<small>{small}</small></caption>{heads}{rows}</table>",
        title=title,
        small=small,
        heads=line("th", heads),
        rows=joined(line("td", row) for row in rows),
    )
