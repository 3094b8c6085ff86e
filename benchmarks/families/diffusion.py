"""Small random models of diffusers' families, and a pass of each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .inputs import ids, real

_HEADS = dict(num_attention_heads=2, attention_head_dim=8)
_AXES = dict(attention_head_dim=16, num_attention_heads=2, axes_dims_rope=(4, 4, 8))
_UNET = dict(
    block_out_channels=(16, 32), layers_per_block=1, sample_size=8, norm_num_groups=8, cross_attention_dim=16,
    attention_head_dim=8, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
)  # fmt: skip
_TIME = torch.tensor([3, 500])


def _time(timestep: Tensor = _TIME, **others: Any) -> dict[str, Any]:
    return {"timestep": timestep, **others}


def _unet(**others: Any) -> dict[str, Any]:
    return _time(sample=real(2, 4, 8, 8), encoder_hidden_states=real(2, 5, 16), **others)


def _image(channels: int = 4, width: int = 16, side: int = 8, **others: Any) -> dict[str, Any]:
    return _time(
        hidden_states=real(2, channels, side, side), encoder_hidden_states=real(2, 5, width).flip(0), **others
    )  # fmt: skip


def _video(channels: int = 4, width: int = 16, **others: Any) -> dict[str, Any]:
    return _time(
        hidden_states=real(2, channels, 2, 8, 8), encoder_hidden_states=real(2, 5, width).flip(0), **others
    )  # fmt: skip


def _places(count: int, axes: int = 3) -> Tensor:
    found = torch.zeros(count, axes)
    found[:, 1], found[:, 2] = torch.arange(count) // 2, torch.arange(count) % 2
    return found


def _packed(pooled: int = 0, axes: int = 3, **others: Any) -> dict[str, Any]:
    """Tokens of an image beside those of a text, with their places."""
    given = {"pooled_projections": real(2, pooled)} if pooled else {}
    return _time(
        torch.tensor([0.003, 0.5]), hidden_states=real(2, 4, 4), encoder_hidden_states=real(2, 5, 16).flip(0),
        img_ids=_places(4, axes), txt_ids=torch.zeros(5, axes), **given, **others,
    )  # fmt: skip


def _rotary(count: int, dim: int, halves: int = 1) -> tuple[Tensor, Tensor]:
    angles = real(count, dim // 2).repeat_interleave(2, 1)
    return angles.cos(), angles.sin()


_MASK = torch.ones(2, 5)
_PACKED = dict(in_channels=4, num_layers=1, num_single_layers=1, joint_attention_dim=16)
_SIZES = dict(
    original_size=torch.tensor([[8, 8]] * 2), target_size=torch.tensor([[8, 8]] * 2),
    crop_coords=torch.tensor([[0, 0]] * 2),
)  # fmt: skip
_WAN = dict(patch_size=(1, 2, 2), in_channels=4, out_channels=4, text_dim=16, freq_dim=8, ffn_dim=24, num_layers=1,
            num_attention_heads=2, attention_head_dim=12, rope_max_seq_len=16)  # fmt: skip
_HUNYUAN = dict(
    in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=1, num_single_layers=1,
    num_refiner_layers=1, text_embed_dim=16,
)  # fmt: skip
_COG = dict(
    in_channels=4, out_channels=4, num_layers=1, attention_head_dim=8, num_attention_heads=2, text_embed_dim=16,
    time_embed_dim=8, condition_dim=4, sample_size=8, pos_embed_max_size=8,
)  # fmt: skip
_SD3 = dict(
    _HEADS, sample_size=8, in_channels=4, num_layers=2, joint_attention_dim=16, caption_projection_dim=16,
    pooled_projection_dim=8, out_channels=4, pos_embed_max_size=8,
)  # fmt: skip

# Class, fields of a small config, and what a pass takes.
_MODELS: dict[str, tuple[str, dict[str, Any], Callable[[], dict[str, Any]]]] = {
    "UNet2DConditionModel": ("UNet2DConditionModel", _UNET, _unet),
    "UNet2DConditionModel of SDXL": (
        "UNet2DConditionModel",
        dict(_UNET, use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=8,
             projection_class_embeddings_input_dim=64, transformer_layers_per_block=(1, 2)),
        lambda: _unet(added_cond_kwargs={"text_embeds": real(2, 16), "time_ids": real(2, 6)}),
    ),
    "UNet2DModel": (
        "UNet2DModel",
        dict(block_out_channels=(16, 32), layers_per_block=1, sample_size=8, norm_num_groups=8, attention_head_dim=8,
             down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D")),
        lambda: _time(sample=real(2, 3, 8, 8)),
    ),
    "UNet3DConditionModel": (
        "UNet3DConditionModel",
        dict(_UNET, down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
             up_block_types=("UpBlock3D", "CrossAttnUpBlock3D")),
        lambda: _time(sample=real(2, 4, 3, 8, 8), encoder_hidden_states=real(2, 5, 16)),
    ),
    "UNetMotionModel": (
        "UNetMotionModel",
        dict(block_out_channels=(16, 32), layers_per_block=1, sample_size=8, norm_num_groups=8, cross_attention_dim=16,
             num_attention_heads=2, motion_num_attention_heads=2, motion_max_seq_length=4,
             down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
             up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion")),
        lambda: _time(sample=real(2, 4, 3, 8, 8), encoder_hidden_states=real(6, 5, 16)),
    ),
    "UNetSpatioTemporalConditionModel": (
        "UNetSpatioTemporalConditionModel",
        dict(block_out_channels=(32, 64), layers_per_block=1, sample_size=8, cross_attention_dim=16,
             num_attention_heads=(2, 2), addition_time_embed_dim=8, projection_class_embeddings_input_dim=24,
             down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
             up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal")),
        lambda: _time(sample=real(2, 3, 8, 8, 8), encoder_hidden_states=real(2, 1, 16), added_time_ids=real(2, 3)),
    ),
    "AuraFlowTransformer2DModel": (
        "AuraFlowTransformer2DModel",
        dict(_HEADS, sample_size=8, in_channels=4, num_mmdit_layers=1, num_single_dit_layers=1, joint_attention_dim=16,
             caption_projection_dim=16, pos_embed_max_size=16),
        lambda: _image(timestep=torch.tensor([0.003, 0.5])),
    ),
    "ChromaTransformer2DModel": (
        "ChromaTransformer2DModel",
        dict(_PACKED, **_AXES, approximator_num_channels=8, approximator_hidden_dim=16, approximator_layers=1),
        _packed,
    ),
    "CogVideoXTransformer3DModel": (
        "CogVideoXTransformer3DModel",
        dict(num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, time_embed_dim=4,
             text_embed_dim=16, num_layers=1, sample_width=8, sample_height=8, sample_frames=5, max_text_seq_length=5),
        lambda: _time(hidden_states=real(2, 2, 4, 8, 8), encoder_hidden_states=real(2, 5, 16)),
    ),
    "CogView3PlusTransformer2DModel": ("CogView3PlusTransformer2DModel", _COG, lambda: _image(**_SIZES)),
    "CogView4Transformer2DModel": (
        "CogView4Transformer2DModel", dict(_COG, rope_axes_dim=(8, 8)), lambda: _image(**_SIZES)
    ),
    "CosmosTransformer3DModel": (
        "CosmosTransformer3DModel",
        dict(in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=12, num_layers=1, mlp_ratio=2,
             text_embed_dim=16, adaln_lora_dim=4, max_size=(4, 8, 8), extra_pos_embed_type=None),
        lambda: _video(fps=30, padding_mask=torch.zeros(1, 1, 8, 8).double(), timestep=torch.tensor([3.0, 500.0])),
    ),
    "DiTTransformer2DModel": (
        "DiTTransformer2DModel", dict(_HEADS, in_channels=4, num_layers=1, sample_size=8, num_embeds_ada_norm=8),
        lambda: _time(hidden_states=real(2, 4, 8, 8), class_labels=torch.tensor([1, 2])),
    ),
    "Flux2Transformer2DModel": (
        "Flux2Transformer2DModel",
        dict(_PACKED, attention_head_dim=16, num_attention_heads=2, axes_dims_rope=(4, 4, 4, 4),
             timestep_guidance_channels=8),
        lambda: _packed(axes=4, guidance=torch.tensor([1.0, 2.0])),
    ),
    "FluxTransformer2DModel": (
        "FluxTransformer2DModel", dict(_PACKED, **_AXES, pooled_projection_dim=16), lambda: _packed(16)
    ),
    "HiDreamImageTransformer2DModel": (
        "HiDreamImageTransformer2DModel",
        dict(patch_size=2, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8,
             num_attention_heads=2, caption_channels=[16, 16], text_emb_dim=16, axes_dims_rope=(4, 2, 2),
             max_resolution=(8, 8), llama_layers=[0, 1], num_routed_experts=2, num_activated_experts=2),
        lambda: dict(hidden_states=real(2, 4, 8, 8), timesteps=_TIME, encoder_hidden_states_t5=real(2, 5, 16),
                     encoder_hidden_states_llama3=real(2, 2, 5, 16), pooled_embeds=real(2, 16)),
    ),
    "HunyuanDiT2DModel": (
        "HunyuanDiT2DModel",
        dict(_HEADS, sample_size=8, patch_size=2, in_channels=4, hidden_size=16, num_layers=2, mlp_ratio=2.0,
             cross_attention_dim=16, cross_attention_dim_t5=16, pooled_projection_dim=8, text_len=5, text_len_t5=5,
             activation_fn="gelu-approximate"),
        lambda: _image(text_embedding_mask=_MASK, text_embedding_mask_t5=_MASK, encoder_hidden_states_t5=real(2, 5, 16),
                       image_meta_size=real(2, 6), style=torch.zeros(2).long(), image_rotary_emb=_rotary(16, 8),
                       timestep=torch.tensor([3.0, 500.0]).double()),
    ),
    "HunyuanImageTransformer2DModel": (
        "HunyuanImageTransformer2DModel", dict(_HUNYUAN, rope_axes_dim=(8, 8)),
        lambda: _image(encoder_attention_mask=_MASK, side=4, timestep=torch.tensor([3.0, 500.0]).double()),
    ),
    "HunyuanVideoTransformer3DModel": (
        "HunyuanVideoTransformer3DModel", dict(_HUNYUAN, pooled_projection_dim=8, rope_axes_dim=(4, 4, 8)),
        lambda: _video(encoder_attention_mask=_MASK, pooled_projections=real(2, 8), guidance=torch.tensor([1.0, 2.0])),
    ),
    "Kandinsky5Transformer3DModel": (
        "Kandinsky5Transformer3DModel",
        dict(in_visual_dim=4, in_text_dim=16, in_text_dim2=8, time_dim=8, out_visual_dim=4, model_dim=32, ff_dim=24,
             num_text_blocks=1, num_visual_blocks=1, axes_dims=(4, 4, 8)),
        lambda: _time(hidden_states=real(2, 2, 8, 8, 4), encoder_hidden_states=real(2, 5, 16),
                      pooled_projections=real(2, 8), visual_rope_pos=[torch.arange(n) for n in (2, 4, 4)],
                      text_rope_pos=torch.arange(5)),
    ),
    "LTXVideoTransformer3DModel": (
        "LTXVideoTransformer3DModel",
        dict(_HEADS, in_channels=4, out_channels=4, cross_attention_dim=16, num_layers=1, caption_channels=16),
        lambda: _time(hidden_states=real(2, 8, 4), encoder_hidden_states=real(2, 5, 16), num_frames=2, height=2,
                      width=2, encoder_attention_mask=_MASK),
    ),
    "LatteTransformer3DModel": (
        "LatteTransformer3DModel",
        dict(_HEADS, in_channels=4, num_layers=1, cross_attention_dim=16, attention_bias=True, sample_size=8,
             patch_size=2, activation_fn="gelu-approximate", num_embeds_ada_norm=8, norm_type="ada_norm_single",
             norm_elementwise_affine=False, caption_channels=16, video_length=2),
        _video,
    ),
    "Lumina2Transformer2DModel": (
        "Lumina2Transformer2DModel",
        dict(sample_size=8, patch_size=2, in_channels=4, hidden_size=24, num_layers=1, num_refiner_layers=1,
             num_attention_heads=2, num_kv_heads=1, multiple_of=8, axes_dim_rope=(4, 4, 4), axes_lens=(16, 8, 8),
             cap_feat_dim=16),
        lambda: _image(encoder_attention_mask=_MASK.bool()),
    ),
    "LuminaNextDiT2DModel": (
        "LuminaNextDiT2DModel",
        dict(sample_size=8, patch_size=2, in_channels=4, hidden_size=16, num_layers=1, num_attention_heads=2,
             num_kv_heads=1, multiple_of=8, cross_attention_dim=16),
        lambda: _image(encoder_mask=_MASK, cross_attention_kwargs={},
                       image_rotary_emb=torch.polar(torch.ones(4, 4, 4).double(), real(4, 4, 4))),
    ),
    "MochiTransformer3DModel": (
        "MochiTransformer3DModel",
        dict(_HEADS, num_layers=2, pooled_projection_dim=16, in_channels=4, text_embed_dim=16, time_embed_dim=4,
             max_sequence_length=5),
        lambda: _video(encoder_attention_mask=_MASK.bool()),
    ),
    "OmniGenTransformer2DModel": (
        "OmniGenTransformer2DModel",
        dict(in_channels=4, hidden_size=16, num_attention_heads=2, num_key_value_heads=2, intermediate_size=24,
             num_layers=1, pad_token_id=0, vocab_size=40, time_step_dim=8,
             rope_scaling={"long_factor": [1.0] * 4, "short_factor": [1.0] * 4}),
        lambda: _time(hidden_states=real(2, 4, 8, 8), input_ids=ids(40, 2, 5), input_img_latents=[],
                      input_image_sizes={}, attention_mask=torch.ones(2, 22, 22).double(),
                      position_ids=torch.arange(22).repeat(2, 1)),
    ),
    "PRXTransformer2DModel": (
        "PRXTransformer2DModel",
        dict(in_channels=4, patch_size=2, context_in_dim=16, hidden_size=16, mlp_ratio=2.0, num_heads=2, depth=1,
             axes_dim=[4, 4]),
        lambda: _image(timestep=torch.tensor([0.003, 0.5])),
    ),
    "PixArtTransformer2DModel": (
        "PixArtTransformer2DModel",
        dict(_HEADS, in_channels=4, out_channels=4, num_layers=1, cross_attention_dim=16, sample_size=8,
             num_embeds_ada_norm=8, caption_channels=16, use_additional_conditions=False),
        lambda: _image(added_cond_kwargs={"resolution": None, "aspect_ratio": None}),
    ),
    "PriorTransformer": (
        "PriorTransformer", dict(_HEADS, num_layers=1, embedding_dim=16, num_embeddings=5),
        lambda: _time(hidden_states=real(2, 16), proj_embedding=real(2, 16).flip(0),
                      encoder_hidden_states=real(2, 5, 16)),
    ),
    "QwenImageTransformer2DModel": (
        "QwenImageTransformer2DModel",
        dict(_AXES, in_channels=4, out_channels=1, num_layers=1, joint_attention_dim=16),
        lambda: _time(torch.tensor([0.003, 0.5]), hidden_states=real(2, 4, 4), encoder_hidden_states=real(2, 5, 16),
                      encoder_hidden_states_mask=_MASK.long(), img_shapes=[[(1, 2, 2)]] * 2),
    ),
    "SD3Transformer2DModel": ("SD3Transformer2DModel", _SD3, lambda: _image(pooled_projections=real(2, 8))),
    "SD3Transformer2DModel of 3.5": (
        "SD3Transformer2DModel", dict(_SD3, dual_attention_layers=(0,), qk_norm="rms_norm"),
        lambda: _image(pooled_projections=real(2, 8)),
    ),
    "SanaTransformer2DModel": (
        "SanaTransformer2DModel",
        dict(_HEADS, in_channels=4, out_channels=4, num_layers=1, num_cross_attention_heads=2,
             cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=16, sample_size=8),
        _image,
    ),
    "StableAudioDiTModel": (
        "StableAudioDiTModel",
        dict(sample_size=8, in_channels=4, num_layers=1, attention_head_dim=8, num_attention_heads=2,
             num_key_value_attention_heads=1, out_channels=4, cross_attention_dim=8, time_proj_dim=4,
             global_states_input_dim=8, cross_attention_input_dim=16),
        lambda: _time(hidden_states=real(2, 4, 8), encoder_hidden_states=real(2, 5, 16),
                      global_hidden_states=real(2, 1, 8), rotary_embedding=_rotary(9, 4)),
    ),
    "StableCascadeUNet": (
        "StableCascadeUNet",
        dict(in_channels=4, out_channels=4, timestep_ratio_embedding_dim=8, conditioning_dim=16,
             block_out_channels=(16, 16), num_attention_heads=(2, 2), down_num_layers_per_block=(1, 1),
             up_num_layers_per_block=(1, 1), clip_text_pooled_in_channels=16, dropout=(0.0, 0.0)),
        lambda: dict(sample=real(2, 4, 4, 4), timestep_ratio=torch.tensor([0.1, 0.5]).double(),
                     clip_text_pooled=real(2, 1, 16)),
    ),
    "UVit2DModel": (
        "UVit2DModel",
        dict(hidden_size=16, cond_embed_dim=16, micro_cond_encode_dim=4, micro_cond_embed_dim=20,
             encoder_hidden_size=16, vocab_size=40, codebook_size=32, in_channels=16, block_out_channels=16,
             num_res_blocks=1, block_num_heads=2, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24,
             sample_size=4),
        lambda: dict(input_ids=ids(32, 2, 4, 4), encoder_hidden_states=real(2, 5, 16), pooled_text_emb=real(2, 16),
                     micro_conds=real(2, 5)),
    ),
    "WanTransformer3DModel": ("WanTransformer3DModel", _WAN, _video),
    "WanTransformer3DModel with an image": (
        "WanTransformer3DModel", dict(_WAN, image_dim=16, added_kv_proj_dim=24, pos_embed_seq_len=None),
        lambda: _video(encoder_hidden_states_image=real(2, 257, 16)),
    ),
    "ZImageTransformer2DModel": (
        "ZImageTransformer2DModel",
        dict(in_channels=4, dim=32, n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=16,
             axes_dims=[4, 4, 8], axes_lens=[64, 8, 8]),
        lambda: dict(x=[real(4, 1, 8, 8)] * 2, t=torch.tensor([0.003, 0.5]), cap_feats=[real(5, 16)] * 2),
    ),
}  # fmt: skip

# Those whose experts have no gradients in evaluation; none has dropout here.
_TRAINED = ("HiDreamImageTransformer2DModel",)

# Those whose q, k and v are run as one matrix after ``fuse_qkv_projections()``.
_FUSED = (
    "UNet2DConditionModel", "AuraFlowTransformer2DModel", "CogVideoXTransformer3DModel", "Flux2Transformer2DModel",
    "FluxTransformer2DModel", "HunyuanDiT2DModel", "PixArtTransformer2DModel", "SD3Transformer2DModel",
    "WanTransformer3DModel with an image",
)  # fmt: skip


Parts = tuple[Callable[[], nn.Module], Callable[[nn.Module], Any], Callable[[], nn.Module]]


def _family(name: str, fused: bool) -> Parts:
    kind, fields, inputs = _MODELS[name]

    def make() -> nn.Module:
        import diffusers

        model = getattr(diffusers, kind)(**fields)
        if fused:
            model.fuse_qkv_projections()
        return model

    def whole() -> nn.Module:
        import diffusers

        with torch.device("meta"):
            return getattr(diffusers, kind)()

    def run(model: nn.Module) -> Any:
        return model.train(model.training or kind in _TRAINED)(**inputs())

    return make, run, whole


def diffusion_families() -> Mapping[str, Parts]:
    """How a small model of each family is made, a pass of it, and its default size without values, by name."""
    fused = {f"{name}, fused": _family(name, True) for name in _FUSED}
    return {**{name: _family(name, False) for name in _MODELS}, **fused}
