"""Random walks over what changes which adapter runs, beside a dense model of its own that says what each step gives."""

from __future__ import annotations

import contextlib
import copy
import random

import pytest
import torch
from support.adapters_help import Attention, batch
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastlora
from fastlora import LoraConfig
from fastlora.nn.linear import adapted_layers

STEPS = 120
TARGETS = (["query", "key", "value"], ["query", "dense"], ["2"], ["key"], ["value", "2"])
POOL = ("default", "b", "c", "d")


class Dense:
    """W + s B A as plain weights of the plain model, one for each row; and what is allowed when."""

    def __init__(self, base):
        self.base = base
        self.adapters: dict[str, dict[str, tuple]] = {}
        self.active, self.merged, self.open = "default", None, []

    def read(self, model, name):
        """Copies of an adapter's factors, as leaves."""
        self.adapters[name] = {
            path: (layer.lora_A[name].weight.detach().clone(), layer.lora_B[name].weight.detach().clone(), s)
            for path, layer in adapted_layers(model).items()
            if name in layer.adapter_names
            for s in layer.adapter_specs[name].scale.values()
        }

    def names_of_rows(self, rows):
        if self.open:
            chosen = self.open[-1]
            return [chosen] * rows if chosen is None or isinstance(chosen, str) else chosen
        return [self.merged or self.active] * rows

    def in_use(self):
        return {n for chosen in self.open for n in ([chosen] if chosen is None or isinstance(chosen, str) else chosen)}

    def step(self, x):
        """Outputs, and gradients of x and of every factor that took part, by autograd."""
        x = x.detach().clone().requires_grad_()
        leaves = {
            (name, path): [t.detach().clone().requires_grad_() for t in pair[:2]]
            for name, layers in self.adapters.items()
            for path, pair in layers.items()
        }
        out = []
        for row, name in zip(x, self.names_of_rows(len(x)), strict=True):
            weights = {}
            for path, (_, _, s) in self.adapters.get(name, {}).items():
                a, b = leaves[name, path]
                weights[f"{path}.weight"] = self.base.get_submodule(path).weight.detach() + s * b @ a
            out.append(torch.func.functional_call(self.base, weights, (row[None],)))
        y = torch.cat(out)
        (y.square().sum() / 10).backward()
        grads = {"x": x.grad}
        for (name, path), pair in leaves.items():
            for side, leaf in zip("AB", pair, strict=True):
                if leaf.grad is not None and self.merged is None:
                    grads[f"{path}.lora_{side}.{name}.weight"] = leaf.grad
        return y.detach(), grads


def check(model, dense, rng):
    x = batch().requires_grad_()
    model.zero_grad()
    want, grads = dense.step(x)
    way = rng.choice(["plain", "frames", "reentrant", "no_grad"])
    if way == "no_grad":
        with torch.no_grad():
            torch.testing.assert_close(model(x), want, rtol=1e-9, atol=1e-10)
        return
    y = model(x) if way == "plain" else checkpoint(model, x, use_reentrant=way == "reentrant")
    torch.testing.assert_close(y, want, rtol=1e-9, atol=1e-10)
    # Backward, and with it the recomputation, runs where other adapters are on.
    with fastlora.disable_adapters(model) if dense.merged is None else contextlib.nullcontext():
        (y.square().sum() / 10).backward()
    got = {n: p.grad for n, p in model.named_parameters() if p.grad is not None} | {"x": x.grad}
    assert got.keys() == grads.keys()
    for key, grad in grads.items():
        torch.testing.assert_close(got[key], grad, rtol=1e-8, atol=1e-9)


class Walk:
    """One operation a method: (whether it is allowed, the call, what becomes of the dense model)."""

    def __init__(self, model, dense, rng):
        self.model, self.dense, self.rng, self.stack = model, dense, rng, []

    def config(self):
        rank = self.rng.randint(1, 3)
        return LoraConfig(r=rank, lora_alpha=4, target_modules=self.rng.choice(TARGETS), init_lora_weights=False)

    def add(self):
        name = self.rng.choice(POOL)
        allowed = name not in self.dense.adapters and self.dense.merged is None
        config = self.config()
        return (
            allowed,
            lambda: fastlora.add_adapter(self.model, name, config),
            lambda: self.dense.read(self.model, name),
        )

    def delete(self):
        d, name = self.dense, self.rng.choice(POOL)
        allowed = name in d.adapters and name not in (d.active, d.merged) and name not in d.in_use()
        return allowed, lambda: fastlora.delete_adapter(self.model, name), lambda: d.adapters.pop(name)

    def activate(self):
        d, name = self.dense, self.rng.choice(POOL)
        allowed = name in d.adapters and d.merged in (None, name)
        return allowed, lambda: fastlora.set_adapter(self.model, name), lambda: setattr(d, "active", name)

    def context(self):
        d, kind = self.dense, self.rng.choice(["name", "rows", "disabled"])
        present = list(d.adapters)
        chosen = {
            "name": lambda: self.rng.choice(present),
            "rows": lambda: [self.rng.choice([*present, None]) for _ in range(len(batch()))],
            "disabled": lambda: None,
        }[kind]()
        make = fastlora.disable_adapters if chosen is None else lambda m: fastlora.use_adapters(m, chosen)

        def enter():
            context = make(self.model)
            context.__enter__()
            self.stack.append(context)

        return d.merged is None, enter, lambda: d.open.append(chosen)

    def leave(self):
        if not self.stack:
            return None
        # Mostly the innermost; generators and callbacks close contexts in other orders.
        i = -1 if self.rng.random() < 0.7 else self.rng.randrange(len(self.stack))
        return True, lambda: self.stack.pop(i).__exit__(None, None, None), lambda: self.dense.open.pop(i)

    def merge(self):
        d = self.dense
        name = self.rng.choice([None, *d.adapters])
        allowed = d.merged is None and not d.open
        return allowed, lambda: fastlora.merge(self.model, name), lambda: setattr(d, "merged", name or d.active)

    def unmerge(self):
        d = self.dense
        return d.merged is not None, lambda: fastlora.unmerge(self.model), lambda: setattr(d, "merged", None)

    def ranks(self):
        name = self.rng.choice(list(self.dense.adapters))
        wanted = {path: self.rng.randint(1, 3) for path in self.dense.adapters[name]}
        keep = self.rng.random() < 0.5
        return (
            self.dense.merged is None,
            lambda: fastlora.set_ranks(self.model, wanted, adapter=name, keep=keep, reinit=not keep),
            lambda: self.dense.read(self.model, name),
        )

    def mode(self):
        training = self.rng.random() < 0.5
        return True, lambda: self.model.train(training), lambda: None

    def copied(self):
        """A copy has no open contexts, and runs on."""
        if self.stack:
            return None

        def go_on():
            self.model = copy.deepcopy(self.model)

        return True, go_on, lambda: None


MOVES = (
    "add",
    "delete",
    "activate",
    "context",
    "context",
    "leave",
    "leave",
    "merge",
    "unmerge",
    "ranks",
    "mode",
    "copied",
)


@pytest.mark.parametrize("seed", range(6))
def test_a_random_walk(seed):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    base = nn.Sequential(Attention(8), Attention(8), nn.Linear(8, 3)).double()
    dense = Dense(copy.deepcopy(base))
    model = fastlora.inject(base, LoraConfig(r=2, target_modules=TARGETS[0], init_lora_weights=False), check="off")
    dense.read(model, "default")
    walk, refused = Walk(model, dense, rng), 0
    for _ in range(STEPS):
        move = getattr(walk, rng.choice(MOVES))()
        if move is None:
            continue
        allowed, call, follow = move
        if allowed:
            call()
            follow()
        else:
            refused += 1
            with pytest.raises(ValueError):
                call()
        check(walk.model, dense, rng)
    assert refused > 5
    for context in reversed(walk.stack):
        context.__exit__(None, None, None)
    dense.open.clear()
    check(walk.model, dense, rng)
