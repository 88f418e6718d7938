"""Gradient conflict is that of the gradients, and measuring it, like all probing, leaves no trace in a training."""

import numpy as np
import pytest
import torch
from torch import nn

from workbench.lib.core.checkpoint import weights_digest
from workbench.lib.core.observe import quiet
from workbench.lib.core.train import Hook, State, TrainConfig, train
from workbench.live.probes import find
from workbench.live.probes.conflict import ConflictProbe, undisturbed
from workbench.live.probes.routing import RoutingProbe
from workbench.live.probes.spectra import SpectrumProbe

K = 2


def test_gramians_are_those_of_the_gradients_of_each_domain(model, task):
    module = model()
    groups = find.groups(module, find.blocks(module))
    found = ConflictProbe(module, task, groups, rows=3).take(seed=5)
    assert list(found) == [f"conflict/{group}" for group in groups]
    generator = torch.Generator().manual_seed(5)
    module.eval()
    halves = [[], []]
    for half in halves:
        for domain in range(3):
            batch = task.batch("train", 3, generator, domain=domain)
            assert set(batch.domain.tolist()) == {domain}
            module.zero_grad()
            task.loss(module, batch)[0].backward()
            half.append({p: None if p.grad is None else p.grad.double().flatten() for p in module.parameters()})
    for group, parameters in groups.items():
        first, second = (torch.stack([torch.cat([task_[p] for p in parameters]) for task_ in half]) for half in halves)
        expected = torch.stack([first @ first.T, second @ second.T, first @ second.T])
        assert found[f"conflict/{group}"].dtype == np.float64
        np.testing.assert_allclose(found[f"conflict/{group}"], expected, rtol=1e-4, atol=1e-9)


def test_measuring_conflict_leaves_no_trace(model, task):
    module = model()
    module.blocks[0].eval()  # a part of the model that its owner keeps in evaluation mode
    seen = []
    module.blocks[1].ffn.observe(lambda *_: seen.append(1))
    task.loss(module, task.batch("train", 2, torch.Generator().manual_seed(0)))[0].backward()
    seen.clear()
    conflict = ConflictProbe(module, task, find.groups(module, find.blocks(module)), rows=2)
    modes = [m.training for m in module.modules()]
    gradients = [p.grad.clone() for p in module.parameters()]
    buffers = [b.clone() for b in module.buffers()]
    random = torch.random.get_rng_state()
    conflict.take(seed=1)
    assert [m.training for m in module.modules()] == modes
    assert all(torch.equal(p.grad, g) for p, g in zip(module.parameters(), gradients, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(module.buffers(), buffers, strict=True))
    assert (
        module.blocks[1].ffn.router.bias.load.sum() == 2 * 8 * K
    )  # the loss-free bias counted the training batch only
    assert torch.equal(torch.random.get_rng_state(), random)
    assert seen == []
    module(torch.zeros(1, 4, dtype=torch.long))
    assert seen == [1]


def test_observers_come_back_after_an_error(model, task):
    module, seen = model(), []
    module.blocks[0].ffn.observe(lambda *_: seen.append(1))
    with pytest.raises(RuntimeError, match="inside"), quiet(module):
        raise RuntimeError("inside")
    with pytest.raises(RuntimeError, match="inside"), undisturbed(module):
        raise RuntimeError("inside")
    assert module.training
    module(torch.zeros(1, 4, dtype=torch.long))
    assert seen == [1]


@pytest.mark.parametrize("capacity", [None, 1.0])
def test_training_with_probes_is_bit_equal_to_training_without(model, task, capacity: float | None):
    class Probes(Hook):
        def __init__(self, module: nn.Module):
            self.routing = RoutingProbe(module, find.blocks(module), {"domain": 3}, 256)
            self.spectra = SpectrumProbe(find.matrices(module, self.routing.found))
            self.conflict = ConflictProbe(module, task, find.groups(module, self.routing.found), rows=2)

        def before_step(self, state: State) -> None:
            self.routing.arm(True)
            self.spectra.remember()

        def after_step(self, state: State) -> None:
            self.routing.take(structure=True)
            assert len(self.spectra.take(state.step)) == 3 * len(self.spectra.dense)
            self.conflict.take(state.step)

    config = TrainConfig(steps=5, batch_size=4, eval_every=2, eval_batches=1)
    plain = train(model(capacity=capacity), task, config)
    watched_model = model(capacity=capacity)
    watched = train(watched_model, task, config, [Probes(watched_model)])
    assert weights_digest(plain.model) == weights_digest(watched.model)
    assert plain.history == watched.history
