"""Small random models of every family: of transformers by config, of timm by the smallest of each name, and others."""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastlora import testing

from .configs import FIELDS, small
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
    within: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext  # of make and every pass


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


# Those that transformers' automatic classes do not build from their config: the class, and the kind of its config.
_CLASSES = {
    "pp_ocrv5_mobile_rec": ("pp_ocrv5_mobile_rec", "PPOCRV5MobileRecForTextRecognition", "pp_ocrv5_mobile_rec"),
    "pp_ocrv5_server_rec": ("pp_ocrv5_server_rec", "PPOCRV5ServerRecForTextRecognition", "pp_ocrv5_server_rec"),
    "evolla": ("evolla", "EvollaModel", "evolla"),
    "funnel": ("funnel", "FunnelModel", "funnel"),
    "musicgen": ("musicgen", "MusicgenModel", "musicgen_decoder"),
    "voxtral_realtime_text": ("voxtral_realtime", "VoxtralRealtimeTextModel", "voxtral_realtime_text"),
    "musicgen_melody": ("musicgen_melody", "MusicgenMelodyModel", "musicgen_melody_decoder"),
}
_OF_DEFAULT_DTYPE = {"dab-detr", "oneformer", "xglm"}  # its own tensors are of it, whatever that of the weights is


@contextlib.contextmanager
def _double() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _of_class(kind: str) -> nn.Module:
    folder, name, config = _CLASSES[kind]
    configs = importlib.import_module("transformers.models.auto.configuration_auto").CONFIG_MAPPING
    fields = small(configs[config](), FIELDS.get(kind, {}))
    owner = importlib.import_module(f"transformers.models.{folder}.modeling_{folder}")
    model = getattr(owner, name)._from_config(configs[config](**fields), attn_implementation="eager").double().eval()
    if getattr(model.config, "use_cache", False):
        model.config.use_cache = False
    with torch.no_grad():
        run_transformers(model)
    return model


_MAPPINGS = {"AutoModel": "MODEL_MAPPING_NAMES", "AutoModelForCausalLM": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"}


def _transformers(kind: str) -> Family:
    def make() -> nn.Module:
        import transformers
        from transformers import PretrainedConfig
        from transformers.models.auto import modeling_auto
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING

        whole = CONFIG_MAPPING[kind]()
        fields = small(whole, FIELDS.get(kind, {}))

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

    if kind in _CLASSES:
        return Family("transformers", kind, functools.partial(_of_class, kind), run_transformers)
    whole = functools.partial(_without_values, kind)
    within = _double if kind in _OF_DEFAULT_DTYPE else contextlib.nullcontext
    return Family("transformers", kind, make, run_transformers, whole, within)


def _without_values(kind: str) -> nn.Module:
    import transformers
    from transformers.models.auto import modeling_auto
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    auto = next(auto for auto, names in _MAPPINGS.items() if kind in getattr(modeling_auto, names))

    def of(fields: Mapping[str, Any]) -> nn.Module:
        with torch.device("meta"):
            return getattr(transformers, auto).from_config(CONFIG_MAPPING[kind](**fields))

    return _first_that_works([functools.partial(of, fields) for fields in ({}, FIELDS.get(kind, {}))])


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
sehalonet33ts shvit_s1 swiftformer_xs swin_tiny_patch4_window7_224 swinv2_cr_tiny_224 swinv2_tiny_window8_256
test_coatnet
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
_THIN = """
botnet26t_256 eca_botnext26ts_256 halo2botnet50ts_256 halonet_h1 lambda_resnet26t lamhalobotnet50ts_256
resnet50_clip sebotnet33ts_256 sehalonet33ts
"""
_FIELDS_OF: dict[str, dict[str, Any]] = {
    **{name: {"width_factor": 0.25} for name in _THIN.split()},
    "hieradet_small": {"embed_dim": 16},
    "mobilenetv5_base": {"channel_multiplier": 0.25},
    "efficientvit_l1": {"widths": (8, 16, 32, 64, 64), "depths": (1, 1, 1, 2, 2)},
}
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

        every = (_FIELDS_OF[name],) if name in _FIELDS_OF else _TIMM_FIELDS
        sizes = [(f, n) for f in every for n in ([f["img_size"]] if "img_size" in f else _SIDES)]
        return _first_that_works([functools.partial(of, fields, size) for fields, size in sizes], last=True)

    return Family("timm", name, make, lambda model: model(_real(2, 3, side[0], side[0])))


def _open_clip(kind: str) -> Family:
    def make() -> nn.Module:
        import open_clip

        vision = dict(layers=2, width=32, head_width=8, patch_size=8, image_size=16)
        text = dict(context_length=9, vocab_size=50, width=32, heads=4, layers=2)
        if kind == "coca":
            decoder = open_clip.coca_model.MultimodalCfg(context_length=9, vocab_size=50, width=32, heads=4, layers=2)
            model = open_clip.CoCa(
                32, decoder, open_clip.CLIPTextCfg(**text, embed_cls=True, output_tokens=True),
                open_clip.CLIPVisionCfg(**vision, attentional_pool=True, attn_pooler_heads=4, output_tokens=True),
            )  # fmt: skip
            nn.init.normal_(model.text_decoder.text_projection, std=0.2)  # CoCa leaves it as it was allocated
            return model
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
