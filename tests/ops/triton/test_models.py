"""Every model family through the Triton backend on tensors without values: its launches, shapes and devices."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")
from support import model_zoo  # noqa: E402
from support.helpers import config  # noqa: E402
from support.model_zoo import ZOO, build  # noqa: E402
from support.without_values import META, record_launches  # noqa: E402

import fastlora  # noqa: E402
from fastlora.ops.lora import lora_linear  # noqa: E402

# Their own code reads values: a mask, padding.
READING = {"torch_encoder", "deberta_v2", "deberta_v3"}


@pytest.mark.parametrize("name", [name for name in ZOO if name not in READING])
def test_a_step_of_a_whole_model(name, monkeypatch):
    made = {kind: getattr(model_zoo, kind) for kind in ("ids", "real")}
    for kind, function in made.items():
        monkeypatch.setattr(model_zoo, kind, lambda *given, function=function: function(*given).to(META))
    model = fastlora.inject(build(name).train(), config(target_modules="all-linear", r=1)).to(META)
    launched = record_launches(monkeypatch)
    with fastlora.track(model, statistics=("grad_sq", "act_var")) as tracker:
        ZOO[name].run(model).square().sum().backward()
        tracker.step()
    assert {"shrink_kernel", "wgrad_kernel", "signs_kernel"} <= set(launched)
    assert {"linear_kernel", "expand_kernel"} & set(launched)
    adapters = {key: p.grad for key, p in model.named_parameters() if "lora_" in key}
    assert [key for key, grad in adapters.items() if grad is None or grad.device != META] == []


class Attention(nn.Module):
    """q, k and v of one input, of unequal sizes, in one matrix or three; a projection of another input."""

    def __init__(self, fused: bool):
        super().__init__()
        if fused:
            self.qkv = nn.Linear(32, 96)
        else:
            self.q_proj, self.k_proj, self.v_proj = nn.Linear(32, 64), nn.Linear(32, 16), nn.Linear(32, 16)
        self.out_proj = nn.Linear(96, 32)

    def forward(self, x):
        y = [layer(x) for name, layer in self.named_children() if name != "out_proj"]
        return self.out_proj(torch.cat(y, -1))


@pytest.mark.parametrize("statistic", ["grad_sq", "fisher"])
@pytest.mark.parametrize("fused", [True, False])
def test_exact_statistics_take_one_launch_an_input(fused, statistic, monkeypatch):
    """The slices of a fused matrix, or q, k and v on one input, are one product."""
    model = nn.Sequential(Attention(fused), Attention(fused))
    names = ["qkv" if fused else r"(q|k|v)_proj", "out_proj"]
    model = fastlora.inject(model, config(target_modules=rf".*\.({'|'.join(names)})", r=2, split_qkv=True)).to(META)
    launched = record_launches(monkeypatch)
    with fastlora.track(model, estimator="exact", statistics=(statistic,)) as tracker:
        assert len(tracker.matrices) == 8
        model(torch.randn(3, 5, 32, device=META, requires_grad=True)).square().sum().backward()
        assert "gradstat_kernel" not in launched
        tracker.step()
    assert launched.count("gradstat_kernel") == launched.count("reduce_pairs_kernel") == 4


class CopiesOf(TorchDispatchMode):
    """How many tensors as large as a weight are made."""

    def __init__(self, numel: int):
        super().__init__()
        self.numel, self.count = numel, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out, made = func(*args, **(kwargs or {})), ("aten::clone", "aten::_to_copy", "aten::contiguous")
        self.count += func.name() in made and out.numel() == self.numel and out is not args[0]
        return out


@pytest.mark.parametrize("rows", [64, 8192])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("transposed", [False, True])
def test_no_weight_is_copied(transposed, dtype, rows, monkeypatch):
    """GPT-2's q, k and v: one matrix that lies transposed."""
    launched, options = record_launches(monkeypatch), {"dtype": dtype, "device": META}
    W = torch.empty(768, 2304, **options).t() if transposed else torch.empty(2304, 768, **options)
    A, B = ([torch.empty(shape, requires_grad=True, **options) for _ in range(3)] for shape in ((8, 768), (768, 8)))
    x = torch.empty(rows, 768, requires_grad=True, **options)
    for _ in range(2):
        with CopiesOf(W.numel()) as copies:
            (y,) = lora_linear(x, [W], [torch.empty(2304, **options)], A, B, [2.0] * 3, backend="triton")
            y.backward(torch.empty(y.shape, **options))
    assert copies.count == 0 and "wgrad_kernel" in launched
