"""A pass of a model of transformers, with what its forward asks for."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def real(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def ids(vocabulary: int = 32, *shape: int) -> Tensor:
    return torch.randint(3, max(vocabulary, 4), shape or (2, 8), generator=torch.Generator().manual_seed(3))


def _video(model: nn.Module) -> Tensor:
    frames = _pixels(model).unsqueeze(1)
    count = getattr(_vision(model.config), "num_frames", None) or getattr(_vision(model.config), "frames_per_clip", 4)
    return frames * real(1, count, 1, 1, 1)


def _both(model: nn.Module) -> dict[str, Tensor]:
    return {"input_ids": ids(40), "pixel_values": _pixels(model)}


def _patches(model: nn.Module) -> dict[str, Tensor]:
    vision = _vision(model.config)
    shapes = torch.tensor([[4, 4]] * 2)
    patches = real(2, 16, 3 * vision.patch_size**2)
    return {"pixel_values": patches, "pixel_attention_mask": torch.ones(2, 16).long(), "spatial_shapes": shapes}


def _images_in_text(model: nn.Module, count: int) -> Tensor:
    """Ids with ``count`` places of an image in each sample."""
    config = model.config
    token = getattr(config, "image_token_id", None) or getattr(config, "image_token_index", None)
    return torch.cat([torch.full((2, count), token), ids(40)], 1)


def _blip(model: nn.Module) -> dict[str, Tensor]:
    count = model.config.num_query_tokens
    return {"input_ids": _images_in_text(model, count), "pixel_values": _pixels(model)}


def _series(model: nn.Module) -> dict[str, Tensor]:
    known, ahead = 9, model.config.prediction_length
    return {
        "past_values": real(2, known), "past_time_features": real(2, known, 1), "future_values": real(2, ahead),
        "past_observed_mask": torch.ones(2, known).double(), "future_time_features": real(2, ahead, 1),
    }  # fmt: skip


def _decisions(model: nn.Module) -> dict[str, Tensor]:
    config = model.config
    return {
        "states": real(2, 5, config.state_dim), "actions": real(2, 5, config.act_dim), "rewards": real(2, 5, 1),
        "returns_to_go": real(2, 5, 1), "timesteps": torch.arange(5).repeat(2, 1),
        "attention_mask": torch.ones(2, 5).long(),
    }  # fmt: skip


_BOXES = torch.tensor([1, 2, 5, 9]).repeat(2, 8, 1)
_INPUTS: dict[str, Callable[[nn.Module], dict[str, Any]]] = {
    **dict.fromkeys(("siglip", "vilt", "bridgetower", "align", "grounding-dino"), _both),
    **dict.fromkeys(("timesformer", "videomae", "vivit"), lambda m: {"pixel_values": _video(m)}),
    **dict.fromkeys(("vjepa2", "videoprism_vision_model"), lambda m: {"pixel_values_videos": _video(m)}),
    **dict.fromkeys(("autoformer", "informer", "time_series_transformer"), _series),
    **dict.fromkeys(
        ("encodec", "mimi", "dac", "mimi_encoder", "xcodec", "pocket_tts_audio_tokenizer"),
        lambda m: {"input_values": real(2, 1, 4000)},
    ),
    **dict.fromkeys(("glmasr_encoder", "voxtral_realtime_encoder"), lambda m: {"input_features": real(2, 16, 48)}),
    **dict.fromkeys(("granite_speech5_ctc", "granite_speech5_encoder"), lambda m: {"input_features": real(2, 24, 64)}),
    **dict.fromkeys(
        ("pp_ocrv5_mobile_rec", "pp_ocrv5_server_rec"),
        lambda m: {"pixel_values": real(2, 3, 96, 96)},
    ),
    **dict.fromkeys(
        ("muse_glimmer_vision", "muse_spark_vision"),
        lambda m: {
            next(iter(inspect.signature(m.forward).parameters)): real(16, 1176),
            "grid_thw": torch.tensor([[1, 4, 4]]),
        },
    ),
    "audioflamingo3_encoder": lambda m: {
        "input_features": real(2, 16, 2 * m.config.max_source_positions),
        "input_features_mask": torch.ones(2, 2 * m.config.max_source_positions).long(),
    },
    "blip_2_qformer": lambda m: {
        "query_embeds": real(2, 4, 32),
        "encoder_hidden_states": real(2, 6, m.config.encoder_hidden_size),
    },
    **dict.fromkeys(("sam3", "sam3_lite_text"), _both),
    "pe_audio_encoder": lambda m: {"input_values": real(2, 1, 4000)},
    "pe_video_encoder": lambda m: {"pixel_values_videos": _video(m)},
    "video_llama_3_vision": lambda m: {
        "pixel_values": real(16, 3 * m.config.patch_size**2),
        "grid_thw": torch.tensor([[1, 4, 4]]),
        "merge_sizes": torch.tensor([1]),
    },
    "perception_lm": lambda m: {"input_ids": _images_in_text(m, 16), "pixel_values": real(2, 1, 3, 64, 64)},
    "voxtral_realtime_text": lambda m: {"input_ids": ids(40), "t_cond": real(2, 1, 32)},
    "timm_backbone": lambda m: {"pixel_values": real(2, 3, 160, 160)},
    "evolla": lambda m: {"input_ids": ids(40)},
    "fun_asr_nano_encoder": lambda m: {
        "input_features": real(2, 24, 112),
        "input_features_mask": torch.ones(2, 24).long(),
    },
    "idefics": lambda m: {
        "input_ids": ids(40),
        "pixel_values": _pixels(m).unsqueeze(1),
        "image_attention_mask": torch.ones(2, 8, 1).long(),
    },
    "mm-grounding-dino": _both,
    "qwen3_asr_encoder": lambda m: {
        "input_features": real(2, 16, 100),
        "input_features_mask": torch.ones(2, 100).long(),
    },
    "oneformer": lambda m: {"pixel_values": _pixels(m), "task_inputs": ids(40, 2, m.config.task_seq_len)},
    "timesfm": lambda m: {
        "past_values": real(2, m.config.context_length),
        "freq": torch.zeros(2, 1).long(),
        "past_values_padding": torch.zeros(2, m.config.context_length).double(),
    },
    "videoprism": lambda m: {"input_ids": ids(40), "pixel_values_videos": _video(m)},
    # Without the cache it makes a mask in float32, of the smallest number of float64.
    "fsmt": lambda m: {"input_ids": ids(40), "decoder_input_ids": ids(40, 2, 5), "use_cache": True},
    "xclip": lambda m: {"input_ids": ids(40), "pixel_values": _video(m)},
    "siglip2": lambda m: {"input_ids": ids(40), **_patches(m)},
    "siglip2_vision_model": _patches,
    "blip-2": _blip,
    "instructblip": lambda m: {**_blip(m), "qformer_input_ids": ids(40)},
    "paligemma": lambda m: {"input_ids": _images_in_text(m, 9), "pixel_values": _pixels(m)},
    "bros": lambda m: {"input_ids": ids(40), "bbox": _BOXES / 10.0},
    "udop": lambda m: {"input_ids": ids(40), "bbox": _BOXES / 10.0, "decoder_input_ids": ids(40, 2, 5)},
    "layoutlmv3": lambda m: {"input_ids": ids(40), "bbox": _BOXES, "pixel_values": _pixels(m)},
    "lxmert": lambda m: {"input_ids": ids(40), "visual_feats": real(2, 5, 32), "visual_pos": real(2, 5, 4)},
    "decision_transformer": _decisions,
    "perceiver": lambda m: {"inputs": real(2, 7, m.config.d_model)},
    "patchtst": lambda m: {"past_values": real(2, m.config.context_length, m.config.num_input_channels)},
    "patchtsmixer": lambda m: {"past_values": real(2, m.config.context_length, m.config.num_input_channels)},
    "speech_to_text": lambda m: {"input_features": real(2, 24, 16), "decoder_input_ids": ids(40, 2, 5)},
    "speecht5": lambda m: {"input_values": real(2, 24, 32), "decoder_input_values": real(2, 5, 32)},
    "seggpt": lambda m: dict.fromkeys(("pixel_values", "prompt_pixel_values", "prompt_masks"), _pixels(m)),
    "wav2vec2-bert": lambda m: {"input_features": real(2, 24, 32)},
    "vit_mae": lambda m: {"pixel_values": _pixels(m), "noise": torch.arange(16.0).repeat(2, 1)},
    "clap": lambda m: {"input_ids": ids(40), "input_features": real(2, 1, 64, 16)},
}


def run_transformers(model: nn.Module) -> Any:
    """A pass with what the model's forward asks for: tokens, pixels, or features of sounds."""
    inner = getattr(model, "_orig_mod", model)
    if (given := _INPUTS.get(inner.config.model_type)) is not None:
        return model(**given(inner))
    config, names = inner.config, list(inspect.signature(inner.forward).parameters)
    text = getattr(config, "text_config", None) or config
    vocabulary = getattr(text, "vocab_size", None) or 32
    inputs: dict[str, Any] = {}
    both = {"input_ids", "pixel_values"} <= set(names) and getattr(config, "projection_dim", None) is not None
    main = getattr(inner, "main_input_name", None)
    if "input_ids" in names and (main == "input_ids" or both or not {"pixel_values", "input_values"} & set(names)):
        inputs["input_ids"] = ids(min(vocabulary, 40))
    if "pixel_values" in names and (both or "input_ids" not in inputs):
        inputs["pixel_values"] = _pixels(inner)
    if not inputs:
        for name in ("input_features", "input_values", "inputs_embeds", "hidden_states", "past_values"):
            if name in names:
                inputs[name] = _features(inner, name)
                break
    if "grid_thw" in names:
        patch, frames = getattr(config, "patch_size", 8), getattr(config, "temporal_patch_size", 1)
        channels = getattr(config, "in_channels", None) or getattr(config, "in_chans", None) or 3
        inputs = {names[0]: real(16, channels * frames * patch**2), "grid_thw": torch.tensor([[1, 4, 4]])}
    if "decoder_input_ids" in names:
        inputs["decoder_input_ids"] = ids(min(vocabulary, 40), 2, 5)
    if not inputs:
        raise ValueError(f"what its forward takes is not known here: {', '.join(names[:4])}")
    return model(**inputs)


def _vision(config: Any) -> Any:
    for name in ("vision_config", "backbone_config", "encoder_config"):
        if getattr(config, name, None) is not None:
            return getattr(config, name)
    return config


def _pixels(model: nn.Module) -> Tensor:
    vision = _vision(model.config)
    size, channels = getattr(vision, "image_size", 64), getattr(vision, "num_channels", 3)
    sides = tuple(size) if isinstance(size, (list, tuple)) else (size or 64,) * 2
    return real(2, channels if isinstance(channels, int) else 3, *sides[-2:])


def _features(model: nn.Module, name: str) -> Tensor:
    config = model.config
    if name == "input_values" and not hasattr(config, "num_mel_bins"):
        return real(2, 4000)
    parts = (config, getattr(config, "encoder_config", None), getattr(config, "audio_config", None))
    bins = next((n for part in parts if (n := getattr(part, "num_mel_bins", None))), None)
    bins = bins or getattr(config, "input_feat_per_channel", None)
    width = bins or getattr(config, "hidden_size", 32)
    if name == "input_values" and isinstance(getattr(config, "max_length", None), int):
        return real(2, config.max_length, width)
    if name == "input_features" and hasattr(config, "max_source_positions"):
        return real(2, width, 2 * config.max_source_positions)
    return real(2, 24, width)
