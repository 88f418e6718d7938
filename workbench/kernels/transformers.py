"""`moe_mlp` inside the mixture-of-experts models of Hugging Face transformers (5.7 or newer)."""

import torch
from torch import Tensor, nn

from workbench.errors import InputError
from workbench.kernels.moe_mlp import moe_mlp
from workbench.kernels.plan import RoutePlan

NAME = "workbench"
SILU = ("SiLUActivation", "SiLU")  # transformers' class and torch's


def register_transformers() -> None:
    """Add the experts implementation "workbench" to transformers; registering twice changes nothing.

        register_transformers()
        model.config._experts_implementation = "workbench"  # or from_pretrained(..., experts_implementation=...)

    It serves every model whose experts keep transformers' packed layout, `gate_up_proj` (E, 2I, H) and `down_proj`
    (E, H, I) with SiLU: Mixtral, OLMoE, Qwen3-MoE and those built like them. Others raise `InputError` when they run.

    Raises:
        InputError: transformers is not installed, or has no registry of experts implementations.
    """
    try:
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    except ImportError as error:
        raise InputError(
            f"register_transformers needs transformers 5.7 or newer (pip install 'transformers>=5.7'): {error}"
        ) from error
    ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)


def experts_forward(experts: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """What transformers calls in place of an experts module's own forward.

    Args:
        experts: the module, with its weights.
        hidden_states: (T, H).
        top_k_index: (T, K) experts of each token.
        top_k_weights: (T, K) their weights.
    """
    _check(experts)
    score = top_k_weights.reshape(-1)
    if score.dtype not in (torch.float32, hidden_states.dtype):
        score = score.to(hidden_states.dtype)
    plan = RoutePlan.build(top_k_index.reshape(-1), experts.num_experts, top_k=top_k_index.shape[1])
    return moe_mlp(hidden_states, experts.gate_up_proj, experts.down_proj, plan, score)


def _check(experts: nn.Module) -> None:
    """Raise `InputError` unless the module computes down(silu(gate x) * up x) from weights in the packed layout."""
    wanted = {
        "has_gate": True,
        "has_bias": False,
        "has_post_expert_norm": False,
        "is_transposed": False,
        "is_concatenated": True,
        "_is_expert_parallel": False,
    }
    for name, value in wanted.items():
        if getattr(experts, name, value) != value:
            raise InputError(f"{type(experts).__name__}.{name} is {getattr(experts, name)}; 'workbench' needs {value}")
    activation = type(experts.act_fn).__name__
    if activation not in SILU:
        raise InputError(f"{type(experts).__name__} has the activation {activation}; 'workbench' needs {SILU[0]}")
    own_gate = type(experts)._apply_gate
    if own_gate.__module__ != "transformers.integrations.moe":
        raise InputError(f"{type(experts).__name__} has a gate of its own; 'workbench' needs act_fn(gate) * up")
