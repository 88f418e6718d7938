"""Who announces, who listens for a while, and who is silent while it is quiet."""

import pytest
import torch
from torch import nn

from workbench.lib.core.observe import Announcing, observing, outputs, quiet
from workbench.lib.core.routing import Context, Routing


class Chooser(Announcing):
    n_experts, top_k = 3, 1

    def forward(self, x):
        self.announce(Routing.fixed(torch.zeros(len(x), 1, dtype=torch.int64), torch.ones(len(x), 1), 3), Context())
        return x


def test_observers_hear_every_announcement_until_they_are_removed_or_it_is_quiet():
    model, heard = nn.Sequential(Chooser(), nn.Sequential(Chooser())), []
    handles = [module.observe(lambda *said: heard.append(said)) for module in (model[0], model[1][0])]
    assert model[0].observed
    model(torch.zeros(2, 4))
    assert [said[0] for said in heard] == [model[0], model[1][0]] and heard[0][1].n_tokens == 2
    with quiet(model):
        assert not model[0].observed
        model(torch.zeros(2, 4))
    assert len(heard) == 2
    handles[0].remove()
    model(torch.zeros(2, 4))
    assert len(heard) == 3 and not model[0].observed


def test_what_is_announced_inside_is_kept_module_by_module_and_nobody_listens_afterwards():
    model, heard = nn.Sequential(Chooser(), Chooser()), []
    model[0].observe(lambda *said: heard.append(said))
    with observing(model) as seen:
        model(torch.zeros(2, 4))
        model(torch.zeros(5, 4))
    assert list(seen) == list(model) and [routing.n_tokens for routing, _ in seen[model[1]]] == [2, 5]
    assert all(isinstance(context, Context) for _, context in seen[model[0]])
    model(torch.zeros(2, 4))
    assert len(seen[model[0]]) == 2 and len(heard) == 3 and model[0].observed and not model[1].observed


def test_what_is_kept_of_a_decision_can_be_chosen():
    model = nn.Sequential(Chooser())
    with observing(model, lambda routing, _: routing.n_tokens) as seen:
        model(torch.zeros(3, 4))
    assert seen == {model[0]: [3]}


def test_nobody_listens_after_an_error():
    model = nn.Sequential(Chooser(), Chooser())
    with pytest.raises(RuntimeError, match="inside"), observing(model), outputs(model):
        assert model[0].observed
        raise RuntimeError("inside")
    assert not model[0].observed and not model[1].observed and not model._forward_hooks


def test_outputs_are_those_of_the_calls_inside():
    model, x = nn.Linear(2, 2), torch.ones(1, 2)
    with outputs(model) as found:
        expected = [model(x), model(2 * x)]
    model(x)
    assert len(found) == 2 and all(a is b for a, b in zip(found, expected, strict=True))
