"""Expert co-activation: which experts work together, in one layer, over layers, and in layers that share them."""

from typing import NamedTuple

import numpy as np
import panel as pn
import torch

from workbench.figures import coactivation as figures
from workbench.figures.theme import short_names
from workbench.lib.measures.coactivation import CoactivationMatrix, cluster_order, coactivation, top_pairs
from workbench.lib.measures.transition import transition_lift
from workbench.live.records import AGREEMENT, COACTIVATION, TRANSITION, Division
from workbench.live.views.bar import division_select, layer_select, widget
from workbench.live.views.card import Card
from workbench.live.views.markup import Markup, table
from workbench.live.views.readings import Nothing, Readings, present, stamped
from workbench.live.views.view import View

TOP_PAIRS = 12
ALL = -1  # the tokens of all domains or modalities; None would show as nothing
WINDOW = 10  # records; the pairs of one batch are few when there are many experts

HOW = {
    "matrix": "Cell (i, j) compares how often experts i and j are chosen for the same token with what balanced random "
    "routing would give: the null, in the neutral colour, is 1 for the corrected lift (for the plain lift it is not, "
    "because choosing one expert uses up one of the K slots). Orange pairs attract, blue pairs avoid each other. "
    "Experts are ordered so that those that work together stand together; the order is kept while the run goes on, "
    "until you ask for a new one. Choose a domain or a modality to see the pairs of its tokens alone.",
    "transition": "Of the tokens of expert i in this layer, how many more than expected go to expert j in the next "
    "one. 1 (neutral) means that the two layers route independently; orange cells are paths through the network.",
    "agreement": "Layers that share their experts, or the depths at which one layer is applied: how many more tokens "
    "than by chance have the same first expert in both. 0 (neutral) means that they choose independently, 1 that every "
    "token goes to the same expert again; chance is what their loads give. 0@2 is layer 0 the third time that it is "
    "applied. A shared router that does this at all "
    "depths has learned nothing from depth.",
    "pairs": "The strongest pairs of the matrix, with the number of tokens that both took in the records summed. "
    "With few tokens a large value is easily chance: sum more records.",
}


class Together(NamedTuple):
    """Co-activation of one layer: the step, the matrix with its null, the counts, and the order of the experts.

    ``part`` names the domain or the modality whose tokens they are, where it is one.
    """

    step: int
    matrix: CoactivationMatrix
    counts: np.ndarray
    order: np.ndarray
    part: str | None = None


class CoactivationView(View):
    """Ordered co-activation matrix of a layer, its top pairs, transitions to the next, and agreement in a pool."""

    title = "Co-activation"

    def make_cards(self) -> dict[str, Card]:
        kinds = {look.title: kind for kind, look in figures.KINDS.items()}
        self.kind = widget(pn.widgets.Select, 210, label="Measure", options=kinds)
        self.reorder = widget(pn.widgets.Button, 160, label="Re-order experts")
        windows = {"newest record": 1, "last 10 records": WINDOW, "last 50 records": 5 * WINDOW}
        self.window = widget(pn.widgets.Select, 210, label="Tokens of", options=windows, value=WINDOW)
        self.part = widget(pn.widgets.Select, 150, label="Part", options={"all": ALL}, value=ALL)
        for control in (self.kind, self.window, self.part):
            control.param.watch(lambda _: self.refresh(), "value")
        self.reorder.on_click(lambda _: self.order_anew())
        by = division_select(self.selection)
        self.controls = [layer_select(self.selection), self.kind, self.window, by, self.part, self.reorder]
        self._orders: dict[tuple, np.ndarray] = {}
        self._ordered = 0  # how often a new order was asked for
        return {
            "matrix": Card("Co-activation", HOW["matrix"], span=5, height=520),
            "transition": Card("Transitions to the next layer", HOW["transition"], span=4, height=520),
            "pairs": Card("Top pairs", HOW["pairs"], span=3, height=520),
            "agreement": Card("Agreement between depths", HOW["agreement"], span=5, height=420),
        }

    def order_anew(self) -> None:
        """Order the experts by the matrix on show."""
        self._orders.clear()
        self._ordered += 1
        self.refresh()

    def draw(self, shown: list[Readings]) -> None:
        chosen, step = self.selection.layer, self.selection.step
        self._offer_parts(shown)
        kind, window = self.kind.value, self.window.value
        part = None if self.part.value == ALL else (self.selection.division, self.part.value)
        found = self.read(lambda run: together(run, chosen, step, kind, self._orders, window, part))
        here = stamped(found, lambda data: data.step)
        self.put("matrix", lambda: matrix_contents(self, found, kind), here, kind, window, self._ordered, part)
        self.put("pairs", lambda: self.each(found, self._pairs), here, kind, window, part)
        there = self.stamps(lambda run: run.at(TRANSITION.name(run.layer(chosen).name), step)[0])
        self.put("transition", self._transitions, there, window)
        self.cards["agreement"].visible = any(run.model.get("pools") for run in shown)
        pools = self.read(self._agreement)
        stamps = stamped(pools, lambda data: data[0])
        self.put("agreement", lambda: self.each(pools, self._agreement_figure), stamps, window)

    def _offer_parts(self, shown: list[Readings]) -> None:
        """The domains or the modalities of the first run on show, whose tokens may be looked at apart."""
        names = self.selection.division.names(shown[0].model)
        options = {"all": ALL} | {name: i for i, name in enumerate(names if len(names) > 1 else ())}
        if self.part.options != options:
            self.part.param.update(options=options, value=ALL)

    def _agreement(self, run: Readings) -> tuple[int, list[str], np.ndarray]:
        """The step, the layers (L,) of the selected layer's pool, and the counts (3, L, L) of the window."""
        layer = run.layer(self.selection.layer).name
        pools = run.model.get("pools") or {}
        name = next((name for name, layers in pools.items() if layer in layers), None)
        if name is None:
            raise Nothing("this layer shares its experts with no other")
        step, counts = run.window(AGREEMENT.name(name), self.selection.step, self.window.value)
        return step, pools[name], counts

    def _agreement_figure(self, run: Readings, data: tuple[int, list[str], np.ndarray]):
        _, layers, counts = data
        with np.errstate(invalid="ignore"):
            share, chance = counts[:2] / counts[2]  # NaN where no tokens were compared
        title = f"Agreement between depths{self.suffix(run)}"
        return figures.agreement_matrix(share, chance, short_names(layers), theme=self.selection.theme, title=title)

    def _transitions(self) -> list:
        chosen = self.selection.layer

        def read(run: Readings) -> np.ndarray:
            if self.selected_layer(run) == len(run.layers) - 1:
                raise Nothing("this is the last layer: choose an earlier one to see where its tokens go next")
            name = run.layer(chosen).name
            _, counts = run.window(TRANSITION.name(name), self.selection.step, self.window.value)
            return transition_lift(torch.as_tensor(counts.astype(np.float64))).numpy()

        found = self.read(read)
        ceiling = figures.transition_ceiling(*present(found))

        def build(run: Readings, lift: np.ndarray):
            here = self.selected_layer(run)
            names = short_names([layer.name for layer in run.layers])
            return figures.transition_matrix(
                lift,
                (names[here], names[here + 1]),
                title=f"Layer {names[here]} → layer {names[here + 1]}{self.suffix(run)}",
                ceiling=ceiling,
                theme=self.selection.theme,
            )

        return self.each(found, build)

    def _pairs(self, run: Readings, data: Together) -> Markup:
        look = figures.KINDS[self.kind.value]
        rows = (
            (f"{pair.first} – {pair.second}", f"{pair.value:.3f}", f"{int(data.counts[pair.first, pair.second]):,}")
            for pair in top_pairs(data.matrix.values, TOP_PAIRS)
        )
        title = f"Top pairs, {self.layer_label(run)}{self.suffix(run)}"
        small = f"{look.title.lower()}, null {data.matrix.null:.3g}{of_part(data)}"
        return table(title, small, ("experts", look.unit, "tokens"), rows)


def together(
    run: Readings,
    number: int,
    step: int | None,
    kind: str,
    orders: dict[tuple, np.ndarray],
    records: int = WINDOW,
    part: tuple[Division, int] | None = None,
) -> Together:
    """Co-activation of one layer over the last ``records`` at a step; ``Nothing`` for K = 1, where it is undefined.

    ``orders`` keeps the order of the experts by run and layer; a new one is added for those it does not hold. ``part``
    is the domain or modality, by its number, whose tokens alone count; the order stays that of the first asked for.
    """
    layer = run.layer(number)
    if layer.top_k == 1:
        raise Nothing("undefined for K=1: one expert per token cannot occur together with another")
    name = None
    if part is None:
        at, recorded = run.window(COACTIVATION.name(layer.name), step, records)
    else:
        by, which = part
        names = run.parts(by)
        if which >= len(names):
            raise Nothing(f"this run has no {by.name} number {which + 1}")
        at, by_part = run.window(by.coactivation.name(layer.name), step, records)
        name, recorded = names[which], by_part[which]
    counts = torch.as_tensor(recorded.astype(np.float64))
    matrix = coactivation(counts, kind)
    if matrix.undefined_reason:
        raise Nothing(matrix.undefined_reason)
    key = (run.run.folder, layer.name)
    if key not in orders:
        orders[key] = cluster_order(coactivation(counts, "lift_corrected").values).numpy()
    return Together(at, matrix, recorded, orders[key], name)


def of_part(data: Together) -> str:
    """What names the part in a title."""
    return "" if data.part is None else f", {data.part}"


def matrix_contents(view: View, found: list, kind: str) -> list:
    """The co-activation matrix of every run on show, on one scale."""
    good = list(present(found))
    ceiling = max((figures.pair_ceiling(kind, d.matrix.null, d.matrix.values.numpy()) for d in good), default=None)
    return view.each(
        found,
        lambda run, data: figures.coactivation_matrix(
            data.matrix.values.numpy(),
            kind=kind,
            null=data.matrix.null,
            order=data.order,
            ceiling=ceiling,
            title=f"{figures.KINDS[kind].title} of pairs, {view.layer_label(run)}{of_part(data)}{view.suffix(run)}",
            theme=view.selection.theme,
        ),
    )
