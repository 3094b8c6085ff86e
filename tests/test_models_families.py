"""Every model family of the real libraries: what plays which role, and numbers against float64."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from helpers import config, randomise
from model_zoo import ZOO, assert_as_exact, build, reference

import fastlora
from fastlora.config import ROLES
from fastlora.model.modules import role_targets
from fastlora.nn.linear import adapted_layers

BIASES_APART = ("timm_beit", "timm_eva02", "timm_swinv2")
SAMPLES_FIRST = ("open_clip", "torch_encoder", "torch_transformer")
EVERY = pytest.mark.parametrize("name", ZOO)


def adapted(name: str, scale: float = 0.1, **fields):
    """Every linear adapted, q, k and v apart also where they are one matrix, and B not zero."""
    fields = {"target_modules": "all-linear", "split_qkv": True, "rank_pattern": ZOO[name].ranks, **fields}
    return randomise(fastlora.inject(build(name), config(**fields)), scale)


@EVERY
def test_counts_by_role(name):
    model = build(name)
    counts = tuple(len(role_targets(model, role)) for role in ("qkv", "attention", "mlp", "all-linear"))
    assert counts == ZOO[name].counts
    assert set(ROLES) == {"qkv", "attention", "mlp", "all-linear"}
    fastlora.inject(model, config(target_modules="attention"))
    assert len(adapted_layers(model)) == counts[1]
    assert counts == tuple(len(role_targets(model, role)) for role in ("qkv", "attention", "mlp", "all-linear"))


def without_dropout(model):
    for module in model.modules():
        if "Drop" in type(module).__name__:
            module.eval()
        for name in ("dropout", "attention_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return model


@EVERY
def test_outputs_at_first_are_the_frozen_base_s_bit_for_bit(name, library_matmul):
    """In training, where torch has no fused path; timm's biases apart are rounded once more.

    Torch's attention puts tokens first and ours samples, and the bits of a row may depend on where it stands.
    """
    base = without_dropout(build(name).requires_grad_(False).train())
    model = without_dropout(fastlora.inject(build(name).train(), config(target_modules="all-linear", r=1)))
    for _ in range(2):
        torch.manual_seed(5)
        mine = ZOO[name].run(model)
        torch.manual_seed(5)
        theirs = ZOO[name].run(base)
        if name in (*BIASES_APART, *SAMPLES_FIRST):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5 * theirs.abs().max().item())
        else:
            assert torch.equal(mine, theirs)


@EVERY
def test_output_and_every_gradient_against_float64(name):
    base, run = build(name), ZOO[name].run
    model = adapted(name)
    exact, exact_grads = reference(base, model, run)
    plain, plain_grads = reference(base, model, run, torch.float32)
    assert not torch.allclose(run(base).double(), exact, rtol=1e-3, atol=1e-3 * exact.abs().max().item())
    for _ in range(2):  # the second pass runs with what the first one learned of groups
        model.zero_grad()
        y = run(model)
        y.square().sum().backward()
        assert_as_exact(y.detach(), plain, exact)
    grads = {n: p.grad for n, p in model.named_parameters() if ".lora_" in n}
    assert grads.keys() == exact_grads.keys()
    for key, grad in grads.items():
        assert grad is not None and grad.any(), key
        assert_as_exact(grad, plain_grads[key], exact_grads[key], key)


@EVERY
def test_what_the_modules_offer(name):
    run = ZOO[name].run
    model = adapted(name)
    with torch.no_grad():
        y = run(model)
        with fastlora.disable_adapters(model):
            torch.testing.assert_close(run(model), run(build(name)), rtol=1e-4, atol=1e-5)
        state = copy.deepcopy(model.state_dict())
        fastlora.merge(model)
        torch.testing.assert_close(run(model), y, rtol=1e-4, atol=1e-4 * y.abs().max().item())
        fastlora.unmerge(model)
        assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
        assert torch.equal(run(copy.deepcopy(model)), run(model))
    layers, summary = adapted_layers(model), fastlora.summary(model)
    assert {row.key.partition("[")[0] for row in summary.rows} == set(layers)
    assert summary.adapter_params == sum(
        p.numel() for n, p in model.named_parameters() if ".lora_" in n and p.requires_grad
    )
    assert [row.path for row in fastlora.explain(model).rows] == list(layers)
    ranks = {row.key: min(1 + i % 3, row.in_features, row.out_features) for i, row in enumerate(summary.rows)}
    fastlora.set_ranks(model, ranks, reinit=True)
    assert {row.key: row.rank for row in fastlora.summary(model).rows} == ranks
    with torch.no_grad():
        torch.testing.assert_close(run(model), run(build(name)), rtol=1e-4, atol=1e-5)


@EVERY
def test_exact_statistics_are_those_of_the_full_gradient(name):
    base, run = build(name), ZOO[name].run
    kinds = ("grad_sq", "act_var") + (("fisher",) if ZOO[name].rows_are_samples else ())
    model = adapted(name, r=2)
    with fastlora.track(model, estimator="exact", statistics=kinds) as tracker:
        run(model).square().sum().backward()
        tracker.step()
    mine = tracker.scores("grad_sq")
    full = fastlora.inject(base.double(), config(target_modules="all-linear", split_qkv=True, r=2))
    state = {k: v.double() for k, v in model.state_dict().items()}
    full.load_state_dict(state)
    layers = adapted_layers(full)
    for layer in layers.values():
        layer.weight.requires_grad_(True)
    run(full).square().sum().backward()
    for path, layer in layers.items():
        for part in layer.slices:
            key = path if part == "weight" else f"{path}[{part}]"
            grad = layer.weight.grad.T if isinstance(layer, fastlora.nn.Conv1D) else layer.weight.grad
            expected = grad[layer.slice_rows(part)].square().sum().item()
            assert math.isclose(mine[key], expected, rel_tol=1e-3), key
    assert all(v > 0 for kind in kinds for v in tracker.scores(kind).values())


@pytest.mark.parametrize("estimator", ["probe", "exact"])
def test_inputs_that_are_not_of_samples_have_no_fisher(estimator):
    """DeBERTa's relative positions pass through query and key once more."""
    model = fastlora.inject(build("deberta_v3"), config(target_modules="qkv"))
    with fastlora.track(model, estimator=estimator, statistics=("fisher",), every=1) as tracker:
        with pytest.raises(RuntimeError, match="fisher: calls of one .* saw"):
            ZOO["deberta_v3"].run(model).square().sum().backward()
            tracker.step()
