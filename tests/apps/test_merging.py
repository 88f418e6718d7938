"""The page of a merge: what it shows is what `workbench.merge` gives, follows its knobs, and never waits."""

import threading
from collections.abc import Iterator

import numpy as np
import pytest
import torch

import workbench
from workbench.beds import digit_experts as bed
from workbench.errors import InputError
from workbench.lib import data
from workbench.lib.core.merge import mergers
from workbench.live import work
from workbench.live.work import begin
from workbench.merging import measure
from workbench.merging.measure import Choice, Merges, methods, open_bed
from workbench.merging.page import MergingPage

LAYER = "blocks.2.3.weight"
NEED_MORE = {"fisher", "regmean", "adamerging", "concrete-subspace", "rmm"}


@pytest.fixture(autouse=True)
def scales(monkeypatch: pytest.MonkeyPatch) -> tuple[float, ...]:
    """A short curve."""
    monkeypatch.setattr(measure, "SCALES", (0, 0.5, 1, 2))
    return measure.SCALES


@pytest.fixture(scope="module")
def opened() -> Merges:
    data.get("mnist-5k")
    *said, merges = open_bed("smoke")
    assert said[0] == "network 1 of 9, the base" and "9 of 9, the expert for “scanned”" in said[8]
    return merges


@pytest.fixture(scope="module")
def models() -> tuple:
    data.get("mnist-5k")
    return bed.base(bed.SMOKE), [bed.expert(name, bed.SMOKE) for name in bed.TASKS]


@pytest.fixture
def beds(monkeypatch: pytest.MonkeyPatch) -> dict:
    """No bed is open yet."""
    monkeypatch.setattr(work, "_opened", {})
    return work._opened


@pytest.fixture
def page(opened: Merges, beds, until) -> Iterator[MergingPage]:
    bed_of("smoke", lambda size: [opened])
    page = MergingPage("smoke")
    follow(page, until)
    yield page
    page.close()


def bed_of(size: str, open_=open_bed) -> work.Job:
    return work.opened(("merges", size), lambda: open_(size))


def follow(page: MergingPage, until) -> None:
    """Look at the page as a browser does, until it has all that is chosen."""

    def settled() -> bool:
        page.poll()
        return page.settled

    until(settled)
    page.poll()


def drawn(page: MergingPage, card: str):
    (figure,) = page.cards[card].figures
    return figure


def accuracies(state: dict) -> list[float]:
    model = bed.DigitNet(bed.SMOKE["width"])
    model.load_state_dict(state)
    return [bed.task(name).evaluate(model, "test")["accuracy"] for name in bed.TASKS]


@pytest.mark.parametrize(
    ("method", "options"), [("average", {}), ("ties", {"density": 0.4}), ("pcb-merging", {"ratio": 0.3})]
)
def test_what_is_measured_is_what_workbench_merge_gives(opened, models, scales, method, options):
    choice = Choice(method, next(iter(options.values()), None), 1.0, LAYER)
    *_, found = opened.measure(choice)
    base, experts = models
    merged = workbench.merge(base, experts, method, exclude="head.*", **options)
    assert accuracies(merged) == found.accuracies.tolist() == found.curve[1].tolist()
    assert found.curve[0].tolist() == opened.before.tolist() == accuracies(base.state_dict())
    spectrum = torch.linalg.svdvals((merged[LAYER] - base.state_dict()[LAYER]).double())
    np.testing.assert_array_equal(found.spectrum, spectrum.numpy())
    assert tuple(found.curve) == scales


def test_lambda_is_the_scale_of_the_method(opened, models):
    base, experts = models
    for scale in (0.1, 2.0):
        merged = workbench.merge(base, experts, "task-arithmetic", exclude="head.*", scale=scale)
        found = next(opened.measure(Choice("task-arithmetic", None, scale, LAYER)))
        np.testing.assert_allclose(found.accuracies, accuracies(merged), atol=0.003)  # rounding may turn an image
        spectrum = torch.linalg.svdvals((merged[LAYER] - base.state_dict()[LAYER]).double())
        np.testing.assert_allclose(found.spectrum, spectrum.numpy(), rtol=1e-3, atol=1e-5)


def test_the_curve_comes_a_lambda_at_a_time_and_once(opened, monkeypatch, scales):
    choice = Choice("dare", 0.35, 1.0, LAYER)
    assert [tuple(found.curve) for found in opened.measure(choice)] == [(1,), (0, 1), (0, 0.5, 1), scales]
    monkeypatch.setattr(opened, "_accuracy", None)  # would raise if anything were measured again
    (found,) = opened.measure(Choice("dare", 0.35, 2.0, LAYER))
    assert tuple(found.curve) == scales and found.accuracies.tolist() == found.curve[2].tolist()


def test_a_layer_is_that_of_the_experts(opened, models):
    base, experts = models
    layer = opened.layer(LAYER)
    change = (experts[3].state_dict()[LAYER] - base.state_dict()[LAYER]).double()
    np.testing.assert_allclose(layer.spectra["flipped"], torch.linalg.svdvals(change).numpy(), rtol=1e-5, atol=1e-8)
    np.testing.assert_allclose(layer.overlaps.diagonal(), 1, rtol=1e-5)
    np.testing.assert_allclose(layer.overlaps, layer.overlaps.T)
    assert (layer.rank, layer.dim) == (4, 32)


def test_every_method_that_needs_weights_alone_is_there_and_no_other():
    base = {"w": torch.randn(6, 4), "b": torch.randn(6)}
    experts = [{name: x + torch.randn_like(x) for name, x in base.items()} for _ in range(3)]
    assert set(mergers()) - set(methods()) == NEED_MORE
    for name in methods():
        workbench.merge(base, experts, name)
    for name in NEED_MORE:
        with pytest.raises(InputError):
            workbench.merge(base, experts, name)
    assert methods()["pcb-merging"] == ("ratio", 0.2) and methods()["dare"] == ("density", 0.5)
    assert methods()["average"] is None


def test_another_lambda_changes_what_hangs_on_it_and_nothing_else(page, until):
    before = {name: drawn(page, name) for name in page.cards}
    page.scale.value = 0.5
    follow(page, until)
    accuracy, curve = drawn(page, "accuracy"), drawn(page, "curve")
    merged = dict(zip(("base", "merged", "own expert"), (bar.y for bar in accuracy.data), strict=True))["merged"]
    assert list(merged) == page.measured.accuracies.tolist() == page.bed.accuracies(page.measured.choice, 0.5).tolist()
    assert list(merged) != list(before["accuracy"].data[1].y) and "λ = 0.50" in accuracy.layout.title.text
    assert curve.layout.shapes[-1].x0 == 0.5
    np.testing.assert_array_equal(curve.data[-1].y, before["curve"].data[-1].y)  # the same merge
    np.testing.assert_allclose(drawn(page, "spectra").data[-1].y, 0.5 * np.array(before["spectra"].data[-1].y))
    assert drawn(page, "cosines") is before["cosines"] and drawn(page, "conflict") is before["conflict"]


def test_what_was_shown_stands_until_there_is_something_newer(page, until):
    before, going = drawn(page, "curve"), threading.Event()
    begin(going.wait() and [] for _ in range(1))  # another page is served
    seen = []
    for scale in (0.5, 2.0, 1.5):
        page.scale.value = scale
        page.poll()
    assert not page.settled and 'class="chip running"' in page.status.object
    assert drawn(page, "curve") is before and page.measured.choice.scale == 1
    going.set()

    def settled() -> bool:
        page.poll()
        seen.append(page.measured.choice.scale)
        return page.settled

    until(settled)
    assert list(dict.fromkeys(seen)) in ([1, 0.5, 1.5], [0.5, 1.5])  # a slider on its way: the first, and then the last
    page.poll()
    assert drawn(page, "curve").layout.shapes[-1].x0 == 1.5


def test_another_method_has_its_own_share_and_figures(page, until):
    assert not page.share.visible
    before = drawn(page, "curve")
    page.method.value = "ties"
    assert page.share.visible and page.share.value == 0.2 and "density" in page.share_text.object
    follow(page, until)
    assert page.measured.choice.options == {"density": 0.2}
    assert list(drawn(page, "curve").data[-1].y) != list(before.data[-1].y)
    assert "ties" in drawn(page, "curve").layout.title.text and drawn(page, "spectra").data[-1].name == "ties, λ = 1.00"
    sparse = page.measured.accuracies
    page.share.value = 0.9
    follow(page, until)
    assert page.measured.choice.options == {"density": 0.9} and page.measured.accuracies.tolist() != sparse.tolist()
    assert "density 0.90" in page.status.object and 'class="chip finished"' in page.status.object


def test_another_layer_and_theme(page, until):
    overlaps = drawn(page, "overlap").data[0].z
    page.layer.value = "embedding.weight"
    page.dark.value = True
    follow(page, until)
    assert not np.array_equal(drawn(page, "overlap").data[0].z, overlaps)
    assert "embedding" in drawn(page, "spectra").layout.title.text
    papers = {drawn(page, name).layout.template.layout.paper_bgcolor for name in page.cards}
    assert papers == {"#161b21"} and "wb-dark" in page._root.css_classes


def test_a_look_at_the_page_never_waits_for_what_takes_long(beds, until, opened):
    going = threading.Event()

    def slow(size: str):
        yield "network 1 of 9, the base"
        going.wait()
        yield opened

    bed_of("smoke", slow)
    page = MergingPage("smoke")

    def told() -> bool:
        page.poll()  # comes back, though the networks do not
        return "network 1 of 9" in page.status.object

    try:
        until(told)
        assert not page.cards["curve"].figures and "trained once" in page.status.object
    finally:
        going.set()
    follow(page, until)
    assert page.cards["curve"].figures


def test_without_the_images_the_page_says_how_to_get_them_and_the_next_one_tries_again(empty_home, beds, until, opened):
    page = MergingPage("smoke")

    def told() -> bool:
        page.poll()
        return "workbench data get mnist-5k" in page.status.object

    until(told)
    page.poll()
    assert all("workbench data get mnist-5k" in str(card.contents[0]) for card in page.cards.values())
    bed_of("smoke", lambda size: [opened])
    again = MergingPage("smoke")
    follow(again, until)
    assert "bad" not in again.status.object


def test_a_fault_is_said_on_the_page_and_in_the_log(beds, until, caplog):
    shown = threading.Event()  # before that it would be opened anew for the page

    def broken(size: str):
        yield "network 1 of 9, the base"
        shown.wait()
        raise ZeroDivisionError("of <nothing>")

    bed_of("smoke", broken)
    page = MergingPage("smoke")
    shown.set()

    def told() -> bool:
        page.poll()
        return "ZeroDivisionError: of &lt;nothing&gt;" in page.status.object

    until(told)
    assert "Traceback" in caplog.text


def test_pages_share_a_bed_and_a_dropped_job_ends(beds, until):
    assert bed_of("smoke", lambda size: ["reading"]) is bed_of("smoke")
    made, step = [], threading.Semaphore(0)

    def endless():
        while True:
            step.acquire()
            made.append(len(made))
            yield made[-1]

    job = begin(endless())
    step.release()
    until(lambda: job.latest == 0)
    job.drop()
    step.release()
    until(lambda: job.done)
    assert len(made) <= 2 and not job.error
    after = begin(iter([7]))
    until(lambda: after.done)
    assert after.latest == 7


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"size": "smal"}, "size 'smal' is unknown; did you mean 'small'"),
        ({"method": "fisher"}, "method 'fisher' is unknown"),
    ],
)
def test_a_page_of_what_is_not_there_is_refused(given, said, beds):
    with pytest.raises(InputError, match=said):
        MergingPage(**given)
    with pytest.raises(InputError, match=r"size 'smal' is unknown"):
        next(open_bed("smal"))
    with pytest.raises(InputError, match=r"method 'rmm' is unknown"):
        Choice("rmm", None, 1.0, LAYER)
