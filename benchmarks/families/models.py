"""Small random models of every family: of transformers by config, of timm by the smallest of each name, and others."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastlora import testing

from .diffusion import diffusion_families
from .inputs import ids as _ids
from .inputs import real as _real
from .inputs import run_transformers

MOST_PARAMETERS = 45_000_000  # of a model that is built at all


@dataclass(frozen=True)
class Family:
    """A model and a pass of it. ``make`` raises ``ValueError`` with the reason where there is no small one."""

    library: str
    name: str
    make: Callable[[], nn.Module]
    run: Callable[[nn.Module], Any]
    whole: Callable[[], nn.Module] | None = None  # the library's own default size, without values


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
_SERIES = {"prediction_length": 4, "context_length": 8, "lags_sequence": [1], "num_time_features": 1}
_FIELDS: dict[str, dict[str, Any]] = {
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


def _small(config: Any, given: Mapping[str, Any]) -> dict[str, Any]:
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
    return type(config)(**_small(config, given))


def _first_that_works(makers: list[Callable[[], nn.Module]], last: bool = False) -> nn.Module:
    errors = []
    for make in makers:
        try:
            return make()
        except Exception as error:  # noqa: BLE001 - the last one is told
            errors.append(error)
    raise errors[-1 if last else 0]


def _one_head_each(fields: dict[str, Any]) -> list[dict[str, Any]]:
    """Latent attention and others have as many heads of keys as of queries."""
    if "num_key_value_heads" not in fields:
        return []
    return [{**fields, "num_key_value_heads": fields.get("num_attention_heads", 4)}]


_MAPPINGS = {"AutoModel": "MODEL_MAPPING_NAMES", "AutoModelForCausalLM": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"}


def _transformers(kind: str) -> Family:
    def make() -> nn.Module:
        import transformers
        from transformers import PretrainedConfig
        from transformers.models.auto import modeling_auto
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING

        whole = CONFIG_MAPPING[kind]()
        fields = _small(whole, _FIELDS.get(kind, {}))

        def of(auto: str, fields: Mapping[str, Any], ways: Mapping[str, Any]) -> nn.Module:
            config = CONFIG_MAPPING[kind](**fields)
            for part in (config, *[v for v in vars(config).values() if isinstance(v, PretrainedConfig)]):
                if getattr(part, "use_cache", False):
                    part.use_cache = False
            _refuse_large(lambda: getattr(transformers, auto).from_config(config, **ways))
            model = getattr(transformers, auto).from_config(config, **ways).double().eval()
            with torch.no_grad():
                run_transformers(model)
            return model

        autos = [
            functools.partial(of, auto, wanted, ways)
            for wanted in (fields, *_one_head_each(fields))
            for ways in (dict(attn_implementation="eager", experts_implementation="eager"), {})
            for auto in ("AutoModel", "AutoModelForCausalLM")
            if kind in getattr(modeling_auto, _MAPPINGS[auto])
        ]
        return _first_that_works(autos)

    return Family("transformers", kind, make, run_transformers, functools.partial(_without_values, kind))


def _without_values(kind: str) -> nn.Module:
    import transformers
    from transformers.models.auto import modeling_auto
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    auto = next(auto for auto, names in _MAPPINGS.items() if kind in getattr(modeling_auto, names))
    with torch.device("meta"):
        return getattr(transformers, auto).from_config(CONFIG_MAPPING[kind]())


def _refuse_large(make: Callable[[], nn.Module]) -> None:
    try:
        with torch.device("meta"):
            size = sum(p.numel() for p in make().parameters())
    except (NotImplementedError, RuntimeError):
        return
    if size > MOST_PARAMETERS:
        raise ValueError(f"its small config still has {size / 1e6:.0f} million parameters")


@functools.cache
def _transformers_kinds() -> tuple[str, ...]:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_MAPPING_NAMES

    return tuple(sorted({*MODEL_MAPPING_NAMES, *MODEL_FOR_CAUSAL_LM_MAPPING_NAMES}))


# The smallest model of every name in timm that has attention.
_TIMM = """
aimv2_large_patch14_224 bat_resnext26ts beit3_base_patch16_224 beit_base_patch16_224 beitv2_base_patch16_224
botnet26t_256 caformer_s18 cait_xxs24_224 coat_tiny coatnet_pico_rw_224 coatnet_rmlp_nano_rw_224
coatnext_nano_rw_224 convit_tiny cpubone_nano crossvit_tiny_240 csatv2 csatv2_21m davit_tiny deepseek_vit_412m
deit3_small_patch16_224 deit_tiny_distilled_patch16_224 deit_tiny_patch16_224 eca_botnext26ts_256 edgenext_xx_small
efficientformer_l1 efficientformerv2_s0 efficientvit_b0 efficientvit_l1 efficientvit_m0 eva02_tiny_patch14_224
eva_giant_patch14_224 eva_large_patch14_196 fastvit_mci0 fastvit_sa12 flexivit_small gcvit_xxtiny gemma4_vit_167m
ghostnetv2_100 ghostnetv3_050 halo2botnet50ts_256 halonet_h1 haloregnetz_b hiera_tiny_224 hieradet_small
lambda_resnet26t lamhalobotnet50ts_256 levit_128s lowformer_b0 maxvit_pico_rw_256 maxvit_rmlp_pico_rw_256
maxxvit_rmlp_nano_rw_256 maxxvitv2_nano_rw_256 maxxvitv2_rmlp_base_rw_224 mobilenetv4_hybrid_medium_075
mobilenetv5_base mobilevit_xxs mobilevitv2_050 mvitv2_tiny naflexvit_base_patch16_parfac_gap nest_tiny nextvit_small
pit_ti_224 pvt_v2_b0 qwen3_vit_88m resnet50_clip sam2_hiera_tiny samvit_base_patch16_224 sebotnet33ts_256
sehalonet33ts swiftformer_xs swin_tiny_patch4_window7_224 swinv2_cr_tiny_224 swinv2_tiny_window8_256 test_coatnet
test_vit test_vit_relpos tiny_vit_5m_224 tnt_s_legacy_patch16_224 tnt_s_patch16_224 twins_pcpvt_small
twins_svt_small visformer_tiny vit_base_patch16_rope_224 vit_base_patch16_xp_224 vit_betwixt_patch16_gap_256
vit_betwixt_patch16_rope_reg4_gap_256 vit_dpwee_patch16_reg1_gap_256 vit_pwee_patch16_reg1_gap_256
vit_relpos_small_patch16_rpn_224 vit_srelpos_small_patch16_224 vit_tiny_patch16_224 vit_tiny_patch16_dinov3_qkvb
vit_tiny_r_s16_p8_224 vit_wee_patch16_reg1_gap_256 vit_xsmall_patch16_clip_224 vitamin_small_224 volo_d1_224
xcit_nano_12_p8_224
"""
# What makes one of them smaller; the first with which it is built and runs.
_TIMM_FIELDS: tuple[dict[str, Any], ...] = (
    dict(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2),
    dict(img_size=32, patch_size=2, window_size=4, embed_dim=16, depths=(2, 2), num_heads=(2, 2)),
    dict(img_size=32, depth=2, embed_dim=64),
    dict(img_size=64, depth=2),
    dict(img_size=64, depths=(1, 1, 1, 1)),
    dict(depths=(1, 1, 1, 1)),
    dict(img_size=64),
    {},
)
_SIDES = (64, 96, 128, 192, 224, 256)  # of images, where img_size is none of the fields


def _timm(name: str) -> Family:
    side: list[int] = []

    def make() -> nn.Module:
        import timm

        def of(fields: Mapping[str, Any], size: int) -> nn.Module:
            _refuse_large(lambda: timm.create_model(name, num_classes=5, **fields))
            torch.manual_seed(0)
            model = timm.create_model(name, num_classes=5, **fields).double().eval()
            for module in model.modules():
                if hasattr(module, "fused_attn"):
                    module.fused_attn = False
            with torch.no_grad():
                model(_real(1, 3, size, size))
            side[:] = [size]
            return model

        sizes = [(f, n) for f in _TIMM_FIELDS for n in ([f["img_size"]] if "img_size" in f else _SIDES)]
        return _first_that_works([functools.partial(of, fields, size) for fields, size in sizes], last=True)

    return Family("timm", name, make, lambda model: model(_real(2, 3, side[0], side[0])))


def _open_clip(kind: str) -> Family:
    def make() -> nn.Module:
        import open_clip

        vision = dict(layers=2, width=32, head_width=8, patch_size=8, image_size=16)
        text = dict(context_length=9, vocab_size=50, width=32, heads=4, layers=2)
        if kind == "coca":
            decoder = open_clip.coca_model.MultimodalCfg(context_length=9, vocab_size=50, width=32, heads=4, layers=2)
            return open_clip.CoCa(
                32, decoder, open_clip.CLIPTextCfg(**text, embed_cls=True, output_tokens=True),
                open_clip.CLIPVisionCfg(**vision, attentional_pool=True, attn_pooler_heads=4, output_tokens=True),
            )  # fmt: skip
        if kind == "resnet":
            vision = dict(layers=(1, 1, 1, 1), width=8, head_width=8, patch_size=8, image_size=32)
        if kind == "custom_text":
            return open_clip.CustomTextCLIP(
                16, open_clip.CLIPVisionCfg(**vision, attentional_pool=True, attn_pooler_heads=4),
                open_clip.CLIPTextCfg(**text), output_dict=True,
            )  # fmt: skip
        return open_clip.CLIP(16, open_clip.CLIPVisionCfg(**vision), open_clip.CLIPTextCfg(**text), output_dict=True)

    side = 32 if kind == "resnet" else 16
    return Family("open_clip", kind, make, lambda model: model(_real(2, 3, side, side), _ids(50, 2, 9)))


class _Classified(nn.Module):
    """torch's encoder under a head, so that what pads is not part of the output."""

    def __init__(self, **fields: Any):
        super().__init__()
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 48, **fields), 2)
        self.classifier = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.encoder(x))


class _Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = nn.MultiheadAttention(32, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attn(x, x.flip(1), x, need_weights=False)[0]


def _torchvision(kind: str) -> Family:
    def make() -> nn.Module:
        testing.enable_torchvision()
        from torchvision import models

        if kind == "vit":
            return models.VisionTransformer(32, 8, 2, 4, 32, 48, num_classes=5)
        if kind == "maxvit":
            return models.MaxVit((32, 32), 8, 4, [8, 16], [1, 1], 8, 0.0, num_classes=5)
        swin = models.swin_transformer
        block = dict(swin={}, swin_v2=dict(block=swin.SwinTransformerBlockV2, downsample_layer=swin.PatchMergingV2))[
            kind
        ]
        return models.SwinTransformer(
            [4, 4], 16, [2, 2], [2, 2], [4, 4], stochastic_depth_prob=0.0, num_classes=5, **block
        )

    return Family("torchvision", kind, make, lambda model: model(_real(2, 3, 32, 32)))


_TORCH: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], Any]]] = {
    "MultiheadAttention": (_Attention, lambda m: m(_real(2, 7, 32))),
    "TransformerEncoder": (lambda: _Classified(batch_first=True), lambda m: m(_real(2, 7, 32))),
    "TransformerEncoder, pre-norm": (lambda: _Classified(norm_first=True), lambda m: m(_real(7, 2, 32))),
    "Transformer": (lambda: nn.Transformer(32, 4, 1, 1, 48), lambda m: m(_real(5, 2, 32), _real(3, 2, 32))),
    "TransformerDecoder": (
        lambda: nn.TransformerDecoder(nn.TransformerDecoderLayer(32, 4, 48, batch_first=True), 2),
        lambda m: m(_real(2, 5, 32), _real(2, 7, 32)),
    ),
}


def families() -> Iterator[Family]:
    """Every family that there is, by library."""
    yield from (Family("torch", name, *parts) for name, parts in _TORCH.items())
    yield from map(_open_clip, ("clip", "custom_text", "coca", "resnet"))
    yield from map(_torchvision, ("vit", "swin", "swin_v2", "maxvit"))
    yield from map(_timm, _TIMM.split())
    yield from map(_transformers, _transformers_kinds())
    yield from (Family("diffusers", name, *parts) for name, parts in diffusion_families().items())
