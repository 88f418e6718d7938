"""The operator inside transformers' own models: random small ones, outputs and gradients against their 'eager'."""

from importlib import import_module

import pytest
import torch

from workbench.errors import InputError
from workbench.kernels import dispatch, native, register_transformers

transformers = pytest.importorskip("transformers", minversion="5.0")

SMALL = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 32,
    "head_dim": 8,
}
MODELS = {
    "mixtral": ("MixtralConfig", "MixtralForCausalLM", {"intermediate_size": 12, "num_local_experts": 4}),
    "olmoe": ("OlmoeConfig", "OlmoeForCausalLM", {"intermediate_size": 12, "num_experts": 4}),
    "qwen3-moe": ("Qwen3MoeConfig", "Qwen3MoeForCausalLM", {"moe_intermediate_size": 12, "num_experts": 4}),
}


def model_of(name: str) -> torch.nn.Module:
    config_name, model_name, extra = MODELS[name]
    torch.manual_seed(0)
    config = getattr(transformers, config_name)(**SMALL, **extra)
    model = getattr(transformers, model_name)(config)
    for weight in model.parameters():  # far from the tiny initial values, so that experts matter
        torch.nn.init.normal_(weight, std=0.2)
    return model


def run(model: torch.nn.Module, implementation: str) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.config._experts_implementation = implementation
    model.zero_grad()
    tokens = torch.randint(50, (2, 9), generator=torch.Generator().manual_seed(1))
    result = model(tokens, labels=tokens)
    result.loss.backward()
    return result.logits.detach(), {name: weight.grad.clone() for name, weight in model.named_parameters()}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-6), (torch.bfloat16, 6e-2), (torch.float16, 1e-2)]
)
def test_outputs_and_gradients_equal_eager(name, dtype, tolerance):
    """transformers' routers compute in float32 whatever the type of the model, so float64 is no nearer than that."""
    register_transformers()
    model = model_of(name).to(dtype)
    with dispatch.recording() as seen:
        ours, our_grads = run(model, "workbench")
    path = "native" if dtype == torch.float32 and native.compiler() else "cpu"
    assert seen == [("moe_mlp", path)] * 2 + [("moe_mlp.backward", path)] * 2
    theirs, their_grads = run(model, "eager")
    assert torch.allclose(ours, theirs, atol=tolerance * theirs.abs().max().item())
    for weight, expected in their_grads.items():
        assert torch.allclose(our_grads[weight], expected, atol=tolerance * max(1e-3, expected.abs().max().item()))


def test_the_implementation_can_be_asked_for_by_name_and_registered_twice():
    register_transformers()
    register_transformers()
    model = model_of("mixtral")
    model.set_experts_implementation("workbench")
    with dispatch.recording() as seen:
        model(torch.zeros(1, 3, dtype=torch.long))
    assert ("moe_mlp", "native" if native.compiler() else "cpu") in seen


def test_experts_that_compute_something_else_are_refused():
    register_transformers()
    config = transformers.MixtralConfig(**SMALL, **MODELS["mixtral"][2], hidden_act="gelu")
    model = transformers.MixtralForCausalLM(config)
    model.config._experts_implementation = "workbench"
    with pytest.raises(InputError, match="MixtralExperts has the activation GELU"):
        model(torch.zeros(1, 3, dtype=torch.long))
    oss = transformers.GptOssConfig(**SMALL, intermediate_size=12, num_local_experts=4)
    model = transformers.GptOssForCausalLM(oss)
    model.config._experts_implementation = "workbench"
    with pytest.raises(InputError, match="GptOssExperts"):
        model(torch.zeros(1, 3, dtype=torch.long))


def asked_in_the_configuration(config, model_class):
    config._experts_implementation = "workbench"


def asked_of_the_class(config, model_class):
    model_class._from_config(config, experts_implementation="workbench")


def asked_of_the_model(config, model_class):
    model_class(config).set_experts_implementation("workbench")


@pytest.mark.parametrize("asked", [asked_in_the_configuration, asked_of_the_class, asked_of_the_model])
@pytest.mark.parametrize("name", ["Llama4Text", "JetMoe"])
def test_an_architecture_that_would_stay_on_its_own_code_is_refused(name, asked):
    register_transformers()
    sizes = {**SMALL, "num_local_experts": 2, "intermediate_size": 12, "intermediate_size_mlp": 12, "kv_channels": 8}
    config = getattr(transformers, f"{name}Config")(**sizes)
    model_class = getattr(transformers, f"{name.removesuffix('Text')}ForCausalLM")
    with pytest.raises(InputError, match=f"{name}Config: the experts of this architecture have code of their own"):
        asked(config, model_class)
    dense = transformers.LlamaConfig(**SMALL, intermediate_size=12)
    asked(dense, transformers.LlamaForCausalLM)  # has no experts that could stay anywhere


def test_experts_with_another_gate_are_refused():
    register_transformers()
    if not hasattr(transformers, "HYV4Config"):
        pytest.skip("this transformers has no HYV4")
    config = transformers.HYV4Config(num_local_experts=2, hidden_size=16, moe_intermediate_size=12)
    experts = import_module("transformers.models.hy_v4.modeling_hy_v4").HYV4Experts(config)
    config._experts_implementation = "workbench"
    with pytest.raises(InputError, match="HYV4Experts has a gate of its own"):
        experts(torch.randn(3, 16), torch.zeros(3, 1, dtype=torch.long), torch.ones(3, 1))


def test_without_transformers_it_says_what_is_missing(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "transformers.integrations.moe", None)
    with pytest.raises(InputError, match=r"needs transformers 5.7 or newer"):
        register_transformers()
