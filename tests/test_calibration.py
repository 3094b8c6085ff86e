"""Calibration passes: scores from exact gradients, and a model that is left as it was."""

from __future__ import annotations

import random

import numpy
import pytest
import torch
from torch import nn
from tracker_help import data, loss_of, model, weight_gradients

import fastlora


def expected_composite(m, batches):
    """FC-LoRA's score from gradients that autograd gives: means over the batches, z-scores, weights."""
    own = [weight_gradients(m, [b]) for b in batches]
    outputs = {}
    handles = [
        layer.register_forward_hook(lambda _, a, out, path=path: outputs.setdefault(path, []).append(out.detach()))
        for path, layer in fastlora.nn.linear.adapted_layers(m).items()
    ]
    for batch in batches:
        m(batch[0])
    for handle in handles:
        handle.remove()

    def z(values):
        v = torch.tensor(values, dtype=torch.float64)
        return (v - v.mean()) / v.std(unbiased=False)

    grad_sq = z([sum(float(g[k].square().mean()) for g in own) / len(own) for k in own[0]])
    grad_abs = z([sum(float(g[k].abs().mean()) for g in own) / len(own) for k in own[0]])
    variance = z(
        [sum(float(o.flatten(0, 1).var(0, unbiased=False).sum()) for o in outputs[k]) / len(own) for k in own[0]]
    )
    return dict(zip(own[0], (0.6 * grad_sq + 0.2 * grad_abs + 0.2 * variance).tolist(), strict=True))


def test_fc_is_the_composite_of_exact_statistics():
    m, batches = model(), [data(seed=s) for s in range(4)]
    scores = fastlora.calibrate(m, iter(batches), loss_of, steps=3)
    expected = expected_composite(m, batches[:3])
    assert scores.kind == "composite" and list(scores) == list(expected)
    for key, value in expected.items():
        assert scores[key] == pytest.approx(value, abs=1e-9), key
    assert scores.costs == fastlora.summary(m).costs


def test_fw_and_a_callable():
    m, batches = model(), [data(seed=s) for s in range(2)]
    own = [weight_gradients(m, [b]) for b in batches]
    scores = fastlora.calibrate(m, batches, loss_of, steps=None, method="fw")
    for key in own[0]:
        assert scores[key] == pytest.approx(sum(float(g[key].square().sum()) for g in own) / 2)
    fisher = fastlora.calibrate(m, batches, loss_of, steps=2, method=lambda tracker: tracker.scores("fisher"))
    assert fisher.kind == "fisher" and list(fisher) == list(scores)


class WithBuffers(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.norm, self.drop = nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.5)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls = self.calls + random.random() + numpy.random.rand()  # a new tensor, not a write into the old one
        return self.drop(self.norm(self.fc1(x)))


def everything(m):
    return (
        {k: v.clone() for k, v in m.state_dict().items()},
        [id(b) for b in m.buffers()],
        [
            (n, p.requires_grad, None if p.grad is None else (id(p.grad), p.grad.clone()))
            for n, p in m.named_parameters()
        ],
        [mod.training for mod in m.modules()],
        [len(mod._forward_hooks) + len(mod._forward_pre_hooks) for mod in m.modules()],
        torch.get_rng_state(),
        random.getstate(),
        repr(numpy.random.get_state()),
    )


def same(a, b):
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


def buffered(init=False):
    torch.manual_seed(0)
    config = fastlora.LoraConfig(r=2, target_modules=["fc1"], init_lora_weights=init)
    m = fastlora.inject(WithBuffers(), config, check="off")  # its hooks go after the first backward
    m(torch.randn(4, 8)).sum().backward()
    m.drop.eval()  # modes differ, and the norm in training mode would move its running statistics
    m.fc1.lora_A.requires_grad_(False)  # as under a schedule that holds adapters still
    return m


def square(m, x):
    return m(x).square().mean()


def meddling(m, x):
    """A loss that changes modes and flags on its way, and then stops."""
    m.train().requires_grad_(True)
    m(x).sum().backward()
    raise KeyboardInterrupt


def rows(*values):
    return [torch.full((4, 8), value) + torch.arange(32.0).reshape(4, 8) for value in values]


def root_at_zero(m, x):
    """Zero, with infinite gradients."""
    y = m(x)
    return (y - y.detach()).sum().sqrt()


def beside(m, x):
    """A loss whose gradient passes the adapted layer by."""
    return m.norm(x.clone().requires_grad_()).sum()


ONE, FIM = {"steps": 1}, {"steps": 1, "method": "fim"}
BAD = {
    "no batch": ([], square, {}, "batches: yielded nothing, at least one"),
    "runs out": (iter(rows(1.0, 2.0)), square, {"steps": 3}, "batches: ran out after 2 of steps=3; pass more, or ste"),
    "not iterable": (3, square, {}, "batches: expected an iterable of batches, got int"),
    "no gradient": (rows(1.0), lambda m, x: m(x).sum().detach(), {}, "loss of batch 0 has no gradient"),
    "not a scalar": (rows(1.0), lambda m, x: m(x), {}, r"expected a scalar tensor, got Tensor of shape \(4, 8\)"),
    "no loss": (rows(1.0), lambda m, x: None, {}, "expected a scalar tensor, got NoneType for batch 0"),
    "nan": (rows(1.0, float("nan")), square, {"steps": 2}, "loss_fn: the loss of batch 1 is nan"),
    "infinite G": (rows(1.0), root_at_zero, ONE, "batches: every backward pass gave gradients that are not finite"),
    "infinite dB": (rows(1.0), root_at_zero, FIM, "batches: every backward pass gave gradients that are not finite"),
    "unreached": (rows(1.0), beside, ONE, "batches: after 1 of them there is no grad_sq yet for fc1"),
    "unreached B": (rows(1.0), beside, FIM, "batches: after 1 of them there is no lora_b_var yet for fc1"),
    "method": (rows(1.0), square, {"method": "svd"}, r"method: expected one of \('fc', 'fc_original', 'fim', 'fw'\)"),
    "no method": (rows(1.0), square, {"method": ["fc"]}, r"method: expected one of .* got \['fc'\]"),
    "nothing": (rows(1.0), square, {**ONE, "method": lambda t: None}, "method: expected to return a mapping .*NoneT"),
    "steps": (rows(1.0), square, {"steps": 0}, "steps: expected a positive integer or None for all batches, got 0"),
    "loss": (rows(1.0), "ce", {}, "loss_fn: expected a callable"),
    "centered": (rows(1.0), square, {"centered": True}, "centered: works with method='fim' only, got method='fc'"),
    "centered flag": (rows(1.0), square, {"centered": 1}, "centered: expected True or False, got 1"),
    "one pass": (rows(1.0), square, {**FIM, "centered": True}, "there is no centered lora_b_var yet: it takes two"),
    "progress": (rows(1.0), square, {"progress": "bar"}, "progress: expected True, False, None or a callable"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named_and_the_model_left_as_it_was(name):
    m = buffered(init=True)
    batches, loss, kwargs, message = BAD[name]
    before = everything(m)
    with pytest.raises(ValueError, match=message):
        fastlora.calibrate(m, batches, loss, **kwargs)
    assert same(before, everything(m))
    assert all(not layer.probes for layer in fastlora.nn.linear.adapted_layers(m).values())


@pytest.mark.parametrize("method", ["fc", "fc_original", "fim", "fw", lambda tracker: tracker.scores("fisher")])
@pytest.mark.parametrize("loss", [square, meddling])
def test_the_model_is_left_as_it_was(method, loss):
    m, batches = buffered(init=True), rows(1.0, 2.0)
    before = everything(m)
    if loss is square:
        scores = fastlora.calibrate(m, batches, loss, steps=2, method=method)
        assert list(scores) == ["fc1"] and (scores["fc1"] > 0 or scores.kind.startswith("composite"))
    else:
        with pytest.raises(KeyboardInterrupt):
            fastlora.calibrate(m, batches, loss, steps=2, method=method)
    assert same(before, everything(m))
    assert all(not layer.probes for layer in fastlora.nn.linear.adapted_layers(m).values())


def test_the_checks_above_would_see_a_change():
    m = buffered(init=True)
    before = everything(m)
    m(torch.randn(4, 8))
    after = everything(m)
    # State, buffers, RNG of torch, Python and NumPy; not gradients, modes and hooks.
    assert [same(a, b) for a, b in zip(before, after, strict=True)] == [False, False, True, True, True] + [False] * 3


def test_nothing_is_taken_from_the_batches_beyond_the_steps():
    stream = iter(rows(1.0, 2.0, 3.0, 4.0))
    fastlora.calibrate(buffered(), stream, square, steps=3, method="fw")
    assert torch.equal(next(stream), rows(4.0)[0])


def test_fim_refuses_a_trained_adapter():
    with pytest.raises(ValueError, match="model: B of 'fc1' is not zero; 'fim' scores an adapter before its training"):
        fastlora.calibrate(buffered(init=False), rows(1.0), square, steps=1, method="fim")


def test_a_model_without_adapters_is_refused():
    with pytest.raises(ValueError, match="model: has no adapters"):
        fastlora.calibrate(WithBuffers(), rows(1.0), square)
    with pytest.raises(ValueError, match="model: expected a torch.nn.Module, got str"):
        fastlora.calibrate("model", rows(1.0), square)
