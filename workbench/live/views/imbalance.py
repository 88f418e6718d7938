"""Routing imbalance: who gets the tokens, over time, per layer, and what each expert takes."""

from collections.abc import Callable

import numpy as np
import panel as pn

from workbench.figures import balance as lines
from workbench.figures import routing as figures
from workbench.live.records import DROPPED, IMPORTANCE, LOAD, PROBABILITY_SUPPORT, TOKENS, Record
from workbench.live.views.bar import division_select, layer_select, text, widget
from workbench.live.views.card import Card
from workbench.live.views.load import balance, information, loads_over_time, shares_of, support
from workbench.live.views.readings import Nothing, Readings, present
from workbench.live.views.tokens import token_label
from workbench.live.views.view import View

TOP_TOKENS = 12
BUSIEST = -1  # a choice in a list, where None would show as nothing

HOW = {
    "load": "Each row is an expert, each column a recorded training batch. White (dark grey at night) is the uniform "
    "share, orange takes more, blue less, and the darkest blue is an expert without a single token. Rows that keep "
    "their colour are experts the router has settled on; flicker is the noise of small batches. Click a row to see "
    "what that expert takes.",
    "balance": "One line per layer. MaxVio is the busiest expert above the mean: it sets the step time when experts "
    "run in parallel. CV sees the whole distribution; least loaded and dead show waste. The grey band holds 90 % of "
    "what uniform random routing of as many tokens gives: inside it, a batch is as even as chance. Compare layers, "
    "not their average: an average hides one collapsed layer.",
    "layers": "The load of every expert in every layer in one batch, at the step on the slider. A layer that differs "
    "from its neighbours deserves a look in the other plots: choose it above.",
    "share": "Bars are the share f of assignments, diamonds the mean router probability P, both as multiples of the "
    "uniform share 1/E. A balance loss multiplies the two, so a router with flat diamonds and uneven bars satisfies "
    "the loss without balancing anything. Click a bar to choose an expert.",
    "tokens": "The tokens this expert received most often since the last token record, as shares of all it received. "
    "The tick is the share of that token over all experts: a bar beyond its tick is a token the expert attracts.",
    "parts": "From which domains, or of which modalities, the expert's tokens are. The tick is the share over all "
    "experts: equal lengths mean that the expert does not care.",
    "information": "How much knowing the expert tells about the domain, or the modality, of a token, as a share of all "
    "there is to know (0 % nothing, 100 % the expert gives it away). Finite batches show a little by chance: the "
    "dashed line is the value after shuffling.",
    "support": "How many experts really act on a token: (Σw)² ÷ Σw² of its combine weights. K if they are equal, 1 if "
    "one takes all. One line per layer; a line that sinks towards 1 is a mixture that becomes a choice of one. Dashed: "
    "the same of the selected layer's probabilities over all experts, which may concentrate where the weights cannot.",
    "dropped": "With a capacity limit, assignments beyond it are dropped. A token is lost only when all of its K "
    "assignments are dropped, so the two rates differ; lost tokens pass the layer unchanged.",
}


class ImbalanceView(View):
    """Load of every expert over time, balance measures with their null bands, and what a clicked expert takes."""

    title = "Imbalance"

    def make_cards(self) -> dict[str, Card]:
        self.expert: int | None = None
        self._chooser = widget(pn.widgets.Select, 170, label="Expert", options={"busiest": BUSIEST})
        self._chooser.param.watch(lambda event: self.choose_expert(event.new), "value")
        hint = text('<span class="muted">or click one in a plot to see what it takes</span>')
        self.controls = [layer_select(self.selection), self._chooser, division_select(self.selection), hint]
        row, bar = (lambda point: self.choose_expert(point["y"])), (lambda point: self.choose_expert(point["x"]))
        return {
            "load": Card("Expert load", HOW["load"], span=7, height=300, on_click=row),
            "balance": Card("Balance", HOW["balance"], span=5, height=300),
            "layers": Card("Load by layer", HOW["layers"], span=4, height=262, on_click=bar),
            "share": Card("Load and probability", HOW["share"], span=4, height=262, on_click=bar),
            "support": Card("Effective support", HOW["support"], span=4, height=262),
            "tokens": Card("Tokens of an expert", HOW["tokens"], span=3, height=262),
            "parts": Card("Parts of an expert", HOW["parts"], span=3, height=262),
            "information": Card("Routing information", HOW["information"], span=3, height=262),
            "dropped": Card("Dropped by capacity", HOW["dropped"], span=3, height=262),
        }

    def choose_expert(self, expert: int | None) -> None:
        """Show what this expert takes; None is the busiest one at the step on show."""
        expert = None if expert is None or expert == BUSIEST else int(expert)
        if expert != self.expert:
            self.expert = expert
            self._chooser.value = BUSIEST if expert is None else expert
            self.refresh()

    def draw(self, shown: list[Readings]) -> None:
        self._offer_experts(shown)
        chosen, step, ceiling = self.selection.layer, self.selection.step, all_layers_ceiling(self)

        def newest(record: Record) -> tuple:
            return self.stamps(lambda run: run.newest(record.name(run.layer(chosen).name)))

        def at_step(record: Record) -> tuple:
            return self.stamps(lambda run: run.at(record.name(run.layer(chosen).name), step)[0])

        expert = self.stamps(self._expert_of)
        self.put("load", lambda: load_contents(self, self.expert), newest(LOAD), self.expert)
        self.put("balance", lambda: balance_contents(self), newest(LOAD))
        self.put("layers", lambda: self._layers(ceiling), at_step(LOAD), ceiling)
        self.put("share", self._share, at_step(LOAD), expert)
        self.put("support", self._support, newest(LOAD))
        self.put("tokens", lambda: self._takes("Tokens", self._tokens), at_step(TOKENS), expert)
        by = self.selection.division
        self.put("parts", lambda: self._takes(by.parts.capitalize(), self._parts), at_step(by.load), expert)
        self.put("information", self._information, newest(by.load))
        self.put("dropped", self._dropped, newest(DROPPED))

    # -- the expert that is looked into

    def _offer_experts(self, shown: list[Readings]) -> None:
        try:
            n = shown[0].layer(self.selection.layer).n_experts
        except Nothing:
            return
        options = {"busiest": BUSIEST} | {str(i): i for i in range(n)}
        if self._chooser.options != options:
            self.expert = None if self.expert is None or self.expert >= n else self.expert
            self._chooser.param.update(options=options, value=BUSIEST if self.expert is None else self.expert)

    def _expert_of(self, run: Readings) -> int:
        """The chosen expert, or the busiest of the selected layer at the step on show."""
        layer = run.layer(self.selection.layer)
        if self.expert is not None:
            return min(self.expert, layer.n_experts - 1)
        return int(run.at(LOAD.name(layer.name), self.selection.step)[1].argmax())

    def _tokens(self, run: Readings) -> tuple[list[str], np.ndarray, np.ndarray]:
        layer = run.layer(self.selection.layer)
        _, counts = run.at(TOKENS.name(layer.name), self.selection.step)
        mine, all_ = shares_of(counts, self._expert_of(run))
        top = np.argsort(-mine, kind="stable")[:TOP_TOKENS]
        top = top[mine[top] > 0]
        names = [token_label(int(token), run.model.get("vocabulary")) for token in top]
        return names, mine[top], all_[top]

    def _parts(self, run: Readings) -> tuple[list[str], np.ndarray, np.ndarray]:
        layer, by = run.layer(self.selection.layer), self.selection.division
        names = run.parts(by)
        _, counts = run.at(by.load.name(layer.name), self.selection.step)
        return names, *shares_of(counts.T, self._expert_of(run))

    def _takes(self, what: str, read: Callable[[Readings], tuple]) -> list:
        def build(run: Readings, data: tuple):
            title = f"{what} of expert {self._expert_of(run)}{self.suffix(run)}"  # of the layer chosen above: no room
            return figures.composition(*data, title=title, of="of the expert's tokens", theme=self.selection.theme)

        return self.each(self.read(read), build)

    # -- the other cards

    def _layers(self, ceiling: float) -> list:
        step = self.selection.step
        return self.each(
            self.read(lambda run: [run.at(LOAD.name(layer.name), step)[1] for layer in run.moe_layers()]),
            lambda run, data: figures.load_by_layer(
                data,
                [layer.name for layer in run.layers],
                title=f"Expert load by layer{self.suffix(run)}",
                ceiling=ceiling,
                theme=self.selection.theme,
            ),
        )

    def _share(self) -> list:
        chosen, step = self.selection.layer, self.selection.step

        def read(run: Readings) -> tuple[np.ndarray, np.ndarray | None]:
            name = run.layer(chosen).name
            load = run.at(LOAD.name(name), step)[1]
            try:
                return load, run.at(IMPORTANCE.name(name), step)[1]
            except Nothing:  # a router without a full distribution
                return load, None

        found = self.read(read)
        tops = [
            figures.as_multiple_of_uniform(part).max() for data in present(found) for part in data if part is not None
        ]
        return self.each(
            found,
            lambda run, data: figures.load_and_probability(
                *data,
                title=f"Load and probability, {self.layer_label(run)}{self.suffix(run)}",
                ceiling=1.08 * float(np.nanmax([1.2, *tops])),
                selected=self._expert_of(run),
                theme=self.selection.theme,
            ),
        )

    def _support(self) -> list:
        def read(run: Readings) -> tuple:
            layer = run.layer(self.selection.layer)
            of_probabilities = run.scalars(PROBABILITY_SUPPORT.name(layer.name))
            return *support(run), of_probabilities if len(of_probabilities[0]) else None, layer.top_k

        found = self.read(read)
        tops = [np.nanmax([*np.ravel(sizes), *(p[1] if p else ()), k or 1]) for _, sizes, p, k in present(found)]
        return self.each(
            found,
            lambda run, data: lines.support_sizes(
                *data[:2],
                [layer.name for layer in run.layers],
                of_probabilities=data[2],
                chosen=data[3],
                title=f"Effective support{self.suffix(run)}",
                selected=self.selected_layer(run),
                ceiling=1.08 * float(max([1.5, *tops])),
                **self.look,
            ),
        )

    def _information(self) -> list:
        by = self.selection.division
        found = self.read(lambda run: information(run, by))
        tops = [np.nanmax([values, null], initial=0.0) for _, values, null in present(found)]
        return self.each(
            found,
            lambda run, data: lines.routing_information(
                *data,
                [layer.name for layer in run.layers],
                of=by.name,
                title=f"Routing information{self.suffix(run)}",
                selected=self.selected_layer(run),
                ceiling=1.08 * float(max([1e-3, *tops])),
                **self.look,
            ),
        )

    def _dropped(self) -> list:
        def read(run: Readings) -> tuple[np.ndarray, np.ndarray]:
            name = DROPPED.name(run.layer(self.selection.layer).name)
            if run.last_step >= 0 and not run.has(name):
                raise Nothing("this run has no capacity limit: nothing is dropped")
            return run.tensors(name)

        found = self.read(read)
        top = max([0.0, *(100 * float(np.nanmax(rates, initial=0.0)) for _, rates in present(found))])
        return self.each(
            found,
            lambda run, data: figures.dropped_rates(
                *data,
                title=f"Dropped, {self.layer_label(run)}{self.suffix(run)}",
                ceiling=1.08 * max(top, 0.5),
                **self.look,
            ),
        )


def all_layers_ceiling(view: View) -> float:
    """One top of the colour scale for all layers, steps and runs on show, so that layers can be compared."""
    found = view.read(lambda run: [loads_over_time(run, number)[1] for number in range(len(run.moe_layers()))])
    return figures.load_ceiling(*(loads for series in present(found) for loads in series))


def load_contents(view: View, selected: int | None = None) -> list:
    """Load heat maps of the selected layer of every run on show, on one colour scale."""
    found = view.read(lambda run: loads_over_time(run, view.selection.layer))
    ceiling = figures.load_ceiling(*(loads for _, loads in present(found)))
    return view.each(
        found,
        lambda run, data: figures.load_heatmap(
            *data,
            title=f"Expert load over training, {view.layer_label(run)}{view.suffix(run)}",
            ceiling=ceiling,
            selected=selected,
            **view.look,
        ),
    )


def balance_contents(view: View, measures: tuple[str, ...] = tuple(lines.BALANCE)) -> list:
    """Balance lines of every run on show, on shared axes."""
    found = view.read(lambda run: balance(run, view.selection.layer))
    ranges = {}
    for measure in measures:
        ends = [[lines.BALANCE[measure].ideal, 1.0 if measure == "dead" else np.nan]]
        for data in present(found):
            ends += [np.ravel(data.values[measure]), data.nulls[measure]]
        low, high = np.nanmin(np.concatenate(ends)), np.nanmax(np.concatenate(ends))
        pad = 0.08 * max(high - low, 0.05)
        ranges[measure] = (float(low - pad), float(high + pad))
    return view.each(
        found,
        lambda run, data: lines.balance_lines(
            data.steps,
            {measure: data.values[measure] for measure in measures},
            [layer.name for layer in run.layers],
            nulls=data.nulls,
            title=f"Balance over training{view.suffix(run)}",
            selected=view.selected_layer(run),
            ranges=ranges,
            **view.look,
        ),
    )
