"""Small models on quantized bases, by the public ways of torchao and bitsandbytes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fastlora
from support.helpers import config, randomise

K, N = 64, 32


def plain(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(K, N), nn.GELU(), nn.Linear(N, K)).to(dtype)


def by_torchao(model, name="Int8WeightOnlyConfig", **fields):
    pytest.importorskip("torchao")
    from torchao import quantization

    quantization.quantize_(model, getattr(quantization, name)(**fields))
    return model


def by_bitsandbytes(model, kind, **fields):
    bnb = pytest.importorskip("bitsandbytes")
    for i in (0, 2):
        source = model[i]
        model[i] = getattr(bnb.nn, kind)(source.in_features, source.out_features, **fields)
        model[i].load_state_dict(source.state_dict())
    return model.to("cpu")  # which quantizes


def intx(model):
    pytest.importorskip("torchao")
    from torchao.quantization.granularity import PerGroup

    return by_torchao(model, "IntxWeightOnlyConfig", weight_dtype=torch.int4, granularity=PerGroup(32))


def int4(model):
    """torchao's layout for CPUs, which its Int4WeightOnlyConfig does not know of."""
    pytest.importorskip("torchao")
    from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
    from torchao.quantization import quantize_

    quantize_(model, PrototypeInt4WeightOnlyConfig(group_size=32, set_inductor_config=False))
    return model


QUANTISED = {
    "torchao int8": by_torchao,
    "torchao int4 in int8": intx,
    "torchao int4": int4,
    "8-bit": lambda model: by_bitsandbytes(model, "Linear8bitLt", has_fp16_weights=False),
    "4-bit nf4": lambda model: by_bitsandbytes(model, "Linear4bit", quant_type="nf4", compute_dtype=torch.float32),
    "4-bit fp4": lambda model: by_bitsandbytes(model, "LinearFP4", compute_dtype=torch.float32),
}
EVERY = pytest.mark.parametrize("kind", QUANTISED)


def make(kind, dtype=torch.float32):
    return QUANTISED[kind](plain(dtype))


def dequantized(layer):
    """The weight that the base multiplies by, from its output for the unit vectors."""
    with torch.no_grad():
        return (layer(torch.eye(K if layer.in_features == K else N)) - layer.bias).t().double()


def adapted(kind, **fields):
    model = make(kind)
    weights = [dequantized(model[i]) for i in (0, 2)]
    fastlora.inject(model, config(**{"target_modules": ["0", "2"], "r": 4, **fields}))
    return randomise(model), weights


def inputs(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))
