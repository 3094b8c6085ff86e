"""Triton kernels that take the place of norms and MLPs as Liger's do, in the interpreter, before and after ``inject``.

A stand-in: ``liger_kernel`` patches instances (``module.__dict__["forward"]``) or classes, its backward passes write
into what they were given, and its fused loss multiplies by ``lm_head.weight`` itself. These do the same.
"""

from __future__ import annotations

import types

import pytest
import torch
from torch import nn

triton = pytest.importorskip("triton")
transformers = pytest.importorskip("transformers")
import triton.language as tl  # noqa: E402
from support.helpers import randomise  # noqa: E402

import fastlora  # noqa: E402

CONFIG = dict(vocab_size=30, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
              num_key_value_heads=1, max_position_embeddings=16)  # fmt: skip


@triton.jit
def norm_forward(X, W, Y, R, columns, eps, BLOCK: tl.constexpr):
    row, column = tl.program_id(0), tl.arange(0, BLOCK)
    x = tl.load(X + row * columns + column, mask=column < columns, other=0.0)
    scale = 1 / tl.sqrt(tl.sum(x * x, 0) / columns + eps)
    tl.store(R + row, scale)
    weight = tl.load(W + column, mask=column < columns, other=0.0)
    tl.store(Y + row * columns + column, x * scale * weight, mask=column < columns)


@triton.jit
def norm_backward(X, W, R, DY, columns, BLOCK: tl.constexpr):
    """dx is written over dy."""
    row, column = tl.program_id(0), tl.arange(0, BLOCK)
    mask, scale = column < columns, tl.load(R + row)
    x = tl.load(X + row * columns + column, mask=mask, other=0.0)
    m = tl.load(DY + row * columns + column, mask=mask, other=0.0) * tl.load(W + column, mask=mask, other=0.0)
    dx = scale * (m - x * scale * scale * tl.sum(m * x, 0) / columns)
    tl.store(DY + row * columns + column, dx, mask=mask)


@triton.jit
def gate_forward(G, U, C, entries, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    g, u = tl.load(G + i, mask=i < entries, other=0.0), tl.load(U + i, mask=i < entries, other=0.0)
    tl.store(C + i, g * tl.sigmoid(g) * u, mask=i < entries)


@triton.jit
def gate_backward(G, U, DC, entries, BLOCK: tl.constexpr):
    """Gradients are written over the outputs of gate_proj and up_proj."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    g, u = tl.load(G + i, mask=i < entries, other=0.0), tl.load(U + i, mask=i < entries, other=0.0)
    dc, s = tl.load(DC + i, mask=i < entries, other=0.0), tl.sigmoid(g)
    tl.store(G + i, dc * u * s * (1 + g * (1 - s)), mask=i < entries)
    tl.store(U + i, dc * g * s, mask=i < entries)


class Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps):
        x, y, scale = x.contiguous(), torch.empty_like(x), x.new_empty(x[..., 0].numel())
        norm_forward[(scale.numel(),)](x, weight, y, scale, x.shape[-1], eps, BLOCK=16)
        ctx.save_for_backward(x, weight, scale)
        return y

    @staticmethod
    def backward(ctx, dy):
        x, weight, scale = ctx.saved_tensors
        dy = dy.contiguous()
        norm_backward[(scale.numel(),)](x, weight, scale, dy, x.shape[-1], BLOCK=16)
        return dy, None, None


class Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, g, u):
        g, u = g.contiguous(), u.contiguous()
        c = torch.empty_like(g)
        gate_forward[(triton.cdiv(g.numel(), 64),)](g, u, c, g.numel(), BLOCK=64)
        ctx.save_for_backward(g, u)
        return c

    @staticmethod
    def backward(ctx, dc):
        g, u = ctx.saved_tensors
        gate_backward[(triton.cdiv(g.numel(), 64),)](g, u, dc.contiguous(), g.numel(), BLOCK=64)
        return g, u


def norm(self, x):
    return Norm.apply(x, self.weight, self.variance_epsilon)


def mlp(self, x):
    return self.down_proj(Gate.apply(self.gate_proj(x), self.up_proj(x)))


def loss_past_the_head(self, input_ids, labels):
    """The logits are never there: the fused loss takes the last hidden states and the weight."""
    hidden = self.model(input_ids=input_ids).last_hidden_state
    return nn.functional.cross_entropy((hidden @ self.lm_head.weight.T).flatten(0, 1), labels.flatten())


PATCHES = (("LlamaRMSNorm", norm), ("LlamaMLP", mlp))


def patch(model):
    """The instances of a model that is there."""
    for module in model.modules():
        for kind, forward in PATCHES:
            if type(module).__name__ == kind:
                module.__dict__["forward"] = types.MethodType(forward, module)
    return model


def base():
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**CONFIG))


def adapt(model, **options):
    return randomise(fastlora.inject(model, fastlora.LoraConfig(r=2, target_modules="all-linear"), **options))


def trained(model, estimator):
    """Logits, gradients and statistics of two steps."""
    ids, found = torch.arange(12).view(2, 6), {}
    with fastlora.track(model.train(), estimator=estimator, every=1, warmup=2) as tracker:
        for _ in range(2):
            model.zero_grad()
            found["logits"] = model(input_ids=ids).logits
            found["logits"].log_softmax(-1)[..., 3].sum().backward()
            tracker.step()
        found["importance"] = tracker.importance.clone()
    return found | {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def classes(monkeypatch):
    from transformers.models.llama import modeling_llama

    for kind, forward in PATCHES:
        monkeypatch.setattr(getattr(modeling_llama, kind), "forward", forward)


@pytest.mark.parametrize("estimator", ["probe", "exact"])
@pytest.mark.parametrize("order", ["instances before", "instances after", "classes before"])
def test_either_order_computes_the_same(order, estimator, monkeypatch):
    expected = trained(adapt(base()), estimator)
    if order == "classes before":
        classes(monkeypatch)
    model = adapt(patch(base())) if order == "instances before" else adapt(base())
    model = patch(model) if order == "instances after" else model
    calls = []
    monkeypatch.setattr(Gate, "apply", lambda *args, own=Gate.apply: calls.append(1) or own(*args))
    found = trained(model, estimator)
    assert len(calls) == 2 * CONFIG["num_hidden_layers"], "the kernels did not run"
    assert found.keys() == expected.keys() and sum("lora_" in name for name in found) == 28
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5)


def test_an_adapted_head_that_the_fused_loss_passes_by_is_named(caplog):
    """At the first read in the log, at the second forward as an error."""
    ids = torch.arange(12).view(2, 6)
    model = base()
    model.__dict__["forward"] = types.MethodType(loss_past_the_head, model)
    fastlora.inject(model, fastlora.LoraConfig(r=2, target_modules=["q_proj", "lm_head"]))
    model.train()(ids, ids).backward()
    assert "the weight of 'lm_head' is read besides the call" in caplog.text
    with pytest.raises(RuntimeError, match=r"never ran.*: lm_head .*the weight was read instead, at .*cases_liger.py"):
        model(ids, ids)
