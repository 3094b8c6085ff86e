"""Small random models of the real libraries, the counts of their matrices by role, and a float64 reference for each."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn

from fastlora.nn.linear import Linear, adapted_layers

TEXT = dict(
    vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
    max_position_embeddings=40,
)  # fmt: skip
VISION = dict(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, image_size=16, patch_size=8
)
CAUSAL = dict(TEXT, num_key_value_heads=2)


@dataclass(frozen=True)
class Entry:
    """A model, a forward pass of it, and how many modules play the roles qkv, attention, mlp, all-linear."""

    make: Callable[[], nn.Module]
    run: Callable[[nn.Module], torch.Tensor]
    counts: tuple[int, int, int, int]
    peft: tuple[str, ...]  # target_modules for PEFT
    rows_are_samples: bool = True  # whether dimension 0 of every input is the sample
    ranks: dict[str, int] = field(default_factory=dict)  # rank_pattern for matrices that are too small for r = 4


def ids(*shape: int) -> torch.Tensor:
    return torch.randint(3, 50, shape, generator=torch.Generator().manual_seed(3))


def real(model: nn.Module, *shape: int) -> torch.Tensor:
    """Random input in the model's dtype, the same values for all."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return x.to(next(model.parameters()).dtype)


def _timm(name: str, **sizes) -> nn.Module:
    import timm

    return timm.create_model(name, pretrained=False, **sizes)


def _hf(model: str, config: str, **fields) -> nn.Module:
    import transformers

    return getattr(transformers, model)(getattr(transformers, config)(**fields))


def _clip() -> nn.Module:
    import transformers

    text, vision = dict(TEXT, projection_dim=16, eos_token_id=2), dict(VISION, projection_dim=16)
    return transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))


def _run_clip(model: nn.Module) -> torch.Tensor:
    return model(input_ids=ids(3, 9), pixel_values=real(model, 2, 3, 16, 16)).logits_per_text


class TorchEncoder(nn.Module):
    """torch's own encoder, whose layers have a fused path that reads the weights."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 4, 48, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(32, 5)

    def forward(self, x: torch.Tensor, padding: torch.Tensor | None = None) -> torch.Tensor:
        y = self.encoder(x, src_key_padding_mask=padding)
        # What padded places hold differs between torch's paths.
        return self.head((y if padding is None else y.masked_fill(padding.unsqueeze(-1), 0.0)).mean(dim=1))


def _run_encoder(model: nn.Module) -> torch.Tensor:
    padding = torch.arange(7).expand(2, 7) >= torch.tensor([[7], [4]])
    return model(real(model, 2, 7, 32), padding)


def _run_transformer(model: nn.Module) -> torch.Tensor:
    return model(real(model, 5, 2, 32), real(model, 3, 2, 32))


def _open_clip() -> nn.Module:
    import pytest

    clip = pytest.importorskip("open_clip")
    vision = clip.CLIPVisionCfg(layers=2, width=32, head_width=8, patch_size=8, image_size=16)
    text = clip.CLIPTextCfg(context_length=9, vocab_size=50, width=32, heads=4, layers=2)
    return clip.CLIP(16, vision, text, output_dict=True)


def _run_open_clip(model: nn.Module) -> torch.Tensor:
    out = model(real(model, 2, 3, 16, 16), ids(2, 9))
    return out["image_features"] @ out["text_features"].T  # the features have norm 1


def image(size: int) -> Callable[[nn.Module], torch.Tensor]:
    return lambda m: m(real(m, 2, 3, size, size))


def _logits(model: nn.Module) -> torch.Tensor:
    return model(input_ids=ids(2, 9)).logits


def _pixels(model: nn.Module) -> torch.Tensor:
    return model(pixel_values=real(model, 2, 3, 16, 16)).logits


_VIT = dict(img_size=16, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=5)
_SWIN = dict(img_size=32, patch_size=2, window_size=4, embed_dim=16, depths=(2, 2), num_heads=(2, 2), num_classes=5)
_BERT = ("query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense")
_SELF = ("q_proj", "k_proj", "v_proj")
_DEBERTA = dict(
    TEXT, type_vocab_size=0, relative_attention=True, position_biased_input=False, pos_att_type=["p2c", "c2p"]
)
# fmt: off
ZOO = {
    "timm_vit": Entry(
        lambda: _timm("vit_tiny_patch16_224", **_VIT), image(16), (2, 4, 4, 8), ("qkv", "attn.proj", "fc1"),
    ),
    "timm_deit": Entry(
        lambda: _timm("deit_tiny_distilled_patch16_224", **_VIT), image(16), (2, 4, 4, 8), ("qkv", "attn.proj", "fc1"),
    ),
    "timm_swin": Entry(
        lambda: _timm("swin_tiny_patch4_window7_224", **_SWIN), image(32), (4, 8, 8, 17), ("qkv", "attn.proj", "fc2"),
        rows_are_samples=False,
    ),
    "timm_beit": Entry(
        lambda: _timm("beit_base_patch16_224", **_VIT), image(16), (2, 4, 4, 8), ("qkv", "attn.proj", "fc1"),
    ),
    "timm_eva02": Entry(
        lambda: _timm("eva02_tiny_patch14_224", **_VIT), image(16), (2, 4, 4, 8), ("qkv", "attn.proj", "fc1"),
    ),
    "timm_swinv2": Entry(
        lambda: _timm("swinv2_tiny_window8_256", **_SWIN), image(32), (4, 8, 8, 25), ("qkv", "attn.proj", "fc2"),
        rows_are_samples=False, ranks={"cpb_mlp.0": 2, "cpb_mlp.2": 2},
    ),
    "open_clip": Entry(_open_clip, _run_open_clip, (4, 8, 8, 16), ("attn", "c_fc", "c_proj")),
    "torch_encoder": Entry(TorchEncoder, _run_encoder, (2, 4, 4, 8), ("self_attn", "linear1")),
    "torch_transformer": Entry(
        lambda: nn.Transformer(32, 4, 1, 1, 48), _run_transformer, (3, 6, 4, 10), ("self_attn", "multihead_attn"),
        rows_are_samples=False,
    ),
    "gpt2": Entry(
        lambda: _hf("GPT2LMHeadModel", "GPT2Config", vocab_size=50, n_embd=32, n_layer=2, n_head=4, n_positions=40),
        _logits, (2, 4, 4, 8), ("c_attn", "c_proj"),
    ),
    "bert": Entry(lambda: _hf("BertForSequenceClassification", "BertConfig", **TEXT), _logits, (6, 8, 4, 13), _BERT),
    "roberta": Entry(
        lambda: _hf("RobertaForSequenceClassification", "RobertaConfig", **TEXT), _logits, (6, 8, 4, 12), _BERT,
    ),
    "deberta_v2": Entry(
        lambda: _hf("DebertaV2ForSequenceClassification", "DebertaV2Config", **_DEBERTA), _logits, (6, 8, 4, 17),
        ("query_proj", "key_proj", "value_proj", "pos_key_proj", "output.dense"),
    ),
    "deberta_v3": Entry(
        lambda: _hf(
            "DebertaV2ForSequenceClassification", "DebertaV2Config", **_DEBERTA, share_att_key=True,
            position_buckets=8, norm_rel_ebd="layer_norm",
        ),
        _logits, (6, 8, 4, 13), ("query_proj", "key_proj", "value_proj", "output.dense"),
        rows_are_samples=False,  # relative positions pass through query and key once more
    ),
    "vit": Entry(
        lambda: _hf("ViTForImageClassification", "ViTConfig", **VISION), _pixels, (6, 8, 4, 12), (*_SELF, "fc1"),
    ),
    "deit": Entry(
        lambda: _hf("DeiTForImageClassification", "DeiTConfig", **VISION), _pixels, (6, 8, 4, 12), (*_SELF, "fc1"),
    ),
    "clip": Entry(_clip, _run_clip, (12, 16, 8, 26), (*_SELF, "out_proj", "fc1", "fc2"), rows_are_samples=False),
    "llama": Entry(
        lambda: _hf("LlamaForCausalLM", "LlamaConfig", **CAUSAL), _logits, (6, 8, 6, 14), (*_SELF, "down_proj"),
    ),
    "qwen2": Entry(
        lambda: _hf("Qwen2ForCausalLM", "Qwen2Config", **CAUSAL), _logits, (6, 8, 6, 14), (*_SELF, "gate_proj"),
    ),
    "qwen3": Entry(
        lambda: _hf("Qwen3ForCausalLM", "Qwen3Config", **CAUSAL, head_dim=8), _logits, (6, 8, 6, 14),
        (*_SELF, "o_proj"),
    ),
    "t5": Entry(
        lambda: _hf(
            "T5ForConditionalGeneration", "T5Config", vocab_size=50, d_model=32, d_kv=8, d_ff=48, num_layers=2,
            num_heads=4, feed_forward_proj="gated-gelu",
        ),
        lambda m: m(input_ids=ids(2, 9), decoder_input_ids=ids(2, 5)).logits, (18, 24, 12, 36),
        ("q", "k", "v", "o", "wi_0"),
    ),
}
# fmt: on


@functools.cache
def _built(name: str) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = ZOO[name].make().eval()
        with torch.no_grad():
            # Initial values of some libraries are so small or so equal that an error would not be seen.
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape), alpha=0.1)
        return model


def build(name: str) -> nn.Module:
    """A fresh copy of the small model, in eval mode."""
    return copy.deepcopy(_built(name))


def _base_weight(model: nn.Module, path: str) -> tuple[nn.Module, str]:
    """The module and the parameter name that hold an adapted layer's frozen weight in the base model."""
    if path.endswith(".in_proj") or path == "in_proj":
        return model.get_submodule(path.rpartition(".")[0]), "in_proj_weight"
    return model.get_submodule(path), "weight"


def merged_by_hand(base: nn.Module, model: nn.Module, dtype: torch.dtype):
    """A copy of ``base`` in ``dtype`` with ``W + s B A`` for every weight, and the leaves (A, B) by parameter name."""
    merged, leaves = copy.deepcopy(base).to(dtype), {}
    layers: dict[str, Linear] = adapted_layers(model)
    for path, layer in layers.items():
        owner, name = _base_weight(merged, path)
        updates = []
        for part, (a, b, s) in zip(layer.slices, layer.pairs(), strict=True):
            a, b = (t.detach().to(dtype).requires_grad_() for t in (a, b))
            updates.append(s * b @ a)
            leaves[f"{path}.lora_A.default.{part}"], leaves[f"{path}.lora_B.default.{part}"] = a, b
        update = torch.cat(updates)
        weight = owner._parameters.pop(name).detach()
        setattr(owner, name, weight + (update.T if type(owner).__name__ == "Conv1D" else update))
    return merged, leaves


def reference(base: nn.Module, model: nn.Module, run, dtype: torch.dtype = torch.float64):
    """Output of the model merged by hand, and the gradients of every A and B for the sum of squares."""
    merged, leaves = merged_by_hand(base, model, dtype)
    y = run(merged)
    y.square().sum().backward()
    return y.detach(), {name: leaf.grad for name, leaf in leaves.items()}


def assert_as_exact(mine: torch.Tensor, plain: torch.Tensor, exact: torch.Tensor, label: str = "") -> None:
    """``mine`` is no further from ``exact`` than a few times what plain torch in the same precision is."""
    scale = exact.abs().max()
    allowed = 4 * (plain.double() - exact).abs().max() + 16 * torch.finfo(plain.dtype).eps * scale
    error = (mine.double() - exact).abs().max()
    assert error <= allowed, f"{label}: error {error:.3g}, allowed {allowed:.3g}, values up to {scale:.3g}"
