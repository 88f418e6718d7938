"""The configuration of an architecture, small: the library's default with every size cut by the name it has there.

Sizes that belong together stay so: heads times their width, the lists over layers, token ids below the vocabulary. What
a few architectures need beside is in a table.
"""

import re
from typing import Any

import transformers
from transformers.models.auto import configuration_auto

MOST = {
    "vocabulary": 128, "heads": 2, "key heads": 1, "head": 16, "width": 32, "inner": 64, "layers": 2, "first": 1,
    "period": 2, "experts": 4, "groups": 2, "active": 2, "rank": 8, "image": 32, "patch": 8, "few": 8, "length": 128,
    "kept": 0,
}  # fmt: skip
"""What a size is at most, by its kind; what is kept is no size, or small already."""

KINDS = (
    (r"chunk_size_feed_forward|num_channels|type_vocab_size|.*(stride|dilation|kernel|divisor|scale).*", "kept"),
    (r".*vocab_size.*|.*vocab|.*codebook_size|num_embeddings|.*num_buckets|.*_bins", "vocabulary"),
    (r".*heads_per_(layer|stage)", "heads"),
    (r".*(num|n)_?(key_value|kv)_heads|kv_n_heads|.*linear_num_key_heads|multi_query_group_num", "key heads"),
    (r".*(num|n)_?(.*_)?heads?|.*attention_heads|resampler_heads", "heads"),
    (r"(.*_)?(head_dim|d_kv|dim_head|d_head|head_size|rotary_dim)", "head"),
    (
        r".*(intermediate|ffn|d_ff|d_inner|n_inner|dim_ff|dff|feedforward|mlp|linear_units|expert)"
        r"(_hidden)?(_dim|_size)?",
        "inner",
    ),
    (r"first_k_dense_replace|moe_layer_start_index|num_dense_layers|.*_layer_offset", "first"),
    (r".*_layer_(period|interval|step)|.*sparse_step|full_attention_interval|layer_group_size", "period"),
    (r"sliding_window_pattern", "period"),
    (r"(.*_)?(num_|n_)?(.*_)?(layers?|blocks)|(.*_)?depths?|blocks_per_stage", "layers"),
    (r".*(experts_per_tok(en)?|top_?k)(_experts|_group)?|moe_k", "active"),
    (r"(.*_)?(num_|n_)?(.*_)?(experts|expert_num)", "experts"),
    (r"n_group|num_expert_groups?", "groups"),
    (r".*(lora_rank|dt_rank|step_rank|low_?rank|state_size|d_state|state_dim)", "rank"),
    (r".*(image_size|img_size|crop_size|resolution|height|width)", "image"),
    (r"(.*_)?patch_size", "patch"),
    (r".*(num|n)_(queries|query_tokens|latents|image_tokens|codevectors_per_group|points|patches)", "few"),
    (r".*(num|n)_(denoising|proposals|filters)", "few"),
    (r".*(max_|n_)(.*)?(positions?|ctx|seq_?(uence_)?len(gth)?|embeddings|length).*", "length"),
    (r"n_positions|max_pos_emb|context_length", "length"),
    (
        r".*(hidden|embed\w*|embd|proj\w*|out|in|output|input|text|decoder|latent|encoder|feature|d_model|width)"
        r"_?(size|dim|channels)?s?",
        "width",
    ),
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
    "dbrx": {
        "attn_config": {"kv_n_heads": 1, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 32, "moe_top_k": 2},
    },
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse"], "num_experts_per_tok": 2},
    "deepseek_v2": {"num_experts_per_tok": 2, "n_group": 2, "topk_group": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "diffusion_gemma_text": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32},
    "doge": {"is_moe": True, "num_experts": 16, "num_experts_per_tok": 4},
    "dory": {"num_hidden_layers": 4, "layer_types": None, "n_input_layers": 1, "n_output_layers": 1},
    "emu3": {"vocabulary_map": {"<image>": 5}},
    "ernie4_5_vl_moe_text": {"rope_parameters": SECTIONS | {"mrope_section": [2, 2, 4]}},
    "flint": {"mlp_only_layers": [0]},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gemma4_text": {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32},
    "glm4v_text": {"rope_parameters": SECTIONS},
    "glm4v_moe_text": {"rope_parameters": SECTIONS | {"mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5}},
    "glm5_next_text": {"index_topk": 2, "index_kpool": 2},
    "glm_image_text": {"rope_parameters": SECTIONS},
    "glm_ocr_text": {"rope_parameters": SECTIONS},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"mamba_n_heads": 4, "mamba_d_head": 16, "layer_types": ["mamba", "attention"]},
    "granitemoeshared": {"num_local_experts": 4},
    "hunyuan_v1_moe": {"num_experts": 4, "moe_topk": 2},
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
    "reformer": {
        "is_decoder": True,
        "axial_pos_shape": (8, 16),
        "axial_pos_embds_dim": (16, 16),
        "lsh_attn_chunk_length": 4,
    },
    "step3p5": {"sliding_window": 4},
    "time_series_transformer": {"prediction_length": 4, "context_length": 8, "lags_sequence": [1, 2]},
    "xmod": {"languages": ("en", "de"), "default_language": "en"},
    "zamba": {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2},
}
"""What a configuration needs beside its sizes, or to be a mixture where it can, by its model_type."""

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
    names = {
        old: new for new, old in getattr(config, "attribute_map", {}).items() if new in fields and old not in fields
    }
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
