"""Pages and passes: no page is two requests', all come back, and every request gets its passes in its order."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench.errors import InputError
from workbench.lib.serving.paging import ADMISSIONS, MODES, PagedKV, Requests, Scheduler


@st.composite
def runs(draw) -> dict:
    """Requests, and a memory that holds the longest of them and sometimes little more."""
    lengths = draw(st.lists(st.tuples(st.integers(1, 20), st.integers(1, 9)), min_size=1, max_size=12))
    page = draw(st.integers(1, 5))
    least = max(-(-(p + g - 1) // page) for p, g in lengths)
    return {
        "lengths": lengths,
        "pages": (least + draw(st.integers(0, 20)), page),
        "max_tokens": draw(st.integers(1, 50)),
        "admission": draw(st.sampled_from(ADMISSIONS)),
        "mode": draw(st.sampled_from(MODES)),
        "groups": draw(st.integers(1, 2)),
    }


def made(run: dict) -> dict:
    """The arguments of a scheduler."""
    how = {name: run[name] for name in ("max_tokens", "admission", "mode", "groups")}
    return {"requests": Requests(*map(tuple, zip(*run["lengths"], strict=True))), "kv": PagedKV(*run["pages"])} | how


@given(runs())
@settings(max_examples=80)
def test_every_request_is_served_token_by_token_in_pages_of_its_own(run):
    run = made(run)
    requests, kv, held, given_out = run["requests"], run["kv"], {}, {}
    for step in Scheduler(**run):
        assert step.shares
        for request in step.preempted:
            held.pop(request)
        owners = {page: share.request for share in step.shares for page in share.pages}
        assert len(owners) == sum(len(share.pages) for share in step.shares)  # nobody shares one
        for share in step.shares:
            assert share.start == held.get(share.request, 0)
            known = requests.prompts[share.request] + given_out.get(share.request, 0)
            assert share.tokens == (1 if share.decodes else known) and share.start + share.tokens == known
            assert len(share.pages) == kv.pages(known)  # less than a page is wasted
            held[share.request], given_out[share.request] = known, given_out.get(share.request, 0) + 1
        assert sum(map(kv.pages, held.values())) <= kv.n_pages
        ended = [request for request in held if given_out[request] == requests.generate[request]]
        for request in ended:
            held.pop(request)
    assert given_out == dict(enumerate(requests.generate)) and held == {}
    assert kv.free == kv.n_pages


@given(runs())
@settings(max_examples=50)
def test_a_pass_keeps_to_its_tokens_and_its_mode_and_nobody_who_runs_is_left_out(run):
    run = made(run)
    running: set[int] = set()
    left = dict(enumerate(run["requests"].generate))
    for step in Scheduler(**run):
        prefills = [share.tokens for share in step.shares if not share.decodes]
        decodes = {share.request for share in step.shares if share.decodes}
        if len(prefills) > 1 or (prefills and max(prefills) <= run["max_tokens"]):
            assert step.tokens <= run["max_tokens"]
        if run["mode"] == "separate":
            assert not (prefills and decodes)
        if run["mode"] == "mixed" or decodes:
            assert decodes == running - set(step.preempted)
        for share in step.shares:
            left[share.request] -= 1
        running = {r for r in running | {share.request for share in step.shares} if left[r]} - set(step.preempted)


@given(runs())
@settings(max_examples=50)
def test_with_peak_admission_nobody_is_turned_out(run):
    run = made(run)
    passes = list(Scheduler(**run | {"admission": "peak"}))
    assert all(step.preempted == () for step in passes)
    requests = run["requests"]
    assert sum(step.tokens for step in passes) == requests.processed
    held = sum(sum(len(share.pages) for share in step.shares) for step in passes) * run["kv"].page
    if run["mode"] == "mixed":  # otherwise they hold pages in passes that they have no part in
        assert held == requests.held(run["kv"].page)
        assert len(passes) * run["kv"].n_pages * run["kv"].page >= held


def test_an_over_committed_memory_turns_out_the_newest_who_begins_anew():
    run = Scheduler(Requests.uniform(4, 8, 3), PagedKV(9, 2), max_tokens=100, admission="headroom")
    passes = list(run)
    first = next(step for step in passes if step.preempted)
    assert first.preempted == (2,)  # the newest
    assert {s.request for step in passes if step.preempted for s in step.shares} == {0, 1}
    again = next(s for step in passes for s in step.shares if s.request == 1 and not s.decodes and s.tokens > 4)
    assert again.start == 0
    assert sum(step.tokens for step in passes) > Requests.uniform(4, 8, 3).processed


def test_the_groups_hold_about_as_much():
    for step in list(Scheduler(Requests.uniform(10, 6, 40), PagedKV(200, 4), max_tokens=60))[5:12]:
        held = [sum(share.start + share.tokens for share in step.group(group)) for group in (0, 1)]
        assert max(held) < 1.35 * min(held)


def test_requests_count_what_they_put_through_and_hold():
    requests = Requests((3, 5), (1, 4))
    assert (len(requests), requests.generated, requests.processed) == (2, 5, 3 + 8)
    assert requests.held() == 3 + (5 + 6 + 7 + 8) and requests.held(page=4) == 4 + (8 + 8 + 8 + 8)
    drawn = Requests.drawn(40, 10, 200, seed=1)
    assert drawn == Requests.drawn(40, 10, 200, seed=1) != Requests.drawn(40, 10, 200, seed=2)
    assert (min(drawn.prompts), max(drawn.prompts), min(drawn.generate), max(drawn.generate)) == (20, 60, 5, 15)


def test_pages_are_given_and_taken_whole():
    kv = PagedKV(4, 8)
    kv.grow(0, 9), kv.grow(1, 8), kv.grow(0, 16)
    assert len(kv.table(0)) == 2 and len(kv.table(1)) == 1 and not set(kv.table(0)) & set(kv.table(1))
    with pytest.raises(InputError, match="request 2 needs 2 pages for 9 tokens but 1 are free"):
        kv.grow(2, 9)
    assert kv.free == 1 and kv.table(2) == ()
    kv.release(0), kv.release(0)
    assert kv.free == 3


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: Requests((), ()), "at least one"),
        (lambda: Requests((1, 2), (1,)), "2 and 1 lengths"),
        (lambda: Requests((0,), (1,)), "prompts holds 0"),
        (lambda: Requests((1,), (-1,)), "generate holds -1"),
        (lambda: Requests((float("inf"),), (1,)), "prompts holds inf"),
        (lambda: Requests((1,), (float("nan"),)), "generate holds nan"),
        (lambda: Requests.drawn(0, 1, 1, seed=0), "prompts holds 0"),
        (lambda: PagedKV(0, 8), "n_pages is 0"),
        (lambda: PagedKV(float("inf"), 8), "n_pages is inf"),
        (lambda: Scheduler(Requests((1,), (1,)), PagedKV(5, 8), float("nan")), "max_tokens is nan"),
        (lambda: Scheduler(Requests((1,), (1,)), PagedKV(5, 8), 9, groups=1.5), "groups is 1.5"),
        (lambda: PagedKV(8, 0), "page is 0"),
        (lambda: Scheduler(Requests((9, 40), (1, 5)), PagedKV(5, 8), 100), "request 1 alone needs 6 pages of 8 for"),
        (lambda: Scheduler(Requests((1,), (1,)), PagedKV(5, 8), 0), "max_tokens is 0"),
        (lambda: Scheduler(Requests((1,), (1,)), PagedKV(5, 8), 9, groups=0), "groups is 0"),
        (lambda: Scheduler(Requests((1,), (1,)), PagedKV(5, 8), 9, "peek"), "admission 'peek' is unknown; did you"),
        (lambda: Scheduler(Requests((1,), (1,)), PagedKV(5, 8), 9, mode="mix"), "mode 'mix' is unknown"),
    ],
)
def test_what_cannot_be_served_is_refused(call, said, unchecked):
    with pytest.raises(InputError, match=said):
        call()
