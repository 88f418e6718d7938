"""All four views and the loss at a glance: one plot of each."""

from collections.abc import Iterable

from workbench.live.records import LOAD
from workbench.live.views import coactivation, conflict, imbalance, loss, spectra
from workbench.live.views.bar import division_select, layer_select
from workbench.live.views.card import Card
from workbench.live.views.readings import Nothing, Readings, stamped
from workbench.live.views.view import View

HEIGHT = 262


class Overview(View):
    """Loss, load, balance, co-activation, effective rank and gradient conflict of a run, six plots on one screen."""

    title = "Overview"

    def make_cards(self) -> dict[str, Card]:
        self._orders: dict = {}
        self.controls = [layer_select(self.selection), division_select(self.selection)]
        texts = {
            "loss": ("Loss", loss.HOW["loss"]),
            "load": ("Expert load", imbalance.HOW["load"]),
            "balance": ("Balance", imbalance.HOW["balance"]),
            "coactivation": ("Co-activation", coactivation.HOW["matrix"]),
            "rank": ("Effective rank", spectra.HOW["effective_rank"]),
            "conflict": ("Gradient conflict", conflict.HOW["groups"]),
        }
        return {name: Card(title, how, span=4, height=HEIGHT) for name, (title, how) in texts.items()}

    def draw(self, shown: list[Readings]) -> None:
        layer, step = self.selection.layer, self.selection.step
        loads = self.stamps(lambda run: run.newest(LOAD.name(run.layer(layer).name)))
        self.put("loss", lambda: loss.loss_contents(self), self.stamps(lambda run: run.last_step))
        self.put("load", lambda: imbalance.load_contents(self), loads)
        self.put("balance", lambda: imbalance.balance_contents(self, ("max_vio",)), loads)

        pairs = self.read(lambda run: coactivation.together(run, layer, step, "lift_corrected", self._orders))
        stamps = stamped(pairs, lambda data: data.step)
        self.put("coactivation", lambda: coactivation.matrix_contents(self, pairs, "lift_corrected"), stamps)

        histories = self.read(self._spectra)
        stamps = stamped(histories, lambda data: data.newest)
        self.put("rank", lambda: spectra.rank_contents(self, histories, "effective_rank"), stamps)

        by = self.selection.division
        records = self.read(lambda run: conflict.conflicts(run, by))
        self.put("conflict", lambda: conflict.group_contents(self, records, "raw", None), conflict.rows(records, step))

    def _spectra(self, run: Readings) -> spectra.History:
        matrices = run.model.get("matrices") or {}
        if not matrices:
            raise Nothing("this run records no spectra")
        if not run.layers:
            return spectra.history(run, next(iter(matrices)))
        return spectra.history(run, _of_block(matrices, run.layer(self.selection.layer).name))


def _of_block(matrices: Iterable[str], layer: str) -> str:
    """The first matrix of the block that the layer is part of, or the first of all."""
    names, block = list(matrices), f"{layer.rpartition('.')[0]}."
    return next((name for name in names if name.startswith(block)), names[0])
