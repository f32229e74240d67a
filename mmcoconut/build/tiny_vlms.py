"""Tiny configurations of vision-language models of any architecture, for smoke tests and tests: real code, no weights.

A configuration of transformers' own defaults is shrunk field by field. All widths are one number, so that what a tower
gives fits what a projector reads; what a name does not say is left as it is.
"""

import re

from transformers import CONFIG_MAPPING
from transformers.configuration_utils import PreTrainedConfig


WIDTH, HEADS, LAYERS, PATCH, SIDE = 32, 4, 2, 8, 32
SIZES = (
    (
        WIDTH,
        "hidden_size d_model embed_dim n_embd hidden_dim width out_hidden_size projection_dim projector_hidden_size "
        "vision_embed_dim cross_attention_hidden_size encoder_hidden_size mm_hidden_size vision_hidden_size "
        "projection_hidden_size text_hidden_size audio_hidden_size output_dim projector_dim attention_dim "
        "q_lora_rank kv_lora_rank moe_intermediate_size shared_expert_intermediate_size resampler_dim "
        "qformer_hidden_size "
        "moe_shared_expert_intermediate_size vision_output_dim proj_hidden_dim output_proj_dims",
    ),
    (
        48,
        "intermediate_size ffn_dim mlp_dim encoder_ffn_dim decoder_ffn_dim intermediate_size_mlp "
        "dense_intermediate_size "
        "projector_intermediate_size n_inner attn_hidden_size adapter_hidden_dim block_ff_dim",
    ),
    (
        HEADS,
        "num_attention_heads num_heads n_head n_heads encoder_attention_heads decoder_attention_heads attention_heads "
        "num_local_experts num_experts n_routed_experts moe_num_experts num_routed_experts linear_num_value_heads "
        "projector_num_heads vision_num_attention_heads",
    ),
    (
        2,
        "num_key_value_heads num_experts_per_tok moe_topk num_experts_per_token moe_k n_shared_experts top_k_experts "
        "linear_num_key_heads num_global_layers num_shared_experts num_global_key_value_heads moe_num_shared_experts",
    ),
    (
        LAYERS,
        "num_hidden_layers depth num_layers n_layer n_layers encoder_layers decoder_layers num_encoder_layers "
        "num_decoder_layers num_blocks vision_num_hidden_layers",
    ),
    (
        WIDTH // HEADS,
        "head_dim global_head_dim v_head_dim qk_nope_head_dim qk_rope_head_dim linear_key_head_dim index_head_dim "
        "linear_value_head_dim hidden_size_per_layer_input qk_head_dim attention_head_dim n_embd_per_head",
    ),
    (SIDE, "image_size input_size"),
    (PATCH, "patch_size sliding_window attention_chunk_size"),
    (512, "max_position_embeddings n_positions max_seq_len max_sequence_length model_max_length seq_length"),
    (1, "num_kv_shared_layers first_k_dense_replace n_group topk_group num_dense_layers mlp_num_layers"),
)
SIZE_OF = {name: size for size, names in SIZES for name in names.split()}
LAYER_NAMES = ("num_hidden_layers", "depth", "num_layers", "n_layer", "n_layers", "encoder_layers")
TEXT_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
ALL_KINDS = 4  # layers of a decoder that has several kinds of them


def _shrunk_rope(rope: dict, head_dim: int) -> dict:
    """Return rotary parameters whose sections, of half a head, fit a small one; by the kind of layer if they are."""
    if not any(name in rope for name in ("rope_type", "rope_theta", "mrope_section")):
        return {kind: _shrunk_rope(each, head_dim) if isinstance(each, dict) else each for kind, each in rope.items()}
    rope = dict(rope)
    half = int(head_dim * rope.get("partial_rotary_factor", 1.0)) // 2
    if rope.get("mrope_section") is not None:
        first = max(1, half // 4)
        rope["mrope_section"] = [half - 2 * first, first, first]
    return rope


def _num_layers(values: dict) -> int | None:
    """Return how many layers a configuration has, under whichever name."""
    return next((values[name] for name in LAYER_NAMES if isinstance(values.get(name), int)), None)


def _shrunk_list(name: str, values: list, small: dict, num_layers: int | None) -> list:
    """Return one value for each layer for as many layers as there are, and numbers of layers that exist."""
    fewer = _num_layers(small)
    if num_layers is not None and len(values) == num_layers:
        return [_shrunk_value(name, value) for value in values[:fewer]]
    are_layers = re.search(r"index|layer|block", name) and all(type(value) is int for value in values)
    if are_layers and fewer is not None and max(values, default=0) >= fewer:
        return list(range(min(len(values), fewer)))
    return [_shrunk_value(name, value) for value in values]


def _shrunk_value(name: str, value):
    return min(SIZE_OF[name], value) if name in SIZE_OF and type(value) is int and value > 0 else value


def _shrunk_ids(small: dict, vocab_size: int) -> None:
    """Give token ids that the small vocabulary has not ones from its end."""
    free = vocab_size
    for name, value in small.items():
        if re.search(r"token_(id|index)$", name) and isinstance(value, int):
            if name in TEXT_IDS:
                small[name] = TEXT_IDS[name]
            elif value >= vocab_size:
                small[name] = free = free - 1


def _shrunk(values: dict, vocab_size: int) -> dict:
    """Return the values of a configuration, and of those inside it, with small sizes."""
    num_layers, small = _num_layers(values), {}
    kinds = list(dict.fromkeys(values.get("layer_types") or ()))
    for name, value in values.items():
        small[name] = vocab_size if name.startswith("vocab_size") else _shrunk_value(name, value)
    if len(kinds) > 1:
        small["num_hidden_layers"] = ALL_KINDS
    for name, value in values.items():
        if isinstance(value, dict) and not name.startswith("rope"):
            is_config = any(key in value for key in ("model_type", "hidden_size", "embed_dim"))
            small[name] = _shrunk(value, vocab_size) if is_config else value
        elif isinstance(value, (list, tuple)):
            small[name] = _shrunk_list(name, list(value), small, num_layers)
    if kinds:
        small["layer_types"] = [kinds[i % len(kinds)] for i in range(_num_layers(small))]
    if values.get("per_layer_config"):
        small["per_layer_config"] = {}
    for name in ("rope_parameters", "rope_scaling"):
        if isinstance(small.get(name), dict):
            small[name] = _shrunk_rope(small[name], small.get("head_dim") or WIDTH // HEADS)
    _shrunk_ids(small, vocab_size)
    return small


def tiny_vlm_config(model_type: str, vocab_size: int = 300, **fields) -> PreTrainedConfig:
    """Return a tiny configuration of a vision-language model.

    fields: of its own, such as image_token_id; those of a dictionary, such as text_config, over the tiny ones in it.
    """
    own_class = CONFIG_MAPPING[model_type]
    values = own_class().to_dict()
    tower = own_class.sub_configs.get("vision_config")
    if values.get("vision_config", tower) is None:  # which reads no images by default
        values["vision_config"] = tower().to_dict()
    values = _shrunk(values, vocab_size)
    return own_class.from_dict(_merged(_merged(values, FIELDS.get(model_type, {})), fields))


def _merged(values: dict, others: dict) -> dict:
    """Return values with others in their place, also in the dictionaries among them."""
    merged = {
        name: _merged(values.get(name) or {}, value) for name, value in others.items() if isinstance(value, dict)
    }
    return {**values, **others, **merged}


def _sections(*sections: int, **others) -> dict:
    """Return the text configuration of a decoder whose rotary positions have planes, which its defaults leave out."""
    return {"text_config": {"rope_parameters": {"mrope_section": list(sections)}, **others}}


# What the sizes alone do not settle, by model type.
FIELDS: dict[str, dict] = dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen2_5_omni_thinker"), _sections(2, 1, 1))
FIELDS |= dict.fromkeys(("glm4v", "glm46v", "glm_ocr", "paddleocr_vl"), _sections(2, 1, 1))
FIELDS |= {"glmga": FIELDS["glm46v"], "glm4v_moe": _sections(2, 1, 1, head_dim=16)}
FIELDS |= {"mllama": {"text_config": {"num_hidden_layers": ALL_KINDS, "cross_attention_layers": [1, 3]}}}
FIELDS["mllama"]["vision_config"] = {"vision_output_dim": 3 * WIDTH}  # two layers joined with the last
FIELDS |= dict.fromkeys(("gemma3", "shieldgemma2"), {"mm_tokens_per_image": (SIDE // PATCH // 2) ** 2})
FIELDS |= {"kimi_k25": {"text_config": {"num_key_value_heads": HEADS}}}
FIELDS |= {"lfm2_vl": {"text_config": {"layer_types": ["conv", "full_attention"], "full_attn_idxs": [1]}}}
