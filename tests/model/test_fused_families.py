"""A fused matrix holds the slices that it is said to hold: what a slice's rows feed, and what an adapter on it does."""

from __future__ import annotations

import pytest
import torch
from support.fused_zoo import CONVOLVED, FUSED
from support.helpers import config, randomise
from torch import nn
from torch.overrides import TorchFunctionMode

import fastlora
from fastlora.model.modules import role_targets
from fastlora.nn.linear import adapted_layers

EVERY = pytest.mark.parametrize("name", FUSED)


def build(name):
    torch.manual_seed(0)
    model = FUSED[name].make().double().eval()
    for parameter in model.parameters() if name in CONVOLVED else ():  # norms whose weight starts at 0
        parameter.data += 0.2 * torch.randn(parameter.shape, dtype=parameter.dtype)
    return model


class FirstScores(TorchFunctionMode):
    """The argument of the first softmax after ``armed``: queries by keys."""

    armed, seen = False, None

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if self.armed and self.seen is None and getattr(func, "__name__", "") == "softmax":
            self.seen = args[0].detach().clone()
        return func(*args, **kwargs or {})


class FirstSplit(TorchFunctionMode):
    """The parts of the first split after ``armed`` into as many as there are slices."""

    armed, seen = False, None

    def __init__(self, count):
        super().__init__()
        self.count = count

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        if self.armed and self.seen is None and getattr(func, "__name__", "") in ("split", "chunk", "unbind"):
            self.seen = [part.detach().clone() for part in out] if len(out) == self.count else None
        return out


@torch.no_grad()
def seen(name, model, rows, mode):
    """What a mode sees of the first fused matrix and the output, with some rows of the second token changed."""
    layer = next(iter(FUSED[name].fused(model).values()))

    def change(module, args, y):
        if not mode.armed:
            mode.armed, y = True, y.clone()
            convolved = isinstance(layer, (nn.Conv1d, nn.Conv2d))
            tokens = y.flatten(2).transpose(1, 2)[0] if convolved else y.view(-1, y.shape[-1])
            tokens[1, rows] += 0.3 * torch.arange(1, len(rows) + 1, dtype=y.dtype).cos()
        return y

    handle = layer.register_forward_hook(change)
    with mode:
        y = FUSED[name].run(model)
    handle.remove()
    return mode.seen, y


def scores(name, model, rows):
    return seen(name, model, rows, FirstScores())


@pytest.mark.parametrize("name", CONVOLVED)
def test_rows_of_a_slice_of_channels_are_the_part_that_the_forward_splits_off(name):
    model, rows = build(name), FUSED[name].rows()
    before, y = seen(name, model, [], FirstSplit(len(rows)))
    for part in rows:
        after, changed = seen(name, model, rows[part], FirstSplit(len(rows)))
        order = [p for p in "qkv" if p in rows]  # of the split in every forward
        moved = [p for p, a, b in zip(order, before, after, strict=True) if not torch.equal(a, b)]
        assert moved == [part] and not torch.equal(y, changed)


@pytest.mark.parametrize("name", [name for name, fused in FUSED.items() if fused.scores])
def test_rows_of_a_slice_move_what_it_feeds(name):
    model, rows = build(name), FUSED[name].rows()
    before, y = scores(name, model, [])
    for part in set(rows) & set("qkv"):
        after, changed = scores(name, model, rows[part])
        moved = (after != before) & ~(after.isinf() & before.isinf())
        queries, keys = ((moved.any(dim).reshape(-1, moved.shape[d])).any(0) for dim, d in ((-1, -2), (-2, -1)))
        assert not torch.equal(y, changed)
        if part == "v":
            assert not moved.any()
        elif part == "q":
            assert queries.nonzero().flatten().tolist() == [1]
        else:
            assert keys.nonzero().flatten().tolist() == [1] and queries.sum() > 1


@EVERY
def test_roles(name):
    model = build(name)
    assert tuple(len(role_targets(model, role)) for role in ("qkv", "attention", "mlp")) == FUSED[name].roles
    table = {row.name: row for row in fastlora.roles(model).rows}
    for path in FUSED[name].fused(model):
        row = table[path]
        assert {n: list(range(row.shape[0]))[r] if isinstance(r, slice) else r.tolist() for n in row.slices
                for r in [row.slices.rows(n)]} == FUSED[name].rows()  # fmt: skip
        assert {"qkv", "attention"} <= set(row.roles) and row.remark == ""


def injected(name, **fields):
    model = build(name)
    fields = {"target_modules": "qkv", "split_qkv": None, "r": 2, **fields}
    return randomise(fastlora.inject(model, config(**fields)))


def as_dense(name, model):
    """The base with W + s B A of every slice put into its rows, the rows written one by one."""
    plain, modules = build(name), {}
    for path, layer in adapted_layers(model).items():
        target, rows = plain.get_submodule(path), FUSED[name].rows()
        W = target.weight.detach().clone()
        W = W.flatten(1) if W.dim() > 2 else W
        W = W.t().contiguous() if W.shape != (layer.out_features, layer.in_features) else W
        for part in layer.slices:
            A, B = (getattr(side["default"], part) for side in (layer.lora_A, layer.lora_B))
            if A is not None:
                chosen = rows[part] if path.endswith(FUSED[name].leaf) else layer.slices.rows(part)
                W[chosen] += layer.adapter_specs["default"].scale[part] * B.detach() @ A.detach()
        conv1d = type(target).__name__ == "Conv1D"
        target.weight = nn.Parameter(W.t().contiguous() if conv1d else W.view_as(target.weight))
        modules[path] = target
    return plain, modules


@EVERY
def test_output_and_every_gradient(name):
    model = injected(name)
    plain, modules = as_dense(name, model)
    y, expected = FUSED[name].run(model), FUSED[name].run(plain)
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-10)
    y.square().mean().backward()
    expected.square().mean().backward()
    for path, layer in adapted_layers(model).items():
        G = modules[path].weight.grad
        G = G.flatten(1) if G.dim() > 2 else G
        G = G if G.shape == (layer.out_features, layer.in_features) else G.t()
        for part in layer.slices:
            A, B = (getattr(side["default"], part) for side in (layer.lora_A, layer.lora_B))
            if A is None:
                assert part == "mlp"
                continue
            own = G[FUSED[name].rows()[part] if path.endswith(FUSED[name].leaf) else layer.slices.rows(part)]
            s = layer.adapter_specs["default"].scale[part]
            torch.testing.assert_close(A.grad, s * B.detach().T @ own, rtol=1e-7, atol=1e-12)
            torch.testing.assert_close(B.grad, s * own @ A.detach().T, rtol=1e-7, atol=1e-12)


@EVERY
def test_merge_and_files(name, tmp_path):
    first = next(iter(FUSED[name].fused(build(name))))
    model = injected(name, rank_pattern={f"{first}[{FUSED[name].parts[-1][0]}]": 3})
    with torch.no_grad():
        y = FUSED[name].run(model)
        fastlora.save(model, tmp_path)
        again = fastlora.load(build(name), tmp_path)
        torch.testing.assert_close(FUSED[name].run(again), y, rtol=1e-9, atol=1e-10)
        for path, layer in adapted_layers(model).items():
            assert adapted_layers(again)[path].slices == layer.slices
            assert adapted_layers(again)[path].ranks() == layer.ranks()
        fastlora.merge(again)
        torch.testing.assert_close(FUSED[name].run(again), y, rtol=1e-9, atol=1e-10)


@EVERY
def test_peft_loads_the_dense_matrix(name, tmp_path):
    peft = pytest.importorskip("peft", minversion="0.18")
    model = injected(name)
    fastlora.save(model, tmp_path)
    with torch.no_grad():
        theirs = peft.PeftModel.from_pretrained(build(name), str(tmp_path)).double().eval()
        found = FUSED[name].run(theirs)
        torch.testing.assert_close(found, FUSED[name].run(model), rtol=1e-6, atol=1e-7)
        assert (found - FUSED[name].run(build(name))).abs().max() > 1e-4
