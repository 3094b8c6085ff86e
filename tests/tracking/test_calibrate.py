"""Calibration passes: scores from exact gradients, every method by its definition, a model left as it was."""

from __future__ import annotations

import copy
import logging
import math
import pickle
import random
import sys

import numpy
import pytest
import torch
from support.tracker_help import data, loss_of, model, weight_gradients
from torch import nn

import fastlora
from fastlora._utils import reporting as progress
from fastlora.importance.scores import minmax
from fastlora.nn.linear import adapted_layers


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
    "not iterable": (3, square, {}, "batches: expected an iterable of batches, got 3"),
    "no gradient": (rows(1.0), lambda m, x: m(x).sum().detach(), {}, "loss of batch 0 has no gradient"),
    "not a scalar": (
        rows(1.0),
        lambda m, x: m(x),
        {},
        r"expected a scalar tensor for batch 0, got torch.float32 \(4, 8\)",
    ),
    "no loss": (rows(1.0), lambda m, x: None, {}, "loss_fn: expected a scalar tensor for batch 0, got None"),
    "nan": (rows(1.0, float("nan")), square, {"steps": 2}, "loss_fn: the loss of batch 1 is nan"),
    "infinite G": (rows(1.0), root_at_zero, ONE, "batches: every backward pass gave gradients that are not finite"),
    "infinite dB": (rows(1.0), root_at_zero, FIM, "batches: every backward pass gave gradients that are not finite"),
    "unreached": (rows(1.0), beside, ONE, "batches: after 1 of them there is no grad_sq yet for fc1"),
    "unreached B": (rows(1.0), beside, FIM, "batches: after 1 of them there is no lora_b_var yet for fc1"),
    "method": (rows(1.0), square, {"method": "svd"}, r"method: expected one of \('fc', 'fc_original', 'fim', 'fw'\)"),
    "no method": (rows(1.0), square, {"method": ["fc"]}, r"method: expected one of .* got \['fc'\]"),
    "nothing": (
        rows(1.0),
        square,
        {**ONE, "method": lambda t: None},
        "method: expected to return a mapping .*, got None",
    ),
    "steps": (rows(1.0), square, {"steps": 0}, "steps: expected None for all batches, or an integer >= 1, got 0"),
    "loss": (rows(1.0), "ce", {}, "loss_fn: expected a callable"),
    "centered": (rows(1.0), square, {"centered": True}, "centered: works with method='fim' only, got method='fc'"),
    "centered flag": (rows(1.0), square, {"centered": 1}, "centered: expected True or False, got 1"),
    "one pass": (rows(1.0), square, {**FIM, "centered": True}, "there is no centered lora_b_var yet: it takes two"),
    "progress": (rows(1.0), square, {"progress": "bar"}, "progress: expected True, False, None or a callable"),
}


OF_ANOTHER_TYPE = {"not iterable", "no loss", "nothing", "loss", "centered flag", "progress"}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named_and_the_model_left_as_it_was(name):
    m = buffered(init=True)
    batches, loss, kwargs, message = BAD[name]
    before = everything(m)
    with pytest.raises(TypeError if name in OF_ANOTHER_TYPE else ValueError, match=message):
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
    with pytest.raises(TypeError, match="model: expected a torch.nn.Module, got 'model'"):
        fastlora.calibrate("model", rows(1.0), square)


def fresh(**kwargs):
    """A model whose B is 0, with one rank of its own."""
    m = model(**kwargs)
    fastlora.set_ranks(m, {"0.key": 3}, reinit=True)
    for layer in adapted_layers(m).values():
        for B in layer.lora_B.parameters():
            torch.nn.init.zeros_(B)
    return m


def b_gradients(m, batches):
    """dB of every matrix and batch by autograd, on a copy."""
    m, found = copy.deepcopy(m), []
    for batch in batches:
        m.zero_grad()
        loss_of(m, batch).backward()
        found.append({k: layer.lora_B["default"].weight.grad.clone() for k, layer in adapted_layers(m).items()})
    return {key: torch.stack([grads[key] for grads in found]) for key in found[0]}


BATCHES = [data(seed=s) for s in range(4)]


@pytest.mark.parametrize("centered", [False, True])
def test_fim_is_the_mean_square_of_the_gradient_of_b(centered):
    m = fresh()
    scores = fastlora.calibrate(m, BATCHES, loss_of, steps=4, method="fim", centered=centered)
    assert scores.kind == "lora_b_var" and scores.costs == fastlora.summary(m).costs
    grads = b_gradients(m, BATCHES)
    assert list(scores) == list(grads)
    for key, g in grads.items():
        expected = g.var(0, unbiased=False).mean() if centered else g.square().mean()
        assert scores[key] == pytest.approx(float(expected), rel=1e-9), key


def test_at_b_zero_the_gradient_of_a_is_zero_and_that_of_b_is_not():
    m = fresh()
    loss_of(m, BATCHES[0]).backward()
    for layer in adapted_layers(m).values():
        assert not layer.lora_A["default"].weight.grad.any() and layer.lora_B["default"].weight.grad.any()


def test_fim_leaves_out_a_pass_that_is_not_finite_and_matrices_without_an_adapter():
    m = fresh()
    fastlora.set_ranks(m, {"1.value": 0})

    def loss(m, batch):
        value = loss_of(m, batch)
        return value if batch is not BATCHES[1] else (value - value.detach()).sqrt() * 0 + value  # d sqrt(0) = inf

    scores = fastlora.calibrate(m, BATCHES, loss, steps=4, method="fim")
    grads = b_gradients(fresh(), [b for b in BATCHES if b is not BATCHES[1]])
    assert set(grads) - set(scores) == {"1.value"}
    # With one matrix less the output of that layer is the same: its B was zero anyhow.
    for key, value in scores.items():
        assert value == pytest.approx(float(grads[key].square().mean()), rel=1e-9)


def test_fc_original_is_the_composite_of_min_max():
    m = model()
    own = [weight_gradients(m, [b]) for b in BATCHES]
    parts = fastlora.calibrate(m, BATCHES, loss_of, steps=4, method=lambda t: t.scores("act_var"))
    scores = fastlora.calibrate(m, BATCHES, loss_of, steps=4, method="fc_original")
    squares = minmax({k: sum(float(g[k].square().mean()) for g in own) for k in own[0]})
    absolute = minmax({k: sum(float(g[k].abs().mean()) for g in own) for k in own[0]})
    variance = minmax(parts)
    assert scores.kind == "composite_minmax"
    for key in own[0]:
        assert scores[key] == pytest.approx(0.6 * squares[key] + 0.2 * absolute[key] + 0.2 * variance[key], abs=1e-9)
    ranks = fastlora.allocate(scores, 12, r_min=1, r_max=4, rule="fc_original")
    assert list(ranks) == list(scores) and all(1 <= r <= 4 for r in ranks.values())


def test_a_callable_may_return_any_mapping():
    m = model()
    scores = fastlora.calibrate(m, BATCHES, loss_of, steps=2, method=lambda t: {k: -1.0 for k in t.keys})
    assert scores.kind == "custom" and set(scores.values()) == {-1.0}
    with pytest.raises(ZeroDivisionError):
        fastlora.calibrate(m, BATCHES, loss_of, steps=2, method=lambda t: 1 / 0)
    with pytest.raises(RuntimeError, match="mine"):
        fastlora.calibrate(m, BATCHES, loss_of, steps=2, method=raising)


def raising(tracker):
    raise RuntimeError("mine")


def test_settled_is_the_rank_correlation_with_the_estimate_before():
    m, prefixes = model(), []
    for count in (1, 2, 3, 4):
        prefixes.append(fastlora.calibrate(m, BATCHES, loss_of, steps=count, method="fw"))
    expected = [after.rank_correlation(before) for before, after in zip(prefixes, prefixes[1:], strict=False)]
    assert prefixes[-1].convergence == pytest.approx(tuple(expected)) and prefixes[0].convergence == ()
    assert any(value < 1.0 for value in expected)


def test_the_result_is_still_a_mapping_of_scores():
    scores = fastlora.calibrate(model(), BATCHES, loss_of, steps=2, method="fw")
    assert isinstance(scores, fastlora.Scores) and dict(scores) == {**scores} and len(scores) == 6
    for copied in (pickle.loads(pickle.dumps(scores)), copy.deepcopy(scores)):
        assert copied == scores and copied.convergence == scores.convergence and copied.costs == scores.costs
        assert type(copied) is type(scores)
    with pytest.raises(AttributeError):
        scores.convergence = ()


def test_one_matrix_has_no_rank_correlation():
    m = model(targets=("query",), depth=1)
    assert [math.isnan(v) for v in fastlora.calibrate(m, BATCHES, loss_of, steps=3, method="fw").convergence] == [
        True
    ] * 2


class TestProgress:
    def test_logged_where_nobody_looks(self, caplog):
        with caplog.at_level(logging.INFO, "fastlora._utils.reporting"):
            scores = fastlora.calibrate(model(), BATCHES, loss_of, steps=2, method="fw")
        assert [r.message for r in caplog.records] == [
            "calibrate: 1 of 2 batches",
            f"calibrate: 2 of 2 batches, rank correlation with the estimate before {scores.convergence[0]:.3f}",
        ]

    def test_a_callable_sees_every_batch(self):
        seen = []
        scores = fastlora.calibrate(
            model(), BATCHES, loss_of, steps=None, method="fw", progress=lambda *args: seen.append(args)
        )
        assert [args[:2] for args in seen] == [(i, None) for i in (1, 2, 3, 4)]
        assert math.isnan(seen[0][2]) and tuple(args[2] for args in seen[1:]) == scores.convergence

    @pytest.mark.parametrize("wanted, terminal", [(True, False), (None, True)])
    def test_a_bar(self, wanted, terminal, monkeypatch, capsys):
        pytest.importorskip("tqdm")
        monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
        monkeypatch.setattr(progress, "PATIENCE", 0.0)
        fastlora.calibrate(model(), BATCHES, loss_of, steps=3, method="fw", progress=wanted)
        shown = capsys.readouterr().err
        assert "calibrate: 100%" in shown and "3/3" in shown and "rank correlation=" in shown

    def test_silence(self, caplog, capsys):
        with caplog.at_level(logging.INFO):
            fastlora.calibrate(model(), BATCHES, loss_of, steps=2, method="fw", progress=False)
        assert not caplog.records and not capsys.readouterr().err

    def test_a_bar_without_tqdm(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "tqdm", None)
        with pytest.raises(ImportError, match=r"progress: True needs tqdm \(pip install tqdm\); None logs instead"):
            fastlora.calibrate(model(), BATCHES, loss_of, steps=2, method="fw", progress=True)
        with progress.reporting(None, 2, "calibrate", "batch") as report:
            report(1, 2, math.nan)


def test_fim_of_parametrized_factors_is_refused_by_name():
    m = model()
    torch.nn.utils.parametrize.register_parametrization(m[0].query.lora_B["default"], "weight", nn.Tanh())
    with pytest.raises(ValueError, match="model: B of '0.query' is parametrized or pruned"):
        fastlora.calibrate(m, [data()], loss_of, steps=1, method="fim")
