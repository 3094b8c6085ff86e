"""An optimizer that does not train the adapters says so at its first step: built too early, or of a merged model."""

from __future__ import annotations

import gc
import logging
import weakref

import pytest
import torch
from support.helpers import config, said
from torch import nn

import fastlora
from fastlora.model import optimizer_check

REPLACED = r"optimizer: holds the factors that others have replaced.*0\.lora_A\.default\.weight.*set_ranks"
MERGED = "optimizer: 'default' is merged into 0, 2, so that the adapters which this optimizer holds get no gradient"
TOO_EARLY = "build it after fastlora.inject"
UNHELD = "optimizer: none that has stepped so far holds these"


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


@pytest.mark.parametrize("changes", [(8, 2), (8, 6, 2), (0, 2), (8, 0, 2), (0, 8, 2)])
@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("between", [False, True])
def test_several_changes(changes, keep, between):
    """A factor leads to what is in its place through changes whose own factors are gone, and through rank 0."""
    model = adapted(modules_to_save=["3"])
    optimizer = torch.optim.AdamW(fastlora.param_groups(model))
    for rank in changes:
        fastlora.set_ranks(model, {"0": rank}, keep=keep)
        if between and rank == 0:
            optimizer.step()
    with pytest.raises(RuntimeError, match=REPLACED):
        steps(model, optimizer)


def test_rank_0_that_grows(caplog):
    model = adapted(rank_pattern={"0": 0})
    optimizer = torch.optim.AdamW(trained(model))
    steps(model, optimizer)
    fastlora.set_ranks(model, {"0": 4})
    steps(model, optimizer, count=20)
    assert caplog.text.count(UNHELD) == 1 and "0.lora_B.default.weight;" in caplog.text
    steps(model, torch.optim.AdamW(trained(model)), count=20)
    assert caplog.text.count(UNHELD) == 1 and model[0].lora_B["default"].weight.any()


def added(model, name, **fields):
    fastlora.add_adapter(model, name, config(target_modules=["0", "2"], r=4, **fields))
    return [p for n, p in model.named_parameters() if f".{name}." in n]


@pytest.mark.parametrize("steps_before", [0, 3])
@pytest.mark.parametrize("resting", [0, 100])
def test_built_before_add_adapter(steps_before, resting, caplog):
    """Also where the new adapter rests for long."""
    model = adapted()
    optimizer = torch.optim.AdamW(trained(model))
    steps(model, optimizer, count=steps_before)
    added(model, "b")
    steps(model, optimizer, count=resting)
    assert UNHELD not in caplog.text
    fastlora.set_adapter(model, "b")
    steps(model, optimizer, count=100)
    assert caplog.text.count(UNHELD) == 1 and "0.lora_B.b.weight, 2.lora_B.b.weight;" in caplog.text


@pytest.mark.parametrize("how", ["deleted and added", "unloaded and injected"])
def test_a_name_that_is_used_again(how, caplog):
    model = adapted()
    b = added(model, "b")
    optimizer = torch.optim.AdamW(trained(model) if how.startswith("unloaded") else b)
    fastlora.set_adapter(model, "b")
    steps(model, optimizer)
    if how.startswith("unloaded"):
        fastlora.inject(fastlora.unload(model), config(target_modules=["0", "2"], r=4))
    else:
        fastlora.set_adapter(model, "default")
        fastlora.delete_adapter(model, "b")
        added(model, "b")
        fastlora.set_adapter(model, "b")
    steps(model, optimizer, count=10)
    assert caplog.text.count(UNHELD) == 1


def of_each_row(model):
    with fastlora.use_adapters(model, ["default", "b", None, "b"]):
        return model(torch.randn(4, 8)).square().sum()


LOOPS = (
    "one batch for both", "in turn", "one after the other", "added to the running one", "one optimizer a parameter",
    "frozen", "another model's", "zero gradients",
)  # fmt: skip


@pytest.mark.parametrize("loop", LOOPS)
def test_adapters_that_others_train_are_not_told_of(loop, caplog):
    model = adapted()
    mine, b = trained(model), added(model, "b")
    first, second = (torch.optim.AdamW(p, lr=0.01) for p in (mine, b))
    turns = {"in turn": ["default", "b"] * 20, "one after the other": ["default"] * 20 + ["b"] * 20}
    if loop == "one batch for both":
        for _ in range(20):
            of_each_row(model).backward()
            for optimizer in (first, second):
                optimizer.step()
                optimizer.zero_grad()
    elif loop in turns:
        for name in turns[loop]:
            steps(fastlora.set_adapter(model, name), first if name == "default" else second, count=1)
    elif loop == "added to the running one":
        steps(model, first, count=3)
        first.add_param_group({"params": b})
        for _ in range(20):
            of_each_row(model).backward()
            first.step()
    elif loop == "one optimizer a parameter":
        for optimizer in (each := [torch.optim.SGD([p], lr=0.01) for p in (*mine, *b)]) * 20:
            of_each_row(model).backward()
            optimizer.step()
            if optimizer is each[-1]:
                model.zero_grad()
    elif loop == "frozen":
        for p in b:
            p.requires_grad_(False)
        for _ in range(20):
            of_each_row(model).backward()
            first.step()
    elif loop == "another model's":
        other = adapted()
        own = torch.optim.AdamW(trained(other))
        for _ in range(20):
            (of_each_row(model) + other(torch.randn(4, 8)).sum()).backward()
            own.step()
        first.step()
    else:  # of ids on a GPU, and in other processes
        for p in b:
            p.grad = torch.zeros_like(p)
        steps(model, first, count=20)
    assert UNHELD not in caplog.text


def test_a_change_at_every_step_keeps_nothing():
    model, made = adapted(), []
    for rank in [2, 4] * 10:
        fastlora.set_ranks(model, {"0": rank}, keep=True)
        steps(model, torch.optim.SGD(trained(model), lr=0.1), count=1)
        made += map(weakref.ref, trained(model))
    gc.collect()
    assert {ref() for ref in made} == {None, *trained(model)}


def test_factors_can_be_swapped_for_others():
    model = adapted()
    steps(model, torch.optim.SGD(trained(model), lr=0.1))
    for factor in trained(model):
        torch.utils.swap_tensors(factor, nn.Parameter(factor.detach().clone()))


def test_an_optimizer_with_everything_is_not_looked_at_again(monkeypatch):
    model, other = adapted(), adapted()
    fastlora.add_adapter(other, "b", config(r=2, target_modules=["0"]))  # which none holds
    optimizer = torch.optim.SGD(trained(model), lr=0.1)
    steps(model, optimizer)
    monkeypatch.setattr(optimizer_check, "_look", None)
    steps(model, optimizer, count=20)


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


def test_of_a_merged_model(caplog):
    model = adapted(modules_to_save=["3"])
    optimizer = torch.optim.AdamW(trained(model), lr=0.1)
    head = torch.optim.AdamW(model[3].parameters(), lr=0.1)
    steps(model, head, optimizer)
    for times in (1, 2):
        fastlora.merge(model)
        steps(model, head)
        assert caplog.text.count(MERGED) == times - 1
        steps(model, head, optimizer)
        assert caplog.text.count(MERGED) == times
        fastlora.unmerge(model)
    fastlora.unmerge(fastlora.merge(model))
    steps(model, head, optimizer)
    assert caplog.text.count(MERGED) == len(caplog.messages) == 2


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
