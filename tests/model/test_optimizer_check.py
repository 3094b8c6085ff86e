"""An optimizer that was built before the parameters it should train says so at its first step."""

from __future__ import annotations

import gc
import logging
import weakref

import pytest
import torch
from support.helpers import config, said
from torch import nn

import fastlora

REPLACED = r"optimizer: holds the factors that others have replaced.*0\.lora_A\.default\.weight.*set_ranks"
TOO_EARLY = "build it after fastlora.inject"


def base():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8), nn.Linear(8, 2))


def adapted(**fields):
    return fastlora.inject(base(), config(target_modules=["0", "2"], r=4, **fields))


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def steps(model, *optimizers, count=3):
    for _ in range(count):
        model(torch.randn(4, 8)).square().sum().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("ranks", [{"0": 2}, {"0": 2, "2": 2}])
def test_built_before_set_ranks(kind, ranks):
    model = adapted()
    optimizer = kind(trained(model), lr=0.1)
    fastlora.set_ranks(model, ranks)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with pytest.raises(RuntimeError, match=REPLACED):
        steps(model, optimizer)
    with pytest.raises(RuntimeError, match=REPLACED):  # until it is mended
        steps(model, optimizer)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_ranks_that_change_between_steps():
    model = adapted()
    optimizer = torch.optim.AdamW(trained(model), lr=0.1)
    steps(model, optimizer)
    fastlora.set_ranks(model, {"0": 2}, keep=True)
    with pytest.raises(RuntimeError, match=REPLACED):
        steps(model, optimizer)


@pytest.mark.parametrize("how", ["built after", "given the new ones", "the same rank", "rank 0", "another model"])
def test_what_is_right_goes_on(how, caplog):
    model = adapted()
    optimizer = torch.optim.AdamW(trained(model), lr=0.1)
    if how == "rank 0":
        fastlora.set_ranks(model, {"0": 0})
    elif how != "another model":
        fastlora.set_ranks(model, {} if how == "the same rank" else {"0": 2, "2": 2})
    if how == "built after":
        optimizer = torch.optim.AdamW(trained(model), lr=0.1)
    elif how == "given the new ones":
        optimizer.add_param_group({"params": trained(model)})
    elif how == "another model":
        model = base()
        optimizer = torch.optim.AdamW(model.parameters())
    before = [p.detach().clone() for p in trained(model)]
    with caplog.at_level(logging.WARNING):
        steps(model, optimizer)
    assert not any(torch.equal(a, b) for a, b in zip(before, trained(model), strict=True))
    assert "optimizer" not in caplog.text


@pytest.mark.parametrize("head", [False, True])
def test_built_before_inject(head, caplog):
    model = base()
    optimizer = torch.optim.AdamW(model.parameters())
    fastlora.inject(model, config(target_modules=["0"], modules_to_save=["3"] if head else None))
    with caplog.at_level(logging.WARNING):
        steps(model, optimizer)
    assert caplog.text.count(TOO_EARLY) == 1


def test_one_optimizer_for_the_head_and_one_for_adapters(caplog):
    model = adapted(modules_to_save=["3"])
    head = torch.optim.AdamW(model[3].parameters())
    others = torch.optim.AdamW([p for n, p in model.named_parameters() if "lora_" in n])
    with caplog.at_level(logging.WARNING):
        steps(model, head, others)
    assert caplog.text == ""


def test_a_compiled_step():
    model = adapted()
    optimizer = torch.optim.SGD(trained(model), lr=0.1)
    steps(model, count=1)
    torch.compile(optimizer.step, backend="eager")()
    assert model[0].lora_B["default"].weight.any()


def test_nothing_is_kept_alive():
    model = adapted()
    optimizer = torch.optim.AdamW(trained(model))
    steps(model, optimizer)
    fastlora.set_ranks(model, {"0": 2}, keep=True)
    alive = weakref.ref(model), weakref.ref(optimizer)
    del model, optimizer
    gc.collect()
    assert [a() for a in alive] == [None, None]


@pytest.mark.parametrize("target", ["0", "3"])
def test_adapters_that_peft_has_frozen_are_named(target, caplog):
    peft = pytest.importorskip("peft")
    model = adapted()
    own = torch.optim.SGD(trained(model), lr=0.1)
    steps(model, own)
    assert not said(caplog)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=[target]))
    steps(wrapped, torch.optim.SGD(trained(wrapped), lr=0.1))
    assert caplog.text.count("get_peft_model has frozen the adapters") == 1
    assert "2.lora_A.default.weight" in caplog.text
