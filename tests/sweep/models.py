"""A tiny model of every architecture in the registry of transformers, and what it is called with.

    for name in architectures():
        try:
            model, inputs = build(name)
        except NotBuilt as reason: ...

An architecture is a key of the library's `CONFIG_MAPPING`. Its configuration is the library's default with every size
made small by the name it has there, nested configurations too; its class is the first of the per-task registries that
has one and runs. What it is called with is found by the names in the signature of its forward. No network, one seed.

Weights are drawn anew, wider than the library does and biases too: with biases of zero and norms of one, a formula that
left them out would be right.
"""

import copy
import inspect
import itertools
import logging
import math
import re
import warnings
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.models.auto import configuration_auto, modeling_auto

from tests.sweep.sizes import MOST, configuration

LARGEST = 2_000_000
"""Parameters of a model that is still called tiny."""

REGISTRIES = (
    "SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ", "MASKED_LM", "CAUSAL_LM", "MULTIMODAL_LM", "", "BACKBONE",
)  # fmt: skip
"""Of transformers, in the order they are tried; "" is that of the models without a head. All others come after."""


class NotBuilt(Exception):
    """No tiny model of this architecture, and why."""


def architectures() -> list[str]:
    """Every key of the registry of configurations."""
    return sorted(configuration_auto.CONFIG_MAPPING_NAMES)


def build(name: str) -> tuple[nn.Module, dict[str, Any]]:
    """The model in evaluation mode, and the keywords of a call that it answers with finite numbers.

    Raises:
        NotBuilt: it cannot be.
    """
    reasons: list[str] = []
    with quiet():
        try:
            config, kinds = configuration(name), classes(name)
        except Exception as error:
            raise NotBuilt(one_line(error)) from error
        for kind in kinds:
            try:
                return built(kind, copy.deepcopy(config))
            except NotBuilt as error:
                reasons.append(str(error))
            except Exception as error:
                reasons.append(one_line(error))
    raise NotBuilt(reasons[0] if reasons else "no registry of models has it: a part of another, or made of others")


def answer(model: nn.Module, inputs: dict[str, Any], seed: int = 0) -> Tensor:
    """Every number of a model's answer, in one row; what it draws is drawn from the seed."""
    torch.manual_seed(seed)
    return torch.cat([tensor.flatten().float() for tensor in tensors(model(**inputs))])


def tensors(value: Any) -> Iterator[Tensor]:
    """The floating-point tensors of an output; no caches, which are no answer."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            if not key.startswith(("past", "cache", "state", "mems")):
                yield from tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors(item)


# -- classes


def classes(name: str) -> list[type]:
    """The classes of an architecture, the likeliest to be used first."""
    ordered = [f"MODEL_FOR_{task}_MAPPING_NAMES" if task else "MODEL_MAPPING_NAMES" for task in REGISTRIES]
    others = sorted(n for n in vars(modeling_auto) if re.fullmatch(r"MODEL_.*MAPPING_NAMES", n))
    found: dict[str, None] = {}
    for registry in dict.fromkeys((*ordered, *others)):
        entry = getattr(modeling_auto, registry).get(name, ())
        found |= dict.fromkeys((entry,) if isinstance(entry, str) else entry)
    inside = {type(value) for value in vars(configuration_auto.CONFIG_MAPPING[name]()).values()}
    kinds = [getattr(transformers, each, None) for each in found]
    return [kind for kind in kinds if isinstance(kind, type) and getattr(kind, "config_class", None) not in inside]


# -- models and inputs


def built(kind: type, config: Any) -> tuple[nn.Module, dict[str, Any]]:
    with torch.device("meta"):
        size = sum(p.numel() for p in kind(copy.deepcopy(config)).parameters())
    if size > LARGEST:
        raise NotBuilt(f"{kind.__name__} has {size / 1e6:.1f} million parameters at its smallest")
    torch.manual_seed(0)
    model = kind(config).float().eval()
    reasons: list[str] = []
    for stirred in (True, False):
        if stirred:
            before = copy.deepcopy(model.state_dict())
            stir(model)
        else:
            model.load_state_dict(before)
        for inputs in calls(model):
            try:
                y = answer(model, inputs)
            except Exception as error:
                reasons.append(f"{kind.__name__}: {one_line(error)}")
                continue
            if y.numel() and y.isfinite().all() and torch.equal(answer(model, inputs), y):
                return model, inputs
            reasons.append(f"{kind.__name__}: its answer is empty, not finite or not the same twice")
    raise NotBuilt(reasons[0] if reasons else f"{kind.__name__}: nothing to call it with")


@torch.no_grad()
def stir(model: nn.Module) -> None:
    """Weights as wide as their inputs ask for, and vectors that are neither zero nor one."""
    generator = torch.Generator().manual_seed(1)
    for p in model.parameters():
        drawn = torch.randn(p.shape, generator=generator)
        if p.ndim > 1:
            p.copy_(drawn / math.sqrt(max(1, p[0].numel() if p.ndim != 3 else p.shape[-1])))
        else:
            p.mul_(1 + 0.1 * drawn.sign()).add_(0.1 * drawn)


B, T = 2, 6
MEL = ("input_feat_per_channel", "input_dim", "n_mels")


def find(config: Any, *names: str, default: Any = None) -> Any:
    """The first of the names that the configuration, or one inside it, has."""
    inside = [value for value in vars(config).values() if isinstance(value, transformers.PreTrainedConfig)]
    for each in (config, *inside):
        for name in names:
            try:
                value = getattr(each, name, None)
            except Exception:  # one that differs between layers is an error to ask for
                continue
            if value is not None:
                return value
    return default


def number(value: Any) -> int:
    return value if isinstance(value, int) else value[0]


def calls(model: nn.Module) -> Iterator[dict[str, Any]]:
    """Keywords to try, the simplest first."""
    names = inspect.signature(model.forward).parameters
    main = getattr(model, "main_input_name", "input_ids")
    needed = [n for n, p in names.items() if p.default is p.empty and p.kind == p.POSITIONAL_OR_KEYWORD]
    decoder = ["decoder_input_ids"] if "decoder_input_ids" in names else []
    firsts = ("input_ids", main, "pixel_values", "input_ids pixel_values", "input_ids bbox", "past_values")
    firsts += ("inputs_embeds", "hidden_states", "")
    known = [first.split() for first in firsts if names.keys() >= set(first.split())]
    for chosen in filter(None, dict.fromkeys(tuple(dict.fromkeys([*each, *needed, *decoder])) for each in known)):
        options = {name: shapes(name, model.config) for name in chosen}
        for made in itertools.product(*options.values()):
            yield dict(zip(options, made, strict=True))
    try:
        yield dict(model.dummy_inputs)
    except Exception:
        return


def shapes(name: str, config: Any) -> list[Any]:
    """What an input of this name may be, by the sizes of a configuration; the likeliest first."""
    generator = torch.Generator().manual_seed(2)

    def floats(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator)

    def ids(*shape: int, most: int = 10) -> Tensor:
        return torch.randint(4, most, shape, generator=generator)

    c = number(find(config, "num_channels", "in_channels", "in_chans", default=3))
    c = c if c <= 16 else 3
    s = number(find(config, "image_size", "img_size", default=MOST["image"]))
    width = number(find(config, "hidden_size", "d_model", default=MOST["width"]))
    mel = number(find(config, "num_mel_bins", "feature_projection_input_dim", "feature_size", *MEL, default=80))
    frames = 2 * number(find(config, "max_source_positions", default=32))
    if name in ("input_ids", "tokens"):
        books = find(config, "num_codebooks", "num_code_groups")
        return [ids(B, T)] if books is None else [ids(B, T), ids(B, T, number(books))]
    if name == "decoder_input_ids":
        return [ids(B, T)]
    if name in ("attention_mask", "decoder_attention_mask"):
        return [torch.ones(B, T, dtype=torch.int64)]
    if name == "pixel_values":
        sides = dict.fromkeys((s, 32, 64, 128))
        images = [floats(B, c, side, side) for side in sides]
        patch = number(find(config, "patch_size", default=8))
        times = number(find(config, "temporal_patch_size", "video_temporal_patch_size", default=1))
        flat = [floats(16, c * t * patch**2) for t in (times, 2)]
        flat += [floats(B, 16, c * patch**2), floats(16, c, patch, patch)]
        return images + flat + [floats(B, n, c, s, s) for n in (number(find(config, "num_frames", default=4)), 2)]
    if name in ("pixel_values_videos", "pixel_values_video"):
        return [floats(B, number(find(config, "frames_per_clip", "num_frames", default=4)), c, s, s)]
    if name == "input_features":
        return [floats(B, mel, frames), floats(B, 64, mel), floats(B, mel, 64), floats(B, mel, 400)]
    if name in ("input_values", "audio_values", "waveform"):
        length = number(find(config, "max_length", default=64))
        return [floats(B, 1600), floats(B, 1, 1600), floats(B, length, mel), floats(B, mel, 64), floats(B, 64, mel)]
    if name in ("inputs_embeds", "hidden_states", "encoder_hidden_states", "hidden_state"):
        return [floats(B, T, width), floats(16, c * 2 * 8 * 8), floats(16, c * 8 * 8), floats(16, width)]
    if name in ("grid_thw", "image_grid_thw"):
        return [torch.tensor([[1, 4, 4]])]
    if name == "bbox":
        return [torch.tensor([1, 2, 3, 4]).expand(B, T, 4).clone(), floats(B, T, 4), floats(B, T, 8)]
    if name in ("past_values", "past_observed_mask", "past_time_features"):
        length = number(find(config, "context_length", default=8)) + max(find(config, "lags_sequence", default=[0]))
        features = number(find(config, "num_input_channels", default=1))
        plain = name != "past_time_features"
        return [floats(B, length), floats(B, length, features)] if plain else [floats(B, length, 0)]
    if name == "inputs":
        return [ids(B, T), floats(B, T, width), floats(B, c, s, s)]
    return []


def one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:100]}"


class quiet(warnings.catch_warnings):
    """Neither warnings nor logs of the library: its defaults are not what a user would choose."""

    def __enter__(self) -> None:
        super().__enter__()
        warnings.simplefilter("ignore")
        self.level = logging.root.manager.disable
        logging.disable(logging.ERROR)

    def __exit__(self, *error: object) -> None:
        logging.disable(self.level)
        super().__exit__(*error)
