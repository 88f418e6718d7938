"""`moe_mlp` inside the mixture-of-experts models of Hugging Face transformers (5.7 or newer)."""

import inspect
import re
from functools import cache, wraps
from importlib import import_module
from typing import Any

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
    (E, H, I) with SiLU: Mixtral, OLMoE, Qwen3-MoE and those built like them, in single and in half precision. Others
    raise `InputError` when they run, and an architecture whose experts have code of their own (Llama 4, JetMoE), which
    transformers would leave at that in silence, does when it is asked for.

    Raises:
        InputError: transformers is not installed, or has no registry of experts implementations.
    """
    try:
        from transformers.configuration_utils import PreTrainedConfig
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
        from transformers.modeling_utils import PreTrainedModel
    except ImportError as error:
        raise InputError(
            f"register_transformers needs transformers 5.7 or newer (pip install 'transformers>=5.7'): {error}"
        ) from error
    if NAME not in ALL_EXPERTS_FUNCTIONS:
        _refuse_own_code(PreTrainedConfig, PreTrainedModel)
    ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)


def _refuse_own_code(config_class: type, model_class: type) -> None:
    """Where "workbench" is asked for, in a configuration or of a model, look first whether it would be used."""
    own, set_own = config_class._experts_implementation, model_class.set_experts_implementation

    def asked(config: Any, value: str | dict[str, str] | None) -> None:
        if _is_asked(value):
            _check_architecture(type(config))
        own.fset(config, value)

    @wraps(set_own)
    def set_asked(model: nn.Module, experts_implementation: str | dict[str, str]) -> None:
        if _is_asked(experts_implementation):
            for part in model.modules():
                if isinstance(part, model_class):
                    _check_architecture(type(part.config))
        set_own(model, experts_implementation)

    config_class._experts_implementation = own.setter(asked)
    model_class.set_experts_implementation = set_asked


def _is_asked(value: str | dict[str, str] | None) -> bool:
    return NAME in (value.values() if isinstance(value, dict) else (value,))


@cache
def _check_architecture(config_class: type) -> None:
    """Raise `InputError` if models of this configuration have experts that ask for no implementation."""
    try:
        source = inspect.getsource(import_module(config_class.__module__.replace("configuration_", "modeling_")))
    except (ImportError, OSError):  # of a class that was written elsewhere nothing is known
        return
    mixed = re.search(r"^class (?!\w*Shared)\w*(Expert|MoE|NaiveMoe)\w*\((torch\.)?nn\.Module", source, re.MULTILINE)
    if mixed and "@use_experts_implementation" not in source:
        raise InputError(
            f"{config_class.__name__}: the experts of this architecture have code of their own and ask for no experts "
            f"implementation, so that {NAME!r} would change nothing"
        )


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
    own_gate = type(experts)._apply_gate
    if own_gate.__module__ != "transformers.integrations.moe":
        raise InputError(f"{type(experts).__name__} has a gate of its own; 'workbench' needs act_fn(gate) * up")
    activation = type(experts.act_fn).__name__
    if activation not in SILU:
        raise InputError(f"{type(experts).__name__} has the activation {activation}; 'workbench' needs {SILU[0]}")
