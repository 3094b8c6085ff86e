"""``freeze_unused_adapters``: which adapters ran since the last step, however they came to run."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastlora
from fastlora import LoraConfig
from fastlora.model.adapters import routers_of

NAMES = ("default", "b", "c")
X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


def three_adapters():
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["0", "2"])
    model = fastlora.inject(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)), config)
    for name in NAMES[1:]:
        fastlora.add_adapter(model, name, config)
    return model


def factors(model, name):
    return [p for n, p in model.named_parameters() if f".{name}." in n]


def optimizer_of(model, *names):
    return torch.optim.AdamW([p for name in names or NAMES for p in factors(model, name)], lr=0.1)


def run(model, x=X):
    """A step's forward and backward; the input asks for a gradient, so that the base alone has one, too."""
    model(x.clone().requires_grad_()).square().sum().backward()


def within(model, ids, *more):
    with fastlora.use_adapters(model, ids):
        run(model)
        for other in more:
            within(model, other)


def stepped(model, optimizer):
    """The adapters that a step trains; gradients are zeros then, as ids on a GPU leave them."""
    optimizer.step()
    trained = {n for n in NAMES if any(p.grad is not None for p in factors(model, n))}
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    return trained


def by_default(model):
    run(model)


def by_default_and_in_a_context(model):
    run(model)
    within(model, "b")


def by_default_within_the_model(model):
    model[2](model[0](X)).sum().backward()
    within(model, "b")


def by_default_in_a_mask(model):
    with fastlora.track(model) as tracker, tracker.mask(torch.ones(1, 3, dtype=torch.bool)):
        run(model, X[None])
    within(model, "b")


def by_default_without_a_graph(model):
    with torch.no_grad():
        model(X)
    within(model, "b")


def in_contexts(model):
    within(model, "b")
    within(model, "c")


def in_nested_contexts(model):
    within(model, "b", "c")


def in_a_context_without_a_forward(model):
    run(model)
    with fastlora.use_adapters(model, "b"):
        pass


def in_a_context_opened_without_grad(model):
    run(model)
    with torch.no_grad(), fastlora.use_adapters(model, "b"), torch.enable_grad():
        run(model)


def in_a_batch_and_by_default(model):
    within(model, torch.tensor([1, -1, 2]))
    run(model)


def in_a_batch_of_the_base(model):
    within(model, torch.tensor([-1, -1, -1]))


def disabled(model):
    with fastlora.disable_adapters(model):
        run(model)


def by_other_defaults(model):
    run(model)
    fastlora.set_adapter(model, "b")
    run(model)
    within(model, "c")
    fastlora.set_adapter(model, "default")


def chosen_and_not_run(model):
    fastlora.set_adapter(model, "b")
    fastlora.set_adapter(model, "default")
    within(model, "c")


def checkpointed(model, reentrant=False):
    with fastlora.use_adapters(model, "b"):
        y = checkpoint(model, X.clone().requires_grad_(), use_reentrant=reentrant)
    y.sum().backward()


def checkpointed_reentrant(model):
    checkpointed(model, reentrant=True)


def compiled(model):
    torch._dynamo.reset()  # how often code may be compiled again is counted over all tests of a process
    fast = torch.compile(model, backend="eager", fullgraph=True)
    for _ in range(2):
        run(fast)
        with fastlora.use_adapters(model, "b"):
            run(fast)
    with torch.no_grad(), fastlora.use_adapters(model, "c"):
        fast(X)


RAN = {
    by_default: {"default"},
    by_default_and_in_a_context: {"default", "b"},
    by_default_within_the_model: {"default", "b"},
    by_default_in_a_mask: {"default", "b"},
    by_default_without_a_graph: {"b"},
    in_contexts: {"b", "c"},
    in_nested_contexts: {"b", "c"},
    in_a_context_without_a_forward: {"default"},
    in_a_context_opened_without_grad: {"default", "b"},
    in_a_batch_and_by_default: {"default", "b", "c"},
    in_a_batch_of_the_base: set(),
    disabled: set(),
    by_other_defaults: {"default", "b", "c"},
    chosen_and_not_run: {"c"},
    checkpointed: {"b"},
    checkpointed_reentrant: {"b"},
    compiled: {"default", "b"},
}


@pytest.mark.parametrize("how", RAN, ids=lambda how: how.__name__)
def test_adapters_that_ran_are_trained_and_no_others(how):
    model = three_adapters()
    optimizer = optimizer_of(model)
    fastlora.freeze_unused_adapters(model, optimizer)
    for _ in range(2):  # what ran before a step does not count at the next
        within(model, torch.tensor([0, 1, 2]))
        assert stepped(model, optimizer) == set(NAMES)
        how(model)
        assert stepped(model, optimizer) == RAN[how]


def test_a_context_that_stays_open_over_steps_counts_where_it_ran():
    model = three_adapters()
    optimizer = optimizer_of(model)
    fastlora.freeze_unused_adapters(model, optimizer)
    within(model, torch.tensor([0, 1, 2]))
    assert stepped(model, optimizer) == set(NAMES)
    with fastlora.use_adapters(model, "b"):
        for _ in range(2):
            run(model)
            assert stepped(model, optimizer) == {"b"}
        run(model)
        within(model, "c")
        assert stepped(model, optimizer) == {"b", "c"}
        within(model, "c")
        assert stepped(model, optimizer) == {"c"}
        assert stepped(model, optimizer) == set(NAMES)  # nothing was seen to run


def test_each_of_two_optimizers_knows_what_ran_since_its_own_step():
    model = three_adapters()
    first, second = optimizer_of(model, "default"), optimizer_of(model, "b", "c")
    for optimizer in (first, second):
        fastlora.freeze_unused_adapters(model, optimizer)
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    run(model)
    within(model, "b")
    first.step()
    assert all(p.grad is None for p in factors(model, "c"))
    for p in factors(model, "c"):
        p.grad = torch.zeros_like(p)
    second.step()
    assert all(p.grad is None for p in factors(model, "c"))
    assert all(p.grad is not None for name in ("default", "b") for p in factors(model, name))


def test_one_that_ran_and_was_deleted():
    model = three_adapters()
    optimizer = optimizer_of(model)
    fastlora.freeze_unused_adapters(model, optimizer)
    within(model, "b")
    fastlora.delete_adapter(model, "b")
    run(model)
    assert stepped(model, optimizer) == {"default"}


def test_nothing_is_kept_once_the_hook_is_removed():
    model = three_adapters()
    handle = fastlora.freeze_unused_adapters(model, optimizer_of(model))
    handle.remove()
    del handle
    with fastlora.use_adapters(model, torch.tensor([0, 1, 2])):
        way = weakref.ref(routers_of(model)[0].current())
        run(model)
    gc.collect()
    assert way() is None
