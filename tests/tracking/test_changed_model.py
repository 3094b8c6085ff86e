"""A tracked model that is given another dtype, moved, or unloaded."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from support.experts_zoo import IDS, moe
from support.helpers import config
from torch import nn

import fastlora

X = torch.randn(6, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

KINDS = {
    "grad_sq": {"statistics": ("grad_sq",)},
    "fisher": {"statistics": ("fisher", "act_var")},
    "columns": {"statistics": ("grad_abs", "act_var"), "probe_kind": "columns"},
    "exact": {"statistics": ("grad_sq", "grad_abs", "act_var", "act_cov"), "estimator": "exact"},
}
MOVES = [
    (torch.float32, torch.float64),
    (torch.float64, torch.float32),
    (torch.bfloat16, torch.float64),
    (torch.float32, torch.bfloat16),
]


class Attended(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        return self.attn(x, x[:, :2].clone(), x[:, :2].clone(), need_weights=False)[0]


def linears():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8), nn.Linear(8, 2))


def convolutions():
    return nn.Sequential(nn.Conv1d(5, 8, 1), nn.Conv1d(8, 3, 1))


MODELS = {
    "linears": (linears, ["0", "2"]),
    "cross-attention": (Attended, ["attn"]),
    "convolutions": (convolutions, ["0", "1"]),
}
REFUSED = ("cross-attention", "fisher")  # whose calls see other numbers of samples


def adapted(kind="linears"):
    torch.manual_seed(0)
    build, targets = MODELS[kind]
    return fastlora.inject(build(), config(r=2, target_modules=targets, init_lora_weights=False))


def backward(model):
    model(X.to(next(model.parameters()).dtype)).float().square().sum().backward()


def numbers(tracker):
    """Every statistic after two steps."""
    found = {kind: dict(tracker.scores(kind)) for kind in tracker.kinds}
    if "act_cov" in tracker._covariances.kinds:
        found |= {path: tensor.double() for path, tensor in tracker.covariances("act_cov").items()}
    return found


@pytest.mark.parametrize("before, after", MOVES, ids=str)
@pytest.mark.parametrize("name, kind", [pair for pair in itertools.product(MODELS, KINDS) if pair != REFUSED])
def test_another_dtype(name, kind, before, after):
    model = adapted(name).to(before)
    other = copy.deepcopy(model).to(after)
    with (
        fastlora.track(model, every=1, **KINDS[kind]) as tracker,
        fastlora.track(other, every=1, **KINDS[kind]) as want,
    ):
        model.to(after)
        for _ in range(2):
            backward(model), backward(other)
            tracker.step(), want.step()
    tolerance = {"rtol": 1e-2, "atol": 1e-6} if torch.bfloat16 in (before, after) else {"rtol": 1e-5, "atol": 1e-8}
    torch.testing.assert_close(numbers(tracker), numbers(want), **tolerance)


def test_another_dtype_between_the_micro_batches_of_a_step():
    model, want = adapted(), adapted().double()
    with fastlora.track(model, every=1) as tracker, fastlora.track(want, every=1) as other:
        backward(model), model.double(), backward(model), tracker.step()
        backward(want), backward(want), other.step()
    torch.testing.assert_close(dict(tracker.scores()), dict(other.scores()), rtol=1e-5, atol=0)


def test_another_dtype_of_experts():
    model = fastlora.inject(moe("Mixtral"), config(r=2, target_modules="experts")).float()
    with fastlora.track(model, every=1) as tracker:
        for dtype in (torch.float64, torch.float32):
            model.to(dtype)(input_ids=IDS).logits.square().mean().backward()
            tracker.step()
    assert len(tracker.scores()) == len(tracker.keys)


def test_another_device_is_refused_where_statistics_are_taken():
    model = adapted()
    with fastlora.track(model, every=1):
        model.to("meta")
        with torch.no_grad():
            assert model(X.to("meta", torch.float32)).is_meta
        model[0].has_changed()
        with pytest.raises(ValueError, match="model: expected on cpu, where it was when .*, got it on meta"):
            model(X.to("meta", torch.float32))


@pytest.mark.parametrize("unload", [fastlora.unload, fastlora.merge_and_unload])
@pytest.mark.parametrize("kind", KINDS)
def test_unloaded(unload, kind, caplog):
    model = adapted()
    with fastlora.track(model, every=1, **KINDS[kind]) as tracker:
        for _ in range(2):
            backward(model)
            tracker.step()
        scores = numbers(tracker)
        unload(model)
        with tracker.mask(torch.ones(6, 5, dtype=torch.bool)):
            model(X.float())
        tracker.step(), tracker.discard(), tracker.load_state_dict(tracker.state_dict())
        for penalty in (tracker.penalty, tracker.apply_penalty):
            with pytest.raises(ValueError, match="statistics: expected" if kind == "columns" else "has no adapters"):
                penalty()
    assert not caplog.records and tracker.steps == 2
    torch.testing.assert_close(numbers(tracker), scores, rtol=0, atol=0)
    again = fastlora.inject(model, config(r=2, target_modules=["0", "2"]))
    with fastlora.track(again, every=1) as other:
        backward(again)
        other.step()
    assert list(other.scores()) == ["0", "2"] and tracker.steps == 2


@pytest.mark.parametrize("options", [KINDS["columns"], {"statistics": "act_var", "estimator": "exact"}])
def test_importance_without_what_it_is_made_of(options):
    model = adapted()
    with pytest.raises(ValueError, match="warmup: expected None without 'grad_sq' or 'fisher' among the statistics"):
        fastlora.track(model, warmup=1, **options)
    with fastlora.track(model, every=1, **options) as tracker:
        backward(model), tracker.step()
        with pytest.raises(ValueError, match="statistics: expected 'grad_sq' among them, which importance is made of"):
            tracker.penalty()


def test_a_copy_that_is_handed_to_peft_leaves_the_tracker_alone():
    pytest.importorskip("peft")
    model = adapted()
    with fastlora.track(model, every=1) as tracker:
        fastlora.to_peft(model)
        backward(model)
        tracker.step()
    assert tracker.steps == 1
