"""The views show the measures of what was recorded: at the newest step, scrubbed back, for one run and for two."""

import re
from html import unescape

import numpy as np
import plotly.graph_objects as go
import pytest
import torch
from torch import nn

from workbench.lib.core.adapt import adapt
from workbench.lib.core.adapt.adapted import adaptation_of
from workbench.lib.measures.coactivation import coactivation
from workbench.lib.measures.conflict import conflict_stats
from workbench.lib.measures.routing import load_stats, routing_information
from workbench.lib.measures.spectra import effective_rank
from workbench.lib.measures.transition import transition_lift
from workbench.live.store import Run, RunWriter
from workbench.live.views import (
    VIEWS,
    AdaptationView,
    CoactivationView,
    ConflictView,
    DepthView,
    ImbalanceView,
    LossView,
    Overview,
    SpectraView,
)
from workbench.live.views.card import EMPTY
from workbench.live.views.coactivation import WINDOW
from workbench.live.views.readings import Nothing, Readings, counterpart
from workbench.live.views.selection import Selection
from workbench.live.views.spectra import history
from workbench.live.watch import watch


def figure(view, card: str, which: int = 0) -> go.Figure:
    return view.cards[card].figures[which]


def messages(view) -> list[str]:
    """What the cards that have a place on the page say in place of a figure."""
    shown = [card for card in view.cards.values() if card.visible]
    return [str(content) for card in shown for content in card.contents if isinstance(content, Nothing)]


def double(array: np.ndarray) -> torch.Tensor:
    return torch.as_tensor(array.astype(np.float64))


# -- what all views have in common


@pytest.mark.parametrize("kind", VIEWS)
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_every_plot_has_a_title_axes_and_a_text_on_how_to_read_it(kind, theme, run, other):
    view = kind(run, other, theme=theme)
    for card in view.cards.values():
        assert "How to read this" in card._how.object
        assert len(card._how.object) > 150
        assert len(card.contents) == 2
        for shown in card.figures:
            assert shown.layout.title.text.startswith("<b>")
            assert "first" in shown.layout.title.text or "second" in shown.layout.title.text
            assert "·" in shown.layout.title.text


@pytest.mark.parametrize("kind", VIEWS)
def test_a_run_without_a_step_says_what_to_wait_for_and_fills_by_itself(kind, growing):
    view = kind(growing.run)
    assert len(messages(view)) == sum(card.visible for card in view.cards.values()) > 0
    growing.grow(1)
    view.selection.poll()
    assert len(messages(view)) <= 1  # drawn with the first record; there is none of a loss by domain before evaluation
    assert not any(
        isinstance(content, str) and not content for card in view.cards.values() for content in card.contents
    )


@pytest.mark.parametrize("kind", VIEWS)
def test_a_run_that_records_none_of_it_is_named_so(kind, tmp_path):
    with RunWriter.create(tmp_path / "bare", {"kind": "watch"}) as writer:
        writer.scalars(0, {"train/loss": 3.0})
        writer.commit(0)
    view = kind(tmp_path / "bare")
    assert all(message for message in messages(view))


@pytest.mark.parametrize("kind", VIEWS)
def test_a_view_can_be_displayed(kind, run):
    assert kind(run).__panel__() is not None


def test_an_unknown_run_is_refused_by_name(run):
    with pytest.raises(ValueError, match="firts"):
        ImbalanceView("firts")


def test_nothing_is_drawn_again_without_news(run):
    view = Overview(run)
    before = {name: card.figures[0] for name, card in view.cards.items()}
    view.selection.poll()
    view.refresh()
    assert all(card.figures[0] is before[name] for name, card in view.cards.items())


def test_a_hidden_view_catches_up_when_it_is_shown(growing):
    growing.grow(1)
    selection = Selection()
    selection.choose(growing.run)
    view = ImbalanceView(selection=selection)
    assert not view.cards["load"].contents
    view.visible = True
    assert len(figure(view, "load").data[0].x) == 1
    view.visible = False
    growing.grow(10)
    selection.poll()
    assert len(figure(view, "load").data[0].x) == 1
    view.visible = True
    assert len(figure(view, "load").data[0].x) == 2


def test_a_slow_browser_is_waited_for(growing):
    growing.grow(1)
    view = ImbalanceView(growing.run)
    growing.grow(10)
    view.selection.settled = lambda: False
    view.selection.poll()
    assert len(figure(view, "load").data[0].x) == 1
    view.selection.settled = lambda: True
    view.selection.poll()
    assert len(figure(view, "load").data[0].x) == 2


# -- imbalance


def test_loads_and_balance_are_those_recorded(run):
    view = ImbalanceView(run)
    view.selection.layer = 1
    steps, loads = run.tensors("load/blocks.1.ffn")
    heat = figure(view, "load").data[0]
    assert list(heat.x) == list(steps)
    np.testing.assert_allclose(heat.z, (loads / loads.mean(axis=1, keepdims=True)).T, rtol=1e-6)
    stats = load_stats(double(loads), 2)
    lines = {(line.name, line.yaxis): line.y for line in figure(view, "balance").data}
    for axis, measure in (("y", "max_vio"), ("y2", "cv"), ("y3", "min_ratio"), ("y4", "dead")):
        np.testing.assert_allclose(lines["1", axis], getattr(stats, measure).numpy(), rtol=1e-5)
    bands = [shape for shape in figure(view, "balance").layout.shapes if shape.type == "rect"]
    cv = next(band for band in bands if band.yref == "y2")
    assert cv.y0 < float(stats.null_cv[0]) < cv.y1


def test_load_beside_probability_and_by_layer(run):
    view = ImbalanceView(run)
    load, importance = run.tensor("load/blocks.0.ffn")[1], run.tensor("importance/blocks.0.ffn")[1]
    bars, dots = figure(view, "share").data
    np.testing.assert_allclose(bars.y, load / load.mean())
    np.testing.assert_allclose(dots.y, importance / importance.mean(), rtol=1e-6)
    assert figure(view, "layers").data[0].z.shape == (3, 8)


def test_domains_information_and_drops(run):
    view = ImbalanceView(run)
    _, counts = run.tensors("load_by_domain/blocks.0.ffn")
    lines = figure(view, "information").data
    information = routing_information(double(counts), 2, null="first_order")
    np.testing.assert_allclose(lines[0].y, 100 * information.normalised.numpy(), rtol=1e-5)
    null = 100 * (information.null / information.row_entropy).numpy()
    np.testing.assert_allclose(lines[-1].y, null, rtol=1e-5)
    sizes = figure(view, "support").data
    np.testing.assert_allclose(sizes[0].y, run.scalars("router/blocks.0.ffn/support")[1], rtol=1e-6)
    np.testing.assert_allclose(sizes[-1].y, run.scalars("router/blocks.0.ffn/probability_support")[1], rtol=1e-6)
    assert sizes[-1].line.dash == "dash" and [line.name for line in sizes[:-1]] == ["0", "1", "2"]
    np.testing.assert_allclose(figure(view, "dropped").data[0].y, 100 * run.tensors("dropped/blocks.0.ffn")[1][:, 0])


def test_the_busiest_expert_is_looked_into_until_one_is_clicked(run):
    view = ImbalanceView(run)
    load = run.tensor("load/blocks.0.ffn")[1]
    assert f"expert {load.argmax()}</b>" in figure(view, "tokens").layout.title.text
    view.cards["load"].on_click({"x": 100, "y": 3})
    assert "expert 3</b>" in figure(view, "tokens").layout.title.text
    tokens = run.tensor("tokens/blocks.0.ffn")[1]
    share = np.sort(tokens[3] / tokens[3].sum())[::-1]
    np.testing.assert_allclose(figure(view, "tokens").data[0].x, 100 * share[:12])
    by_domain = run.tensor("load_by_domain/blocks.0.ffn")[1]
    np.testing.assert_allclose(figure(view, "parts").data[0].x, 100 * by_domain[:, 3] / by_domain[:, 3].sum())
    assert figure(view, "share").data[0].marker.line.width[3] == 2
    view.choose_expert(None)
    assert f"expert {load.argmax()}</b>" in figure(view, "tokens").layout.title.text


def test_without_a_capacity_nothing_is_dropped(growing):
    layer = {"name": "a", "n_experts": 4, "top_k": 2}
    folder = growing.run.folder.parent / "free"
    with RunWriter.create(folder, {"model": {"layers": [layer]}}) as writer:
        writer.tensors(0, {"load/a": np.array([2, 2, 2, 2], dtype=np.uint32)})
        writer.commit(0)
    view = ImbalanceView(folder)
    assert "no capacity limit" in str(view.cards["dropped"].contents[0])
    assert "holds no record" in str(view.cards["support"].contents[0])
    assert figure(view, "share").data[0].y[0] == 1  # and a load without probabilities is shown alone
    assert len(figure(view, "share").data) == 1


def test_scrubbing_back_moves_the_mark_and_shows_the_records_of_that_step(run):
    view = ImbalanceView(run)
    drawn = figure(view, "load")
    view.selection.step = 57
    load = run.tensor("load/blocks.0.ffn", 57)[1]
    np.testing.assert_allclose(figure(view, "share").data[0].y, load / load.mean())
    assert figure(view, "load") is drawn  # not built again: the page moves its mark
    assert view.cards["load"]._slots[0].step == 57
    view.selection.step = None
    assert view.cards["load"]._slots[0].step is None


# -- two runs


def test_two_runs_share_one_colour_scale_and_one_axis(run, other):
    view = ImbalanceView(run, other)
    first, second = (figure(view, "load", i).data[0] for i in (0, 1))
    assert (first.zmin, first.zmax) == (second.zmin, second.zmax)
    assert first.colorscale == second.colorscale
    assert not np.array_equal(first.z, second.z)
    for card in ("balance", "share", "information", "support", "dropped"):
        assert figure(view, card, 0).layout.yaxis.range == figure(view, card, 1).layout.yaxis.range
    for kind, card in ((CoactivationView, "matrix"), (CoactivationView, "transition"), (ConflictView, "cosine")):
        heats = [figure(kind(run, other), card, i).data[0] for i in (0, 1)]
        assert (heats[0].zmin, heats[0].zmax) == (heats[1].zmin, heats[1].zmax)
    for kind, card in ((SpectraView, "effective_rank"), (SpectraView, "spectrum"), (LossView, "loss")):
        view = kind(run, other)
        assert figure(view, card, 0).layout.yaxis.range == figure(view, card, 1).layout.yaxis.range


def test_a_run_beside_one_that_lacks_the_record(run, single):
    view = CoactivationView(run, single)
    shown, missing = view.cards["matrix"].contents
    assert isinstance(shown, go.Figure)
    assert str(missing).startswith("undefined for K=1")


# -- co-activation


def test_the_matrix_is_the_sum_of_the_window_in_its_order(run):
    view = CoactivationView(run)
    counts = run.tensors("coactivation/blocks.0.ffn")[1].sum(axis=0)
    lift = coactivation(double(counts), "lift_corrected").values.numpy()
    heat = figure(view, "matrix").data[0]
    order = np.array([int(cell[0]) for cell in heat.customdata[:, 0]])
    np.testing.assert_allclose(heat.z, lift[np.ix_(order, order)], rtol=1e-6)
    assert sorted(order) == list(range(8))
    view.window.value = 1
    newest = coactivation(double(run.tensor("coactivation/blocks.0.ffn")[1]), "lift_corrected").values.numpy()
    np.testing.assert_allclose(figure(view, "matrix").data[0].z, newest[np.ix_(order, order)], rtol=1e-6)


def test_the_order_stays_until_a_new_one_is_asked_for(growing):
    growing.grow(1)
    view = CoactivationView(growing.run)

    def order() -> list[str]:
        return [cell[0] for cell in figure(view, "matrix").data[0].customdata[:, 0]]

    first = order()
    growing.grow(400)
    view.selection.poll()
    assert order() == first
    view.order_anew()
    assert order() != first and sorted(order()) == sorted(first)


@pytest.mark.parametrize("kind", ["conditional", "jaccard", "npmi"])
def test_other_measures_of_pairs(run, kind):
    view = CoactivationView(run)
    view.kind.value = kind
    matrix = coactivation(double(run.tensors("coactivation/blocks.0.ffn")[1].sum(axis=0)), kind)
    heat = figure(view, "matrix").data[0]
    assert np.nanmax(heat.z) == pytest.approx(np.nanmax(matrix.values.masked_fill(torch.eye(8).bool(), -9).numpy()))
    assert any(value == pytest.approx(matrix.null) for value in heat.colorbar.tickvals)


def test_pairs_and_transitions(run):
    view = CoactivationView(run)
    table = view.cards["pairs"].contents[0]
    assert table.count("<tr>") == 13 and "null 1" in table
    counts = run.tensors("transition/blocks.0.ffn")[1].sum(axis=0)
    np.testing.assert_allclose(figure(view, "transition").data[0].z, transition_lift(double(counts)), rtol=1e-6)
    view.selection.layer = 2
    assert "last layer" in str(view.cards["transition"].contents[0])


def test_one_expert_per_token_has_no_co_activation(single):
    view = CoactivationView(single)
    assert str(view.cards["matrix"].contents[0]).startswith("undefined for K=1")
    assert str(view.cards["pairs"].contents[0]).startswith("undefined for K=1")
    assert view.cards["transition"].figures


# -- spectra


def test_ranks_of_the_chosen_matrix_over_time(run):
    view = SpectraView(run)
    view.matrix.value = "blocks.1.attention.out"
    steps, values = run.tensors("spectrum/weight/blocks.1.attention.out")
    line = figure(view, "effective_rank").data[0]
    assert list(line.x) == list(steps)
    np.testing.assert_allclose(line.y, effective_rank(double(values)) / 128, rtol=1e-6)
    null = figure(view, "stable_rank").layout.annotations[0]
    assert null.y == pytest.approx(0.25)  # a square random matrix
    names = [line.name for line in figure(view, "spectrum").data]
    own = [f"gradient, {domain}" for domain in ("python", "docs", "names")]
    assert names == ["weight at first", "weight", "update", "gradient", *own, "Marchenko–Pastur"]


def test_the_size_of_a_step_is_its_norm_over_the_rate(run, other):
    view = SpectraView(run, other)
    view.matrix.value = "blocks.0.attention.qkv"
    steps, values = run.tensors("spectrum/update/blocks.0.attention.qkv")
    rates = run.scalars("train/lr")[1][steps]
    out, inside = run.meta["model"]["matrices"]["blocks.0.attention.qkv"]
    expected = double(values)[:, 0].numpy() * (inside / out) ** 0.5 / rates
    shown = figure(view, "update_norm")
    assert list(shown.data[0].x) == list(steps) and [line.name for line in shown.data] == ["update"]
    np.testing.assert_allclose(shown.data[0].y, expected, rtol=1e-5)
    band = shown.layout.shapes[0]
    np.testing.assert_allclose((band.y0, band.y1), (expected[0] / 2, 2 * expected[0]), rtol=1e-5)
    assert shown.layout.yaxis.range == figure(view, "update_norm", 1).layout.yaxis.range


def test_a_run_that_does_not_say_its_rate_has_no_size_of_a_step(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    with watch(model, tmp_path / "run", cadence={"structure": 1}) as watching:
        for _ in range(2):
            model(torch.ones(2, 4)).sum().backward()
            optimizer.step()
            watching.step(loss=1.0)
    said = SpectraView(Run(tmp_path / "run")).cards["update_norm"].contents[0]
    assert "does not say its learning rate: hand it over" in str(said)
    with watch(model, tmp_path / "other", cadence={"structure": 1}) as watching:
        for lr in (0.0, 0.5, 0.5):
            optimizer.param_groups[0]["lr"] = lr
            model(torch.ones(2, 4)).sum().backward()
            optimizer.step()
            watching.step(loss=1.0, lr=lr)
    line = figure(SpectraView(Run(tmp_path / "other")), "update_norm").data[0]
    assert list(np.isfinite(line.y)) == [False, True, True]  # where the rate is 0 there is no size


def test_the_heavy_tail_exponent_only_where_it_may_be_read(run):
    view = SpectraView(run)

    def cells() -> list[str]:
        row = view.cards["numbers"].contents[0].split("heavy-tail exponent")[1]
        return [cell.split("</td>")[0] for cell in row.split("<td>")[1:4]]

    view.matrix.value = "blocks.0.attention.out"  # n = 128
    weight, update, gradient = cells()
    assert "±" in weight and "±" in gradient and "single update" in update
    view.matrix.value = "blocks.0.ffn.router"  # n = 8
    assert not any("±" in cell for cell in cells())


def test_before_the_first_record_there_is_no_spectrum(growing):
    growing.grow(1)
    view = SpectraView(growing.run)
    growing.grow(120)
    view.selection.poll()
    view.selection.step = 60
    weight = growing.run.tensor("spectrum/weight/blocks.0.attention.qkv", 60)[1]
    np.testing.assert_allclose(figure(view, "spectrum").data[1].y, weight / weight[0], rtol=1e-6)


def test_a_row_of_cards_without_anything_is_low_until_there_is_something(growing):
    growing.grow(1)
    card = SpectraView(growing.run).cards["spectrum"]
    nothing = Nothing("nothing yet")
    card.show([nothing])  # beside cards that may have something
    assert card._slots.height == card.height
    card.show([nothing, nothing])
    assert card._slots.height == card._slots[0].height == EMPTY
    card.show([nothing, "something"])
    assert card._slots.height == card._slots[1].height == card.height


# -- the form of layers that change


def test_the_ranks_of_all_layers_fall_over_time_and_the_chosen_table_follows_the_step(run, other):
    view = SpectraView(run, other)
    assert view.cards["form"].visible and view.cards["table"].visible
    assert not view.form.number.visible and view.form.table.visible  # one number, several tables
    lines = figure(view, "form", 1).data
    assert [line.name for line in lines] == ["0", "1", "2"]
    steps, ranks = other.scalars("form/blocks.2.ffn/rank")
    assert list(lines[2].x) == list(steps) and list(lines[2].y) == list(ranks) and ranks[-1] < ranks[0]
    history = figure(view, "table").data[0]
    np.testing.assert_array_equal(history.z, run.tensors("form_table/blocks.0.ffn/importance")[1][:, 0].T)

    view.form.table.value = ("blocks.1.ffn", "overlap")
    view.selection.step = 55
    table = figure(view, "table").data[0]
    np.testing.assert_allclose(table.z, run.tensor("form_table/blocks.1.ffn/overlap", 50)[1])
    assert list(table.x) == list(run.meta["model"]["domains"])  # a table of domains by domains
    assert figure(view, "table", 0).data[0].zmax == figure(view, "table", 1).data[0].zmax


def test_a_model_whose_form_stays_has_no_cards_for_it(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4))
    with watch(model, tmp_path / "run", cadence={"structure": 1}) as watching:
        model(torch.ones(2, 4)).sum().backward()
        watching.step()
    view = SpectraView(Run(tmp_path / "run"))
    assert view.cards["spectrum"].visible
    for card in ("form", "table"):
        assert not view.cards[card].visible
        assert "no layer of this model tells a form" in str(view.cards[card].contents[0])


def test_a_table_is_chosen_by_the_part_of_its_layers_name_that_tells_it_from_others(run):
    names = list(SpectraView(run).form.table.options)
    assert names[:2] == ["0 · importance", "0 · overlap"]


# -- conflict


def test_cosines_rates_and_bands_of_the_chosen_group(run):
    view = ConflictView(run)
    view.group.value = "router"
    steps, gramians = run.tensors("conflict/router")
    stats = conflict_stats(torch.as_tensor(gramians), 3000)
    np.testing.assert_allclose(figure(view, "cosine").data[0].customdata, stats.cosine[-1], rtol=1e-5)
    np.testing.assert_allclose(figure(view, "self").data[0].y, stats.self_cosine[-1], rtol=1e-5)
    rate = next(line for line in figure(view, "rate").data if line.name == "router")
    np.testing.assert_allclose(rate.y, stats.rate, rtol=1e-6)
    band = next(shape for shape in figure(view, "worst").layout.shapes if shape.type == "rect")
    assert band.y1 == pytest.approx(3000**-0.5)
    view.kind.value = "noise-corrected"
    np.testing.assert_allclose(figure(view, "cosine").data[0].customdata, stats.corrected[-1], rtol=1e-5)
    view.selection.step = int(steps[1])
    np.testing.assert_allclose(figure(view, "cosine").data[0].customdata, stats.corrected[1], rtol=1e-5)


def test_clicking_a_group_chooses_it(run):
    view = ConflictView(run)
    view.cards["groups"].on_click({"x": "python<br>docs", "y": 3})
    assert view.group.value == "experts"
    assert "experts" in figure(view, "cosine").layout.title.text


def test_one_domain_has_no_conflict(tmp_path):
    with RunWriter.create(tmp_path / "one", {"model": {"domains": ["python"], "groups": {"trunk": 9}}}):
        pass
    assert "at least two domains" in messages(ConflictView(Run(tmp_path / "one")))[0]


# -- by domain, or by modality


def test_every_measure_of_parts_is_of_domains_or_of_modalities_as_chosen(run):
    selection = Selection()
    selection.choose(run)
    imbalance, conflict, spectra, together = (
        kind(selection=selection) for kind in (ImbalanceView, ConflictView, SpectraView, CoactivationView)
    )
    for view in (imbalance, conflict, spectra, together):
        view.visible = True
    imbalance.choose_expert(3)
    for by, names in (("domain", ["python", "docs", "names"]), ("modality", ["text", "image"])):
        selection.by = by
        load = run.tensor(f"load_by_{by}/blocks.0.ffn")[1]
        (bars, *_) = figure(imbalance, "parts").data
        assert list(figure(imbalance, "parts").layout.yaxis.ticktext) == names
        np.testing.assert_allclose(bars.x, 100 * load[:, 3] / load[:, 3].sum(), rtol=1e-6)
        information = routing_information(double(run.tensors(f"load_by_{by}/blocks.0.ffn")[1]), 2, null="first_order")
        drawn = figure(imbalance, "information")
        np.testing.assert_allclose(drawn.data[0].y, 100 * information.normalised.numpy(), rtol=1e-5)
        assert f"% of {by} entropy" in drawn.layout.yaxis.title.text
        gramians = run.tensors("conflict/router" if by == "domain" else "conflict_by_modality/router")[1]
        conflict.group.value = "router"
        cosines = conflict_stats(torch.as_tensor(gramians), 3000).cosine[-1]
        np.testing.assert_allclose(figure(conflict, "cosine").data[0].customdata, cosines, rtol=1e-5)
        assert list(figure(conflict, "cosine").data[0].x) == names
        assert len(figure(conflict, "groups").data[0].x) == len(names) * (len(names) - 1) // 2
        own = {line.name: line for line in figure(spectra, "spectrum").data if line.name.startswith("gradient, ")}
        assert list(own) == [f"gradient, {name}" for name in names]
        assert len({line.line.color for line in figure(spectra, "spectrum").data}) >= 3 + len(names)
        values = run.tensor(f"gradients_by_{by}/{spectra.matrix.value}")[1]
        np.testing.assert_allclose(own[f"gradient, {names[-1]}"].y, values[-1] / values[-1, 0], rtol=1e-5)
        assert list(together.part.options) == ["all", *names]
        for which in range(len(names)):
            together.part.value = which
            counts = run.tensors(f"coactivation_by_{by}/blocks.0.ffn")[1][-WINDOW:, which].sum(0)
            heat = figure(together, "matrix").data[0]
            order = np.array([int(cell[0]) for cell in heat.customdata[:, 0]])
            lift = coactivation(double(counts), "lift_corrected").values.numpy()
            np.testing.assert_allclose(heat.z, lift[np.ix_(order, order)], rtol=1e-6)
            assert names[which] in figure(together, "matrix").layout.title.text


def test_validation_is_by_domain_or_by_modality(tmp_path):
    model = {"domains": ["caption first", "image first"], "modalities": ["text", "image"]}
    with RunWriter.create(tmp_path / "both", {"model": model}) as writer:
        found = {"caption first": 1.5, "image first": 1.25, "text": 1.0, "image": 1.75}
        writer.scalars(0, {"valid/bits": 1.375} | {f"valid/bits/{name}": bits for name, bits in found.items()})
        writer.commit(0)
    view = LossView(tmp_path / "both")
    assert [(line.name, line.y[0]) for line in figure(view, "valid").data] == [*found.items()][:2]
    view.selection.by = "modality"
    assert [(line.name, line.y[0]) for line in figure(view, "valid").data] == [*found.items()][2:]
    assert "Validation by modality" in figure(view, "valid").layout.title.text


def test_the_choice_is_offered_where_a_run_has_both_and_else_made(run, tmp_path):
    view = ConflictView(run)
    choice = next(control for control in view.controls if "by modality" in getattr(control, "options", ()))
    assert choice.visible and choice.value == "domain"
    choice.value = "modality"
    assert view.selection.by == "modality" and list(figure(view, "cosine").data[0].x) == ["text", "image"]
    with RunWriter.create(tmp_path / "plain", {"model": {"domains": ["a", "b"], "groups": {"trunk": 9}}}) as writer:
        writer.tensors(0, {"conflict/trunk": np.ones((3, 2, 2))})
        writer.commit(0)
    view.selection.choose(tmp_path / "plain")
    assert not choice.visible and view.selection.by == "domain"
    assert list(figure(view, "cosine").data[0].x) == ["a", "b"]
    model = {"domains": ["only"], "modalities": ["text", "image", "speech"], "groups": {"trunk": 9}}
    with RunWriter.create(tmp_path / "modal", {"model": model}) as writer:
        writer.tensors(0, {"conflict_by_modality/trunk": np.ones((3, 3, 3))})
        writer.commit(0)
    assert list(figure(ConflictView(tmp_path / "modal"), "cosine").data[0].x) == ["text", "image", "speech"]
    view.selection.choose(tmp_path / "modal")
    assert not choice.visible and view.selection.by == "modality"
    with RunWriter.create(tmp_path / "neither", {"model": {"groups": {"trunk": 9}}}) as writer:
        writer.scalars(0, {"train/loss": 1.0})
        writer.commit(0)
    view.selection.choose(tmp_path / "neither")
    assert not choice.visible and view.selection.by == "domain"
    assert "at least two domains; this run has none" in str(view.cards["cosine"].contents[0])


def test_a_task_without_a_loss_of_each_modality_has_no_conflict_of_them_and_the_card_says_so(tmp_path):
    model = {"domains": ["a", "b"], "modalities": ["text", "image"], "groups": {"trunk": 9}}
    with RunWriter.create(tmp_path / "run", {"model": model, "cadence": {"conflict": 100}}) as writer:
        writer.tensors(0, {"conflict/trunk": np.ones((3, 2, 2))})
        writer.commit(0)
        view = ConflictView(tmp_path / "run")
        assert list(figure(view, "cosine").data[0].x) == ["a", "b"]
        view.selection.by = "modality"
        assert "tells no loss of each modality" in str(view.cards["cosine"].contents[0])


def test_a_long_name_of_a_matrix_is_cut_in_the_title_of_a_small_plot(tmp_path):
    name = "lm.blocks.0.attention.qkv.experts.0"
    with RunWriter.create(tmp_path / "run", {"model": {"matrices": {name: [4, 3]}}}) as writer:
        writer.tensors(0, {f"spectrum/weight/{name}": np.ones(3, dtype=np.float32)})
        writer.commit(0)
    view = SpectraView(tmp_path / "run")
    assert "Stable rank, …qkv.experts.0<" in figure(view, "stable_rank").layout.title.text
    assert name in figure(view, "spectrum").layout.title.text


def test_a_balance_loss_of_zero_has_an_axis_that_can_be_read(tmp_path):
    recipe = {"study": "moma", "arm": "4t4i", "preset": "small", "seed": 0}
    with RunWriter.create(tmp_path / "arm", {"kind": "train", "recipe": recipe}) as writer:
        for step in range(3):
            writer.scalars(step, {"train/loss": 1.0, "train/aux": 0.0})
            writer.commit(step)
    axis = figure(LossView(tmp_path / "arm"), "aux").layout.yaxis
    assert axis.range == (0, 1.08) and axis.title.text == "balance loss"


# -- depth


def test_depths_are_shares_of_the_tokens_and_the_text_is_that_of_the_newest_evaluation(run):
    view = DepthView(run)  # of the layer that has recursions, though the first is chosen, which has none
    steps, counts = run.tensors("depth/blocks.2.ffn")
    *bands, mean = figure(view, "training").data
    shares = 100 * counts / counts.sum(1, keepdims=True)
    for band in bands:
        np.testing.assert_allclose(band.y, shares[:, int(band.name)])
    np.testing.assert_allclose(mean.y, counts @ np.arange(9) / counts.sum(1))
    assert list(mean.x) == steps.tolist() and "blocks.2.ffn" in figure(view, "evaluation").layout.title.text
    (heat,) = figure(view, "text").data
    ids, depths = run.tensor("valid/depth_text/blocks.2.ffn")[1]
    np.testing.assert_array_equal(heat.z.ravel(), depths)
    assert [unescape(cell) for cell in heat.text.ravel()] == [chr(i).replace(" ", "·") for i in ids]
    assert "validation at step 0" in figure(view, "text").layout.title.text


def test_the_text_by_depth_is_scrubbed_back(tmp_path):
    layer = {"name": "deep", "n_experts": 2, "top_k": None, "recursive": True}
    with RunWriter.create(tmp_path / "run", {"model": {"layers": [layer], "vocabulary": "bytes"}}) as writer:
        for step in range(4):
            text = np.full((2, 6), -1, dtype=np.int32)
            text[:, :3] = [[97, 10, 98], [step % 3, 1, 2]]
            writer.tensors(step, {"depth_text/deep": text} | ({"valid/depth_text/deep": text} if step == 2 else {}))
            writer.commit(step)
    view = DepthView(tmp_path / "run")

    def shown() -> tuple[str, list[float], list[str]]:
        (heat,) = figure(view, "text").data
        title = figure(view, "text").layout.title.text
        there = ~np.isnan(heat.z.ravel())
        return (
            title.split("by depth, ")[1].split("</b>")[0],
            heat.z.ravel()[there].tolist(),
            list(heat.text.ravel()[there]),
        )

    assert shown() == ("validation at step 2", [2, 1, 2], ["a", "⏎", "b"])
    view.selection.step = 1
    assert shown() == ("the training batch at step 1", [1, 1, 2], ["a", "⏎", "b"])
    view.selection.step = 0
    assert shown()[1] == [0, 1, 2]
    assert "holds no record" in messages(view)[0]


def test_without_recursions_there_is_no_depth(single):
    readings = Readings(single)
    readings.meta["model"]["layers"] = [
        {name: value for name, value in layer.items() if name != "recursive"} for layer in readings.model["layers"]
    ]
    view = DepthView(selection=Selection())
    view.visible = True
    view.selection.run = readings
    assert messages(view) == ["no layer of this run has recursions, so that its tokens had a depth"]  # in one card


# -- loss


def test_losses_are_in_bits_per_byte(growing):
    growing.grow(5)
    growing.writer.event(3, "control", "learning_rate = 0.001")
    view = LossView(growing.run)
    _, nats = growing.run.scalars("train/loss")
    traces = {trace.name: trace for trace in figure(view, "loss").data}
    np.testing.assert_allclose(figure(view, "loss").data[0].y, nats / np.log(2), rtol=1e-6)
    assert traces["validation"].y[0] == pytest.approx(growing.run.scalars("valid/loss")[1][0] / np.log(2))
    assert list(traces["commands"].text) == ["learning_rate = 0.001"]
    assert [line.name for line in figure(view, "valid").data] == ["python", "docs", "names"]


def test_a_metric_that_is_no_loss_keeps_its_own_plot(tmp_path):
    with RunWriter.create(tmp_path / "digits", {"model": {"vocabulary": None}}) as writer:
        writer.scalars(0, {"train/loss": 2.3, "valid/accuracy": 0.5, "valid/accuracy/digits": 0.5})
        writer.commit(0)
    view = LossView(tmp_path / "digits")
    assert [trace.name for trace in figure(view, "loss").data if trace.name] == ["train"]
    assert figure(view, "valid").layout.yaxis.title.text == "share correct"


def test_a_run_without_the_chosen_part_shows_its_counterpart():
    known = ["blocks.0.attention", "blocks.0.ffn.gate_up", "blocks.1.ffn.gate_up"]
    assert counterpart("blocks.1.ffn.gate_up", known) == "blocks.1.ffn.gate_up"
    assert counterpart("blocks.1.ffn.router", known) == "blocks.1.ffn.gate_up"
    assert counterpart("blocks.0.attention.q", known) == "blocks.0.attention"
    assert counterpart("head", known) == "blocks.0.attention"
    assert counterpart("head", []) == "head" and counterpart(None, known) is None


def test_the_rank_of_a_product_of_two_factors_is_known_from_the_values_there_are(tmp_path):
    torch.manual_seed(0)
    model = adapt(nn.Sequential(nn.Linear(12, 10), nn.ReLU()), "lora", "*", rank=3).model
    with watch(model, tmp_path / "run", cadence={"structure": 1}) as watched:
        for p in model.parameters():
            if p.requires_grad:
                nn.init.normal_(p)
        watched.step()
    readings = Readings(Run(tmp_path / "run"))
    (name,) = readings.model["low_rank"]
    data = history(readings, name)
    layer = model[0]
    full = torch.linalg.svdvals(layer.fixed_update().detach().double())
    (_, ranks) = data.measure("effective_rank")["weight"]
    assert data.series["weight"][1].shape == (1, 3)
    assert ranks[0] == pytest.approx(float(effective_rank(full)) / 3, rel=1e-5)


# -- adapters


class Blocks(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.image = nn.Embedding(9, 8), nn.Conv2d(3, 8, 1)
        self.blocks = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(8, 12), "down": nn.Linear(12, 8)}) for _ in range(3))
        self.head = nn.Linear(8, 4)


def cells(view, which: int = 0) -> list[list[str]]:
    """The lines of the tables of a card, cell by cell."""
    content = view.cards["report"].contents[which]
    lines = re.findall(r"<tr>(.*?)</tr>", content)
    return [
        [unescape(re.sub(r"<.*?>", "", cell)).strip() for cell in re.findall(r"<t[dh]>.*?</t[dh]>", line)]
        for line in lines
    ]


def test_a_watched_model_that_is_adapted_shows_what_was_put_where(tmp_path):
    adapted = adapt(Blocks(), "lora", rank=2, alpha=3)
    report = adapted.report()
    with watch(adapted.model, tmp_path / "run") as watched:
        watched.step(1.0)
    view = AdaptationView(tmp_path / "run")
    assert cells(view) == [
        ["layers", "number", "rank", "scale", "experts", "router", "trained"],
        ["blocks.*.up", "3", "2", "1.5", "–", "–", str(3 * 2 * (8 + 12))],
        ["blocks.*.down", "3", "2", "1.5", "–", "–", str(3 * 2 * (8 + 12))],
        ["head", "1", "2", "1.5", "–", "–", str(2 * (8 + 4))],
        ["name", "number", "why"],
        ["embed", "1", "a Embedding"],
        ["image", "1", "a Conv2d"],
    ]
    total, trained = report["base"] + report["added"], report["trained"]
    text = view.cards["report"].contents[0]
    assert f"{trained:,} of {total:,} parameters are trained, {report['percent']:.3g} %; rank 2, alpha 3" in text
    assert "blocks.0.up, blocks.1.up, blocks.2.up" in text
    adapted.remove()
    again = adapt(adapted.model, "mhr", "blocks.*", experts=3, rank=4, tasks=2)
    with watch(again.model, tmp_path / "other") as watched:
        watched.step(1.0)
    both = AdaptationView(tmp_path / "run", tmp_path / "other")
    assert cells(both) == cells(view) and cells(both, 1)[1][:6] == ["blocks.*.up", "3", "4", "0.25", "3", "trained"]


def test_a_run_that_goes_on_shows_the_adaptation_it_has_now(tmp_path):
    for alpha in (2, 3):
        model = nn.Sequential(nn.Linear(8, 8))
        with watch(adapt(model, "lora", rank=2, alpha=alpha).model, tmp_path / "run", resume=True) as watched:
            watched.step(1.0)
        assert cells(AdaptationView(tmp_path / "run"))[1][:4] == ["0", "1", "2", f"{alpha / 2:g}"]
    adapted = adapt(nn.Sequential(nn.Linear(8, 8)), "lora")
    assert adaptation_of(nn.Sequential(adapted.model)) is adapted
    assert adaptation_of(adapted.remove()) is None


def test_names_of_layers_are_shown_as_text(tmp_path):
    model = nn.ModuleDict({"<b>x</b>": nn.Linear(8, 8)})
    with watch(adapt(model, "lora").model, tmp_path / "run") as watched:
        watched.step(1.0)
    content = AdaptationView(tmp_path / "run").cards["report"].contents[0]
    assert "&lt;b&gt;x&lt;/b&gt;" in content and "<b>x" not in content


@pytest.mark.parametrize(
    "wrong", [{"slug": 1}, {"targets": {"a": {"trained": "2"}}}, {"left_out": {"a": 1}}, {"base": -1}]
)
def test_a_report_that_is_none_is_refused(tmp_path, wrong):
    report = {"slug": "lora", "options": {}} | adapt(nn.Sequential(nn.Linear(8, 8)), "lora").report()
    RunWriter.create(tmp_path / "right", {"kind": "watch", "model": {"adaptation": report}}).close()
    with pytest.raises(ValueError, match="meta 'model' is"):
        RunWriter.create(tmp_path / "wrong", {"kind": "watch", "model": {"adaptation": report | wrong}})


def test_agreement_is_of_the_pool_of_the_selected_layer(run, tmp_path):
    view = CoactivationView(run)
    same, chance, n = run.tensors("agreement/blocks.0.ffn.experts")[1].sum(axis=0).astype(np.float64)
    (cells,) = figure(view, "agreement").data
    expected = (same / n - chance / n) / (1 - chance / n)
    apart = ~np.eye(3, dtype=bool)
    np.testing.assert_allclose(cells.z[apart], expected[apart], rtol=1e-5)
    assert view.cards["agreement"].visible and figure(view, "agreement").layout.xaxis.ticktext == ("0", "1", "2")
    with watch(nn.Linear(4, 4), tmp_path / "plain") as watched:
        watched.step(loss=1.0)
    assert not CoactivationView(tmp_path / "plain").cards["agreement"].visible
