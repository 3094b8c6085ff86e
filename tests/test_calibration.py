"""Calibration passes: scores from exact gradients, and a model that is left as it was."""

from __future__ import annotations

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
    scores = fastlora.calibrate(m, batches, loss_of, method="fw")
    for key in own[0]:
        assert scores[key] == pytest.approx(sum(float(g[key].square().sum()) for g in own) / 2)
    fisher = fastlora.calibrate(m, batches, loss_of, method=lambda tracker: tracker.scores("fisher"))
    assert fisher.kind == "fisher" and list(fisher) == list(scores)


class WithBuffers(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.norm, self.drop = nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.5)

    def forward(self, x):
        return self.drop(self.norm(self.fc1(x)))


def everything(m):
    return (
        {k: v.clone() for k, v in m.state_dict().items()},
        [(n, p.requires_grad, None if p.grad is None else p.grad.clone()) for n, p in m.named_parameters()],
        [mod.training for mod in m.modules()],
        [len(mod._forward_hooks) + len(mod._forward_pre_hooks) for mod in m.modules()],
        torch.get_rng_state(),
    )


def same(a, b):
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


def buffered():
    torch.manual_seed(0)
    config = fastlora.LoraConfig(r=2, target_modules=["fc1"], init_lora_weights=False)
    m = fastlora.inject(WithBuffers(), config)
    m(torch.randn(4, 8)).sum().backward()
    m.drop.eval()  # modes differ, and the norm in training mode would move its running statistics
    return m


def square(m, x):
    return m(x).square().mean()


def failing(m, x):
    m(x)
    raise KeyboardInterrupt


BAD = {
    "no batch": (([], square), {}, ValueError, "batches: yielded nothing"),
    "no gradient": (
        ([torch.randn(4, 8)], lambda m, x: m(x).sum().detach()),
        {},
        ValueError,
        "loss of batch 0 has no grad",
    ),
    "not a scalar": (([torch.randn(4, 8)], lambda m, x: m(x)), {}, ValueError, "expected a scalar tensor"),
    "nan": (([torch.full((4, 8), float("nan"))], square), {}, ValueError, "loss_fn: the loss of batch 0 is nan"),
    "method": (([torch.randn(4, 8)], square), {"method": "svd"}, ValueError, "method: expected one of"),
    "steps": (([torch.randn(4, 8)], square), {"steps": 0}, ValueError, "steps: expected a positive integer, got 0"),
    "interrupt": (([torch.randn(4, 8)], failing), {}, KeyboardInterrupt, None),
}


@pytest.mark.parametrize("name", ["fine", *BAD])
def test_the_model_is_left_as_it_was(name):
    m = buffered()
    before = everything(m)
    if name == "fine":
        assert all(
            v >= 0 for v in fastlora.calibrate(m, [torch.randn(4, 8) for _ in range(2)], square, method="fw").values()
        )
    else:
        args, kwargs, error, message = BAD[name]
        rng = torch.get_rng_state()
        with pytest.raises(error, match=message):
            fastlora.calibrate(m, *args, **kwargs)
        torch.set_rng_state(rng)
    after = everything(m)
    if name == "fine":  # the batches above were drawn outside
        before, after = before[:-1], after[:-1]
    assert same(before, after)
    assert all(not layer.probes for layer in fastlora.nn.linear.adapted_layers(m).values())


def test_random_state_is_put_back():
    m, batch = buffered(), torch.randn(4, 8)
    state = torch.get_rng_state()
    fastlora.calibrate(m, [batch], square, method="fw")  # dropout draws inside
    assert torch.equal(torch.get_rng_state(), state)


def test_a_model_without_adapters_is_refused():
    with pytest.raises(ValueError, match="model: has no adapters"):
        fastlora.calibrate(WithBuffers(), [torch.randn(4, 8)], square)
