"""Recipes: plain values in, the same values out, and nothing wrong accepted."""

import dataclasses
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from workbench.errors import InputError
from workbench.lib.core.checkpoint import weights_digest
from workbench.lib.core.moe import moe_layers
from workbench.live.arm import read_recipe
from workbench.live.recipe import ROUTERS, Recipe

SMALL = {"domains": ["docs"], "cap": 4096, "seq_len": 16, "d_model": 16, "n_layers": 2, "n_heads": 2, "d_hidden": 8}


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "domains": st.lists(st.sampled_from(["python", "docs", "names"]), min_size=1, unique=True),
            "lr": st.floats(1e-8, 1),
            "balance": st.none() | st.floats(0, 10),
            "capacity_factor": st.none() | st.floats(0.01, 512),
            "top_k": st.integers(1, 8),
            "seed": st.integers(0, 2**31 - 1),
            "steps": st.integers(1, 10**8),
            "router": st.sampled_from(["linear", "fixed-random"]),
        },
    )
)
def test_a_recipe_comes_back_from_json_as_it_was(values: dict):
    recipe = Recipe.from_dict(values)
    assert read_recipe(recipe.to_json()) == recipe
    assert {name: recipe.to_dict()[name] for name in values} == values


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"n_expert": 4}, "recipe value 'n_expert' is unknown; did you mean 'n_experts'"),
        ({"top_k": 9}, "top_k is 9 but must be between 1 and n_experts = 8"),
        ({"n_experts": 0}, "n_experts is 0 but must be a whole number between 1 and 512"),
        ({"steps": 1.5}, "steps is 1.5 but must be a whole number"),
        ({"steps": True}, "steps is True but must be a whole number"),
        ({"steps": "9"}, "steps is '9' but must be a whole number"),
        ({"seed": -1}, "seed is -1 but must be"),
        ({"lr": float("nan")}, "lr is nan but must be a number between"),
        ({"lr": 0}, "lr is 0 but must be a number"),
        ({"lr": None}, "lr is None but must be a number"),
        ({"balance": -0.1}, "balance is -0.1 but must be a number between 0 and 10"),
        ({"router": "liner"}, "router 'liner' is unknown; did you mean 'linear'"),
        ({"router": 3}, "router is 3 but must be a name"),
        ({"router": "hash", "balance": 0.1}, "balance is 0.1 but the hash router takes none"),
        ({"router": "expert-choice", "bias_rate": 0.1}, "bias_rate is 0.1 but the expert-choice router takes none"),
        ({"domains": "python"}, "domains is 'python' but must be a list of names"),
        ({"domains": []}, "domains is .* but must name at least one domain"),
        ({"domains": ["docs", "docs"]}, "each once"),
        ({"domains": ["pyton"]}, "domain 'pyton' is unknown; did you mean 'python'"),
        ({"d_model": 66}, "d_model is 66 but must be divisible by n_heads = 4"),
    ],
)
def test_a_wrong_value_is_named_with_what_is_allowed(values: dict, message: str):
    with pytest.raises(InputError, match=message):
        Recipe.from_dict(values)


@pytest.mark.parametrize("text", ["", "[1]", "3", "{"])
def test_what_is_no_recipe_is_refused(text: str):
    with pytest.raises(InputError, match="the recipe is"):
        read_recipe(text)


def test_every_value_says_what_it_is():
    assert all(name in Recipe.__dataclass_fields__["router"].metadata["help"] for name in ROUTERS)
    assert all(item.metadata["help"] for item in dataclasses.fields(Recipe))
    json.dumps([item.metadata["help"] for item in dataclasses.fields(Recipe)])


@pytest.mark.parametrize("router", ROUTERS)
def test_every_router_builds_and_routes(router: str):
    recipe = Recipe.from_dict(
        SMALL | {"router": router, "n_experts": 4, "top_k": 2, "d_shared": 4, "steps": 7, "seed": 3}
    )
    random = torch.random.get_rng_state()
    model, task, config = recipe.build()
    assert torch.equal(torch.random.get_rng_state(), random)
    assert (config.steps, config.seed, config.lr, config.eval_batches) == (7, 3, recipe.lr, 1)
    assert task.domains == ("docs",) and task.seq_len == 16
    assert len(moe_layers(model)) == 2
    loss, _ = task.loss(model, task.batch("train", 2, torch.Generator().manual_seed(0)))
    assert loss.isfinite()
    assert weights_digest(recipe.build()[0]) == weights_digest(model)
    other = Recipe.from_dict(recipe.to_dict() | {"seed": 4}).build()[0]
    assert weights_digest(other) != weights_digest(model)


def test_values_reach_the_router():
    values = {"balance": 0.5, "z_loss": 0.25, "bias_rate": 0.125, "capacity_factor": 1.5}
    layer = moe_layers(Recipe.from_dict(SMALL | values).build()[0])["blocks.1.ffn"]
    assert layer.router.coefficients == {"lbl": 0.5, "z": 0.25}
    assert layer.router.bias.rate == 0.125 and layer.capacity_factor == 1.5 and layer.shared is None
    assert moe_layers(Recipe.from_dict(SMALL).build()[0])["blocks.0.ffn"].router.coefficients == {"lbl": 0.01}
