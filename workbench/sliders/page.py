"""The page of sliders: a network, its knobs, and what it says to an image, at once."""

import base64
import io
import time

import numpy as np
import panel as pn
import plotly.graph_objects as go

from workbench.errors import InputError, unknown
from workbench.figures.theme import blank, theme_named
from workbench.live.views import style
from workbench.live.views.bar import served, text, widget
from workbench.live.views.card import Card, grid
from workbench.live.views.markup import Markup, html, joined
from workbench.live.views.plot import Pulse
from workbench.live.views.readings import Nothing
from workbench.live.work import Job, opened
from workbench.sliders.networks import Answer, Network
from workbench.sliders.opening import NETWORKS, SIZES, open_network

POLL_MS = 300  # how often one looks whether a network has been opened
PICTURE, CURVE = 330, 330  # pixels, the heights of the cards

HOW = {
    "given": "What the network is given: a photograph that it was not trained on, as the knobs spoil it.",
    "made": "What the network makes of it at this setting. Nothing is prepared: it computes each time a knob moves.",
    "difference": "What the network has changed: blue is darker than before, orange brighter, white is nothing. The "
    "strongest colour is a tenth of the range from black to white; more than that looks the same.",
    "curve": "What there is to choose between for this very image, a point each; the ring is what is chosen now.",
}


class SlidersPage(pn.viewable.Viewer):
    """A network that answers while a knob moves.

    Args:
        network: one of `NETWORKS`.
        size: one of `SIZES`.
        theme: "light" or "dark".

    Raises:
        InputError: an unknown network or size.
    """

    def __init__(self, network: str = next(iter(NETWORKS)), size: str = SIZES[0], *, theme: str = "light"):
        super().__init__()
        for name, value, known in (("network", network, NETWORKS), ("size", size, SIZES)):
            if value not in known:
                raise unknown(name, value, known)
        titles = {title: name for name, (title, _) in NETWORKS.items()}
        self.size = size
        self.network = widget(pn.widgets.Select, 240, label="Network", options=titles, value=network)
        self.image = widget(pn.widgets.Select, 90, label="Image", options={"1": 0}, value=0)
        self.dark = widget(pn.widgets.Toggle, 70, label="◐ Dark", value=theme == "dark")
        self.status = text(min_width=400)
        self.cards = {
            "given": Card("Given", HOW["given"], span=4, height=PICTURE),
            "made": Card("Made of it", HOW["made"], span=4, height=PICTURE),
            "difference": Card("The difference", HOW["difference"], span=4, height=PICTURE),
            "curve": Card("What there is to choose", HOW["curve"], span=8, height=CURVE),
            "measures": Card("In numbers", "What is measured of this image at this setting.", span=4, height=CURVE),
        }
        self.sliders: dict[str, pn.widgets.FloatSlider] = {}
        self.answered: Answer | None = None
        self.seconds = 0.0
        self._knobs = pn.Row(stylesheets=[style.BAR], sizing_mode="stretch_width", margin=0)
        self._told = ""
        self._open()
        self._root = self._compose()
        self.network.param.watch(lambda _: self._open(), "value")
        self.image.param.watch(lambda _: self._answer(), "value")
        self.dark.param.watch(lambda _: self._darken(), "value")

    @property
    def theme(self) -> str:
        return "dark" if self.dark.value else "light"

    def tell(self, error: str) -> None:
        """Say on the page what is wrong with what was asked for."""
        self._told = error

    # -- opening a network

    def _open(self) -> None:
        name, size = self.network.value, self.size
        self._job: Job[str | Network] = opened(("sliders", name, size), lambda: open_network(name, size))
        self._shown: Network | None = None
        self.sliders, self.answered, self._told = {}, None, ""
        self._knobs.objects = []
        for card in self.cards.values():
            card.show([Nothing("the network is trained once, and then kept")])
        self.poll()

    def poll(self) -> None:
        """Look whether the network is there: called again and again while the page is open."""
        network = self._job.latest
        if self._shown is None and isinstance(network, Network):
            self._shown = network
            parts = []
            for knob in network.knobs:
                look = {"start": knob.low, "end": knob.high, "step": knob.step, "value": knob.value}
                label = f"{knob.name} ({knob.about})" if knob.about else knob.name
                slider = widget(pn.widgets.FloatSlider, 250, label=label, format="0[.]00", **look)
                slider.param.watch(lambda _: self._answer(), "value")
                self.sliders[knob.name] = slider
                parts.append(slider)
            self._knobs.objects = parts
            self.image.param.update(options={str(i + 1): i for i in range(network.images)}, value=0)
            self._answer()
        self.status.object = self._status()

    # -- answering

    def _answer(self) -> None:
        if self._shown is None:
            return
        began = time.perf_counter()
        try:
            self.answered = self._shown.answer(
                self.image.value, {k: slider.value for k, slider in self.sliders.items()}
            )
        except InputError as error:
            self.tell(str(error))
        else:
            self.seconds, self._told = time.perf_counter() - began, ""
            self._draw(self.answered)
        self.status.object = self._status()

    def _draw(self, answer: Answer) -> None:
        given, made = answer.given, answer.made
        truth = [] if answer.truth is None else [("the truth", answer.truth)]
        self.cards["given"].show([_images([("given", given), *truth])])
        self.cards["made"].show([_images([("made of it", made)])])
        self.cards["difference"].show([_images([("made − given", made - given)], signed=True)])
        self.cards["curve"].show([self._curve(answer)])
        rows = joined(html("<dt>{what}</dt><dd>{value}</dd>", what=k, value=v) for k, v in answer.measures.items())
        inside = '<div style="padding: 4px 14px"><dl>{rows}</dl><p>{about}</p></div>'
        about = html(inside, rows=rows, about=self._shown.about)
        self.cards["measures"].show([about])

    def _curve(self, answer: Answer) -> go.Figure:
        curve, colours = answer.curve, theme_named(self.theme)
        figure = blank(self.theme, curve.title, "", x=curve.x, y=curve.y, showlegend=False)
        xs, ys = zip(*curve.points.values(), strict=True)
        figure.add_scatter(
            x=xs, y=ys, mode="lines+markers+text" if curve.line else "markers+text", name="may be chosen",
            text=list(curve.points), textposition="top center", textfont={"size": 10, "color": colours.muted},
            marker={"size": 8, "color": colours.muted}, line={"color": colours.grid},
        )  # fmt: skip
        figure.add_scatter(
            x=[curve.chosen[0]], y=[curve.chosen[1]], mode="markers", name="chosen",
            marker={"size": 16, "symbol": "circle-open", "line": {"width": 3}, "color": colours.accent},
        )  # fmt: skip
        return figure

    def _status(self) -> Markup:
        wrong, lines = self._job.error or self._told, []
        if wrong:
            lines.append(html('<span class="bad">{wrong}</span>', wrong=wrong))
        elif self._shown is None:
            said = self._job.latest or "another page comes first"
            lines.append(html('<span class="chip running">working</span><span>{said}</span>', said=said))
        else:
            said = html("answered in <b>{ms} ms</b>", ms=f"{1000 * self.seconds:.0f}")
            lines.append(html('<span class="chip finished">ready</span><span>{said}</span>', said=said))
        wrapped = '<div class="status" style="flex-wrap: wrap; white-space: normal">{lines}</div>'
        return html(wrapped, lines=joined(lines))

    # -- composition

    def _compose(self) -> pn.Column:
        brand = text('<div class="brand"><span>◆</span> workbench sliders</div>', width=165)
        wide = {"sizing_mode": "stretch_width", "margin": 0}
        return pn.Column(
            pn.Row(brand, self.network, self.image, self.status, self.dark, stylesheets=[style.BAR], **wide),
            self._knobs,
            grid(list(self.cards.values())),
            Pulse((self.poll, POLL_MS)),
            css_classes=self._classes(),
            stylesheets=[style.ROOT],
            **wide,
        )

    def _darken(self) -> None:
        self._root.css_classes = self._classes()
        if self.answered is not None:
            self._draw(self.answered)

    def _classes(self) -> list[str]:
        return ["wb", *(["wb-page"] if served() else []), f"wb-{self.theme}"]

    def __panel__(self):
        return self._root


def _images(images: list[tuple[str, np.ndarray]], signed: bool = False) -> Markup:
    """Pictures side by side, each with its name below."""
    style_of = f"width: {'100' if len(images) == 1 else '49'}%; max-width: 280px; image-rendering: pixelated"
    parts = [
        html(
            '<figure style="display: inline-block; margin: 0; {style}"><img alt="{name}" style="width: 100%; '
            'image-rendering: pixelated" src="{source}"><figcaption><b>{name}</b></figcaption></figure>',
            style=style_of,
            name=name,
            source=_png(_diverging(pixels) if signed else np.repeat(pixels[..., None], 3, -1)),
        )
        for name, pixels in images
    ]
    return html('<div style="padding: 12px 14px 0">{parts}</div>', parts=joined(parts, " "))


def _diverging(change: np.ndarray, most: float = 0.1) -> np.ndarray:
    """Blue below 0, orange above, white at 0."""
    share = (change / most).clip(-1, 1)[..., None]
    below, above = np.array([0.04, 0.38, 0.72]), np.array([0.85, 0.45, 0.05])
    return 1 - np.abs(share) * (1 - np.where(share < 0, below, above))


def _png(pixels: np.ndarray) -> str:
    """An image (H, W, 3) of values 0 to 1 as an address that holds it."""
    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray((pixels.clip(0, 1) * 255).round().astype(np.uint8)).save(stream, "PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()
