"""Statistics over steps: averages, covariances, and steps that are left out."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from support.tracker_help import (
    assert_scores,
    data,
    first_only,
    loss_of,
    model,
    track,
    weight_gradients,
)

import fastlora


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("estimator", ["probe", "exact"])
def test_a_step_that_is_not_finite_is_left_out_and_counted(bad, estimator):
    m, batch = model(), data()
    plain = track(m, estimator=estimator)
    loss_of(m, batch).backward()
    plain.step()
    plain.close()
    tracker = track(m, estimator=estimator)
    loss_of(m, batch).backward()
    tracker.step()
    (loss_of(m, batch) * bad).backward()
    tracker.step()
    assert tracker.skipped == 1
    assert_scores(tracker.scores("grad_sq"), dict(plain.scores("grad_sq")))
    loss_of(m, batch).backward()
    tracker.step()
    assert tracker.skipped == 1 and tracker._averages.counts["grad_sq"].unique().tolist() == [2.0]


def test_ema_is_bias_corrected_per_matrix():
    m = model()
    used, values = [0, 1, 0, 1, 1], []
    with track(m, estimator="exact", ema=0.9) as tracker:
        for i, both in enumerate(used):
            x, y = data(seed=i)
            G = weight_gradients(m, [(x, y)], (lambda m, b: loss_of(m, b)) if both else first_only)
            (loss_of(m, (x, y)) if both else first_only(m, (x, y))).backward()
            tracker.step()
            values.append({k: None if g is None else float(g.square().sum()) for k, g in G.items()})
    expected = {}
    for key in tracker.keys:
        f = [v[key] for v in values if v[key] is not None]
        weights = [0.1 * 0.9 ** (len(f) - 1 - i) for i in range(len(f))]
        expected[key] = sum(w * v for w, v in zip(weights, f, strict=True)) / sum(weights)
    assert_scores(tracker.scores("grad_sq"), expected)


def test_covariances_stream_over_steps_and_leave_out_what_is_not_finite():
    m, batches = model(), [data(seed=s, samples=n) for s, n in ((1, 4), (2, 6))]
    seen = {}

    def keep(path):
        def hook(module, args, out):
            x, dys = args[0].detach().flatten(0, 1), seen.setdefault(path, [])
            out.register_hook(lambda g: dys.append((x, g.detach().flatten(0, 1))) or None)

        return hook

    handles = [layer.register_forward_hook(keep(p)) for p, layer in fastlora.nn.linear.adapted_layers(m).items()]
    with track(m, estimator="exact", statistics=("act_cov", "grad_cov", "grad_sq"), ema=None) as tracker:
        for batch in batches:
            loss_of(m, batch).backward()
            tracker.step()
        for handle in handles:
            handle.remove()
        (loss_of(m, batches[0]) * math.nan).backward()
        tracker.step()
        assert tracker.skipped == 1
        state = copy.deepcopy(tracker.state_dict())
    for kind, index in (("act_cov", 0), ("grad_cov", 1)):
        found = tracker.covariances(kind)
        assert list(found) == list(seen)
        for path, pairs in seen.items():
            rows = torch.cat([pair[index] for pair in pairs])
            torch.testing.assert_close(found[path], rows.T @ rows / len(rows), rtol=1e-10, atol=1e-14)
    with track(m, estimator="exact", statistics=("act_cov", "grad_cov", "grad_sq"), ema=None) as again:
        again.load_state_dict(state)
    assert all(torch.equal(a, again.covariances("act_cov")[p]) for p, a in tracker.covariances("act_cov").items())
    with pytest.raises(ValueError, match="kind: expected what is tracked, .*, got 'act_cov'; name it in statistics"):
        with track(m) as plain:
            plain.covariances("act_cov")


def test_loss_scale_is_divided_out_of_grad_cov():
    m, batch = model(dtype=torch.float32), data(dtype=torch.float32)
    scaler, found = torch.amp.GradScaler("cpu", init_scale=1024.0), []
    for use in (False, True):
        with track(m, estimator="exact", statistics=("grad_cov",)) as tracker:
            loss = loss_of(m, batch)
            (scaler.scale(loss) if use else loss).backward()
            tracker.step(scaler=scaler if use else None)
        found.append(tracker.covariances("grad_cov"))
    for path, plain in found[0].items():
        torch.testing.assert_close(found[1][path], plain, rtol=1e-4, atol=1e-9)
