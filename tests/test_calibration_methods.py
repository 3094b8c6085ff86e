"""The methods of calibrate against their definitions, how estimates settle, and what is shown meanwhile."""

from __future__ import annotations

import copy
import logging
import math
import pickle
import sys

import pytest
import torch
from tracker_help import data, loss_of, model, weight_gradients

import fastlora
from fastlora._utils import reporting as progress
from fastlora.importance.scores import minmax
from fastlora.nn.linear import adapted_layers


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
        with progress.reporting(None, 2) as report:
            report(1, 2, math.nan)
