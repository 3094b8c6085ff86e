"""Statistics of experts that are one parameter: each expert's own, against gradients of the written-out weights."""

from __future__ import annotations

import pytest
import torch
from support.experts_zoo import IDS, loss_of, moe, ranks_of
from support.helpers import config, randomise
from support.tracker_help import track

import fastlora
from fastlora.model.modules import role_targets
from fastlora.nn.linear import adapted_layers

SHORT = IDS[:, :3]  # so that some experts have no row


def adapted(name="Mixtral", **fields):
    model = moe(name, **fields)
    ranks = ranks_of(model, role_targets(model, "experts"))
    return randomise(fastlora.inject(model, config(r=2, target_modules="experts", rank_pattern=ranks)))


def losses(model, ids):
    """One loss a sample."""
    logits = model(input_ids=ids).logits
    weight = torch.linspace(-1, 1, logits[0].numel(), dtype=logits.dtype).view_as(logits[0])
    return (logits * weight).square().flatten(1).mean(1)


def gradients(name, model, ids, loss=lambda m, ids: losses(m, ids).mean()):
    """{matrix: G [N, K]} of the model in which every expert's update is part of its weight."""
    plain = moe(name)
    layers = adapted_layers(model)
    for path, layer in layers.items():
        plain.get_parameter(path).data += layer.delta()
        plain.get_parameter(path).requires_grad_()
    loss(plain, ids).backward()
    return {
        f"{path}[{e}]": (g.T if layer.transposed else g)
        for path, layer in layers.items()
        for e, g in enumerate(plain.get_parameter(path).grad)
    }


@pytest.mark.parametrize("name", ["Mixtral", "GptOss", "Llama4Text"])
class TestExact:
    def test_squares_and_absolute_values(self, name):
        model = adapted(name)
        with track(model, estimator="exact", statistics=("grad_sq", "grad_abs"), ema=None) as tracker:
            losses(model, SHORT).mean().backward()
            tracker.step()
        G = gradients(name, model, SHORT)
        assert 0 < sum(not g.any() for g in G.values()) < len(G)  # experts without rows count as zero
        torch.testing.assert_close(dict(tracker.scores("grad_sq")), {k: float(g.square().sum()) for k, g in G.items()})
        torch.testing.assert_close(dict(tracker.scores("grad_abs")), {k: float(g.abs().mean()) for k, g in G.items()})

    def test_of_frozen_factors(self, name):
        model = adapted(name).requires_grad_(False)
        with track(model, estimator="exact", ema=None) as tracker:
            losses(model, SHORT).mean().backward()
            tracker.step()
        G = gradients(name, model, SHORT)
        torch.testing.assert_close(dict(tracker.scores("grad_sq")), {k: float(g.square().sum()) for k, g in G.items()})

    def test_fisher_is_of_samples(self, name):
        model = adapted(name)
        with track(model, estimator="exact", statistics="fisher", ema=None) as tracker:
            losses(model, SHORT).mean().backward()
            tracker.step()
        each = [gradients(name, model, SHORT[i : i + 1]) for i in range(len(SHORT))]
        wanted = {k: sum(float(G[k].square().sum()) for G in each) / len(each) for k in each[0]}
        torch.testing.assert_close(dict(tracker.scores("fisher")), wanted)


def test_probes_are_the_gradient_times_p():
    model = adapted()
    with track(model, probes=3, ema=None) as tracker:
        losses(model, SHORT).mean().backward()
        G, probes = gradients("Mixtral", model, SHORT), tracker._tracked.probes
        for path, layer in adapted_layers(model).items():
            probe = probes[path]
            for name in layer.slices:
                torch.testing.assert_close(probe.Z[name].grad, G[f"{path}[{name}]"] @ probe.P.to(torch.float64).T)
        wanted = {
            f"{path}[{name}]": float(z.grad.square().sum()) / 3 for path, p in probes.items() for name, z in p.Z.items()
        }
        tracker.step()
        torch.testing.assert_close(dict(tracker.scores("grad_sq")), wanted)


def test_probes_of_samples_estimate_fisher():
    model = adapted()
    totals = {}
    with track(model, probes=64, statistics="fisher", ema=None) as tracker:
        for _ in range(30):
            losses(model, SHORT).mean().backward()
            tracker.step()
        totals = dict(tracker.scores("fisher"))
    with track(model, estimator="exact", statistics="fisher", ema=None) as tracker:
        losses(model, SHORT).mean().backward()
        tracker.step()
    for key, value in tracker.scores("fisher").items():
        assert totals[key] == pytest.approx(value, rel=0.2), key


def test_variances_of_outputs_are_of_the_rows_of_each_expert():
    model, seen = adapted(), {}
    layers = adapted_layers(model)
    with track(model, statistics="act_var", ema=None) as tracker:
        loss_of(model).backward()
        tracker.step()
    merged = moe()
    for path, layer in layers.items():
        merged.get_parameter(path).data += layer.delta()
    for i, block in enumerate(merged.model.layers):
        experts = block.mlp.experts

        def hook(module, args, i=i):
            x, index, _ = args
            for e in range(6):
                rows = x[(index == e).any(1)]
                y = rows @ module.gate_up_proj[e].T
                gate, up = y.chunk(2, -1)
                z = (module.act_fn(gate) * up) @ module.down_proj[e].T
                for leaf, out in (("gate_up_proj", y), ("down_proj", z)):
                    if len(rows):
                        seen[f"model.layers.{i}.mlp.experts.{leaf}[{e}]"] = float(out.var(0, correction=0).sum())

        experts.register_forward_pre_hook(hook)
    with torch.no_grad():
        merged(input_ids=IDS)
    scores = tracker.scores("act_var")
    torch.testing.assert_close({k: scores[k] for k in seen}, seen)


def test_scores_become_ranks_and_calibration_runs():
    model = fastlora.inject(moe(), config(r=2, target_modules="experts"))
    scores = fastlora.calibrate(model, [IDS, IDS.flip(1)], lambda m, ids: losses(m, ids).mean(), steps=2)
    ranks = fastlora.allocate(scores, 40, r_min=0, r_max=8)
    assert sum(ranks.values()) == 40 and min(ranks.values()) == 0
    fastlora.set_ranks(model, ranks)
    assert {row.key: row.rank for row in fastlora.summary(model).rows} == ranks
    losses(model, IDS).mean().backward()


def test_what_is_not_tracked_is_refused():
    model = adapted()
    with pytest.raises(ValueError, match="statistics: expected statistics of weights .*gate_up_proj"):
        fastlora.track(model, estimator="exact", statistics="act_cov")
    with pytest.raises(ValueError, match="probe_kind: expected 'rademacher'"):
        fastlora.track(model, probe_kind="columns")
    with fastlora.track(model, estimator="exact", statistics="fisher", every=1):
        with pytest.raises(RuntimeError, match="'fisher' of experts needs the samples"):
            model.model.layers[0].mlp(torch.randn(2, 3, 32, dtype=torch.float64))
        with fastlora.use_adapters(model, ["default", None]), pytest.raises(RuntimeError, match="several adapters"):
            losses(model, IDS).sum().backward()
