"""A dropped model is freed at once: nothing that was done to it makes its parameters part of a reference cycle."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import gc
import pickle
import tempfile
import threading
import weakref

import pytest
import torch
from support.helpers import FAMILIES, config, randomise
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastlora


class TorchAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)

    def forward(self, x):
        return self.block(x)


class Siblings(nn.Module):
    """Two linears that share an input, which has to be seen."""

    def __init__(self):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(16, 24), nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, x):
        return self.down(self.gate(x).sigmoid() * self.up(x))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(16, 16) for _ in range(3))

    def forward(self, x):
        return nn.functional.scaled_dot_product_attention(self.q_proj(x), self.k_proj(x), self.v_proj(x))


MODELS = {"torch's attention": TorchAttention, "siblings": Siblings, "attention": Attention}


def adapted(kind):
    torch.manual_seed(0)
    return randomise(fastlora.inject(MODELS[kind](), config(target_modules="all-linear", r=2)))


def run(model):
    for _ in range(3):
        model(torch.randn(2, 5, 16)).square().sum().backward()
    return model


def tracked(model, **options):
    with fastlora.track(model, **options) as tracker:
        for _ in range(2):
            model(torch.randn(2, 5, 16)).square().sum().backward()
            tracker.step()
    return model


def several(model):
    fastlora.add_adapter(model, "b", config(target_modules="all-linear", r=3))
    with fastlora.use_adapters(model, torch.tensor([0, 1])):
        run(model)
    fastlora.delete_adapter(model, "b")
    return run(model)


def reranked(model):
    fastlora.set_ranks(run(model), {row.key: 1 for row in fastlora.summary(model).rows}, reinit=True)
    return run(model)


def unmerged(model):
    return run(fastlora.unmerge(fastlora.merge(run(model))))


def compiled(model):
    torch.compile(model, backend="eager")(torch.randn(2, 5, 16)).sum().backward()
    torch.compiler.reset()
    gc.collect()  # what a compiler traced is garbage of the compiler's own, which is a cycle
    return model


def ejected(model):
    from fastlora.model.eject import eject

    return run(eject(run(model)).requires_grad_())


def trained(model):
    optimizer = torch.optim.AdamW(fastlora.param_groups(model))
    fastlora.freeze_unused_adapters(model, optimizer)
    schedule = fastlora.training.Cosine(optimizer, 10)
    for _ in range(2):
        run(model)
        optimizer.step()
        schedule.step()
    return model


def checkpointed(model):
    for reentrant in (False, True):
        checkpoint(model, torch.randn(2, 5, 16, requires_grad=True), use_reentrant=reentrant).sum().backward()
    return model


def in_contexts(model):
    with contextlib.suppress(KeyError), fastlora.use_adapters(model, "default"):
        run(model)
        raise KeyError
    with fastlora.disable_adapters(model), torch.inference_mode():
        model(torch.randn(2, 5, 16))
    with torch.autocast("cpu", torch.bfloat16):
        run(model)
    return model


def in_a_file(model):
    with tempfile.TemporaryDirectory() as folder:
        fastlora.save(run(model), folder)
        fastlora.load(model, folder)
    model.load_state_dict(model.state_dict())
    return run(model)


def penalized(model):
    tracker = fastlora.track(model, every=1)
    run(model)
    tracker.step()
    tracker.penalty().backward()
    tracker.apply_penalty()
    tracker.load_state_dict(tracker.state_dict())
    return model  # the tracker is dropped, not closed


def calibrated(model):
    fastlora.calibrate(model, [torch.randn(2, 5, 16)], lambda m, x: m(x).square().mean(), steps=1)
    return model


def by_sample(model):
    def loss(factors, x):
        return torch.func.functional_call(model, factors, (x[None],)).sum()

    factors = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    gradients = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0), randomness="different")
    gradients(factors, torch.randn(2, 5, 16))
    return model


def interrupted(model):
    def stop(*_):
        raise KeyboardInterrupt

    hook = [m for m in model.modules() if hasattr(m, "lora_A")][-1].register_forward_hook(stop)
    with contextlib.suppress(KeyboardInterrupt):
        model(torch.randn(2, 5, 16))
    hook.remove()
    y = model(torch.randn(2, 5, 16))
    y.register_hook(stop)
    with contextlib.suppress(KeyboardInterrupt):
        y.sum().backward()
    return model


async def as_task(model):
    with fastlora.use_adapters(model, "default"):
        run(model)


def elsewhere(model):
    for target in (lambda: run(model), lambda: asyncio.run(as_task(model))):
        thread = threading.Thread(target=target)
        thread.start()
        thread.join()
    return model


def failed(model):
    run(model)
    try:
        model(torch.randn(2, 5, 15))
    except (RuntimeError, ValueError):
        return model
    raise AssertionError


USES = {
    "injected": lambda model: model,
    "stepped": run,
    "evaluated": lambda model: run(model).eval(),
    "tracked": tracked,
    "tracked exactly": lambda model: tracked(model, estimator="exact"),
    "copied": lambda model: copy.deepcopy(run(model)),
    "copied and run": lambda model: run(copy.deepcopy(run(model))),
    "pickled": lambda model: run(pickle.loads(pickle.dumps(run(model)))),
    "merged": lambda model: fastlora.merge(run(model)),
    "unmerged": unmerged,
    "several adapters": several,
    "other ranks": reranked,
    "compiled": compiled,
    "ejected": ejected,
    "failed": failed,
    "interrupted": interrupted,
    "trained": trained,
    "checkpointed": checkpointed,
    "in contexts": in_contexts,
    "saved and loaded": in_a_file,
    "penalized": penalized,
    "calibrated": calibrated,
    "gradients by sample": by_sample,
    "in threads and tasks": elsewhere,
    "merged and unloaded": lambda model: fastlora.merge_and_unload(run(model)),
    "cast": lambda model: run(run(model).double().float()),
    "explained": lambda model: [fastlora.explain(run(model)), model][1],
}


@pytest.fixture(autouse=True)
def no_collection():
    torch.optim.SGD([torch.ones(1, requires_grad=True)])  # the first imports what keeps the frames that it came from
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("kind", MODELS)
def test_a_dropped_model_is_freed_at_once(kind, use):
    model = USES[use](adapted(kind))
    alive = {name: weakref.ref(parameter) for name, parameter in model.named_parameters()}
    del model
    assert [name for name, p in alive.items() if p() is not None] == []


@pytest.mark.parametrize("name", ["llama", "timm_vit"])
def test_of_families(name):
    model = fastlora.inject(FAMILIES[name].make(), config(target_modules="qkv", r=2))
    alive = weakref.ref(next(model.parameters()))
    del model
    assert alive() is None


def test_a_part_that_outlives_its_model_can_be_copied():
    model = adapted("torch's attention")
    part = model.block
    x = torch.randn(2, 5, 16)
    expected = part.eval()(x)
    del model
    torch.testing.assert_close(copy.deepcopy(part)(x), expected)
