"""Who announces, and who is silent while it is quiet."""

import torch
from torch import nn

from workbench.lib.core.observe import Announcing, quiet
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
