"""Depth: how many of a block's recursions the tokens go through, over time, and text coloured by it."""

import numpy as np

from workbench.figures import depth as figures
from workbench.live.records import DEPTH, DEPTH_TEXT, Record, on_validation
from workbench.live.views.bar import layer_select
from workbench.live.views.card import Card
from workbench.live.views.readings import Layer, Nothing, Readings
from workbench.live.views.tokens import NAMED, token_label
from workbench.live.views.view import View

WIDE = 6
"""Letters of the longest token that is written into a cell."""

HOW = {
    "training": "Each band is the share of tokens that stop at a depth, the number of times that the shared block was "
    "applied to them; the line is the mean. Where a router takes a fixed share of a sequence, these bands are what it "
    "was told to take and stay as they are; where each token chooses, a band that takes everything is a collapse.",
    "evaluation": "The same on validation text, where each token decides for itself, without a look at those that "
    "follow. Where this differs from the training batch, the router has not learned to say who is taken, and the model "
    "is used otherwise than it was trained.",
    "text": "The beginning of the validation text at the step on the slider, token by token; it is the same text at "
    "every evaluation, and stronger colours are deeper. Without an evaluation so far, the beginning of the training "
    "batch. A pattern that follows words or indents is the router's; a flicker from step to step is none yet.",
}


class DepthView(View):
    """Shares of the depths over training and in evaluation, and text by depth, of a layer that has recursions."""

    title = "Depth"

    def make_cards(self) -> dict[str, Card]:
        self.controls = [layer_select(self.selection)]
        return {
            "training": Card("Depth in training", HOW["training"], span=6, height=290),
            "evaluation": Card("Depth in evaluation", HOW["evaluation"], span=6, height=290),
            "text": Card("Text by depth", HOW["text"], span=12, height=260),
        }

    def draw(self, shown: list[Readings]) -> None:
        deep = any(layer.recursive for run in shown for layer in run.layers)
        for card in ("evaluation", "text"):  # where there are none, one card says so
            self.cards[card].visible = deep
        for card, record in (("training", DEPTH), ("evaluation", on_validation(DEPTH))):
            newest = self.stamps(lambda run, record=record: run.newest(record.name(self._layer(run).name)))
            self.put(card, lambda card=card, record=record: self._shares(card, record), newest)
        texts = self.read(self._text)
        self.put("text", lambda: self.each(texts, self._coloured), self.stamps(lambda run: self._text(run)[:2]))

    def _layer(self, run: Readings) -> Layer:
        """The chosen layer, or the first that has recursions."""
        deep = [layer for layer in run.moe_layers() if layer.recursive]
        if not deep:
            raise Nothing("no layer of this run has recursions, so that its tokens had a depth")
        chosen = run.layer(self.selection.layer)
        return chosen if chosen.recursive else deep[0]

    def _shares(self, card: str, record: Record) -> list:
        return self.each(
            self.read(lambda run: run.tensors(record.name(self._layer(run).name))),
            lambda run, data: figures.depth_shares(
                *data, title=f"Depth in {card}, {self._layer(run).name}{self.suffix(run)}", **self.look
            ),
        )

    def _text(self, run: Readings) -> tuple[str, int, np.ndarray]:
        """Of which text, the step, and its (2, N) token ids and depths."""
        name = self._layer(run).name
        try:
            return "validation", *run.at(on_validation(DEPTH_TEXT).name(name), self.selection.step)
        except Nothing:
            return "the training batch", *run.at(DEPTH_TEXT.name(name), self.selection.step)

    def _coloured(self, run: Readings, data: tuple[str, int, np.ndarray]):
        what, step, (ids, depths) = data
        there = ids >= 0
        return figures.text_by_depth(
            [_written(int(token), run.model.get("vocabulary")) for token in ids[there]],
            depths[there],
            self._layer(run).n_experts,
            columns=64 // len(self.selection.shown),
            title=f"Text by depth, {what} at step {step}{self.suffix(run)}",
            theme=self.selection.theme,
        )


def _written(token: int, vocabulary: str | None) -> str:
    """What stands in the cell of a token."""
    if vocabulary == "bytes" and token in NAMED:
        return chr(token)
    return token_label(token, vocabulary)[:WIDE]
