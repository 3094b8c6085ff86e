"""How the rows of fused matrices lie, by the class of the owner whose forward was read.

A name and a divisor prove nothing: what is in no table stays one matrix.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from ..nn.adapter import Slices

Layout = Callable[[Any, int], Slices]
_LIBRARIES = ("transformers", "timm", "torchvision", "litgpt", "diffusers")


def _equal(*names: str) -> Layout:
    """Parts of one size, one after another."""
    return lambda owner, N: Slices(dict.fromkeys(names, N // len(names)))


def _by_head(heads: str, *names: str) -> Layout:
    """Each head has its part of every slice, all of one size."""
    return lambda owner, N: Slices(dict.fromkeys(names, N // len(names)), getattr(owner, heads))


def _key_and_value_dims(owner: Any, N: int) -> Slices:
    q, v = owner.key_dim * owner.num_heads, owner.val_dim * owner.num_heads
    return Slices({"q": q, "k": q, "v": v}, owner.num_heads)


def _levit(owner: Any, N: int) -> Slices:
    heads, q = owner.num_attention_heads, owner.key_dim * owner.num_attention_heads
    return Slices({"q": q, "k": q, "v": N - 2 * q}, heads)


def _levit_kv(owner: Any, N: int) -> Slices:
    k = owner.key_dim * owner.num_attention_heads
    return Slices({"k": k, "v": N - k}, owner.num_attention_heads)


def _after_q(q: int, N: int) -> Slices:
    return Slices({"q": q, "k": (N - q) // 2, "v": (N - q) // 2})


def _phi(owner: Any, N: int) -> Slices:
    return _after_q(owner.config.num_attention_heads * owner.head_dim, N)


def _falcon(owner: Any, N: int) -> Slices:
    q = owner.num_heads * owner.head_dim
    if owner.new_decoder_architecture:
        return Slices(_after_q(q, N), owner.num_kv_heads)
    return _after_q(q, N) if owner.multi_query else _by_head("num_heads", "q", "k", "v")(owner, N)


def _bigcode(owner: Any, N: int) -> Slices:
    if owner.is_cross_attention:
        return _equal("k", "v")(owner, N)
    return _after_q(owner.embed_dim, N) if owner.multi_query else _by_head("num_heads", "q", "k", "v")(owner, N)


def _kv_where(flag: str) -> Layout:
    """k and v where the owner says so, else q, k and v."""
    return lambda owner, N: (_KV if getattr(owner, flag) else _THIRDS)(owner, N)


def _head_first(owner: Any, N: int) -> Slices:
    return _by_head("num_heads", "q", "k", "v")(owner, N) if owner.head_first else _equal("q", "k", "v")(owner, N)


def _mobilevit(owner: Any, N: int) -> Slices:
    return Slices({"q": 1, "k": owner.embed_dim, "v": owner.embed_dim})


def _glu(owner: Any, N: int) -> Slices | None:
    if getattr(owner, "chunk_dim", -1) != -1:
        return None
    return _equal("up", "gate")(owner, N) if owner.gate_last else _equal("gate", "up")(owner, N)


def _feed_forward(owner: Any, N: int) -> Slices | None:
    """diffusers' block of any activation: those that gate have the gate last."""
    return _equal("up", "gate")(owner, N) if type(owner.net[0]).__name__ in ("GEGLU", "SwiGLU") else None


def _flux2(owner: Any, N: int) -> Slices:
    return Slices(dict.fromkeys("qkv", owner.inner_dim) | dict.fromkeys(("gate", "up"), owner.mlp_hidden_dim))


def _differential(owner: Any, N: int) -> Slices:
    """Two maps of attention: two of q, two of k, one of v."""
    return Slices(
        {"q": 2 * N // 5, "k": 2 * N // 5, "v": N // 5} if owner.use_differential else dict.fromkeys("qkv", N // 3)
    )


# Owners of a ``qkv`` whose rows are all of q, then all of k, then all of v: file and class.
_QKV = """
blip.BlipAttention blip_2.Blip2Attention cohere_compass.CohereCompassVisionAttention
deepseek_ocr2.DeepseekOcr2SamVisionAttention deepseek_ocr2.DeepseekOcr2SamVisionSdpaAttention
dots3_note.Dots3NoteVisionAttention ernie4_5_vl_moe.Ernie4_5_VLMoeVisionAttention
florence2.Florence2VisionChannelAttention florence2.Florence2VisionWindowAttention glm4v.Glm4vVisionAttention
glm4v_moe.Glm4vMoeVisionAttention glm5_next.Glm5NextVisionAttention glm_image.GlmImageVisionAttention
glm_ocr.GlmOcrVisionAttention got_ocr2.GotOcr2VisionAttention hiera.HieraMaskUnitAttention
instructblip.InstructBlipAttention instructblipvideo.InstructBlipVideoAttention mgp_str.MgpstrAttention
pp_formulanet.PPFormulaNetVisionAttention pp_ocrv5_mobile_rec.PPOCRV5MobileRecAttention
pp_ocrv5_server_rec.PPOCRV5ServerRecAttention pp_ocrv6_small_rec.PPOCRV6SmallRecAttention
qwen2_5_vl.Qwen2_5_VLVisionAttention qwen2_vl.VisionAttention qwen3_5.Qwen3_5VisionAttention
qwen3_5_moe.Qwen3_5MoeVisionAttention qwen3_omni_moe.Qwen3OmniMoeVisionAttention qwen3_vl.Qwen3VLVisionAttention
qwen3_vl_moe.Qwen3VLMoeVisionAttention qwen4_exp.Qwen4ExpVisionAttention sam.SamVisionAttention
sam.SamVisionSdpaAttention sam2.Sam2MultiScaleAttention sam_hq.SamHQVisionAttention sam_hq.SamHQVisionSdpaAttention
seggpt.SegGptAttention slanext.SLANeXtVisionAttention timesformer.TimesformerSelfAttention
unlimited_ocr.UnlimitedOcrSamVisionAttention unlimited_ocr.UnlimitedOcrSamVisionSdpaAttention vitdet.VitDetAttention
attention.Attention attention.AttentionRope attention_pool2d.RotAttentionPool2d attention_pool2d.AttentionPool2d
diff_attention.DiffAttention beit.Attention cait.TalkingHeadAttn coat.FactorAttnConvRelPosEnc convit.MHSA
davit.ChannelAttentionV2 davit.ChannelAttention davit.WindowAttention edgenext.CrossCovarianceAttn eva.EvaAttention
fastvit.Attention hiera.MaskUnitAttention hieradet_sam2.MultiScaleAttention metaformer.Attention
mvitv2.MultiScaleAttention nest.Attention swin_transformer.WindowAttention swin_transformer_v2.WindowAttention
swin_transformer_v2_cr.WindowMultiHeadAttention twins.LocallyGroupedAttn vision_transformer.Attention
vision_transformer_relpos.RelPosAttention vision_transformer_sam.Attention volo.Attention xcit.XCA
visformer.Attention
"""

# Owners of a ``gate_up_proj``: act(gate) * up, in this order.
_GATE_UP = """
dia.DiaMLP dots3_note.Dots3NoteAudioMLP glm.GlmMLP glm4.Glm4MLP glm4v.Glm4vTextMLP glm_image.GlmImageTextMLP
glm_ocr.GlmOcrTextMLP minimax_m3_vl.MiniMaxM3VLDenseMLP phi3.Phi3MLP phi4_multimodal.Phi4MultimodalMLP zamba2.Zamba2MLP
"""

# Attention of diffusers, whose ``fuse_qkv_projections`` stacks the separate matrices, which stay where they are.
_FUSED = """
attention_processor.Attention transformer_bria.BriaAttention transformer_bria_fibo.BriaFiboAttention
transformer_chronoedit.WanAttention transformer_flux.FluxAttention transformer_flux2.Flux2Attention
transformer_flux3.Flux3Attention transformer_helios.HeliosAttention transformer_longcat_image.LongCatImageAttention
transformer_minimax_h3.MiniMaxH3Attention transformer_ovis_image.OvisImageAttention
transformer_skyreels_v2.SkyReelsV2Attention transformer_wan.WanAttention transformer_wan_animate.WanAttention
transformer_wan_animate_2.WanAnimate2Attention
"""
_STACKS = {
    "to_qkv": ("to_q", "to_k", "to_v"),
    "to_kv": ("to_k", "to_v"),
    "to_added_qkv": ("add_q_proj", "add_k_proj", "add_v_proj"),
    "to_added_kv": ("add_k_proj", "add_v_proj"),
}

_BY_HEAD = _by_head("num_heads", "q", "k", "v")
_BY_ATTENTION_HEAD = _by_head("num_attention_heads", "q", "k", "v")
_THIRDS, _KV, _QK = _equal("q", "k", "v"), _equal("k", "v"), _equal("q", "k")

LAYOUTS: dict[str, Layout] = {
    **{f"{owner}.qkv": _THIRDS for owner in _QKV.split()},
    **{f"{owner}.gate_up_proj": _equal("gate", "up") for owner in _GATE_UP.split()},
    **{f"{owner}.{leaf}": _THIRDS if "q" in leaf else _KV for owner in _FUSED.split() for leaf in _STACKS},
    "attention.FeedForward.net.0.proj": _feed_forward,
    "transformer_flux2.Flux2FeedForward.linear_in": _equal("gate", "up"),
    "transformer_flux2.Flux2ParallelSelfAttention.to_qkv_mlp_proj": _flux2,
    "transformer_flux3.Flux3FeedForward.linear_in": _equal("gate", "up"),
    "transformer_omnigen.OmniGenFeedForward.gate_up_proj": _equal("gate", "up"),
    "transformer_prx.PRXAttention.img_qkv_proj": _THIRDS,
    "transformer_prx.PRXAttention.txt_kv_proj": _KV,
    "transformer_stable_audio3.StableAudio3SelfAttention.to_qkv": _differential,
    "phi4_multimodal.Phi4MultimodalAudioMLP.gate_up_proj": _equal("up", "gate"),
    "modernbert.ModernBertMLP.Wi": _equal("gate", "up"),
    "modernbert_decoder.ModernBertDecoderMLP.Wi": _equal("gate", "up"),
    "mlp.GluMlp.fc1": _glu,
    "bark.BarkSelfAttention.att_proj": _THIRDS,
    "bark.BarkSelfFlashAttention2.att_proj": _THIRDS,
    "maxvit.RelativePositionalMultiHeadAttention.to_qkv": _THIRDS,
    "layoutlmv2.LayoutLMv2SelfAttention.qkv_linear": _THIRDS,
    "modernbert.ModernBertAttention.Wqkv": _THIRDS,
    "mpt.MptAttention.Wqkv": _THIRDS,
    "openai.Attention.c_attn": _THIRDS,
    "gpt2.GPT2Attention.c_attn": _kv_where("is_cross_attention"),
    "decision_transformer.DecisionTransformerGPT2Attention.c_attn": _kv_where("is_cross_attention"),
    "imagegpt.ImageGPTAttention.c_attn": _kv_where("is_cross_attention"),
    "gpt_bigcode.GPTBigCodeAttention.c_attn": _bigcode,
    "model.CausalSelfAttention.qkv": lambda owner, N: _after_q(owner.config.n_head * owner.config.head_size, N),
    "phi3.Phi3Attention.qkv_proj": _phi,
    "phi4_multimodal.Phi4MultimodalAttention.qkv_proj": _phi,
    "dbrx.DbrxAttention.Wqkv": lambda owner, N: _after_q(owner.hidden_size, N),
    "exaone4_5.Exaone4_5_VisionAttention.qkv": lambda owner, N: _after_q(owner.q_dim, N),
    "falcon.FalconAttention.query_key_value": _falcon,
    "falcon.FalconFlashAttention2.query_key_value": _falcon,
    "bloom.BloomAttention.query_key_value": _BY_HEAD,
    "persimmon.PersimmonAttention.query_key_value": _BY_HEAD,
    "gpt_neox.GPTNeoXAttention.query_key_value": lambda owner, N: Slices(
        dict.fromkeys("qkv", N // 3), owner.config.num_attention_heads
    ),
    "gpt_neox_japanese.GPTNeoXJapaneseAttention.query_key_value": _BY_ATTENTION_HEAD,
    "minimax.MiniMaxLightningAttention.qkv_proj": _BY_ATTENTION_HEAD,
    "deberta.DisentangledSelfAttention.in_proj": _BY_ATTENTION_HEAD,
    "codegen.CodeGenAttention.qkv_proj": lambda owner, N: Slices(dict.fromkeys("qvk", N // 3), 4),
    "efficientformer.Attention.qkv": _key_and_value_dims,
    "tiny_vit.Attention.qkv": _key_and_value_dims,
    "levit.Attention.qkv.linear": _key_and_value_dims,
    "levit.AttentionDownsample.kv.linear": lambda owner, N: Slices(
        {"k": owner.key_dim * owner.num_heads, "v": owner.val_dim * owner.num_heads}, owner.num_heads
    ),
    "levit.LevitAttention.queries_keys_values.linear": _levit,
    "levit.LevitAttentionSubsample.keys_values.linear": _levit_kv,
    "maxxvit.AttentionCl.qkv": _head_first,
    "maxxvit.Attention2d.qkv": _head_first,
    "attention2d.Attention2d.qkv": _head_first,
    "mobilevit.LinearSelfAttention.qkv_proj": _mobilevit,
    "mobilevitv2.MobileViTV2LinearSelfAttention.qkv_proj.convolution": _mobilevit,
    "efficientvit_msra.CascadedGroupAttention.qkvs.*.conv": lambda owner, N: Slices(
        {"q": owner.key_dim, "k": owner.key_dim, "v": owner.val_dim}
    ),
    "efficientvit_mit.LiteMLA.qkv.conv": lambda owner, N: Slices(dict.fromkeys("qkv", N // 3), N // (3 * owner.dim)),
    "shvit.SHSA.qkv.c": lambda owner, N: Slices({"q": owner.qk_dim, "k": owner.qk_dim, "v": owner.pdim}),
    "bottleneck_attn.BottleneckAttn.qkv": lambda owner, N: Slices(
        {"q": owner.dim_out_qk, "k": owner.dim_out_qk, "v": owner.dim_out_v}
    ),
    "lambda_layer.LambdaLayer.qkv": lambda owner, N: Slices(
        {"q": owner.num_heads * owner.dim_qk, "k": owner.dim_qk, "v": owner.dim_v}
    ),
    "halo_attn.HaloAttn.kv": lambda owner, N: Slices({"k": owner.dim_out_qk, "v": owner.dim_out_v}, owner.num_heads),
    "cpubone.ConvAttention.pwise": _BY_HEAD,
    "lowformer.ConvAttention.pwise": _BY_HEAD,
    "gcvit.WindowAttentionGlobal.qkv": _kv_where("use_global"),
    "vision_transformer.ParallelScalingBlock.in_proj": lambda owner, N: Slices(
        dict(zip(("mlp", "q", "k", "v"), owner.in_split, strict=True))
    ),
    "vision_transformer.DiffParallelScalingBlock.in_proj": lambda owner, N: Slices(
        dict(zip(("mlp", "q", "k", "v"), owner.in_split, strict=True))
    ),
    "pvt_v2.Attention.kv": _KV,
    "twins.GlobalSubSampleAttn.kv": _KV,
    "volo.ClassAttention.kv": _KV,
    "attention_pool.AttentionPoolLatent.kv": _KV,
    "evolla.EvollaSequenceCompressorAttention.to_kv": _KV,
    "granite_speech.GraniteSpeechConformerAttention.to_kv": _KV,
    "granite_speech_plus.GraniteSpeechPlusConformerAttention.to_kv": _KV,
    "tnt.Attention.qk": _QK,
    "convit.GPSA.qk": _QK,
}


def _key(owner: nn.Module) -> str | None:
    """The class whose forward an owner runs, as the table names it; None for one of another library."""
    kind = next((c for c in type(owner).__mro__ if "forward" in vars(c)), type(owner))
    if kind.__module__.partition(".")[0] not in _LIBRARIES:
        return None
    return f"{kind.__module__.rpartition('.')[2].removeprefix('modeling_')}.{kind.__qualname__}"


def known_layout(owner: nn.Module, leaf: str, N: int) -> Slices | None:
    """The slices of ``owner.<leaf>``, N rows; None where no forward was read that uses it, or they do not tile it."""
    if isinstance(owner, nn.MultiheadAttention) and leaf == "in_proj":
        return _THIRDS(owner, N)
    layout = LAYOUTS.get(f"{_key(owner)}.{leaf}")
    slices = None if layout is None else layout(owner, N)
    if slices is None or sum(slices.values()) != N or any(rows % slices.blocks for rows in slices.values()):
        return None
    return slices if slices.blocks > 1 else Slices(slices)


def called_instead(owner: nn.Module, leaf: str) -> str | None:
    """What an attention of diffusers calls in place of ``owner.<leaf>``: projections fused, or fused no more."""
    if not hasattr(owner, "fused_projections"):
        return None
    made = {s: parts for s, parts in _STACKS.items() if {s, *parts} <= owner._modules.keys()}
    if hasattr(owner, "_supports_qkv_fusion"):  # a flag, that not all of them heed
        fused = owner.fused_projections and f"{_key(owner)}.to_qkv" in LAYOUTS
    else:
        fused = type(owner.processor).__name__.startswith("Fused")
    if fused:
        return next((stack for stack, parts in made.items() if leaf in parts), None)
    return ", ".join(made[leaf]) if leaf in made else None
