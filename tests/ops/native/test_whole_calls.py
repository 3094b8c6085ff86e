"""linear_lora_forward and linear_lora_backward: the bits of torch's products followed by the passes, or nothing."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support.native_help import DTYPES, needs_library
from torch import nn

import fastlora
from fastlora.ops import matmul
from fastlora.ops.matmul import ENGINES, LINEAR, ONEDNN

pytestmark = needs_library

ops = torch.ops.fastlora
SHAPES = [(4, 32), (2, 3, 20), (1, 1, 7), (2, 1, 3, 5), (0, 8), (3, 0, 8), (65, 130)]
WIDTHS = [(32, 32, 32), (33, 8, 1)]


def rows(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1, tensor.shape[-1])


def laid_out(shape: tuple[int, ...], layout: str, dtype: torch.dtype) -> torch.Tensor:
    """The same shape as it lies in memory: on its own, among other columns, by columns, or one row for all."""
    if layout == "slice":
        return torch.randn(*shape[:-1], shape[-1] + 7).to(dtype)[..., 3 : 3 + shape[-1]]
    if layout == "transposed":
        return torch.randn(*shape[:-2], shape[-1], shape[-2]).to(dtype).transpose(-1, -2)
    if layout == "expanded":
        return torch.randn(shape[-1]).to(dtype).expand(shape)
    return torch.randn(shape).to(dtype)


class Group:
    """Operands of a group, fused or separate, over rows of any shape."""

    def __init__(self, shape, widths, dtype, adapter=None, fused=False, biased=(True, True, True), layout="contiguous"):
        depth, adapter = shape[-1], adapter or dtype
        sizes = [sum(widths)] if fused else list(widths)
        self.x = laid_out(shape, layout if len(shape) == 2 else "contiguous", dtype)
        self.W = [laid_out((n, depth), layout, dtype) for n in sizes]
        self.bias = [torch.randn(n).to(dtype) if b else None for n, b in zip(sizes, biased, strict=False)]
        self.A = [torch.randn(3, depth).to(adapter) for _ in widths]
        self.B = [torch.randn(n, 3).to(adapter) for n in widths]
        self.dy = [laid_out((*shape[:-1], n), layout, dtype) for n in sizes]
        columns = [sum(widths[:i]) for i in range(3)]
        self.where = ([0, 0, 0], columns, [2.0, 0.5, 1.0]) if fused else ([0, 1, 2], [0, 0, 0], [2.0, 0.5, 1.0])

    drop = ()  # seed, p, streams

    def forward(self, P=None, moments=False):
        operands = (self.x, self.W, self.bias, self.A, P, self.B, *self.where, moments)
        return ops.linear_lora_forward(*operands, *self.drop)

    def forward_in_parts(self, P=None, moments=False):
        y = [F.linear(self.x, w, b).clone() for w, b in zip(self.W, self.bias, strict=True)]
        operands = ([rows(t) for t in y], rows(self.x), self.A, P, self.B, *self.where, moments)
        h, sums = ops.lora_forward_(*operands, *self.drop)
        count = torch.full((2, 1), len(rows(self.x)), dtype=torch.float64)
        return [*y, h, *[torch.cat([s, count], 1) for s in sums]]

    def backward(self, h, probes=0, need=(True, True, True)):
        operands = (self.dy, self.x, h, self.W, self.A, self.B, *self.where, probes, *need)
        return ops.linear_lora_backward(*operands, *self.drop)

    def backward_in_parts(self, h, probes=0, need=(True, True, True)):
        dy, dx = [rows(g) for g in self.dy], None
        if need[0]:
            dx = torch.mm(dy[0], self.W[0])
            for g, w in zip(dy[1:], self.W[1:], strict=True):
                dx.addmm_(g, w)
        operands = (dx, dy, rows(self.x), h, self.A, self.B, *self.where, probes, *need[1:], *self.drop)
        found = [g for part in ops.lora_backward_(*operands) for g in part]
        return [*([] if dx is None else [dx.view(self.x.shape)]), *found]


def same(whole, parts) -> bool:
    pairs = zip(whole, parts, strict=True)
    return all([a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b) and not a._is_view() for a, b in pairs])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("layout", ["contiguous", "slice", "transposed", "expanded"])
def test_bits_are_those_of_the_parts(layout, fused, dtype):
    for shape in SHAPES:
        for widths in WIDTHS:
            for adapter in (torch.float32, dtype):
                for biased in ((True, True, True), (False, False, False), (True, False, True)):
                    group = Group(shape, widths, dtype, adapter, fused, biased, layout)
                    whole, parts = group.forward(), group.forward_in_parts()
                    assert same(whole, parts), (shape, widths, adapter, biased)
                    h = whole[len(group.W)]
                    assert same(group.backward(h), group.backward_in_parts(h)), (shape, widths, adapter, biased)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("drop", [(), (torch.tensor(7), 0.25, [4, 0, 1])], ids=["", "dropout"])
def test_probes_sums_and_what_is_not_needed(drop, dtype):
    group = Group((2, 5, 16), (8, 8, 4), dtype)
    group.drop = drop
    for P, k in ((torch.randn(6, 16), 6), (torch.tensor([[0, 15], [3, 3], [7, 1]]), 2)):
        whole = group.forward(P, True)
        assert same(whole, group.forward_in_parts(P, True)) and len(whole) == 7
        for need in [(a, b, c) for a in (True, False) for b in (True, False) for c in (True, False)]:
            assert same(group.backward(whole[3], k, need), group.backward_in_parts(whole[3], k, need))


def test_other_products_are_left_to_others():
    def left(forward=True, **changes):
        group = Group((2, 5, 16), (8, 8, 4), torch.float32)
        for name, value in changes.items():
            setattr(group, name, value)
        return (group.forward() if forward else group.backward(torch.randn(10, 9))) == []

    assert not left() and not left(False)
    assert left(x=torch.randn(16)) and left(x=torch.randn(5, 2, 16).transpose(0, 1))
    assert left(x=torch.randn(2, 5, 16).double()) and left(x=torch.randn(2, 5, 16).bfloat16())
    assert left(A=[torch.randn(3, 16).double()] * 3) and left(bias=[None, None])
    assert left(bias=[torch.randn(8), torch.randn(1), torch.randn(4)]) and left(bias=[torch.randn(8).double()] * 3)
    assert left(W=[torch.randn(8, 15)] * 3) and left(W=[torch.randn(8)] * 3)
    assert left(False, dy=[torch.randn(10, n).double() for n in (8, 8, 4)])
    assert left(False, dy=[]) and left(False, dy=[torch.randn(9, n) for n in (8, 8, 4)])
    assert left(False, W=[torch.randn(8, 15)] * 3) and left(False, B=[torch.randn(8, 3).double()] * 3)


@pytest.mark.parametrize("shape", [(5, 16), (2, 5, 16)])
def test_schemas_and_fake_tensors(shape):
    group = Group(shape, (8, 8, 4), torch.float32, biased=(True, False, True))
    h = group.forward()[3]
    check = {"test_utils": ("test_schema", "test_faketensor")}
    operands = (group.x, group.W, group.bias, group.A, None, group.B, *group.where, True)
    torch.library.opcheck(ops.linear_lora_forward.default, operands, **check)
    operands = (group.dy, group.x, h, group.W, group.A, group.B, *group.where, 0, True, True, False)
    torch.library.opcheck(ops.linear_lora_backward.default, operands, **check)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(16, n) for n in (16, 8, 8))

    def forward(self, x):
        return self.q(x), self.k(x), self.v(x)


def called(model, x) -> dict[str, int]:
    with torch.profiler.profile() as profile:
        sum([y.square().sum() for y in model(x)]).backward()
    counts = {event.key: event.count for event in profile.key_averages()}
    names = ("aten::linear", "fastlora::linear_lora_forward", "fastlora::linear_lora_backward")
    return {name.rpartition(":")[2]: counts[name] for name in names if name in counts}


def test_a_layer_takes_one_call_a_direction_once_every_product_is_the_library_s(monkeypatch):
    monkeypatch.setattr(ENGINES, "override", "")
    monkeypatch.setattr(ENGINES, "_choices", {})
    monkeypatch.setattr(matmul, "_time", lambda candidates, run: matmul.Choice(LINEAR, dict.fromkeys(candidates, 1.0)))
    model = fastlora.inject(Attention(), fastlora.LoraConfig(r=2, target_modules="qkv"))
    x, both = torch.randn(4, 16, requires_grad=True), {"linear_lora_forward": 1, "linear_lora_backward": 1}
    assert called(model, x) == {"linear": 3}  # nothing is known of the engines yet
    assert called(model, x) == both
    dropping = fastlora.inject(Attention(), fastlora.LoraConfig(r=2, lora_dropout=0.1, target_modules="qkv"))
    assert called(dropping, x) == both
    assert called(model, torch.randn(16, 16, requires_grad=True)) == {"linear": 3}  # other rows, other engines
    # Part of the outputs in the loss: a gradient is missing.
    with torch.profiler.profile() as profile:
        model(x)[1].sum().backward()
    counts = {event.key: event.count for event in profile.key_averages()}
    assert "fastlora::linear_lora_forward" in counts and "fastlora::linear_lora_backward" not in counts
    monkeypatch.setattr(ENGINES, "override", LINEAR)
    assert called(model, torch.randn(64, 16, requires_grad=True)) == both
    if matmul.onednn_reason() is None:
        monkeypatch.setattr(ENGINES, "override", ONEDNN)
        assert called(model, x) == {}
