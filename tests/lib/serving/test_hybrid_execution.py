"""HybriMoE carried out on threads: the same outputs whatever is decided, each expert once, memory that holds what it
should."""

from itertools import product

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from workbench.errors import InputError
from workbench.lib.core.experts import GLUExperts
from workbench.lib.core.routing import Routing
from workbench.lib.core.simulation.executor import ThrottledLink
from workbench.lib.core.simulation.traces import zipf_markov
from workbench.lib.serving.hybrid_execution import HybridExecutor, routed
from workbench.lib.serving.hybrid_schedule import MODES, PUBLIC
from workbench.lib.serving.hybrimoe import PREFETCHES, HybridSim, Offload, passes

TRACE = zipf_markov(0, prompts=2, prompt=5, generated=5, layers=3, experts=8, top_k=3)
LAYERS, EXPERTS, WIDTH = 3, 8, 32


@pytest.fixture(scope="module")
def stack():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        banks = [GLUExperts(EXPERTS, WIDTH, 48) for _ in range(LAYERS)]
        mixers = [nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)]
        return banks, mixers, torch.randn(*TRACE.probs.shape[:2], WIDTH)


@torch.no_grad()
def plain(stack) -> torch.Tensor:
    """The same stack without any device: every layer at once for all tokens."""
    banks, mixers, inputs = stack
    chosen, weights = routed(TRACE)
    x = inputs.flatten(0, 1)
    for layer, (bank, mixer) in enumerate(zip(banks, mixers, strict=True)):
        x = x + mixer(x)
        pairs = (part[:, :, layer].flatten(0, 1) for part in (chosen, weights))
        x = x + bank(F.rms_norm(x, (WIDTH,)), Routing.fixed(*pairs, EXPERTS))
    return x.view_as(inputs)


@pytest.mark.parametrize(("mode", "prefetch"), [*product(MODES, PREFETCHES)])
def test_outputs_are_those_of_the_plain_layers_whatever_is_decided(stack, mode, prefetch):
    banks, mixers, inputs = stack
    for capacity in (1, 4, EXPERTS):
        offload = Offload.of(TRACE, PUBLIC, capacity, mode=mode, prefetch=prefetch)
        with HybridExecutor(banks, mixers, offload, ThrottledLink(2e8), slower=2) as executor:
            found = executor.run(TRACE, inputs)
        torch.testing.assert_close(found.outputs, plain(stack), rtol=1e-5, atol=1e-5)
        check_memory(executor, banks)
        events = found.timeline.events
        assert found.timeline.overlaps() == []
        asked = sum(len(step.counts) for row in passes(TRACE) for steps in row for step in steps)
        assert sum(event.group == "expert" for event in events) == asked
        assert sum(event.group == "transfer" for event in events) == found.metrics.transfers
        assert len(found.layers) == 2 * (1 + 5) * LAYERS
        if mode == "fixed":
            assert found.metrics.transfers == 0
        if prefetch == "none":  # nothing depends on the clock: decisions are those of the simulation
            said = HybridSim(TRACE, PUBLIC, offload).run().metrics
            assert (found.metrics.hit_rate, found.metrics.transfers) == (said.hit_rate, said.transfers)


def check_memory(executor: HybridExecutor, banks: list[GLUExperts]) -> None:
    """Where an expert should be in the device's memory its weights are, bit for bit."""
    for layer, bank in enumerate(banks):
        cache, slots = executor.offload.caches[layer], executor._slots[layer]
        assert len(cache) <= cache.capacity and cache.resident.keys() <= slots.keys()
        assert len({*slots.values()}) == len(slots)
        for expert in cache.resident:
            for there, here in zip(executor._memory[layer], (bank.gate_up, bank.down), strict=True):
                assert torch.equal(there[slots[expert]], here[expert])


def test_an_expert_that_fails_ends_the_run_with_its_error(stack):
    banks, mixers, inputs = stack
    broken = [*mixers[:2], nn.Linear(WIDTH + 1, WIDTH)]
    offload = Offload.of(TRACE, PUBLIC, 4)
    with (
        pytest.raises(RuntimeError, match="mat1 and mat2"),
        HybridExecutor(banks, broken, offload, ThrottledLink(1e9), slower=1) as executor,
    ):
        executor.run(TRACE, inputs)


def test_a_fetch_that_fails_ends_with_its_error(stack):
    class Broken(ThrottledLink):
        def copy(self, target, source):
            raise ZeroDivisionError("the link broke")

    banks, mixers, inputs = stack
    offload = Offload.of(TRACE, PUBLIC, 2, mode="fixed")  # nothing but fetches goes over the link
    with pytest.raises(ZeroDivisionError), HybridExecutor(banks, mixers, offload, Broken(1), slower=20) as executor:
        executor.run(TRACE, inputs)


def test_what_does_not_fit_together_is_refused(stack):
    banks, mixers, inputs = stack
    with HybridExecutor(banks, mixers, Offload.of(TRACE, PUBLIC, 4), ThrottledLink(1e9), slower=1) as executor:
        with pytest.raises(InputError, match=r"inputs has shape \(2, 11, 32\) but must be \(2, 10\) tokens"):
            executor.run(TRACE, torch.cat([inputs, inputs[:, :1]], 1))
        shallow = zipf_markov(0, prompts=2, prompt=5, generated=5, layers=2, experts=8, top_k=3)
        with pytest.raises(InputError, match=r"trace has \(2, 8\) layers and experts but must have \(3, 8\)"):
            executor.run(shallow, inputs)
    offload = Offload.of(TRACE, PUBLIC, 4)
    with pytest.raises(InputError, match=r"banks, mixers and caches are 2, 3, 3 but must be as many"):
        HybridExecutor(banks[:2], mixers, offload, ThrottledLink(1e9), slower=1)
    with pytest.raises(InputError, match=r"slower is 0 but must be at least 1"):
        HybridExecutor(banks, mixers, offload, ThrottledLink(1e9), slower=0)
