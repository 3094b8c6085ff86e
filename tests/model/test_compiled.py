"""torch.compile of whole models: one graph, one more for dynamic sizes, and the statistics of eager."""

from __future__ import annotations

import contextlib
import copy
import logging

import pytest
import torch
from support.model_zoo import build
from torch import nn

import fastlora

counters = torch._dynamo.utils.counters


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def graphs():
    assert not counters["graph_break"]
    return counters["stats"]["unique_graphs"]


def call(model, name, samples):
    g = torch.Generator().manual_seed(samples)
    if name.startswith("timm"):
        return model(torch.randn(samples, 3, 16, 16, generator=g))
    return model(input_ids=torch.randint(3, 50, (samples, 9), generator=g)).logits


STACKS = {"timm_vit": "blocks", "bert": "bert.encoder.layer", "llama": "model.layers"}


def adapted(name):
    model = build(name).train()
    owner, _, stack = STACKS[name].rpartition(".")
    owner = model.get_submodule(owner)
    setattr(owner, stack, getattr(owner, stack)[:1])  # one block compiles in half the time
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    torch.manual_seed(0)
    return fastlora.inject(model, fastlora.LoraConfig(r=4, target_modules="qkv", init_lora_weights=False))


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


SIZES = (2, 3, 5)  # the second compiles once more, the third no longer


# Llama's graph through dynamo alone: autograd's part of it has nothing that BERT's does not have.
@pytest.mark.parametrize("name, backend", [("timm_vit", "aot_eager"), ("bert", "aot_eager"), ("llama", "eager")])
def test_a_model_with_statistics_and_dynamic_batches(name, backend):
    found, grads = [], []
    for compiled in (True, False):
        model = adapted(name)
        run = torch.compile(model, backend=backend, fullgraph=True) if compiled else model
        with fastlora.track(model, every=1, statistics=("grad_sq", "act_var")) as tracker:
            for samples in SIZES:
                model.zero_grad()
                call(run, name, samples).square().mean().backward()
                tracker.step()
        found.append((tracker.scores(), tracker.scores("act_var")))
        grads.append(gradients(model))
    assert graphs() == 2
    for mine, theirs in zip(*found, strict=True):
        for key, value in theirs.items():
            assert mine[key] == pytest.approx(value, rel=1e-5)
    for key, grad in grads[1].items():
        torch.testing.assert_close(grads[0][key], grad, rtol=1e-3, atol=1e-6)


def test_a_model_without_statistics():
    model = adapted("timm_vit")
    run = torch.compile(model, backend="aot_eager", fullgraph=True)
    for samples in SIZES:
        model.zero_grad()
        call(run, "timm_vit", samples).square().mean().backward()
    assert graphs() == 2
    mine = gradients(model)
    model.zero_grad()
    call(model, "timm_vit", SIZES[-1]).square().mean().backward()
    for key, grad in gradients(model).items():
        torch.testing.assert_close(mine[key], grad, rtol=1e-3, atol=1e-6)


def small(p=0.0):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    config = fastlora.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, lora_dropout=p)
    return fastlora.inject(model, config)


def batch(seed, samples=5):
    return torch.randn(samples, 3, 8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    "statistics, micro", [(("grad_sq",), 3), (("act_var",), 1), (("fisher", "act_var"), 1), (("fisher", "act_var"), 3)]
)
def test_accumulated_steps_are_not_compiled_again(statistics, micro):
    found = []
    for compiled in (False, True):
        model = small()
        run = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
        with fastlora.track(model, every=1, statistics=statistics) as tracker:
            for i in range(4 * micro):
                run(batch(i)).square().mean().backward()
                if i % micro == micro - 1:
                    tracker.step()
        found.append({kind: dict(tracker.scores(kind)) for kind in statistics})
    assert graphs() == 1
    for kind in statistics:
        assert found[1][kind] == pytest.approx(found[0][kind], rel=1e-6)


def test_fisher_of_eager_and_compiled_forwards_in_one_step():
    """The samples of both count, and a state that is loaded goes on with the same signs."""
    found = []
    for compiled in (False, True):
        model = small()
        run = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True) if compiled else model
        for reduction in ("mean", "sum"):  # which changes nothing that is compiled
            options = dict(every=1, statistics="fisher", loss_reduction=reduction)
            with fastlora.track(model, **options) as tracker:
                run(batch(0)).square().mean().backward()
                tracker.step()
                state = tracker.state_dict()
            with fastlora.track(model, **options) as tracker:
                tracker.load_state_dict(state)
                run(batch(1)).square().mean().backward()
                run(batch(2, samples=4)).square().mean().backward()
                tracker.step()
            found.append(dict(tracker.scores("fisher")))
    for eager, mine in zip(found[:2], found[2:], strict=True):
        assert mine == pytest.approx(eager, rel=1e-6)


def test_sampled_steps_are_two_graphs():
    model = small()
    run = torch.compile(model, backend="aot_eager", fullgraph=True)
    with fastlora.track(model, every=3) as tracker:
        for i in range(7):
            run(batch(i)).square().mean().backward()
            tracker.step()
    assert graphs() == 2


def test_a_schedule_that_lets_go_is_one_more_graph():
    """torch 2.11 would go on with the frozen phase's code, without gradients and without a word."""
    model = fastlora.inject(
        nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)),
        fastlora.LoraConfig(r=2, target_modules=["0"], modules_to_save=["2"], init_lora_weights=False),
    )
    eager, run = copy.deepcopy(model), torch.compile(model, backend="aot_eager", fullgraph=True)
    optimizer = torch.optim.SGD(fastlora.param_groups(model, lr_lora=1e-3))
    scheduler = fastlora.training.Cosine(optimizer, 9, freeze={"lora": 2})
    fastlora.track(model, every=1)
    for step in range(4):
        eager.load_state_dict(model.state_dict())
        for forward in (eager, run):
            forward(batch(0)).square().mean().backward()
        found, expected = gradients(model), gradients(eager)
        frozen = {name for name in expected if "lora" in name} if step < 2 else set()
        assert set(expected) - set(found) == frozen
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, expected[name], msg=name)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        eager.zero_grad()
    assert graphs() == 2


def test_adapters_that_change_are_explained(caplog):
    model = small()
    for name in "bc":
        fastlora.add_adapter(model, name, fastlora.LoraConfig(r=2, target_modules="all-linear"))
    run = torch.compile(model, backend="aot_eager", fullgraph=True)
    with caplog.at_level(logging.WARNING, "fastlora"):
        for ids in ([0, 1, 1, 0, -1], [1, 0, 0, 0, 1], ["b", "default", None, "b", "b"]):
            with fastlora.use_adapters(model, torch.tensor(ids) if isinstance(ids[0], int) else ids):
                run(batch(0)).square().mean().backward()
        assert graphs() == 1 and not caplog.records
        for _ in range(2):
            with fastlora.use_adapters(model, ["b", "c", "c", "c", "b"]):
                run(batch(0)).square().mean().backward()
        assert graphs() == 2
        with fastlora.use_adapters(model, "c"):
            run(batch(0)).square().mean().backward()
        assert graphs() == 3
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2
    assert "compiled again for the adapters of this batch, b, c:" in said[0] and "these did: default, b." in said[0]
    assert "compiled again for the adapters of this batch, c:" in said[1] and "default, b; b, c." in said[1]


def test_eager_models_hear_nothing_of_compilation(caplog):
    model = small()
    fastlora.add_adapter(model, "b", fastlora.LoraConfig(r=2, target_modules="all-linear"))
    for ids in ("b", "default", torch.tensor([0, 1, 1, 0, -1])):
        with fastlora.use_adapters(model, ids):
            model(batch(0))
    assert "compiled" not in caplog.text


def test_inductor():
    model = adapted("timm_vit")
    call(model, "timm_vit", 2).square().mean().backward()
    want = gradients(model)
    model.zero_grad()
    with fastlora.track(model, every=1) as tracker:
        run = torch.compile(model, fullgraph=True)
        call(run, "timm_vit", 2).square().mean().backward()
        tracker.step()
    for key, grad in want.items():
        torch.testing.assert_close(gradients(model)[key], grad, rtol=1e-3, atol=1e-5)
    assert all(value > 0 for value in tracker.scores().values())


@pytest.mark.parametrize("tracked", [False, True])
def test_the_graph_holds_our_operator(tracked):
    """And not the formula that exporters get: torch 2.11 tells all code that is compiled that it is exported."""
    model, found = adapted("timm_vit"), []

    def keep(graph, example_inputs):
        found.extend(node.target for node in graph.graph.nodes if node.op == "call_function")
        return graph

    with fastlora.track(model, every=1) if tracked else contextlib.nullcontext():
        call(torch.compile(model, backend=keep), "timm_vit", 2).sum().backward()
    assert torch.ops.fastlora.lora_linear in [getattr(target, "overloadpacket", target) for target in found]
