"""Random walks over what changes which adapter runs, beside a dense model of its own that says what each step gives."""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import pickle
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
        self.frozen: set[str] = set()

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

    def delta(self, name, path):
        a, b, s = self.adapters.get(name, {}).get(path, (None, None, None))
        return 0.0 if s is None else s * b @ a

    def fits(self, name, shapes):
        """Whether factors of these shapes can be the adapter's, which a name that is not there may have."""
        return name not in self.adapters or shapes == {p: a.shape for p, (a, _, _) in self.adapters[name].items()}

    def bake(self, name):
        """The update of an adapter becomes part of the base."""
        with torch.no_grad():
            for path in self.adapters[name]:
                self.base.get_submodule(path).weight += self.delta(name, path)

    def weight_gradients(self, x, name):
        """Squared norms of the gradients of the weights that ``name`` adapts."""
        weights = {
            path: (self.base.get_submodule(path).weight.detach() + self.delta(name, path)).requires_grad_()
            for path in self.adapters[name]
        }
        y = torch.func.functional_call(self.base, {f"{path}.weight": w for path, w in weights.items()}, (x,))
        (y.square().sum() / 10).backward()
        return {path: w.grad.square().sum().item() for path, w in weights.items()}

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
                if leaf.grad is not None and self.merged is None and name not in self.frozen:
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

    def __init__(self, model, dense, rng, folder):
        self.model, self.dense, self.rng, self.stack, self.folder = model, dense, rng, [], folder
        self.files: list[tuple] = []
        self.state: tuple | None = None

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
        return allowed, lambda: fastlora.delete_adapter(self.model, name), lambda: self.forgotten(name)

    def forgotten(self, name):
        self.dense.adapters.pop(name)
        self.dense.frozen.discard(name)

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

    def pickled(self):
        if self.stack:
            return None

        def go_on():
            self.model = pickle.loads(pickle.dumps(self.model))

        return True, go_on, lambda: None

    def saved(self):
        name, folder = self.rng.choice(list(self.dense.adapters)), self.folder / str(len(self.files))
        held = copy.deepcopy(self.dense.adapters[name])
        return True, lambda: fastlora.save(self.model, folder, name), lambda: self.files.append((folder, held))

    def loaded(self):
        if not self.files:
            return None
        d, name, (folder, held) = self.dense, self.rng.choice(POOL), self.rng.choice(self.files)
        fits = d.fits(name, {path: a.shape for path, (a, _, _) in held.items()})

        def follow():
            d.adapters[name] = copy.deepcopy(held)

        return fits and d.merged is None, lambda: fastlora.load(self.model, folder, adapter=name), follow

    def of_another_library(self):
        d, name, rank = self.dense, self.rng.choice(POOL), self.rng.randint(1, 3)
        pairs = {p: (torch.randn(rank, 8).double(), torch.randn(8, rank).double()) for p in ("0.query", "1.dense")}
        state = {f"{path}.lora_{side}": t for path, pair in pairs.items() for side, t in zip("AB", pair, strict=True)}
        allowed = d.merged is None and d.fits(name, {path: A.shape for path, (A, _) in pairs.items()})

        def follow():
            d.adapters[name] = {path: (*pair, 6 / rank) for path, pair in pairs.items()}

        call = functools.partial(fastlora.load_layout, self.model, state, "loralib", lora_alpha=6, adapter=name)
        return allowed, call, follow

    def weighted(self):
        d, name = self.dense, self.rng.choice(POOL)
        parts = {part: self.rng.choice([-0.5, 0.25, 1.0]) for part in self.rng.sample(POOL, 2) if part in d.adapters}
        if not parts:
            return None
        options = {"adapter_name": name, "combination_type": "cat"}
        allowed = name not in d.adapters and d.merged is None

        def follow():
            d.read(self.model, name)
            d.frozen.add(name)
            for path in d.adapters[name]:
                want = sum(weight * d.delta(part, path) for part, weight in parts.items())
                torch.testing.assert_close(d.delta(name, path), want)

        call = functools.partial(fastlora.add_weighted_adapter, self.model, [*parts], [*parts.values()], **options)
        return allowed, call, follow

    def counted(self):
        d = self.dense
        name = self.rng.choice(list(d.adapters))

        def call():
            rows, found = fastlora.summary(self.model, name), d.adapters[name]
            assert {r.key: (r.rank, r.scale) for r in rows.rows} == {p: (len(a), s) for p, (a, _, s) in found.items()}
            assert rows.adapter_params == sum(a.numel() + b.numel() for a, b, _ in found.values())
            assert set(fastlora.adapter_names(self.model)) - {None} == set(d.adapters)
            assert len(fastlora.explain(self.model).rows) == len(adapted_layers(self.model))
            assert fastlora.roles(self.model)
            held = {id(p) for group in fastlora.param_groups(self.model) for p in group["params"]}
            assert held == {id(p) for p in self.model.parameters() if p.requires_grad}

        return True, call, lambda: None

    def tracked(self):
        d, x = self.dense, batch().requires_grad_()
        name = self.rng.choice(list(d.adapters))

        def call():
            tracker = fastlora.track(self.model, estimator="exact", adapter=name, every=1)
            with tracker, fastlora.use_adapters(self.model, name):
                (self.model(x).square().sum() / 10).backward()
                tracker.step()
            found = dict(tracker.scores("grad_sq"))
            assert found == pytest.approx(d.weight_gradients(x, name), rel=1e-5)

        return d.merged is None, call, lambda: None

    def trained(self):
        d, x = self.dense, batch().requires_grad_()

        def call():
            optimizer = torch.optim.SGD(fastlora.param_groups(self.model), lr=0.01)
            for group in optimizer.param_groups:
                group["lr"] = 0.01
            fastlora.freeze_unused_adapters(self.model, optimizer)
            self.model.zero_grad()
            (self.model(x).square().sum() / 10).backward()
            optimizer.step()

        def follow():
            _, grads = d.step(x)
            for name, layers in d.adapters.items():
                for path, (a, b, s) in layers.items():
                    a, b = (
                        t - 0.01 * grads.get(f"{path}.lora_{side}.{name}.weight", 0.0)
                        for side, t in (("A", a), ("B", b))
                    )
                    layers[path] = a, b, s

        return (True, call, follow) if set(d.adapters) - d.frozen else None

    def calibrated(self):
        d, x = self.dense, batch()
        call = functools.partial(fastlora.calibrate, self.model, [x], lambda m, x: m(x).square().mean(), steps=1)
        return (d.merged is None, call, lambda: None) if not d.open and d.active not in d.frozen else None

    def reallocated(self):
        d = self.dense
        name = self.rng.choice(list(d.adapters))
        scores = {path: self.rng.random() + 0.1 for path in d.adapters[name]}
        options = {"adapter": name, "reinit": True, "r_min": 1, "r_max": 3}
        call = functools.partial(fastlora.reallocate, self.model, scores, **options)
        return d.merged is None, call, lambda: d.read(self.model, name)

    def restored(self):
        """A state dict, of now or of before."""
        d = self.dense
        keys = {key: t.shape for key, t in self.model.state_dict().items()}
        if self.state is None or d.merged or {key: t.shape for key, t in self.state[0].items()} != keys:
            if d.merged is None:
                self.state = copy.deepcopy(self.model.state_dict()), copy.deepcopy(d.adapters)
            return None
        state, held = self.state
        assign = self.rng.random() < 0.5

        def call():
            flags = {name: p.requires_grad for name, p in self.model.named_parameters()}
            self.model.load_state_dict(copy.deepcopy(state), assign=assign)
            for name, p in self.model.named_parameters():
                p.requires_grad_(flags[name])

        def follow():
            for name, layers in copy.deepcopy(held).items():
                for path, (a, b, _) in layers.items():
                    d.adapters[name][path] = a, b, d.adapters[name][path][2]

        return True, call, follow

    def unloaded(self):
        """Plain modules again, of the base or with the merged adapter, and new adapters on them."""
        d, merging = self.dense, self.rng.random() < 0.5
        if self.stack:
            return None
        allowed, baked = not (merging and d.merged), d.active if merging else d.merged
        held = copy.deepcopy(d.adapters)

        def call():
            (fastlora.merge_and_unload if merging else fastlora.unload)(self.model)
            fastlora.inject(self.model, self.config(), check="off")

        def follow():
            d.adapters = held
            if baked is not None:
                d.bake(baked)
            d.adapters, d.active, d.merged, d.frozen = {}, "default", None, set()
            d.read(self.model, "default")
            self.state = None

        return allowed, call, follow

    def handed_over(self):
        d, x = self.dense, batch()
        name = self.rng.choice(list(d.adapters))

        def call():
            handed = fastlora.to_peft(self.model, name)
            back = fastlora.from_peft(handed)
            weights = {f"{path}.weight": self.dense.base.get_submodule(path).weight for path in d.adapters[name]}
            weights = {key: w + d.delta(name, key.removesuffix(".weight")) for key, w in weights.items()}
            with torch.no_grad():
                want = torch.func.functional_call(d.base, weights, (x,))
                for other in (handed, back):
                    torch.testing.assert_close(other(x), want, rtol=1e-9, atol=1e-9)

        return d.merged is None, call, lambda: None

    def not_on_an_adapted_model(self):
        if not any(b.any() for _, b, _ in self.dense.adapters[self.dense.active].values()):
            return None
        eyes = {path: torch.eye(8) for path in self.dense.adapters[self.dense.active]}
        calls = (
            lambda: fastlora.inject(self.model, self.config()),
            lambda: fastlora.apply_policy(self.model, "lora_only"),
            lambda: fastlora.recommend(self.model, [batch()], lambda m, x: m(x).sum(), 500, steps=1),
            lambda: fastlora.initialize_eva(self.model, eyes),
            lambda: fastlora.initialize_corda(self.model, eyes),
            lambda: fastlora.initialize_lora_ga(self.model, [batch()], lambda m, x: m(x).sum(), steps=1),
        )
        return False, self.rng.choice(calls), None


MOVES = (
    *("add", "delete", "activate", "context", "context", "leave", "leave", "merge", "unmerge", "ranks", "mode"),
    *("copied", "pickled", "saved", "loaded", "of_another_library", "weighted", "counted", "tracked", "trained"),
    *("calibrated", "reallocated", "restored", "unloaded", "handed_over", "not_on_an_adapted_model"),
)
# What takes no model, or is the class of what another returns.
NO_STEP = {"LoraConfig", "Scores", "Tracker", "allocate", "nn", "training", "per_adapter_mean"}


def test_every_public_function_is_a_step():
    source = inspect.getsource(Walk)
    names = set(fastlora.__all__) - NO_STEP
    assert names and [name for name in names if f"fastlora.{name}" not in source] == []


@pytest.mark.parametrize("seed", range(6))
def test_a_random_walk(seed, tmp_path):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    base = nn.Sequential(Attention(8), Attention(8), nn.Linear(8, 3)).double()
    dense = Dense(copy.deepcopy(base))
    model = fastlora.inject(base, LoraConfig(r=2, target_modules=TARGETS[0], init_lora_weights=False), check="off")
    dense.read(model, "default")
    walk, refused = Walk(model, dense, rng, tmp_path), 0
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
