"""Cosine with a floor, and adapters frozen at first."""

from __future__ import annotations

import copy
import io
import math
import warnings

import pytest
import torch
from support.optimizer_help import backward, grouped
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, SequentialLR

import fastlora
from fastlora.training.schedule import Cosine


def train(model, optimizer, scheduler, steps, first=0):
    for step in range(first, first + steps):
        optimizer.zero_grad()
        backward(model, step)
        optimizer.step()
        scheduler.step()


def values(model):
    return {n: p.detach().clone() for n, p in model.named_parameters()}


class TestCosine:
    def test_rates_are_those_of_torch_s_cosine_and_stay_at_the_floor(self):
        _, mine = grouped()
        _, other = grouped()
        ours, theirs = Cosine(mine, 10, floor=1e-3), CosineAnnealingLR(other, 10, eta_min=1e-3)
        for step in range(15):
            if step <= 10:
                assert ours.get_last_lr() == pytest.approx(theirs.get_last_lr(), rel=1e-9)
            else:
                assert ours.get_last_lr() == pytest.approx([1e-3, 1e-3], rel=1e-12)
            for optimizer, scheduler in ((mine, ours), (other, theirs)):
                optimizer.step()
                scheduler.step()

    def test_warmup_rises_and_counts(self):
        _, optimizer = grouped(rates=(1.0, 1.0))
        scheduler, rates = Cosine(optimizer, 8, floor=0.1, warmup=3), []
        for _ in range(9):
            rates.append(scheduler.get_last_lr()[0])
            optimizer.step()
            scheduler.step()
        assert rates[:4] == pytest.approx([0.1 + 0.9 * i / 4 for i in (1, 2, 3, 4)])
        assert rates[3:] == pytest.approx([0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * i / 5)) for i in range(6)])

    @pytest.mark.parametrize("how", ["requires_grad", "lr"])
    def test_frozen_for_exactly_so_many_optimiser_steps(self, how):
        model, optimizer = grouped(torch.optim.AdamW, weight_decay=0.1)
        scheduler = Cosine(optimizer, 20, freeze=3, freeze_by=how)
        start = values(model)
        train(model, optimizer, scheduler, 3)
        moved = {n for n, v in values(model).items() if not torch.equal(v, start[n])}
        assert moved == {"head.weight", "head.bias"}
        # Under "lr" the moments have filled, under "requires_grad" the first step is the optimiser's first.
        assert (model["lora"].weight in optimizer.state) == (how == "lr")
        train(model, optimizer, scheduler, 1, first=3)
        assert all(not torch.equal(v, start[n]) for n, v in values(model).items())
        assert all(p.requires_grad for p in model.parameters())

    @pytest.mark.parametrize("how", ["requires_grad", "lr"])
    @pytest.mark.parametrize(
        "freeze, moved", [(2, "head"), ({"lora": 2}, "head"), ({"lora": 2, "lora_B": 0}, "B"), ({"lora_B": 2}, "A")]
    )
    def test_both_halves_of_an_adapter_s_groups(self, how, freeze, moved):
        """LoRA+: ``param_groups(lr_ratio=...)`` has B in a group of its own."""
        torch.manual_seed(0)
        config = fastlora.LoraConfig(r=2, target_modules=["0"], modules_to_save=["1"], init_lora_weights=False)
        model = fastlora.inject(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), config)
        optimizer = torch.optim.AdamW(fastlora.param_groups(model, lr_ratio=16))
        scheduler, start = Cosine(optimizer, 10, freeze=freeze, freeze_by=how), values(model)

        def stepped():
            optimizer.zero_grad()
            model(torch.ones(3, 4)).square().sum().backward()
            optimizer.step()
            scheduler.step()
            return {n for n, v in values(model).items() if not torch.equal(v, start[n])}

        trained = {"A": {"0.lora_A.default.weight"}, "B": {"0.lora_B.default.weight"}, "head": set()}
        head = {"1.weight", "1.bias"}
        for _ in range(2):
            assert stepped() == head | trained[moved]
        assert stepped() == head | trained["A"] | trained["B"]

    @pytest.mark.parametrize("names", [["lora_B", "head"], ["lora", "lora_B"]])
    def test_half_an_adapter_alone(self, names):
        """A that is never trained, or no group that learns meanwhile."""
        _, optimizer = grouped()
        for group, name in zip(optimizer.param_groups, names, strict=True):
            group["name"] = name
        if "head" in names:
            Cosine(optimizer, 5, freeze=2)
            assert [group["params"][0].requires_grad for group in optimizer.param_groups] == [False, True]
        else:
            with pytest.raises(ValueError, match="freeze: expected a group that learns meanwhile"):
                Cosine(optimizer, 5, freeze=2)

    @pytest.mark.parametrize("how", ["requires_grad", "lr"])
    @pytest.mark.parametrize("stop", [1, 3, 6])
    def test_resumes_from_a_file(self, how, stop):
        def fresh():
            model, optimizer = grouped(torch.optim.AdamW)
            return model, optimizer, Cosine(optimizer, 9, floor=1e-3, freeze={"lora": 3}, freeze_by=how)

        whole = fresh()
        train(*whole, 9)
        first = fresh()
        train(*first, stop)
        file = io.BytesIO()
        torch.save([part.state_dict() for part in first], file)
        file.seek(0)
        second = fresh()
        for part, state in zip(second, torch.load(file, weights_only=True), strict=True):
            part.load_state_dict(state)
        assert second[2].get_last_lr() == first[2].get_last_lr()
        train(*second, 9 - stop, first=stop)
        for mine, expected in zip(second[0].parameters(), whole[0].parameters(), strict=True):
            assert torch.equal(mine, expected)

    def test_a_left_over_gradient_is_not_stepped(self):
        model, optimizer = grouped()
        backward(model)
        start = values(model)
        Cosine(optimizer, 5, freeze=2)
        optimizer.step()
        assert torch.equal(model["lora"].weight, start["lora.weight"])
        assert not torch.equal(model["head"].weight, start["head.weight"])

    def test_inside_torch_s_sequence(self):
        _, optimizer = grouped()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns about its own call of step(epoch)
            constant = torch.optim.lr_scheduler.ConstantLR(optimizer, 0.5, total_iters=2)
            scheduler = SequentialLR(optimizer, [constant, Cosine(optimizer, 4, floor=1e-3)], milestones=[2])
            rates = []
            for _ in range(7):
                rates.append(optimizer.param_groups[0]["lr"])
                optimizer.step()
                scheduler.step()
        assert rates[2] == pytest.approx(0.5) and rates[6] == pytest.approx(1e-3)

    @pytest.mark.parametrize(
        "kwargs, message",
        [
            ({"steps": 0}, "steps: expected an integer >= 1, got 0"),
            ({"floor": 0.0}, "floor: expected a learning rate > 0, got 0.0"),
            ({"floor": 0.2}, "floor: expected at most the learning rate 0.1 of group 'head', got 0.2"),
            ({"warmup": 10}, "warmup: expected less than steps = 10, got 10"),
            ({"freeze": -1}, "freeze: expected an integer >= 0, got -1"),
            ({"freeze": 10}, "freeze: expected less than the 10 steps, so that 'lora' learns, got 10"),
            ({"freeze": {"norm": 2}}, r"freeze: expected names of parameter groups, \['lora', 'head'\], got 'norm'"),
            ({"freeze": {"lora": 2, "head": 2}}, "freeze: expected a group that learns meanwhile"),
            (
                {"freeze": 2, "freeze_by": "detach"},
                "freeze_by: expected one of .*, got 'detach'",
            ),
        ],
    )
    def test_refused_by_name_with_nothing_changed(self, kwargs, message):
        model, optimizer = grouped()
        before = copy.deepcopy(optimizer.state_dict())
        with pytest.raises(ValueError, match=message):
            Cosine(optimizer, **{"steps": 10, **kwargs})
        assert optimizer.state_dict() == before and all(p.requires_grad for p in model.parameters())
        with pytest.raises(TypeError, match="optimizer: expected a torch.optim.Optimizer, got Linear"):
            Cosine(nn.Linear(1, 1), 10)
