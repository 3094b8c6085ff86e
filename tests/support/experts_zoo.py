"""Small random models with experts that are parameters [E, N, K], in float64 with the eager loop."""

from __future__ import annotations

import torch
from torch import nn

from fastlora.testing import enable_torchvision

_SIZES = dict(
    vocab_size=64, hidden_size=32, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, head_dim=8,
    num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    num_experts_per_tok=2,
)  # fmt: skip
_LATENT = dict(
    n_routed_experts=6, moe_intermediate_size=24, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=4,
    qk_nope_head_dim=8, v_head_dim=8, n_group=1, topk_group=1, first_k_dense_replace=1,
)  # fmt: skip
MODELS = {
    "Mixtral": dict(_SIZES, num_local_experts=6),
    "Qwen3Moe": dict(_SIZES, num_experts=6, moe_intermediate_size=24),
    "GptOss": dict(_SIZES, num_local_experts=6, layer_types=["full_attention"] * 2),
    "DeepseekV3": {**{k: v for k, v in _SIZES.items() if k != "head_dim"}, **_LATENT, "num_key_value_heads": 4},
}
MODELS["Llama4Text"] = dict(_SIZES, num_local_experts=6, intermediate_size_mlp=24, interleave_moe_layer_step=1)
IDS = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(3))


def moe(name: str = "Mixtral", implementation: str = "eager", dtype: torch.dtype = torch.float64, **fields):
    enable_torchvision()
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**MODELS[name], **fields})
    model = transformers.AutoModelForCausalLM.from_config(config, experts_implementation=implementation)
    for p in model.parameters():  # some classes leave theirs empty, and biases zero
        nn.init.normal_(p, std=0.2)
    return model.to(dtype).eval()


def ranks_of(model: nn.Module, paths) -> dict[str, int]:
    """Ranks 0 to 3, another for each expert."""
    return {f"{path}[{e}]": (e + i) % 4 for i, path in enumerate(paths) for e in range(6)}


def loss_of(model: nn.Module) -> torch.Tensor:
    logits = model(input_ids=IDS).logits
    return (logits * torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype).view_as(logits)).square().mean()
