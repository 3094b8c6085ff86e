"""Parameters that are swapped, cast, replaced, copied or computed are those that run, in every kind of layer."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

import fastlora
from fastlora import LoraConfig
from fastlora.nn.linear import adapted_layers


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x):
        return self.o_proj(torch.softmax(self.q_proj(x) @ self.k_proj(x).mT, -1) @ self.v_proj(x))


class Fused(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(8, 24)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        return torch.softmax(q @ k.mT, -1) @ v


class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn, self.words, self.conv = (
            nn.MultiheadAttention(8, 2),
            nn.Embedding(11, 8),
            nn.Conv1d(8, 8, 3, padding=1),
        )

    def forward(self, x):
        x = x + self.words(torch.arange(x.shape[1]) % 11)
        return self.conv(self.attn(x, x, x, need_weights=False)[0].mT).mT


MODELS = {
    "a group": (Attention, {"target_modules": "attention"}),
    "slices": (Fused, {"target_modules": ["qkv"], "split_qkv": {"qkv": {"q": 8, "k": 8, "v": 8}}}),
    "attention, embedding and convolution": (Own, {"target_modules": ["attn", "words", "conv"]}),
}


def inputs(dtype=torch.float64):
    return torch.randn(3, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(7)).to(dtype)


def adapted(kind):
    torch.manual_seed(0)
    make, fields = MODELS[kind]
    config = LoraConfig(r=2, init_lora_weights=False, lora_alpha=3, **fields)
    model = fastlora.inject(make().double(), config, check="off")
    for _ in range(3):
        model(inputs()).sum().backward()
    model.zero_grad()
    return model


def written_out(kind, model):
    """The plain model with W + s B A for W, and its s B A as a function of leaves: its own gradients of A and B."""
    plain, leaves, weights = MODELS[kind][0]().double(), {}, {}
    plain.load_state_dict({k: v.double() for k, v in model.state_dict().items()}, strict=False)
    for path, layer in adapted_layers(model).items():
        holder = path.removesuffix(".in_proj")
        name = f"{holder}.in_proj_weight" if holder != path else f"{path}.weight"
        base = (layer.parametrizations.weight.original if parametrize.is_parametrized(layer) else layer.weight).detach()
        rows = []
        for part in layer.slices:
            a, b = (getattr(side["default"], part).detach().double() for side in (layer.lora_A, layer.lora_B))
            leaves[path, part] = a.requires_grad_(), b.requires_grad_()
            rows.append(layer.adapter_specs["default"].scale[part] * b @ a)
        update = torch.cat(rows)
        weights[name] = base.double() + (update.T if layer.lookup else update.view(base.shape))
    return plain, weights, leaves


def check(kind, model, tolerance):
    plain, weights, leaves = written_out(kind, model)
    x = inputs().requires_grad_()
    want = torch.func.functional_call(plain, weights, (x,))
    (want.square().sum() / 10).backward()
    mine = inputs(next(model.parameters()).dtype).requires_grad_()
    for mode in (False, True):
        with torch.no_grad():
            torch.testing.assert_close(model.train(mode)(mine).double(), want, rtol=tolerance, atol=tolerance)
    model.zero_grad()
    found = model(mine)
    (found.square().sum() / 10).backward()
    pairs = [(found, want), (mine.grad, x.grad)]
    for (path, part), factors in leaves.items():
        layer = model.get_submodule(path) if path in dict(model.named_modules()) else adapted_layers(model)[path]
        for side, leaf in zip((layer.lora_A, layer.lora_B), factors, strict=True):
            factor = side["default"]._parameters.get(part)
            if factor is not None and factor.requires_grad:
                pairs.append((factor.grad, leaf.grad))
    for mine, other in pairs:
        torch.testing.assert_close(mine.double(), other, rtol=tolerance, atol=tolerance * other.abs().max().item())


def swapped(model):
    for p in list(model.parameters()):
        torch.utils.swap_tensors(p, nn.Parameter(torch.randn_like(p) / 3, requires_grad=p.requires_grad))
    return model


def other_data(model):
    for p in model.parameters():
        p.data = torch.randn_like(p) / 3
    return model


def one_buffer(model):
    """As trainers keep parameters: views of one tensor, which is then written to."""
    flat = torch.cat([p.detach().flatten() for p in model.parameters()])
    start = 0
    for p in model.parameters():
        p.data = flat[start : start + p.numel()].view_as(p)
        start += p.numel()
    flat.mul_(0.7)
    return model


def loaded(model, **options):
    flags = [p.requires_grad for p in model.parameters()]
    model.load_state_dict({key: 0.7 * t for key, t in model.state_dict().items()}, **options)
    for p, flag in zip(model.parameters(), flags, strict=True):
        p.requires_grad_(flag)
    return model


def emptied(model, device):
    state = copy.deepcopy(model.state_dict())
    model.to(device)
    model.to_empty(device="cpu").load_state_dict(state)
    return model


def in_future(change):
    def changed(model):
        before = torch.__future__.get_swap_module_params_on_conversion()
        torch.__future__.set_swap_module_params_on_conversion(True)
        try:
            return change(model)
        finally:
            torch.__future__.set_swap_module_params_on_conversion(before)

    return changed


def factors_of(model):
    return [side["default"] for layer in adapted_layers(model).values() for side in (layer.lora_A, layer.lora_B)]


def replaced(model):
    for factors in factors_of(model):
        for part in factors.slices:
            setattr(factors, part, nn.Parameter(torch.randn_like(getattr(factors, part)) / 3))
    return model


def pruned(model, keep=False):
    for factors in factors_of(model):
        for part in factors.slices:
            prune.l1_unstructured(factors, part, amount=0.5)
            if not keep:
                prune.remove(factors, part)
    return model


class Doubled(nn.Module):
    def forward(self, factor):
        return 2 * factor


def parametrized(model, keep=False):
    for factors in factors_of(model):
        for part in factors.slices:
            parametrize.register_parametrization(factors, part, Doubled())
    model(inputs())
    if not keep:
        for factors in factors_of(model):
            for part in factors.slices:
                parametrize.remove_parametrizations(factors, part)
    return model


def toggled(model):
    for p in model.parameters():
        p.requires_grad_(not p.requires_grad)
    model(inputs()).sum().backward()
    for p in model.parameters():
        p.requires_grad_(not p.requires_grad)
    return model


def called_with_others(model):
    others = {name: 2 * p.detach() for name, p in model.named_parameters()}
    torch.func.functional_call(model, others, (inputs(),))
    return model


def tracked(model):
    with fastlora.track(model, every=1) as tracker:
        model(inputs()).sum().backward()
        tracker.step()
        return copy.deepcopy(model)


def through_a_file(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


CHANGES = {
    "nothing": lambda m: m,
    "swap_tensors": swapped,
    "other data": other_data,
    "views of one buffer": one_buffer,
    "half and back": lambda m: m.half().double(),
    "float": lambda m: m.float(),
    "float by swapping": in_future(lambda m: m.float()),
    "load_state_dict": loaded,
    "load_state_dict by swapping": in_future(loaded),
    "assign": lambda m: loaded(m, assign=True),
    "to_empty": lambda m: emptied(m, "cpu"),
    "meta and back": lambda m: emptied(m, "meta"),
    "replaced": replaced,
    "pruned": pruned,
    "pruning": lambda m: pruned(m, keep=True),
    "parametrized once": parametrized,
    "parametrized": lambda m: parametrized(m, keep=True),
    "requires_grad_ and back": toggled,
    "functional_call": called_with_others,
    "a copy": copy.deepcopy,
    "a copy of a tracked model": tracked,
    "a pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "a file": through_a_file,
    "shared memory": lambda m: m.share_memory(),
    "merged and unmerged": lambda m: fastlora.unmerge(fastlora.merge(m)),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", MODELS)
def test_what_runs_is_what_the_attributes_say(kind, change):
    torch.manual_seed(1)
    model = CHANGES[change](adapted(kind))
    check(kind, model, 2e-5 if next(model.parameters()).dtype == torch.float32 else 1e-9)


@pytest.mark.parametrize("kind", MODELS)
def test_a_change_that_goes_unnoticed_would_be_seen(kind):
    model = adapted(kind)
    stale = copy.deepcopy(model)
    replaced(model)
    model.forward = stale.forward
    with pytest.raises(AssertionError):
        check(kind, model, 1e-9)
