"""Small random models that keep q, k and v, or gate and up, in one matrix, and how its rows lie, one by one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from fastlora.testing import enable_torchvision

_SIZES = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=64,
    max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
_GPT = dict(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64)
_IDS = torch.randint(3, 64, (2, 8), generator=torch.Generator().manual_seed(3))


@dataclass(frozen=True)
class Fused:
    """A model, a pass of it, the suffix of its fused matrices, and the parts of each block of rows in order.

    ``roles``: how many modules qkv, attention and mlp mean. ``scores``: whether a softmax over queries by keys shows
    what q and k feed; else the split alone that the forward makes.
    """

    make: Callable[[], nn.Module]
    run: Callable[[nn.Module], torch.Tensor]
    leaf: str
    parts: tuple[tuple[str, int], ...]
    blocks: int
    roles: tuple[int, int, int]
    scores: bool = True

    def rows(self) -> dict[str, list[int]]:
        found, row = {name: [] for name, _ in self.parts}, 0
        for _ in range(self.blocks):
            for name, count in self.parts:
                found[name] += range(row, row + count)
                row += count
        return found

    def fused(self, model: nn.Module) -> dict[str, nn.Module]:
        return {n: m for n, m in model.named_modules() if n.endswith(self.leaf)}


def _tokens(model: nn.Module) -> torch.Tensor:
    out = model(input_ids=_IDS)
    return out.logits if hasattr(out, "logits") else out[0]


def _image(size: int) -> Callable[[nn.Module], torch.Tensor]:
    x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return lambda model: model(x)


def _lm(name: str, **fields) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        enable_torchvision()
        import transformers

        config = getattr(transformers, f"{name}Config")(**fields)
        config._attn_implementation = "eager"
        for auto in (transformers.AutoModelForCausalLM, transformers.AutoModelForMaskedLM, transformers.AutoModel):
            try:
                return auto.from_config(config, attn_implementation="eager")
            except ValueError:
                continue
        raise AssertionError(name)

    return make


def _timm(name: str, **fields) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        enable_torchvision()
        import timm

        model = timm.create_model(name, num_classes=5, **fields)
        for module in model.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = False
        return model

    return make


class _Around(nn.Module):
    """An attention of convolutions between others, which are in no role."""

    def __init__(self, channels: int, attention: nn.Module, after: int):
        super().__init__()
        self.stem, self.attn, self.out = nn.Conv2d(3, channels, 1), attention, nn.Conv2d(after, 5, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.attn(self.stem(x)))


def _convolved(where: str, owner: str, channels: int = 16, after: int | None = None, **fields):
    def make() -> nn.Module:
        enable_torchvision()
        import importlib

        kind = getattr(importlib.import_module(f"timm.{where}"), owner)
        attention = kind(**fields)
        if hasattr(attention, "fused_attn"):
            attention.fused_attn = False
        return _Around(channels, attention, after or channels)

    return make


def _even(rows: int, names: str = "qkv") -> tuple[tuple[str, int], ...]:
    return tuple((name, rows) for name in names)


_FALCON = dict(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
_GATE_UP = (("gate", 48), ("up", 48))
_XP = dict(img_size=16, patch_size=8, embed_dim=32, depth=2, num_heads=4)

# Of convolutions over channels alone.
CONVOLVED: dict[str, Fused] = {
    "visformer": Fused(
        _timm("visformer_tiny", img_size=64, init_channels=8, embed_dim=32, depth=(1, 1, 1), num_heads=2), _image(64),
        "stage2.0.attn.qkv", _even(32), 1, (2, 4, 6),
    ),
    "coatnet": Fused(
        _convolved("models.maxxvit", "Attention2d", dim=16, dim_head=8, head_first=True), _image(4), "qkv", _even(8), 2,
        (1, 2, 0),
    ),
    "attention2d": Fused(
        _convolved("layers.attention2d", "Attention2d", dim=16, num_heads=2), _image(4), "qkv", _even(16), 1, (1, 2, 0),
    ),
    "mobilevitv2": Fused(
        _timm("mobilevitv2_050"), _image(64), "stages.2.1.transformer.0.attn.qkv_proj",
        (("q", 1), ("k", 64), ("v", 64)), 1, (9, 18, 18), False,
    ),
    "mobilevitv2 of transformers": Fused(
        _lm("MobileViTV2", width_multiplier=0.25, image_size=64, n_attn_blocks=[1, 1, 1], output_stride=8),
        lambda model: _image(64)(lambda x: model(pixel_values=x).last_hidden_state),
        "encoder.layer.2.transformer.layer.0.attention.qkv_proj.convolution",
        (("q", 1), ("k", 32), ("v", 32)), 1, (3, 6, 6), False,
    ),
    "efficientvit_msra": Fused(
        _timm("efficientvit_m0", img_size=64, embed_dim=(16, 32, 48), num_heads=(2, 2, 2), depth=(1, 1, 1)), _image(64),
        "stages.0.blocks.0.mixer.m.attn.qkvs.0.conv", (("q", 16), ("k", 16), ("v", 8)), 1, (6, 9, 20), False,
    ),
    "efficientvit_mit": Fused(
        _convolved("models.efficientvit_mit", "LiteMLA", in_channels=16, out_channels=16), _image(4), "qkv.conv",
        _even(8), 2, (1, 2, 0), False,
    ),
    "shvit": Fused(
        _convolved("models.shvit", "SHSA", dim=16, qk_dim=4, pdim=8), _image(4), "qkv.c",
        (("q", 4), ("k", 4), ("v", 8)), 1, (1, 2, 0),
    ),
    "lowformer": Fused(
        _convolved("models.lowformer", "ConvAttention", channels=120, input_dim=120, head_dim_mul=0.5), _image(8),
        "pwise", _even(30), 2, (1, 2, 0),
    ),
    "cpubone": Fused(
        _convolved("models.cpubone", "ConvAttention", channels=120, input_dim=120, head_dim_mul=0.5), _image(8),
        "pwise", _even(30), 2, (1, 2, 0),
    ),
    "bottleneck": Fused(
        _convolved("layers.bottleneck_attn", "BottleneckAttn", dim=16, feat_size=(4, 4), num_heads=2, qk_ratio=0.5),
        _image(4), "qkv", (("q", 8), ("k", 8), ("v", 16)), 1, (1, 1, 0),
    ),
    "lambda": Fused(
        _convolved("layers.lambda_layer", "LambdaLayer", dim=16, num_heads=2, dim_head=4, r=3), _image(4), "qkv",
        (("q", 8), ("k", 4), ("v", 8)), 1, (1, 1, 0), False,
    ),
    "halo": Fused(
        _convolved("layers.halo_attn", "HaloAttn", dim=16, num_heads=2, dim_head=4, block_size=2, halo_size=1),
        _image(4), "kv", (("k", 4), ("v", 8)), 2, (2, 2, 0), False,
    ),
}  # fmt: skip

FUSED: dict[str, Fused] = {
    "phi3": Fused(
        _lm("Phi3", **_SIZES, num_key_value_heads=2, tie_word_embeddings=False), _tokens, "qkv_proj",
        (("q", 32), ("k", 16), ("v", 16)), 1, (2, 4, 4),
    ),
    "gpt_neox": Fused(_lm("GPTNeoX", **_SIZES), _tokens, "query_key_value", _even(8), 4, (2, 4, 4)),
    "gpt_neox_japanese": Fused(
        _lm("GPTNeoXJapanese", **{**_SIZES, "intermediate_multiple_size": 2}), _tokens, "query_key_value", _even(8), 4,
        (2, 4, 4),
    ),
    "bloom": Fused(
        _lm("Bloom", vocab_size=64, hidden_size=32, n_layer=2, n_head=4), _tokens, "query_key_value", _even(8), 4,
        (2, 4, 4),
    ),
    "falcon": Fused(
        _lm("Falcon", **_FALCON, multi_query=False, new_decoder_architecture=False), _tokens, "query_key_value",
        _even(8), 4, (2, 4, 4),
    ),
    "falcon_multi_query": Fused(
        _lm("Falcon", **_FALCON, multi_query=True, new_decoder_architecture=False), _tokens, "query_key_value",
        (("q", 32), ("k", 8), ("v", 8)), 1, (2, 4, 4),
    ),
    "falcon_grouped": Fused(
        _lm("Falcon", **_FALCON, num_kv_heads=2, new_decoder_architecture=True), _tokens, "query_key_value",
        (("q", 16), ("k", 8), ("v", 8)), 2, (2, 4, 4),
    ),
    "mpt": Fused(
        _lm("Mpt", vocab_size=64, d_model=32, n_heads=4, n_layers=2), _tokens, "Wqkv", _even(32), 1, (2, 4, 4)
    ),
    "modernbert": Fused(
        _lm("ModernBert", **_SIZES, cls_token_id=1, sep_token_id=2), _tokens, "Wqkv", _even(32), 1, (2, 4, 4)
    ),
    "codegen": Fused(
        _lm("CodeGen", **_GPT, rotary_dim=4, bos_token_id=1, eos_token_id=2), _tokens, "qkv_proj", _even(8, "qvk"), 4,
        (2, 4, 4),
    ),
    "gpt_bigcode": Fused(
        _lm("GPTBigCode", **_GPT, multi_query=False), _tokens, "c_attn", _even(8), 4, (2, 4, 4)
    ),
    "gpt_bigcode_multi_query": Fused(
        _lm("GPTBigCode", **_GPT, multi_query=True), _tokens, "c_attn", (("q", 32), ("k", 8), ("v", 8)), 1, (2, 4, 4)
    ),
    "gpt2": Fused(_lm("GPT2", **_GPT), _tokens, "c_attn", _even(32), 1, (2, 4, 4)),
    "persimmon": Fused(_lm("Persimmon", **_SIZES), _tokens, "query_key_value", _even(8), 4, (2, 4, 4)),
    "deberta": Fused(_lm("Deberta", **_SIZES), _tokens, "in_proj", _even(8), 4, (2, 4, 4)),
    "vit": Fused(
        _timm("vit_tiny_patch16_224", img_size=16, patch_size=8, embed_dim=32, depth=2, num_heads=4), _image(16),
        "attn.qkv", _even(32), 1, (2, 4, 4),
    ),
    "vit_xp": Fused(
        _timm("vit_base_patch16_xp_224", **_XP), _image(16), "in_proj", (("mlp", 128), *_even(32)), 1, (2, 4, 4)
    ),
    "tiny_vit": Fused(
        _timm(
            "tiny_vit_5m_224", embed_dims=(8, 16, 16, 16), depths=(1, 1, 1, 1), num_heads=(1, 2, 2, 2),
            window_sizes=(2, 2, 2, 2),
        ),
        _image(32), "attn.qkv", _even(8), 2, (3, 6, 6),
    ),
    "pvt_v2": Fused(
        _timm(
            "pvt_v2_b0", embed_dims=(16, 16, 16, 16), depths=(1, 1, 1, 1), num_heads=(2, 2, 2, 2),
            sr_ratios=(1, 1, 1, 1),
        ),
        _image(32), "attn.kv", _even(16, "kv"), 1, (8, 12, 8),
    ),
    "tnt": Fused(
        _timm(
            "tnt_s_patch16_224", img_size=32, embed_dim=16, inner_dim=16, depth=1, num_heads_inner=2, num_heads_outer=2
        ),
        _image(32), ".qk", _even(16, "qk"), 1, (4, 6, 4),
    ),
    **CONVOLVED,
}  # fmt: skip
