"""All that a page shows, as the browser is handed it."""

from collections.abc import Iterator

import plotly.graph_objects as go

from workbench.live.views import Workbench


def texts(page: Workbench) -> Iterator[str]:
    """HTML of the page and of its cards, and every text of their figures, which plotly reads tags in."""
    yield from (page.status.object, page.trainer.answer.object)
    for view in page.views.values():
        for card in view.cards.values():
            for content in card.contents:
                yield from (
                    strings(content.to_plotly_json()) if isinstance(content, go.Figure) else [card._html(content)]
                )


def strings(value: object) -> Iterator[str]:
    """The texts in a figure, its arrays and lists among them."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from strings(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from strings(item)
    elif getattr(value, "dtype", None) is not None and value.dtype.kind in "OU":
        yield from strings(value.tolist())
