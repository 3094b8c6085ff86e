"""Small configs of transformers: sizes by the names of fields, and what a few families want besides."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

# Sizes of a small config by the names that configs give them; the first pattern that matches the whole name.
_SIZES: tuple[tuple[str, int], ...] = (
    (r"vocab_size_per_layer_input|hidden_size_per_layer_input", 8),
    (r"(.*_)?vocab_size", 64),
    (r"(.*_)?pad_token_id", 0),
    (r"(.*_)?bos_token_id|decoder_start_token_id", 1),
    (r"(.*_)?eos_token_id|sep_token_id", 2),
    (r"(.*_)?(image|audio|video|mask|boi|eoi|boa|eoa|start|end)\w*_token_(id|index)", 50),
    (r"(max_position_embeddings|n_positions|max_seq_len|n_ctx|context_length|max_(source|target)_positions)", 64),
    (r"max_2d_position_embeddings", 64),
    (
        r"moe_intermediate_size|(moe_)?shared_expert_intermediate_size|shared_intermediate_size|expert_ffn_hidden_size",
        16,
    ),
    (r"(.*_)?intermediate_size(_mlp)?|(.*_)?ffn_dim|d_ff|(.*_)?mlp_dim|ffn_hidden_size|d_inner|n_inner", 48),
    (r"embedding_size", 32),
    (r"q_lora_rank|kv_lora_rank", 16),
    (r"qk_rope_head_dim", 4),
    (
        r"head_dim|global_head_dim|d_kv|v_head_dim|qk_nope_head_dim|swa_head_dim|linear_\w+_head_dim|attention_head_dim",
        8,
    ),
    (r"qk_head_dim", 12),
    (r"(.*_)?(hidden_size|d_model|n_embd|hidden_dim|embed_dim|emb_dim|model_dim|word_embed_proj_dim)|dim|proj_dim", 32),
    (r"encoder_hidden|out_hidden_size|lru_width|feature_size", 32),
    (r"projection_dim|latent_dim|output_dim|classifier_proj_size|codevector_dim|proj_codevector_dim", 16),
    (r"mamba_num_heads|mamba_n_heads", 8),
    (r"num_key_value_heads|num_kv_heads|n_kv_heads|num_global_key_value_heads", 2),
    (r"(.*_)?(num_attention_heads|attention_heads|num_heads|n_heads?|num_query_heads)|nheads", 4),
    (r"linear_num_(key|value)_heads|index_n_heads", 2),
    (r"index_head_dim", 8),
    (r"index_topk", 4),
    (r"mamba_d_head|mamba_head_dim|dim_head", 8),
    (r"mamba_num_heads|mamba_n_heads", 8),
    (r"mamba_d_state|state_size|ssm_state_size|conv_dim_\w+", 4),
    (r"n_groups|mamba_n_groups", 1),
    (
        r"(?!num_key_value|num_denoising)(.*_)?(num_(hidden_)?layers|n_layers?|depth|num_encoder_layers|num_decoder_layers)",
        2,
    ),
    (r"(encoder|decoder|dec|enc|text|vision)_layers|num_blocks|num_encoder_blocks|num_hidden_blocks|num_layers_\w+", 2),
    (r"(encoder|decoder)_num_layers|num_(self_attends_per_block|cross_attention_heads|self_attention_heads)", 2),
    (r"num_experts_per_tok|moe_topk|moe_k|num_selected_experts|moe_top_k|top_k_experts|num_experts_per_token", 2),
    (r"n_group|topk_group|n_shared_experts|num_shared_experts|moe_num_shared_experts|first_k_dense_replace", 1),
    (r"(num|n|num_local|n_routed|moe_num|num_routed)_?(local_|routed_)?experts|ffn_num_experts|n_experts", 4),
    (r"num_mel_bins|feature_dim|input_feat_per_channel|num_mel_filters", 16),
    (r"num_labels", 3),
    (r"num_kv_shared_layers", 0),
    (r"num_codebooks", 2),
    (r"chunk_length|local_attn_chunk_length|lsh_attn_chunk_length", 4),
    (r"num_latents|num_queries|num_query_tokens", 4),
    (r"d_latents", 32),
    (r"rotary_dim", 4),
    (r"sliding_window|attention_window|local_attention|window_size|block_size", 4),
)
_LISTS: tuple[tuple[str, Any], ...] = (
    (r"depths|encoder_depths|decoder_depths|layer_depths", 1),
    (r"hidden_sizes|embed_dims?|dims|encoder_hidden_sizes", 32),
    (r"num_heads|num_attention_heads|encoder_num_heads", 2),
    (r"conv_dim", 16),
    (r"encoder_in_channels|decoder_in_channels|feat_channels", 32),
)
_KINDS = re.compile(r"(.*_)?layer_types|layers_block_type")  # a list of strings, one of each layer
_SKIPPED = re.compile(r"_|vision_feature|.*_loss|chunk_size_feed_forward|num_return|.*num_hidden_layers_to")

# What a few families want besides; fields of a sub-config by its name.
_WINDOWS = ("swin", "swinv2", "swin2sr", "donut-swin", "maskformer-swin", "clap", "clap_audio_model")
_RESNET = {
    "use_timm_backbone": False,
    "backbone": None,
    "backbone_config": {
        "model_type": "resnet",
        "embedding_size": 8,
        "hidden_sizes": [8, 8, 16, 32],
        "depths": [1, 1, 1, 1],
        "layer_type": "basic",
        "out_features": ["stage2", "stage3", "stage4"],
    },
}
_ROPE = {"rope_type": "default", "rope_theta": 1e4}
_ROPE_OF_EACH = {"full_attention": _ROPE, "sliding_attention": _ROPE}
_INDEXER = {
    "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 4, "indexer_compress_ratio": 2
}  # fmt: skip
_SERIES = {"prediction_length": 4, "context_length": 8, "lags_sequence": [1], "num_time_features": 1}
_TIMM = {"architecture": "test_vit", "model_args": {"img_size": 64, "embed_dim": 64}}
_STRIPS = ("vertical_long_to_small_conv", "horizontal_small_to_long_conv", "symmetric_conv_long")
_INTRACLASS = [f"{strip}_{ratio}ratio" for strip in _STRIPS for ratio in ("long", "mid", "short")]
FIELDS: dict[str, dict[str, Any]] = {
    **{kind: {"window_size": 2} for kind in _WINDOWS},
    **dict.fromkeys(("conditional_detr", "dab-detr", "deformable_detr", "detr", "table-transformer"), _RESNET),
    **dict.fromkeys(("autoformer", "informer", "time_series_transformer"), _SERIES),
    **dict.fromkeys(("granite_speech5_ctc", "granite_speech5_encoder"), {"context_size": 16}),
    **dict.fromkeys(("mimi", "mimi_decoder", "mimi_encoder"), {"upsample_groups": 32}),
    **dict.fromkeys(
        ("csm", "pocket_tts_audio_tokenizer"), {"codec_config": {"upsample_groups": 32}, "upsample_groups": 32}
    ),
    **dict.fromkeys(("mask2former", "oneformer", "grounding-dino"), {"backbone_config": {"window_size": 2}}),
    **dict.fromkeys(("kimi_k25", "mistral_large4"), {"text_config": {"num_key_value_heads": 4}}),
    **dict.fromkeys(("blip-2", "instructblip"), {"image_token_index": 50}),
    "gemma3n_vision": {"model_args": {"channel_multiplier": 0.25}},
    "granite4_vision": {
        "deepstack_layer_map": [[0, 0], [1, 1]],
        "downsample_rate": "1/2",
        "spatial_target_layers": [0, 0, 1, 1],
        "vision_config": {"hidden_size": 64},
    },
    "perception_lm": {"vision_config": _TIMM},
    "pp_ocrv6_medium_det": {
        "intraclass_block_config": dict.fromkeys(("reduce_channel", "return_channel", *_INTRACLASS), (1, 1, 0))
    },
    "timm_backbone": {"backbone": "test_vit"},
    "timm_wrapper": _TIMM,
    "cohere_compass": {"text_config": {"rope_parameters": _ROPE_OF_EACH}},
    "cohere_compass_text": {"rope_parameters": _ROPE_OF_EACH},
    "deepseek_ocr2": {
        "text_config": {"mlp_layer_types": ["dense", "sparse"], "num_key_value_heads": 4, "num_experts_per_tok": 2}
    },
    "fun_asr_nano": {"adaptor_config": {"intermediate_size": 8}},
    "glm5_next": {"text_config": {"num_key_value_heads": 4, "index_kpool": 2, "qk_rope_head_dim": 0}},
    "glm5_next_text": {"num_key_value_heads": 4, "index_kpool": 2, "qk_rope_head_dim": 0},
    "granite_speech5_ctc": {"encoder_config": {"context_size": 16, "num_key_value_heads": 4}},
    "gradium_phonon_tts": {"flow_head_config": {"condition_dim": 32}},
    "molmo2": {"adapter_config": {"vision_feature_layer": [0, 1]}},
    "nemotron3_diarization": {"chunk_right_context": 2},
    "pocket_tts": {"flow_head_config": {"condition_dim": 32}},
    "mm-grounding-dino": {"backbone_config": {"window_size": 2}},
    "moonshine_streaming": {"num_key_value_heads": 4},
    "qwen4_exp": {"text_config": _INDEXER},
    "qwen4_exp_text": _INDEXER,
    "sam_hq": {"vision_config": {"output_channels": 32, "image_size": 64, "num_pos_feats": 16}},
    "step3p7": {"text_config": {"sliding_window": 4}},
    "t5gemma2_encoder": {"text_config": {"dropout_rate": 0.0}},
    "qwen2_5_vl_vision": {"window_size": 64},
    "exaone4_5_vision": {"window_size": 64},
    "esm": {"vocab_size": 64, "pad_token_id": 0},
    "gpt_neo": {"num_layers": 2, "attention_types": [[["global", "local"], 1]]},
    "bridgetower": {"hidden_size": 64, "text_config": {"hidden_size": 64}, "vision_config": {"hidden_size": 64}},
    "bros": {"hidden_size": 256},
    "chameleon": {"vocabulary_map": {"<image>": 4}},
    "dbrx": {
        "d_model": 32,
        "n_heads": 4,
        "n_layers": 2,
        "max_seq_len": 64,
        "attn_config": {"kv_n_heads": 4, "clip_qkv": 8.0, "rope_theta": 1e4},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2, "ffn_act_fn": {"name": "silu"}},
    },
    "deepseek_v2": {"num_experts_per_tok": 2, "num_key_value_heads": 4},
    "diffusion_gemma": {"text_config": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 16}},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "n_group": 1, "topk_group": 1},
    "ernie4_5_vl_moe": {"text_config": {"rope_parameters": {**_ROPE, "mrope_section": [1, 1, 2]}}},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_d_head": 8},
    "funnel": {"block_sizes": [1, 1], "block_repeats": [1, 1]},
    "gemma4": {"text_config": {"vocab_size_per_layer_input": 64}},
    "gemma4_text": {"vocab_size_per_layer_input": 64},
    "layoutlmv3": {"coordinate_size": 6, "shape_size": 4, "input_size": 64},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2, "num_dense_layers": 1},
    "lilt": {"hidden_size": 48},
    "lxmert": {"visual_feat_dim": 32},
    "mamba2": {"hidden_size": 32, "expand": 2, "num_heads": 8, "head_dim": 8},
    "mobilebert": {"embedding_size": 32, "intra_bottleneck_size": 32, "true_hidden_size": 32},
    "nemotron": {"num_key_value_heads": 2},
    "paddleocr_vl": {"text_config": {"rope_parameters": {**_ROPE, "mrope_section": [2, 1, 1]}}},
    "paligemma": {"projection_dim": 32, "vision_config": {"projection_dim": 32}},
    "pvt": {"num_encoder_blocks": 4},
    "sam": {"vision_config": {"output_channels": 32, "image_size": 64, "num_pos_feats": 16}},
    "wav2vec2-bert": {"feature_projection_input_dim": 32},
    "xclip": {"projection_dim": 32},
    "zamba2": {"attention_hidden_size": 64, "attention_head_dim": 16},
    "xmod": {"default_language": "en_XX"},
}


def small(config: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    from transformers import PretrainedConfig

    fields: dict[str, Any] = {}
    aliases, kinds = getattr(type(config), "attribute_map", {}), {}
    ropes = getattr(type(config), "ignore_keys_at_rope_validation", ())
    for name, value in vars(config).items():
        if _SKIPPED.match(name) or name in aliases:
            continue
        if isinstance(value, float) and re.search("drop", name):
            fields[name] = 0.0
        if isinstance(value, PretrainedConfig):
            fields[name] = _sub(value, given.get(name, {}))
        elif isinstance(value, dict) and "mrope_section" in {*value, *(ropes if "rope_theta" in value else ())}:
            half = int(4 * value.get("partial_rotary_factor", 1.0))
            fields[name] = {
                **value,
                "mrope_section": [half - 2 * (half // 4) - (half == 2), half // 4 + (half == 2), half // 4],
            }
        elif _KINDS.fullmatch(name) and isinstance(value, (list, tuple)) and value and isinstance(value[0], str):
            kinds[name] = list(dict.fromkeys(value))
        elif isinstance(value, int) and not isinstance(value, bool):
            size = next((n for pattern, n in _SIZES if re.fullmatch(pattern, name)), None)
            if size is not None and (value > size or "head" in name or name.endswith(("_id", "_index"))):
                fields[name] = size
        elif isinstance(value, (list, tuple)) and value and all(isinstance(n, int) for n in value):
            size = next((n for pattern, n in _LISTS if re.fullmatch(pattern, name)), None)
            if size is not None:
                fields[name] = type(value)([size] * len(value))
    if "depths" in fields and getattr(config, "out_features", None):
        fields["out_features"] = config.out_features
    if kinds:  # a layer of each kind
        fields["num_hidden_layers"] = count = max(2, *map(len, kinds.values()))
        fields.update({name: (2 * count * kind)[:count] for name, kind in kinds.items()})
    if "qk_rope_head_dim" in fields:
        fields["head_dim"] = fields["qk_rope_head_dim"]
    elif vars(config).get("head_dim", 0) is None and fields.get("hidden_size") == 32:
        fields["head_dim"] = 8
    if "image_size" in vars(config) and isinstance(getattr(config, "image_size", None), int):
        patch = getattr(config, "patch_size", 8)
        patch = patch if isinstance(patch, int) else 8
        fields["image_size"] = min(config.image_size, 4 * patch if patch >= 8 else 64)
    if fields.get("num_key_value_heads") and not isinstance(vars(config).get("num_attention_heads", 4), int):
        del fields["num_key_value_heads"]
    fields.update(
        {
            key: value
            for key, value in given.items()
            if key not in fields or not isinstance(value, Mapping) or "model_type" in value
        }
    )
    return fields


def _sub(config: Any, given: Mapping[str, Any]) -> Any:
    return type(config)(**small(config, given))
