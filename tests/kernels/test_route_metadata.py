"""`route_metadata` without a GPU: what it chooses and refuses. Its Triton path is tested in interp_route_metadata."""

import pytest
import torch

from workbench.errors import InputError
from workbench.kernels import RoutePlan, dispatch
from workbench.kernels.route_metadata import route_metadata


@pytest.mark.parametrize("backend", [None, "reference"])
def test_it_is_the_plan(backend):
    expert = torch.tensor([2, 0, 1, 2, 2, 0])
    for tokens in ({"top_k": 2}, {"tok_offs": torch.tensor([0, 1, 1, 6])}):
        with dispatch.recording() as seen:
            plan = route_metadata(expert, 3, **tokens, backend=backend)
        assert seen == [("route_metadata", "reference")]
        expected = RoutePlan.build(expert, 3, **tokens)
        for name in ("order", "inv", "tok", "offs"):
            assert torch.equal(getattr(plan, name), getattr(expected, name))
        assert (plan.n_tokens, plan.n_experts, plan.top_k) == (3, 3, tokens.get("top_k"))


def test_wrong_input_is_named():
    expert = torch.tensor([0, 1])
    with pytest.raises(InputError, match="backend of route_metadata 'cpu' is unknown"):
        route_metadata(expert, 2, top_k=1, backend="cpu")
    with pytest.raises(InputError, match="backend is 'triton' but route_metadata"):  # no GPU, no interpreter
        route_metadata(expert, 2, top_k=1, backend="triton")
    with pytest.raises(InputError, match="expert holds values from 0 to 1 but all must be from 0 to n_experts - 1 = 0"):
        route_metadata(expert, 1, top_k=1)
