"""Small random models of real families, and functions that the tests of the module layer share."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastlora
from fastlora.nn.linear import Linear, adapted_layers

BERT = dict(
    vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
    max_position_embeddings=40,
)  # fmt: skip


@dataclass(frozen=True)
class Family:
    """A model and a forward pass of it; names of its linears by role, for layer ``{i}``."""

    make: Callable[[], nn.Module]
    run: Callable[[nn.Module], torch.Tensor]
    layers: tuple[str, ...]  # path prefixes of the repeated blocks
    qkv: tuple[str, ...]
    attention_output: str
    mlp: tuple[str, ...]
    other: tuple[str, ...] = ()  # further linears that are no task head
    head: str = "classifier"


def _ids(*shape: int) -> torch.Tensor:
    return torch.randint(3, 50, shape, generator=torch.Generator().manual_seed(3))


def _image() -> torch.Tensor:
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(3))


def _run_ids(model: nn.Module) -> torch.Tensor:
    return model(input_ids=_ids(2, 9)).logits


def _timm_vit() -> nn.Module:
    import timm

    sizes = dict(img_size=16, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=5)
    return timm.create_model("vit_tiny_patch16_224", **sizes)


def _transformers(model: str, config: str, **fields) -> nn.Module:
    import transformers

    return getattr(transformers, model)(getattr(transformers, config)(**fields))


_SELF = ("attention.self.query", "attention.self.key", "attention.self.value")
_PROJ = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")

FAMILIES = {
    "timm_vit": Family(
        _timm_vit, lambda m: m(_image()), ("blocks.0.", "blocks.1."),
        ("attn.qkv",), "attn.proj", ("mlp.fc1", "mlp.fc2"), head="head",
    ),
    "bert": Family(
        functools.partial(_transformers, "BertForSequenceClassification", "BertConfig", **BERT), _run_ids,
        ("bert.encoder.layer.0.", "bert.encoder.layer.1."),
        _SELF, "attention.output.dense", ("intermediate.dense", "output.dense"), ("bert.pooler.dense",),
    ),
    "roberta": Family(
        functools.partial(_transformers, "RobertaForSequenceClassification", "RobertaConfig", **BERT), _run_ids,
        ("roberta.encoder.layer.0.", "roberta.encoder.layer.1."),
        _SELF, "attention.output.dense", ("intermediate.dense", "output.dense"),
    ),
    "deberta": Family(
        functools.partial(
            _transformers, "DebertaV2ForSequenceClassification", "DebertaV2Config", **BERT, relative_attention=True,
            pos_att_type=["p2c", "c2p"], share_att_key=True,
        ),
        _run_ids, ("deberta.encoder.layer.0.", "deberta.encoder.layer.1."),
        tuple(f"{n}_proj" for n in _SELF), "attention.output.dense", ("intermediate.dense", "output.dense"),
        ("pooler.dense",),
    ),
    "vit": Family(
        functools.partial(
            _transformers, "ViTForImageClassification", "ViTConfig", hidden_size=32, num_hidden_layers=2,
            num_attention_heads=4, intermediate_size=64, image_size=16, patch_size=8,
        ),
        lambda m: m(pixel_values=_image()).logits, ("vit.layers.0.", "vit.layers.1."),
        ("attention.q_proj", "attention.k_proj", "attention.v_proj"), "attention.o_proj", ("mlp.fc1", "mlp.fc2"),
    ),
    "llama": Family(
        functools.partial(
            _transformers, "LlamaForCausalLM", "LlamaConfig", vocab_size=50, hidden_size=32, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, intermediate_size=64,
        ),
        _run_ids, ("model.layers.0.", "model.layers.1."),
        _PROJ, "self_attn.o_proj", ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"), head="lm_head",
    ),
    "distilbert": Family(
        functools.partial(
            _transformers, "DistilBertForSequenceClassification", "DistilBertConfig", vocab_size=50, dim=32,
            n_layers=2, n_heads=4, hidden_dim=64, max_position_embeddings=40,
        ),
        _run_ids, ("distilbert.transformer.layer.0.", "distilbert.transformer.layer.1."),
        ("attention.q_lin", "attention.k_lin", "attention.v_lin"), "attention.out_lin", ("ffn.lin1", "ffn.lin2"),
    ),
    "t5": Family(
        functools.partial(
            _transformers, "T5ForConditionalGeneration", "T5Config", vocab_size=50, d_model=32, d_kv=8, d_ff=64,
            num_layers=1, num_heads=4,
        ),
        lambda m: m(input_ids=_ids(2, 9), decoder_input_ids=_ids(2, 5)).logits,
        ("encoder.block.0.layer.0.SelfAttention.", "decoder.block.0.layer.0.SelfAttention.",
         "decoder.block.0.layer.1.EncDecAttention."),
        ("q", "k", "v"), "o", (),
        ("encoder.block.0.layer.1.DenseReluDense.wi", "encoder.block.0.layer.1.DenseReluDense.wo",
         "decoder.block.0.layer.2.DenseReluDense.wi", "decoder.block.0.layer.2.DenseReluDense.wo"),
        head="lm_head",
    ),
}  # fmt: skip


@functools.cache
def built(name: str) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return FAMILIES[name].make().eval()


def randomise(model: nn.Module, scale: float = 0.3) -> nn.Module:
    """Put B of every adapter somewhere else than zero."""
    with torch.no_grad():
        for layer in adapted_layers(model).values():
            for b in layer.lora_B.parameters():
                b.normal_(std=scale)
    return model


def ungrouped(model: nn.Module) -> nn.Module:
    """A copy of a model in which every projection runs alone."""
    model = copy.deepcopy(model)
    for layer in adapted_layers(model).values():
        layer.group = None
    return model


def one_by_one(model: nn.Module) -> nn.Module:
    """A copy of a model whose siblings know each other, and run one by one in the first pass."""
    model = copy.deepcopy(model)
    for group in {layer.group for layer in adapted_layers(model).values()} - {None}:
        group.__setstate__({"layers": group.layers, "expected": False})
    return model


def said(caplog) -> list[str]:
    """What the package has logged: libraries log of their own when they are first imported."""
    return [record.getMessage() for record in caplog.records if record.name.startswith("fastlora")]


def lora_grads(model: nn.Module) -> dict[str, torch.Tensor | None]:
    return {n: p.grad for n, p in model.named_parameters() if ".lora_" in n}


class CountOps(TorchDispatchMode):
    """Calls of the forward operator inside, as the tuple of weights' rows that ran together."""

    def __init__(self):
        super().__init__()
        self.calls: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.fastlora.lora_linear.default:
            self.calls.append(tuple(w.shape[0] for w in args[1]))
        return func(*args, **(kwargs or {}))


def formula(layer: Linear, x: torch.Tensor, weight: torch.Tensor | None = None) -> torch.Tensor:
    """The layer's output in plain torch, from its own parameters."""
    weight = layer.weight if weight is None else weight
    y = torch.nn.functional.linear(x, weight, layer.bias)
    updates = [s * (x @ a.to(x.dtype).T) @ b.to(x.dtype).T for a, b, s in layer.pairs()]
    return y + torch.cat(updates, dim=-1)


def config(**fields) -> fastlora.LoraConfig:
    return fastlora.LoraConfig(**{"r": 4, "lora_alpha": 8, **fields})


D, KV = 16, 8


class Attention(nn.Module):
    """Projections named so that they are found; ``body`` decides how they are called."""

    def __init__(self, body=None):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(D, D), nn.Linear(D, KV, bias=False), nn.Linear(D, KV)
        self.o_proj = nn.Linear(D, D)
        self.body = body or plain

    def forward(self, x, memory=None):
        return self.body(self, x, x if memory is None else memory)


def mix(owner, q, k, v):
    """Any function in which q, k and v all matter, differently."""
    q, k, v = (t.reshape(-1, t.shape[-1]) for t in (q, k, v))
    scores = (q[:, :KV] * q[:, KV:]) @ k.T
    return owner.o_proj(torch.cat([scores.softmax(-1) @ v, q[:, :KV]], dim=-1))


def plain(self, x, memory):
    return mix(self, self.q_proj(x), self.k_proj(memory), self.v_proj(memory))


def adapted(body=None, r=3, **fields):
    model = nn.Sequential()
    model.add_module("attn", Attention(body))
    fastlora.inject(model, config(r=r, target_modules="qkv", **fields))
    return randomise(model)


def calls(model, *args, times=1):
    """What ran together in the last of several passes."""
    for _ in range(times):
        with CountOps() as count:
            model.attn(*args)
    return count.calls


def outcome(model, *args):
    """Output and every gradient of one pass, with the RNG as it was."""
    torch.manual_seed(11)
    model.zero_grad()
    args = [a.detach().clone().requires_grad_() for a in args]
    y = model.attn(*args)
    y.square().sum().backward()
    return [y.detach(), *[a.grad for a in args], *lora_grads(model).values()]


def assert_same(mine, other):
    assert len(mine) == len(other)
    for a, b in zip(mine, other, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            # Sums taken in another order differ by roundings of the largest entries, also where entries cancel.
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6 * max(1.0, float(b.abs().max()) if b.numel() else 0))
