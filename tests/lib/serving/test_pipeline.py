"""The woven pipeline: every dependency holds in every event, and two groups hide what one cannot."""

from collections import defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench.lib.core.simulation.fits import LinkModel, RateTable
from workbench.lib.serving.costs import MeasuredCosts, pass_terms, stretches
from workbench.lib.serving.paging import PagedKV, Requests, Scheduler
from workbench.lib.serving.pipeline import ATTEND, HEAD, LOAD, MOE, QKV, PipelineSim

LAYERS = 3


class Fixed:
    """Costs by the number of tokens, as given."""

    basis, layers = "simulated, calibrated by a test", LAYERS

    def __init__(self, load=1.0, device=0.1, attention=0.1, host=0.0):
        self._load, self._device, self._attention, self._host = load, device, attention, host

    def load(self):
        return self._load

    def qkv(self, shares):
        return 0.3 * self._device * sum(share.tokens for share in shares)

    def moe(self, shares):
        return 0.7 * self._device * sum(share.tokens for share in shares)

    def head(self, shares):
        return 0.0

    def attend(self, shares):
        return self._attention * sum(share.decodes for share in shares)

    def host(self, shares):
        return self._host

    def crowded(self, device, attention):
        return device, attention


def planned(groups=2, count=12, **options):
    requests = Requests(tuple(3 + i % 4 for i in range(count)), tuple(2 + i % 5 for i in range(count)))
    return list(Scheduler(requests, PagedKV(24, 2), 14, groups=groups, **options))


costs = st.builds(Fixed, *(st.floats(0, 2) for _ in range(3)))
options = st.fixed_dictionaries({"groups": st.integers(1, 2), "admission": st.sampled_from(["peak", "headroom"])})


@given(costs, options)
@settings(max_examples=20)
def test_every_dependency_holds_in_every_event(found, how):
    passes = planned(**how)
    timeline = PipelineSim(found).run(passes)
    assert timeline.overlaps() == []
    at = {event.name: event for event in timeline.events}
    assert len(at) == len(timeline.events)
    heads: dict[int, float] = {}
    done: dict[tuple[int, int], float] = defaultdict(float)  # the experts of a layer of a pass
    ended = {}
    for number, step in enumerate(passes):
        for layer in range(LAYERS):
            name = f"pass {number} layer {layer}"
            load = at[f"{LOAD} {name}"]
            before = divmod(number * LAYERS + layer - 2, LAYERS)
            assert load.start >= done[before] - 1e-9  # its buffer is free
            for group in sorted({share.group for share in step.shares}):
                qkv, moe = (at[f"{kind} {name} group {group}"] for kind in (QKV, MOE))
                assert qkv.start >= load.end - 1e-9
                start = qkv.end
                if any(share.decodes for share in step.group(group)):
                    attend = at[f"{ATTEND} {name} group {group}"]
                    assert attend.start >= start - 1e-9
                    start = attend.end
                else:
                    assert f"{ATTEND} {name} group {group}" not in at
                assert moe.start >= start - 1e-9
                if layer:
                    assert qkv.start >= ended[group] - 1e-9
                else:  # the last token of each is known
                    known = [heads[share.request] for share in step.group(group) if share.request in heads]
                    assert qkv.start >= max(known, default=0) - 1e-9
                ended[group] = moe.end
                done[number, layer] = max(done[number, layer], moe.end)
        for share in step.shares:
            heads[share.request] = at[f"{HEAD} pass {number} layer {LAYERS - 1} group {share.group}"].end


@given(costs)
@settings(max_examples=20)
def test_the_time_lies_between_the_busiest_resource_and_one_thing_after_another(found):
    passes = planned()
    timeline = PipelineSim(found).run(passes)
    busy = timeline.busy()
    assert max(busy.values()) - 1e-9 <= timeline.makespan <= sum(busy.values()) + 1e-9
    terms = [pass_terms(found, step.shares) for step in passes]
    for lane, name in (("link", "stream"), ("device", "device"), ("cpu", "attention")):
        assert busy[lane] == pytest.approx(sum(each[name] for each in terms))


@pytest.mark.parametrize(("load", "device"), [(1.0, 0.01), (0.5, 0.02), (0.1, 0.1)])
def test_without_attention_a_run_takes_the_stream_or_the_device(load, device):
    busy = (timeline := PipelineSim(Fixed(load, device, attention=0)).run(planned(count=40))).busy()
    assert timeline.makespan == pytest.approx(max(busy["link"], busy["device"]), rel=0.08)


def test_two_groups_hide_attention_behind_the_device():
    found = Fixed(load=0.01, device=0.05, attention=0.2)
    two, one = (PipelineSim(found).run(planned(groups, count=60)) for groups in (2, 1))
    busy = one.busy()
    assert one.makespan >= busy["device"] + busy["cpu"]
    assert two.makespan < 0.75 * one.makespan


def test_where_host_memory_is_asked_for_too_much_attention_waits_for_it():
    found = Fixed(load=0.1, device=0.001, attention=0.1, host=5.0)
    step = planned()[4]
    assert stretches(found, step.shares) == (1.0, pytest.approx(5.0 / pass_terms(found, step.shares)["attention"]))
    assert stretches(Fixed(load=9.0, host=5.0), step.shares) == pytest.approx((1.0, 1.0))  # the stream hides it


def measured(**changes) -> MeasuredCosts:
    table = RateTable((1, 100), (0.01, 1.0))
    found = {"products_in": table, "products_out": table, "prefill": table, "output": table}
    found |= {"basis": "simulated, calibrated by a test", "layers": LAYERS, "page": 2, "cached_tokens": 8}
    found |= {"layer_bytes": 10, "streamed": LinkModel(0, 0.1), "decode": LinkModel(0.5, 0.25), "decode_call": 3.0}
    return MeasuredCosts(**found | {"hand_over": 0.0, "crowd": (1.0, 1.0)} | changes)


def test_measured_costs_attend_in_parts_that_stay_in_the_cache():
    """Five decodes of two pages of two tokens: 8 tokens at once are two of them, so two, two and one."""
    share = next(s for step in planned() for s in step.shares if s.decodes and len(s.pages) == 2)
    found, shares = measured(), [share] * 5
    assert found.attend(shares) == pytest.approx(3.0 + 2 * (0.5 + 0.25 * 8) + (0.5 + 0.25 * 4))
    assert found.attend([s for s in planned()[0].shares if not s.decodes]) == 0
    assert found.load() == pytest.approx(1.0)
    assert MeasuredCosts.from_dict(found.to_dict()) == found


def test_device_and_cpu_crowd_each_other_for_as_long_as_both_work():
    found = measured(crowd=(1.5, 2.0))
    assert found.crowded(10.0, 4.0) == (10.0 + 0.5 * 4, 4.0 + 1.0 * 4)
    assert found.crowded(10.0, 0.0) == (10.0, 0.0)
    assert pass_terms(found, planned(groups=1)[4].shares) == pass_terms(measured(), planned(groups=1)[4].shares)
