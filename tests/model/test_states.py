"""Active, mixed, disabled, merged: each state means one thing, per thread, task and recomputation, or is refused."""

from __future__ import annotations

import asyncio
import contextvars

import pytest
import torch
from support.adapters_help import IDS, batch, gradients, model
from torch.utils.checkpoint import checkpoint

import fastlora
from fastlora import LoraConfig

CONTEXTS = {
    "b": lambda m: fastlora.use_adapters(m, "b"),
    "ids": lambda m: fastlora.use_adapters(m, IDS),
    "disabled": fastlora.disable_adapters,
}


def answers(m, x):
    """The outputs of the default, of "b" and of the base."""
    with torch.no_grad():
        found = {"default": m(x)}
        with fastlora.use_adapters(m, "b"):
            found["b"] = m(x)
        with fastlora.disable_adapters(m):
            found["base"] = m(x)
    return found


def same(got, want):
    assert got.keys() == want.keys()
    for name, grad in want.items():
        torch.testing.assert_close(got[name], grad, rtol=1e-9, atol=1e-12)


class TestMerged:
    @pytest.mark.parametrize("name", ["default", "b", "c"])
    def test_runs_the_merged_adapter_alone(self, name):
        """Also in layers that it does not have, whatever is active."""
        m, x = model(), batch()
        before = {key: value.clone() for key, value in m.state_dict().items()}
        with fastlora.use_adapters(m, name):
            want = m(x)
        fastlora.merge(m, name)
        torch.testing.assert_close(m(x), want, rtol=1e-12, atol=1e-12)
        fastlora.unmerge(m)
        assert all(torch.equal(value, before[key]) for key, value in m.state_dict().items())
        with fastlora.use_adapters(m, name):
            assert torch.equal(m(x), want)

    def test_what_cannot_run_is_refused(self):
        m, x = model(), batch()
        fastlora.merge(m, "c")
        want = m(x)
        refused = [
            lambda: fastlora.disable_adapters(m).__enter__(),
            lambda: fastlora.use_adapters(m, "c").__enter__(),
            lambda: fastlora.set_adapter(m, "b"),
            lambda: fastlora.add_adapter(m, "d", LoraConfig(r=1, target_modules=["2"])),
        ]
        for call in refused:
            with pytest.raises(ValueError, match="model: 'c' is merged into '0.query'; call fastlora.unmerge first"):
                call()
        assert torch.equal(m(x), want)
        fastlora.set_adapter(m, "c")
        assert torch.equal(m(x), want)
        fastlora.unmerge(m)
        torch.testing.assert_close(m(x), want)

    @pytest.mark.parametrize("name", CONTEXTS)
    def test_no_merge_within_a_context_of_any_thread(self, name):
        m, x = model(), batch()
        with CONTEXTS[name](m):
            want = m(x)
            for call in (fastlora.merge, lambda m: contextvars.Context().run(fastlora.merge, m)):
                with pytest.raises(ValueError, match="model: use_adapters or disable_adapters is open"):
                    call(m)
            assert torch.equal(m(x), want)
        fastlora.merge(m)

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_a_merge_before_the_recomputation(self, reentrant):
        m, x = model(), batch().requires_grad_()
        y = checkpoint(m, x, use_reentrant=reentrant)
        fastlora.merge(m)
        with pytest.raises(RuntimeError, match="the weights were merged or unmerged after the forward"):
            y.sum().backward()


def test_deleting_an_adapter_that_a_context_runs():
    m, x = model(), batch()
    with torch.no_grad(), fastlora.use_adapters(m, IDS):
        want = m(x)
        with fastlora.disable_adapters(m), pytest.raises(ValueError, match="name: 'c' runs in a context"):
            fastlora.delete_adapter(m, "c")
        assert torch.equal(m(x), want)
    fastlora.delete_adapter(m, "c")


def test_a_context_that_outlives_models_keeps_nothing_of_them():
    m, other, x = model(), model(), batch()
    want = answers(m, x)
    with fastlora.use_adapters(other, "c"), fastlora.use_adapters(m, "b"):
        assert torch.equal(m(x), want["b"])
        with fastlora.disable_adapters(other):
            assert torch.equal(m(x), want["b"])
        with fastlora.use_adapters(other, "b"):
            y = other(x)
        assert not torch.equal(other(x), y)
    before = dict(contextvars.copy_context())
    for _ in range(3):
        with fastlora.use_adapters(model(), "b"):
            pass
    assert dict(contextvars.copy_context()) == before


class TestTasks:
    def test_each_task_has_its_own_adapter(self):
        m, x = model(), batch()
        want, found = answers(m, x), {}

        async def serve(name, turns):
            context = fastlora.disable_adapters(m) if name == "base" else fastlora.use_adapters(m, name)
            with context:
                for turn in range(turns):
                    await asyncio.sleep(0)
                    found[name, turn] = m(x)
            await asyncio.sleep(0)
            found[name, "after"] = m(x)

        async def serve_all():
            await asyncio.gather(*[serve(name, turns) for name, turns in (("b", 2), ("base", 4), ("default", 3))])
            return m(x)

        assert torch.equal(asyncio.run(serve_all()), want["default"])
        assert torch.equal(m(x), want["default"])
        for (name, turn), y in found.items():
            assert torch.equal(y, want["default" if turn == "after" else name]), (name, turn)

    def test_a_thread_that_a_task_waits_for_answers_as_the_task(self):
        m, x = model(), batch()

        async def serve():
            with fastlora.use_adapters(m, "b"):
                return await asyncio.to_thread(m, x)

        assert torch.equal(asyncio.run(serve()), answers(m, x)["b"])

    def test_compiled_code_does_not_answer_with_another_task_s_adapter(self):
        m, x = model(torch.float32, blocks=1), batch(torch.float32)
        want = answers(m, x)
        torch._dynamo.reset()
        compiled = torch.compile(m, backend="eager")

        async def serve(name):
            with fastlora.use_adapters(m, name):
                at_once = compiled(x)
                await asyncio.sleep(0)
                return at_once, compiled(x)

        async def serve_all():
            return await asyncio.gather(serve("b"), serve("default"))

        for name, pair in zip(("b", "default"), asyncio.run(serve_all()), strict=True):
            for y in pair:
                torch.testing.assert_close(y, want[name])
        torch.testing.assert_close(compiled(x), want["default"])

    def test_contexts_close_in_any_order_and_elsewhere(self):
        m, x = model(), batch()
        want = answers(m, x)
        first, second = fastlora.use_adapters(m, "b"), fastlora.disable_adapters(m)
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        assert torch.equal(m(x), want["base"])
        second.__exit__(None, None, None)
        assert torch.equal(m(x), want["default"])
        first = fastlora.use_adapters(m, "b")
        first.__enter__()
        contextvars.Context().run(first.__exit__, None, None, None)
        assert torch.equal(m(x), want["default"])


class TestRecomputation:
    @pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
    @pytest.mark.parametrize("name", CONTEXTS)
    @pytest.mark.parametrize("part", ["whole", "part"])
    def test_reentrant_goes_the_way_of_its_forward(self, training, name, part):
        m, x = model().train(training), batch().requires_grad_()
        with torch.no_grad():
            m(x)
        run = m if part == "whole" else m[:2]

        def step(forward):
            m.zero_grad()
            x.grad = None
            with CONTEXTS[name](m):
                y = forward()
            y.square().sum().backward()
            return {**gradients(m), "x": x.grad}

        same(step(lambda: checkpoint(run, x, use_reentrant=True)), step(lambda: run(x)))

    @pytest.mark.parametrize("inner", [False, True])
    @pytest.mark.parametrize("outer", [False, True])
    def test_a_checkpoint_within_a_checkpoint(self, inner, outer):
        m, x = model(), batch().requires_grad_()

        def nested(x):
            return m[1](checkpoint(m[0], x, use_reentrant=inner))

        def step(forward):
            m.zero_grad()
            with fastlora.use_adapters(m, "b"):
                y = forward()
            y.square().sum().backward()
            return gradients(m)

        same(step(lambda: checkpoint(nested, x, use_reentrant=outer)), step(lambda: m[:2](x)))

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_a_context_inside_what_is_repeated(self, reentrant):
        m, x = model(), batch().requires_grad_()

        def inside(x):
            with fastlora.use_adapters(m, "b"):
                return m(x)

        def both(x):
            with fastlora.disable_adapters(m):
                reference = m(x)
            return (m(x) - reference).square()

        def step(forward):
            m.zero_grad()
            forward(x).sum().backward()
            return gradients(m)

        same(step(lambda x: checkpoint(inside, x, use_reentrant=reentrant)), step(inside))
        with pytest.raises(RuntimeError, match="cannot be told from others with other adapters"):
            step(lambda x: checkpoint(both, x, use_reentrant=reentrant))


def test_a_second_adapter_does_not_replace_the_head_of_the_first(tmp_path):
    def made(**more):
        config = fastlora.LoraConfig(r=2, target_modules=["0"], modules_to_save=["1"], **more)
        return fastlora.inject(torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 2)), config)

    torch.manual_seed(0)
    first = made()
    fastlora.save(first, tmp_path)
    fastlora.load(first, tmp_path, adapter="b")  # the same head
    with torch.no_grad():
        first[1].weight.add_(1)
    before = {k: v.clone() for k, v in first.state_dict().items()}
    with pytest.raises(ValueError, match="1.weight' differs from the model's, which its adapters share"):
        fastlora.load(first, tmp_path, adapter="c")
    after = first.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[k], before[k]) for k in before)
