"""Memory that ends, or a weight without finite values, leaves a model as it was: whatever can fail fails before."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from support.helpers import config, randomise
from support.model_state import assert_untouched, state_of
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastlora
from fastlora.nn.linear import adapted_layers

FIELDS = [dict(), dict(lora_bias=True), dict(use_dora=True), dict(init_lora_weights=False, lora_bias=True)]


class NoMoreMemory(TorchDispatchMode):
    """The operator after so many that allocate fails; ``ran``: how many there were."""

    def __init__(self, after: float):
        super().__init__()
        self.after, self.ran = after, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view and not func._schema.is_mutable:
            if self.ran >= self.after:
                raise torch.OutOfMemoryError("out of memory")
            self.ran += 1
        return func(*args, **(kwargs or {}))


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 12))


def adapted(**fields) -> nn.Module:
    slices = {"1": {"q": 4, "k": 4, "v": 4}}
    return fastlora.inject(net(), config(r=2, target_modules=["0", "1"], split_qkv=slices, **fields), check="off")


def fails_everywhere(
    make: Callable[[], nn.Module], change: Callable[[nn.Module], object], but: int = 0, every: int = 1
) -> int:
    """A change of a model fails at each of its operators but the last ``but``, and nothing has changed."""
    with NoMoreMemory(float("inf")) as mode:
        change(make())
    with NoMoreMemory(float("inf")) as made:
        make()
    count = mode.ran - made.ran - but
    for after in [*range(0, count, every), count - 1]:
        model = make()
        before = state_of(model)
        with pytest.raises(torch.OutOfMemoryError), NoMoreMemory(after):
            change(model)
        assert_untouched(model, before)
    return count


@pytest.mark.parametrize("fields", FIELDS)
def test_inject(fields):
    told = config(r=2, target_modules=["0", "1"], **fields)
    assert fails_everywhere(net, lambda model: fastlora.inject(model, told)) >= 4


@pytest.mark.parametrize("init", ["pissa", "olora", "pissa_niter_2"])
def test_inject_of_what_takes_a_part_of_the_weight(init):
    """The part itself is taken out of W in the end, for which less memory is needed than for finding it."""
    told = config(r=2, target_modules=["0", "1"], init_lora_weights=init, use_dora=True)
    assert fails_everywhere(net, lambda model: fastlora.inject(model, told), but=2) > 10


@pytest.mark.parametrize("fields", FIELDS)
def test_add_adapter(fields):
    told = config(r=2, target_modules=["0", "1"], **fields)

    def make():
        return fastlora.inject(net(), config(r=2, target_modules=["0"]))

    assert fails_everywhere(make, lambda model: fastlora.add_adapter(model, "b", told)) >= 4


@pytest.mark.parametrize("way", [dict(reinit=True), dict(keep=True)])
@pytest.mark.parametrize("fields", [dict(), dict(lora_bias=True), dict(use_dora=True)])
def test_set_ranks(fields, way):
    def make():
        model = adapted(**fields)
        randomise(model)
        return model

    assert fails_everywhere(make, lambda model: fastlora.set_ranks(model, {"0": 3, "1[k]": 1}, **way)) >= 4


def covariances(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: torch.eye(x.in_features) + 0.1 for name, x in layers(model)}


def gradients(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return model(x).square().mean()


STARTS = {
    "corda": (lambda model: fastlora.initialize_corda(model, covariances(model)), 4, 1),
    "lora_ga": (lambda model: fastlora.initialize_lora_ga(model, [torch.ones(3, 6)], gradients, steps=1), 4, 5),
    "eva": (lambda model: fastlora.initialize_eva(model, covariances(model)), 0, 1),
}


@pytest.mark.parametrize("change, but, every", STARTS.values(), ids=STARTS)
def test_starts_from_data(change, but, every):
    assert fails_everywhere(adapted, change, but, every) > 10


def test_other_ways_to_an_adapter(tmp_path):
    def make():
        model = adapted()
        randomise(model)
        return model

    fastlora.save(make(), tmp_path)
    assert fails_everywhere(net, lambda model: fastlora.load(model, tmp_path)) > 4
    assert fails_everywhere(make, lambda model: fastlora.load(model, tmp_path, adapter="b")) > 4
    combine = partial(fastlora.add_weighted_adapter, adapters=["default"], weights=[0.5], adapter_name="b")
    assert fails_everywhere(make, partial(combine, combination_type="svd")) > 10
    assert fails_everywhere(make, fastlora.merge) > 4


def test_measuring():
    def track(model):
        try:
            fastlora.track(model, statistics=("grad_sq", "act_var"))
        except torch.OutOfMemoryError:
            assert not any(layer.probes for _, layer in layers(model))
            raise

    assert fails_everywhere(adapted, track) > 4
    assert fails_everywhere(adapted, lambda m: fastlora.calibrate(m, [torch.ones(2, 6)], gradients, steps=1)) > 20


@pytest.mark.parametrize("init", ["pissa", "olora", "pissa_niter_2"])
def test_a_weight_that_is_not_finite(init):
    model = net()
    model[1].weight.data[3, 2] = float("nan")
    before = state_of(model)
    with pytest.raises(ValueError, match=f"init_lora_weights: '{init}' takes a part of the weight, and that of '1'"):
        fastlora.inject(model, config(r=2, target_modules=["0", "1"], init_lora_weights=init))
    assert_untouched(model, before)


@pytest.mark.parametrize("fields", [dict(lora_bias=True), dict(use_dora=True)])
def test_reinit_starts_what_stands_beside_the_changed_rows_afresh(fields):
    model = adapted(**fields)
    start = {n: {k: p.detach().clone() for k, p in x.lora_B["default"].beside().items()} for n, x in layers(model)}
    randomise(model)
    trained = {n: {k: p.detach().clone() for k, p in x.lora_B["default"].beside().items()} for n, x in layers(model)}
    parameters = [id(p) for _, x in layers(model) for p in x.lora_B["default"].beside().values()]
    fastlora.set_ranks(model, {"0": 3, "1[k]": 1}, reinit=True)
    assert [id(p) for _, x in layers(model) for p in x.lora_B["default"].beside().values()] == parameters
    for name, layer in layers(model):
        changed = {"0": slice(0, 8), "1": slice(4, 8)}[name]
        for kept, now in layer.lora_B["default"].beside().items():
            wanted = trained[name][kept].clone()
            assert not torch.equal(wanted[changed], start[name][kept][changed])
            wanted[changed] = start[name][kept][changed]
            torch.testing.assert_close(now.detach(), wanted)


def layers(model: nn.Module):
    return adapted_layers(model).items()
