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
    with quiet():
        kinds = classes(name)
        if not kinds:
            raise NotBuilt("no registry of models has it: a part of another, or one made of others")
        reasons: list[str] = []
        for kind in kinds:
            try:
                return built(kind, configuration(name))
            except NotBuilt as error:
                reasons.append(str(error))
            except Exception as error:
                reasons.append(one_line(error))
    raise NotBuilt(reasons[0])


def is_mixture(model: nn.Module) -> bool:
    """Whether it holds a module whose name says that it has experts."""
    return any("expert" in type(module).__name__.lower() for module in model.modules())


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


# -- sizes

MOST = {
    "vocabulary": 128, "heads": 2, "key heads": 1, "head": 16, "width": 32, "inner": 64, "layers": 2, "first": 1,
    "period": 2, "experts": 4, "groups": 2, "active": 2, "rank": 8, "image": 32, "patch": 8, "few": 8, "length": 128, "kept": 0,
}  # fmt: skip
"""What a size is at most, by its kind; what is kept is no size, or small already."""

KINDS = (
    (r"chunk_size_feed_forward|num_channels|type_vocab_size|.*(stride|dilation|kernel|divisor|scale).*", "kept"),
    (r".*vocab_size.*|.*vocab|.*codebook_size|num_embeddings|.*num_buckets|.*_bins", "vocabulary"),
    (r".*heads_per_(layer|stage)", "heads"),
    (r".*(num|n)_?(key_value|kv)_heads|kv_n_heads|.*linear_num_key_heads|multi_query_group_num", "key heads"),
    (r".*(num|n)_?(.*_)?heads?|.*attention_heads|resampler_heads", "heads"),
    (r"(.*_)?(head_dim|d_kv|dim_head|d_head|head_size|rotary_dim)", "head"),
    (r".*(intermediate|ffn|d_ff|d_inner|n_inner|dim_ff|dff|feedforward|mlp|linear_units|expert)(_hidden)?(_dim|_size)?", "inner"),
    (r"first_k_dense_replace|moe_layer_start_index|num_dense_layers|.*_layer_offset", "first"),
    (r".*_layer_(period|interval|step)|.*sparse_step|full_attention_interval|sliding_window_pattern|layer_group_size", "period"),
    (r"(.*_)?(num_|n_)?(.*_)?(layers?|blocks)|(.*_)?depths?|blocks_per_stage", "layers"),
    (r".*(experts_per_tok(en)?|top_?k)(_experts|_group)?|moe_k", "active"),
    (r"(.*_)?(num_|n_)?(.*_)?(experts|expert_num)", "experts"),
    (r"n_group|num_expert_groups?", "groups"),
    (r".*(lora_rank|dt_rank|step_rank|low_?rank|state_size|d_state|state_dim)", "rank"),
    (r".*(image_size|img_size|crop_size|resolution|height|width)", "image"),
    (r"(.*_)?patch_size", "patch"),
    (r".*(num|n)_(queries|query_tokens|latents|image_tokens|codevectors_per_group|points|patches|denoising|proposals)", "few"),
    (r".*(max_|n_)(.*)?(positions?|ctx|seq_?(uence_)?len(gth)?|embeddings|length).*|n_positions|max_pos_emb|context_length", "length"),
    (r".*(hidden|embed\w*|embd|proj\w*|out|in|output|input|text|decoder|latent|encoder|feature|d_model|width)_?(size|dim|channels)?s?", "width"),
    (r"num_filters", "few"),
    (r"embed_dim_per_stage", "width"),
    (r".*(dim|rank|channel|units|d_model)s?|(.*_)?dim_.*", "width"),
)  # fmt: skip
"""A pattern for the whole name of a size in a configuration, and its kind; the first that fits."""

TOKEN = re.compile(r"(.*_)?(token|bos|eos|pad|sep|cls|mask|unk|blank|image|start|end)_?(ids?|index)")
INDICES = re.compile(r".*(ind(ex(es)?|ices)|idxs?|layers)")
OFF = re.compile(r"(.*_)?(layerdrop|apply_spec_augment|mask_time_prob|mask_feature_prob)")
"""What skips layers or masks inputs by a generator that is not torch's."""

SECTIONS = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}
BY_TYPE = {kind: {"rope_type": "default", "rope_theta": 1e4} for kind in ("full_attention", "sliding_attention")}
ALSO: dict[str, dict[str, Any]] = {
    "autoformer": {"prediction_length": 4, "context_length": 8, "lags_sequence": [1, 2]},
    "bamba": {"mamba_n_heads": 4, "mamba_d_head": 16, "attn_layer_indices": [1]},
    "chameleon": {"vocabulary_map": {"<image>": 5}},
    "cohere_compass_text": {"rope_parameters": BY_TYPE},
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse"], "num_experts_per_tok": 2},
    "deepseek_v2": {"num_experts_per_tok": 2, "n_group": 2, "topk_group": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dory": {"num_hidden_layers": 4, "layer_types": None, "n_input_layers": 1, "n_output_layers": 1},
    "emu3": {"vocabulary_map": {"<image>": 5}},
    "ernie4_5_vl_moe_text": {"rope_parameters": SECTIONS | {"mrope_section": [2, 2, 4]}},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "glm4v_text": {"rope_parameters": SECTIONS},
    "glm4v_moe_text": {"rope_parameters": SECTIONS | {"mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5}},
    "glm5_next_text": {"index_topk": 2, "index_kpool": 2},
    "glm_image_text": {"rope_parameters": SECTIONS},
    "glm_ocr_text": {"rope_parameters": SECTIONS},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"mamba_n_heads": 4, "mamba_d_head": 16, "layer_types": ["mamba", "attention"]},
    "hunyuan_vl_text": {"rope_parameters": SECTIONS | {"mrope_section": [2, 2, 2, 2]}},
    "informer": {"prediction_length": 4, "context_length": 8, "lags_sequence": [1, 2]},
    "led": {"attention_window": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "lilt": {"hidden_size": 48},
    "longcat_flash": {"qk_head_dim": 32},
    "mamba2": {"num_heads": 4, "head_dim": 16, "n_groups": 1},
    "moonshine": {"encoder_num_key_value_heads": 2, "decoder_num_key_value_heads": 2},
    "nemotron_h": {
        "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"],
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "n_groups": 1,
    },
    "paddleocr_vl_text": {"rope_parameters": SECTIONS},
    "qwen2_5_omni_text": {"rope_parameters": SECTIONS},
    "qwen2_5_vl_text": {"rope_parameters": SECTIONS},
    "qwen2_vl_text": {"rope_parameters": SECTIONS},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 4,
        "indexer_compress_ratio": 2,
        "ngram_vocab_size_base": 128,
    },
    "recurrent_gemma": {"block_types": ("recurrent", "attention")},
    "reformer": {"is_decoder": True, "axial_pos_shape": (8, 16), "axial_pos_embds_dim": (16, 16), "lsh_attn_chunk_length": 4},
    "step3p5": {"sliding_window": 4},
    "time_series_transformer": {"prediction_length": 4, "context_length": 8, "lags_sequence": [1, 2]},
    "xmod": {"languages": ("en", "de"), "default_language": "en"},
}
"""What a configuration needs beside its sizes, by its model_type."""

FILLED = {"head_dim": 16, "num_key_value_heads": 1, "vocab_size": MOST["vocabulary"]}
"""Sizes that some defaults leave open."""


def configuration(name: str) -> Any:
    """The library's default, small."""
    return small(configuration_auto.CONFIG_MAPPING[name]())


def small(config: Any) -> Any:
    """The configuration with every size small, and those inside it."""
    own = {key: value for key, value in vars(config).items() if not key.startswith("_")}
    kept = layers_kept(own)
    vocabulary = min(MOST["vocabulary"], own.get("vocab_size") or MOST["vocabulary"])
    ids = iter(range(vocabulary - 1, 0, -1))
    changed: dict[str, Any] = {}
    for key, value in own.items():
        if isinstance(value, transformers.PreTrainedConfig):
            changed[key] = small(value)
        elif OFF.fullmatch(key) and value is not None:
            changed[key] = type(value)(0)
        elif value is None and key in FILLED:
            changed[key] = FILLED[key]
        elif isinstance(value, bool) or value is None:
            continue
        elif TOKEN.fullmatch(key):
            if isinstance(value, int) and value >= vocabulary:
                changed[key] = next(ids)
            elif isinstance(value, list | tuple) and all(isinstance(each, int) for each in value):
                changed[key] = type(value)(i if i < vocabulary else next(ids) for i in value)
        elif isinstance(value, list | tuple) and value:
            changed[key] = type(value)(small_list(key, value, kept))
        elif isinstance(value, int):
            changed[key] = small_size(key, value, own, len(kept))
        elif isinstance(value, dict):
            changed[key] = sections(value)
    fields = {f for kind in type(config).__mro__ for f in getattr(kind, "__annotations__", ())}
    names = {old: new for new, old in getattr(config, "attribute_map", {}).items() if new in fields and old not in fields}
    own, changed = ({names.get(key, key): value for key, value in each.items()} for each in (own, changed))
    plain = {names.get(key, key): value for key, value in vars(type(config)()).items()}
    same = [key for key, value in changed.items() if not isinstance(value, transformers.PreTrainedConfig)]
    same = {key for key in same if changed[key] == plain.get(key)}
    chosen = {key: value for key, value in (own | changed).items() if key in fields and key not in same}
    chosen = {key: value for key, value in chosen.items() if key in changed or value != plain.get(key)}
    return type(config)(**chosen | ALSO.get(config.model_type, {}))


def layers_kept(own: dict[str, Any]) -> list[int]:
    """The layers that are kept: the first of each kind that the lists over layers tell apart, and two at least."""
    counts = {value for key, value in own.items() if isinstance(value, int) and kind_of(key) == "layers"}
    lists = [v for v in own.values() if isinstance(v, list | tuple) and len(v) in counts and len(v) > MOST["layers"]]
    lists = [v for v in lists if len(v) == max(map(len, lists)) and all(isinstance(each, str) for each in v)]
    kinds = list(zip(*lists, strict=True))
    first = {kinds.index(kind) for kind in kinds}
    return sorted(first if len(first) >= MOST["layers"] else first | {0, 1})


def small_list(key: str, value: Any, kept: list[int]) -> Any:
    kind = kind_of(key)
    if (all(isinstance(each, str) for each in value) or len(value) > 8) and len(value) > max(MOST["layers"], *kept):
        value = [value[i] for i in kept]
        return [min(each, MOST[kind]) for each in value] if kind in ("heads", "inner") else value
    if not all(isinstance(each, int) and not isinstance(each, bool) for each in value):
        return value
    if INDICES.fullmatch(key):
        return sorted({min(each, len(kept) - 1) for each in value})
    if kind == "width" and min(value) > 1:
        return [max(8, min(128, each * 16 // min(value) // 8 * 8)) for each in value]
    if kind == "layers":
        return [min(each, 1) for each in value]
    return [min(each, MOST[kind]) if kind != "kept" else each for each in value]


def small_size(key: str, value: int, own: dict[str, Any], layers: int) -> int:
    kind = kind_of(key)
    if kind == "kept" or value <= 1:
        return value
    if kind == "layers":
        return min(value, layers)
    heads = next((own[each] for each in ("num_attention_heads", "num_heads", "n_heads", "n_head") if each in own), None)
    return min(value, MOST["heads" if kind == "key heads" and value == heads else kind])


def sections(value: dict[str, Any]) -> dict[str, Any]:
    """The parameters of a rotary embedding, whose sections are of a head's width, or those of every kind of layer."""
    out = {}
    for key, item in value.items():
        if isinstance(item, dict):
            item = sections(item)
        elif key == "mrope_section":
            whole = int(MOST["head"] // 2 * value.get("partial_rotary_factor", 1.0))
            parts = [max(1, whole * each // sum(item)) for each in item]
            item = [whole - sum(parts[1:]), *parts[1:]]
        out[key] = item
    return out


def kind_of(key: str) -> str:
    return next((kind for pattern, kind in KINDS if re.fullmatch(pattern, key)), "kept")


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
    firsts = [["input_ids"], [main], ["pixel_values"], ["input_ids", "pixel_values"], ["input_ids", "bbox"], ["past_values"], ["inputs_embeds"], ["hidden_states"], []]
    tried: list[list[str]] = []
    for first in firsts:
        chosen = list(dict.fromkeys([*first, *needed, *decoder]))
        if not chosen or chosen in tried or not names.keys() >= set(first):
            continue
        tried.append(chosen)
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
    mel = number(find(config, "num_mel_bins", "feature_projection_input_dim", "feature_size", "input_feat_per_channel", "input_dim", "n_mels", default=80))
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
        flat += [ floats(B, 16, c * patch**2), floats(16, c, patch, patch)]
        return [*images, *flat, floats(B, number(find(config, "num_frames", default=4)), c, s, s), floats(B, 2, c, s, s)]
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
        return [floats(B, length, 0)] if name == "past_time_features" else [floats(B, length), floats(B, length, features)]
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
