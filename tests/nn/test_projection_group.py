"""Separate q, k, v found at call time: the grouped model equals the ungrouped one, whatever the owner does with x."""

from __future__ import annotations

import copy
import functools
import gc
import itertools
import pickle
import threading
import types
import weakref

import pytest
import torch
from support.helpers import (
    KV,
    Attention,
    CountOps,
    D,
    adapted,
    assert_same,
    calls,
    config,
    lora_grads,
    mix,
    one_by_one,
    outcome,
    plain,
    randomise,
    ungrouped,
)
from torch import nn

import fastlora
from fastlora.nn.linear import Linear
from fastlora.ops import bound


@pytest.fixture
def x():
    return torch.randn(2, 5, D)


@pytest.fixture
def memory():
    return torch.randn(2, 7, D)


class TestTogether:
    def test_one_call_for_three_projections_of_unequal_width(self, x):
        assert calls(adapted(), x) == [(D, KV, KV)]

    def test_values_and_gradients_are_those_of_the_ungrouped(self, x):
        model = adapted()
        assert_same(outcome(model, x), outcome(ungrouped(model), x))

    def test_mixed_ranks_and_a_rank_of_zero(self, x):
        model = adapted(rank_pattern={"q_proj": 5, "k_proj": 0})
        assert calls(model, x) == [(D, KV)]
        assert_same(outcome(model, x), outcome(ungrouped(model), x))

    def test_only_the_adapted_ones(self, x):
        model = nn.Sequential()
        model.add_module("attn", Attention())
        fastlora.inject(model, config(target_modules=["q_proj", "v_proj"]))
        assert calls(randomise(model), x) == [(D, KV)]

    @pytest.mark.parametrize("cross", [False, True])
    def test_dropout_masks_do_not_depend_on_what_runs_together(self, x, memory, cross):
        model, args = adapted(lora_dropout=0.5), (x, memory) if cross else (x,)
        alone = outcome(one_by_one(model), *args)
        assert calls(one_by_one(model), *args) == [(D,), (KV,), (KV,)]
        for _ in range(3):  # the last as the first taught
            assert_same(outcome(model, *args), alone)
        assert calls(model, *args) == ([(D,), (KV, KV)] if cross else [(D, KV, KV)])
        model.attn.k_proj.register_forward_hook(lambda *_: None)
        assert_same(outcome(model, *args), alone)

    def test_dropout_masks_by_row_seeds_do_not_either(self, x):
        model, found = adapted(lora_dropout=0.5), []
        for each in (model, one_by_one(model), one_by_one(model)):
            with fastlora.use_adapters(each, "default", row_seeds=torch.tensor([3, 4])):
                found.append(outcome(each, x))
        assert_same(found[0], found[1])
        compiled = one_by_one(model)
        compiled.attn = torch.compile(compiled.attn, backend="aot_eager")
        with fastlora.use_adapters(compiled, "default", row_seeds=torch.tensor([3, 4])):
            assert_same(outcome(compiled, x)[:1], found[0][:1])

    @pytest.mark.parametrize("again", ["other", "same"])
    def test_a_second_call_has_a_mask_of_its_own(self, x, memory, again):
        seen = {}

        def body(self, x, memory):
            other = memory if again == "other" else x
            # k takes part in q's call; then it comes for another input before its own, and twice for that.
            seen["q"], k = self.q_proj(x), [self.k_proj(other), self.k_proj(x), self.k_proj(x)]
            seen["k"] = [t.detach() for t in k]
            return sum(t.square().sum() for t in k) + self.v_proj(x).sum() + seen["q"].square().sum()

        model = adapted(body, lora_dropout=0.5)
        x, memory = x.flatten(0, 1), memory.flatten(0, 1)
        for _ in range(2):
            mine, here = outcome(model, x, memory), list(seen["k"])
            assert_same(mine, outcome(one_by_one(model), x, memory))
            for a, b in zip(here, seen["k"], strict=True):
                torch.testing.assert_close(a, b)
            masked = here[1:] if again == "other" else here
            assert all(not torch.allclose(a, b) for a, b in itertools.combinations(masked, 2))

    def test_dropout_has_its_own_mask_for_each(self, x):
        model = adapted(lora_dropout=0.5, r=8)
        y = [None] * 3

        def same_weights(self, x, memory):
            y[:] = self.q_proj(x), self.k_proj(x), self.v_proj(x)
            return y[0]

        model.attn.body = same_weights
        with torch.no_grad():
            model.attn.v_proj.bias.zero_()
            model.attn.v_proj.load_state_dict(model.attn.k_proj.state_dict(), strict=False)
        model.attn(x)
        assert not torch.allclose(y[1], y[2])
        model.eval()
        model.attn(x)
        torch.testing.assert_close(y[1], y[2])

    def test_at_initialisation_bit_for_bit(self, x, library_matmul):
        base = Attention()
        model = nn.Sequential()
        model.add_module("attn", copy.deepcopy(base))
        fastlora.inject(model, config(target_modules="qkv"))
        assert torch.equal(model.attn(x), base(x))


def edit_between(self, x, memory):
    q = self.q_proj(x)
    x = x.add_(1.0) if not x.requires_grad else x
    return mix(self, q, self.k_proj(x), self.v_proj(x))


def edit_copy_between(self, x, memory):
    """An edit that autograd allows: x here is not a leaf."""
    x = x * 1.0
    q, k = self.q_proj(x.clone()), self.k_proj(x)
    x += 1.0
    return mix(self, q, k, self.v_proj(x))


class TestNotTogether:
    def test_x_edited_in_place_between_q_and_k(self, x):
        model = adapted(edit_between)
        with torch.no_grad():
            expected = ungrouped(model).attn(x.clone())
            given = x.clone()
            torch.testing.assert_close(model.attn(given), expected)
        assert torch.equal(given, x + 1)

    def test_x_edited_in_place_in_grad_mode(self, x):
        # k saved x, so its backward must refuse: as with an ungrouped model.
        model = adapted(edit_copy_between)
        torch.testing.assert_close(model.attn(x), ungrouped(model).attn(x))
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            model.attn(x).sum().backward()

    @pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
    def test_hook_on_k_only(self, x, register):
        model, seen = adapted(), []
        getattr(model.attn.k_proj, register)(lambda *a: seen.append(a[1][0]))
        assert calls(model, x) == [(D, KV), (KV,)]
        assert len(seen) == 1 and seen[0] is x
        assert_same(outcome(model, x), outcome(ungrouped(model), x))

    def test_a_hook_that_replaces_the_input_of_k(self, x):
        model = adapted()
        model.attn.k_proj.register_forward_pre_hook(lambda m, a: (a[0] * 2,))
        assert_same(outcome(model, x), outcome(ungrouped(model), x))

    def test_backward_hook_on_k_only(self, x):
        model, seen = adapted(), []
        model.attn.k_proj.register_full_backward_hook(lambda m, gi, go: seen.append(go[0].shape))
        assert_same(outcome(model, x), outcome(ungrouped(model), x))
        assert seen == [(2, 5, KV)] * 2

    def test_a_hook_that_is_taken_off_leaves_nothing_learned(self, x):
        model = adapted()
        handle = model.attn.k_proj.register_forward_hook(lambda *a: None)
        calls(model, x, times=2)
        handle.remove()
        assert calls(model, x) == [(D, KV, KV)]

    def test_instance_level_forward_on_a_sibling(self, x):
        model, seen = adapted(), []
        k, old = model.attn.k_proj, model.attn.k_proj.forward

        @functools.wraps(old)
        def replaced(module, *args, **kwargs):  # as accelerate.hooks.add_hook_to_module does it
            seen.append("before")
            return old(*args, **kwargs) + 1.0

        k.forward = types.MethodType(replaced, k)
        alone = ungrouped(model)
        assert calls(model, x)[0] == (D, KV)
        assert seen == ["before"]
        alone.attn.k_proj.forward = types.MethodType(
            lambda module, t: type(module).forward(module, t) + 1.0, alone.attn.k_proj
        )
        torch.testing.assert_close(model.attn(x), alone.attn(x))

    def test_autocast_changed_between_q_and_k(self, x):
        def body(self, x, memory):
            with torch.autocast("cpu", torch.bfloat16):
                q = self.q_proj(x)
            return q, self.k_proj(x), self.v_proj(x)

        model = adapted(body)
        q, k, v = model.attn(x)
        assert (q.dtype, k.dtype, v.dtype) == (torch.bfloat16, torch.float32, torch.float32)
        for mine, other in zip((q, k, v), ungrouped(model).attn(x), strict=True):
            torch.testing.assert_close(mine, other)

    def test_grad_mode_changed_between_q_and_k(self, x):
        def body(self, x, memory):
            with torch.no_grad():
                q = self.q_proj(x)
            return q, self.k_proj(x), self.v_proj(x)

        q, k, v = adapted(body).attn(x)
        assert not q.requires_grad and k.requires_grad and v.requires_grad

    def test_inference_mode_inside_no_grad(self, x):
        def body(self, x, memory):
            with torch.inference_mode():
                q = self.q_proj(x)
            return q, self.k_proj(x), self.v_proj(x)

        with torch.no_grad():
            q, k, v = adapted(body).attn(x)
        assert q.is_inference() and not k.is_inference()

    def test_disabled_between_q_and_k(self, x):
        def body(self, x, memory):
            q = self.q_proj(x)
            with fastlora.disable_adapters(self):
                return q, self.k_proj(x), self.v_proj(x)

        model = adapted(body)
        k = model.attn(x)[1]
        assert torch.equal(k, nn.functional.linear(x, model.attn.k_proj.weight))

    def test_a_projection_called_outside_its_owner_runs_alone(self, x):
        model = adapted()
        with CountOps() as count:
            model.attn.q_proj(x)
            with torch.no_grad():
                model.attn.k_proj.weight.add_(1.0)
            k = model.attn.k_proj(x)
        assert count.calls == [(D,), (KV,)]
        torch.testing.assert_close(k, ungrouped(model).attn.k_proj(x))


class TestLearning:
    def test_only_q_called(self, x):
        model = adapted(lambda self, x, memory: self.q_proj(x))
        assert calls(model, x) == [(D, KV, KV)]
        assert calls(model, x) == [(D,)]
        assert_same(outcome(model, x), outcome(ungrouped(model), x))

    def test_cross_attention(self, x, memory):
        model = adapted()
        first = outcome(model, x, memory)
        assert calls(model, x, memory) == [(D,), (KV, KV)]
        assert_same(first, outcome(ungrouped(model), x, memory))
        assert_same(outcome(model, x, memory), outcome(ungrouped(model), x, memory))

    def test_one_more_call_of_a_projection(self, x, memory):
        def body(self, x, memory):
            out = plain(self, x, x)
            return out + self.q_proj(x).flatten(0, 1) + self.k_proj(memory).sum() * self.q_proj(memory).mean()

        model = adapted(body)
        reference = outcome(ungrouped(model), x, memory)
        for _ in range(3):
            assert_same(outcome(model, x, memory), reference)
        assert calls(model, x, memory) == [(D, KV, KV), (D,), (KV, D)]

    def test_a_failed_pass_teaches_nothing(self, x):
        model = adapted()

        def fail(self, x, memory):
            self.q_proj(x)
            raise ValueError("no")

        model.attn.body = fail
        with pytest.raises(ValueError, match="no"):
            model.attn(x)
        model.attn.body = plain
        assert calls(model, x) == [(D, KV, KV)]

    def test_gradient_of_v_only(self, x):
        model = adapted()

        def of_v(model):
            model.zero_grad()
            given = x.clone().requires_grad_()
            model.attn.body = lambda self, x, memory: (self.q_proj(x), self.k_proj(x), self.v_proj(x))
            model.attn(given)[2].square().sum().backward()
            return [given.grad, *lora_grads(model).values()]

        mine, other = of_v(model), of_v(ungrouped(model))
        assert [None if b is None else b.any().item() for b in other] == [True, None, None, None, None, True, True]
        for a, b in zip(mine, other, strict=True):
            if b is None:
                assert a is None or not a.any()
            else:
                torch.testing.assert_close(a, b)


class TestLifetime:
    def test_unconsumed_results_are_freed_at_exit(self, x):
        held = []

        def body(self, x, memory):
            q = self.q_proj(x)
            (visits,) = self.q_proj.group._visits.values()
            held.extend(weakref.ref(t) for t in visits[-1].waiting.values())
            return q

        model = adapted(body)
        with torch.no_grad():
            y = model.attn(x)
        gc.collect()
        assert y.shape == x.shape and len(held) == 2 and all(ref() is None for ref in held)

    def test_results_and_input_are_freed_after_an_exception(self):
        held = []

        def body(self, x, memory):
            self.q_proj(x)
            (visits,) = self.q_proj.group._visits.values()
            held.extend(weakref.ref(t) for t in visits[-1].waiting.values())
            raise ValueError("no")

        model = adapted(body)
        x = torch.randn(3, D)
        watched = weakref.ref(x)
        with pytest.raises(ValueError, match="no"):
            model.attn(x)
        del x
        gc.collect()
        assert len(held) == 2 and all(ref() is None for ref in held) and watched() is None

    def test_after_a_keyboard_interrupt(self, x):
        def interrupt(self, x, memory):
            self.q_proj(x)
            raise KeyboardInterrupt

        model = adapted(interrupt)
        given = x.clone()
        watched = weakref.ref(given)
        with pytest.raises(KeyboardInterrupt):
            model.attn(given)
        del given
        model.attn.body = plain
        assert_same(outcome(model, x), outcome(ungrouped(model), x))
        gc.collect()
        assert watched() is None

    def test_outputs_do_not_outlive_the_caller(self, x):
        model = adapted()
        y = model.attn(x)
        ref = weakref.ref(y)
        del y
        gc.collect()
        assert ref() is None and not model.attn.q_proj.group._visits

    def test_two_threads(self):
        # Each thread is inside the owner, between its q and its k, at the same time as the other.
        barrier = threading.Barrier(2, timeout=20)

        def body(self, x, memory):
            q = self.q_proj(x)
            barrier.wait()
            k = self.k_proj(x)
            barrier.wait()
            return mix(self, q, k, self.v_proj(x))

        model = adapted(body)
        inputs, results, done = [torch.randn(3, D), torch.randn(4, D)], {}, set()

        def work(i):
            with CountOps() as count:
                results[i] = [model.attn(inputs[i]).detach() for _ in range(5)]
            assert count.calls == [(D, KV, KV)] * 5
            done.add(i)

        threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert done == {0, 1}
        alone = ungrouped(model)
        alone.attn.body = plain
        for i in range(2):
            for y in results[i]:
                torch.testing.assert_close(y, alone.attn(inputs[i]))
        assert not model.attn.q_proj.group._visits

    @pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
    def test_a_copy_has_its_own_group(self, x, copied):
        model = adapted()
        model.attn(x)
        other = copied(model)
        group = other.attn.q_proj.group
        assert group is not model.attn.q_proj.group
        assert [id(m) for m in group.layers] == [id(getattr(other.attn, f"{n}_proj")) for n in "qkv"]
        assert other.attn.k_proj.group is group and other.attn.v_proj.group is group
        assert calls(other, x) == [(D, KV, KV)]
        with torch.no_grad():
            other.attn.k_proj.lora_B["default"].weight.zero_()
        assert_same(outcome(other, x), outcome(ungrouped(other), x))
        assert not torch.allclose(other.attn(x), model.attn(x))

    def test_a_layer_moved_away_works_alone(self, x):
        layer = copy.copy(adapted().attn.q_proj)
        assert isinstance(layer, Linear) and layer(x).shape == (2, 5, D)


class Gated(nn.Module):
    """An MLP whose gate and up share an input, and whose down is as wide as they are."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return self.down(torch.tanh(self.gate(x)) * self.up(x))


def test_whatever_shares_an_input_runs_together_once_it_was_seen_to(monkeypatch):
    model = fastlora.inject(
        Gated(), fastlora.LoraConfig(r=2, target_modules=["gate", "up", "down"], init_lora_weights=False)
    )
    calls, plain = [], bound.BoundCall.__call__

    def count(self, *args, **kwargs):
        calls.append(len(self.W))
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(bound.BoundCall, "__call__", count)
    x, found = torch.randn(3, 8, requires_grad=True), []
    for _ in range(3):
        calls.clear()
        y = model(x)
        found.append((y, *torch.autograd.grad(y.sum(), [x, *[p for p in model.parameters() if p.requires_grad]])))
    assert calls == [2, 1]
    for later in found[1:]:
        for a, b in zip(later, found[0], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    # One of them alone, as a branch that is not taken: what is not used is not computed ahead again.
    model.forward = lambda x: model.gate(x)
    for expected in ([2], [1]):
        calls.clear()
        model(x)
        assert calls == expected
