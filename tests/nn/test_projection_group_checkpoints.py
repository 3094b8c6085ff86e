"""Groups under activation checkpointing (the recomputation does what its forward did), compile and functional_call."""

from __future__ import annotations

import copy
import functools
import gc

import pytest
import torch
from support.helpers import (
    KV,
    CountOps,
    D,
    adapted,
    assert_same,
    calls,
    lora_grads,
    mix,
    one_by_one,
    outcome,
    plain,
    ungrouped,
)
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastlora


@pytest.fixture
def x():
    return torch.randn(2, 5, D)


@pytest.fixture
def memory():
    return torch.randn(2, 7, D)


class TestCheckpointing:
    @staticmethod
    def through(model, use_reentrant, *args):
        torch.manual_seed(11)
        model.zero_grad()
        args = [a.detach().clone().requires_grad_() for a in args]
        y = checkpoint(model.attn, *args, use_reentrant=use_reentrant)
        y.square().sum().backward()
        return [y.detach(), *[a.grad for a in args], *lora_grads(model).values()]

    @pytest.mark.parametrize("p", [0.0, 0.3])
    @pytest.mark.parametrize("cross", [False, True])
    @pytest.mark.parametrize("use_reentrant", [False, True])
    def test_every_step_equals_the_plain_one(self, x, memory, use_reentrant, cross, p):
        args = (x, memory) if cross else (x,)
        model = adapted(lora_dropout=p)
        for _ in range(3):
            assert_same(self.through(model, use_reentrant, *args), outcome(one_by_one(model), *args))
        # The formula holds along a direction, so the masks of forward and backward are the same.
        self.check_directional(model, functools.partial(checkpoint, use_reentrant=use_reentrant), *args)

    @staticmethod
    def check_directional(model, run, *args):
        model, args = copy.deepcopy(model).double(), [a.double() for a in args]
        b = model.attn.v_proj.lora_B["default"].weight
        direction = torch.randn_like(b)

        def loss():
            torch.manual_seed(3)
            given = [a.clone().requires_grad_() for a in args]
            return run(model.attn, *given).square().sum()

        model.zero_grad()
        loss().backward()
        slope, step = (b.grad * direction).sum().item(), 1e-6
        with torch.no_grad():
            b.add_(direction, alpha=step)
        high = loss().item()
        with torch.no_grad():
            b.sub_(direction, alpha=2 * step)
        assert (high - loss().item()) / (2 * step) == pytest.approx(slope, rel=1e-5)

    @pytest.mark.parametrize("use_reentrant", [False, True])
    def test_learned_plan_wastes_nothing(self, x, memory, use_reentrant):
        model = adapted()
        args = [t.requires_grad_() for t in (x, memory)]
        for _ in range(2):
            with CountOps() as count:
                checkpoint(model.attn, *args, use_reentrant=use_reentrant).sum().backward()
        assert count.calls == [(D,), (KV, KV)] * 2

    @pytest.mark.parametrize("early", [True, False])
    def test_two_forwards_before_the_first_backward(self, x, memory, early):
        # What the first pass taught must not change what its recomputation saves.
        model = adapted()

        def both(model, run):
            model.zero_grad()
            with torch.utils.checkpoint.set_checkpoint_early_stop(early):
                losses = [run(model.attn, x, memory).square().sum(), run(model.attn, memory, x).square().sum()]
                sum(losses).backward()
            return list(lora_grads(model).values())

        mine = both(model, functools.partial(checkpoint, use_reentrant=False))
        assert_same(mine, both(ungrouped(model), lambda f, *a: f(*a)))
        assert_same(both(model, functools.partial(checkpoint, use_reentrant=False)), mine)
        assert calls(model, x, memory) == [(D,), (KV, KV)]

    def test_a_graph_that_never_ran_backward_does_not_stop_learning(self, x, memory):
        model = adapted()
        y = checkpoint(model.attn, x, memory, use_reentrant=False)
        assert calls(model, x, memory) == [(D, KV, KV), (KV, D, KV)]
        del y
        gc.collect()
        assert calls(model, x, memory) == [(D,), (KV, KV)]

    @pytest.mark.parametrize("use_reentrant", [False, True])
    def test_a_projection_checkpointed_alone_inside_its_owner(self, x, use_reentrant):
        def body(self, x, memory):
            return mix(self, checkpoint(self.q_proj, x, use_reentrant=use_reentrant), self.k_proj(x), self.v_proj(x))

        model = adapted(body)
        reference = adapted(plain)
        reference.load_state_dict(model.state_dict())
        for _ in range(2):
            assert_same(outcome(model, x), outcome(ungrouped(reference), x))

    @pytest.mark.parametrize("outer", [None, False, True])
    @pytest.mark.parametrize("use_reentrant", [False, True])
    def test_dropout_in_a_projection_checkpointed_alone(self, x, use_reentrant, outer):
        def body(self, x, memory):
            k, v = (checkpoint(layer, x, use_reentrant=use_reentrant) for layer in (self.k_proj, self.v_proj))
            return mix(self, self.q_proj(x), k, v)

        model = adapted(body, lora_dropout=0.3)
        for _ in range(2):
            if outer is None:
                self.check_directional(model, lambda f, *args: f(*args), x)
            else:
                self.check_directional(model, functools.partial(checkpoint, use_reentrant=outer), x)

    def test_saved_tensor_hooks_without_recomputation(self, x, memory):
        model = adapted()
        for _ in range(2):
            with torch.autograd.graph.save_on_cpu():
                mine = outcome(model, x, memory)
        assert_same(mine, outcome(ungrouped(model), x, memory))
        assert calls(model, x, memory) == [(D,), (KV, KV)]


def test_compiled_without_a_graph_break(x):
    model = adapted()
    given = x.clone().requires_grad_()
    torch._dynamo.reset()
    y = torch.compile(model.attn, backend="aot_eager", fullgraph=True)(given)
    torch.testing.assert_close(y, ungrouped(model).attn(x))
    y.sum().backward()
    assert all(g is not None for g in lora_grads(model).values())


def test_functional_call(x):
    model = adapted()
    other = {n: torch.randn_like(p) for n, p in model.named_parameters()}
    y = torch.func.functional_call(model, other, (x,))
    with torch.no_grad():
        for n, p in model.named_parameters():
            p.copy_(other[n])
    torch.testing.assert_close(y, ungrouped(model)(x))


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_disabled_forward_is_repeated_without_adapters(reentrant):
    layer = fastlora.nn.Linear(6, 4, r=2, init_lora_weights=False)
    x = torch.randn(3, 6, requires_grad=True)
    model = nn.Sequential(layer)
    with fastlora.disable_adapters(model):
        y = checkpoint(model, x, use_reentrant=reentrant)
        y.sum().backward()  # inside the context: the base's gradient
    torch.testing.assert_close(x.grad, layer.weight.detach().sum(0).expand(3, 6))
    with fastlora.disable_adapters(model):
        y = checkpoint(model, x, use_reentrant=reentrant)
    x.grad = None
    y.sum().backward()  # and outside
    torch.testing.assert_close(x.grad, layer.weight.detach().sum(0).expand(3, 6))
    checkpoint(model, x, use_reentrant=reentrant).sum().backward()  # and the model goes on
