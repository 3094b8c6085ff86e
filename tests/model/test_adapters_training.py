"""Training adapters together equals training each alone on its own rows; so do their statistics."""

from __future__ import annotations

import gc
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastlora
from fastlora import LoraConfig
from fastlora.ops.layout import AdapterBatch

RANKS = {"default": 2, "b": 4, "c": 1}
STEPS = 50


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.query, self.key, self.value = nn.Linear(width, width), nn.Linear(width, 4), nn.Linear(width, 4)
        self.out = nn.Linear(4, width)

    def forward(self, x):
        q, k, v = self.query(x), self.key(x), self.value(x)
        return torch.tanh(x + self.out(v * torch.sigmoid(k)) + q)


def model(dtype, dropout=0.0):
    torch.manual_seed(0)
    m = nn.Sequential(Block(6), Block(6), nn.Linear(6, 3)).to(dtype)
    kwargs = {"target_modules": "qkv", "lora_dropout": dropout, "adapter_dtype": dtype}
    fastlora.inject(m, LoraConfig(r=RANKS["default"], **kwargs))
    for name in ("b", "c"):
        fastlora.add_adapter(m, name, LoraConfig(r=RANKS[name], **kwargs))
    return m


def batches(dtype):
    """Some batches lack an adapter, some have rows of none."""
    g = torch.Generator().manual_seed(1)
    for step in range(STEPS):
        pool = [[0, 1, 2, -1], [0, 1], [2, 0], [1]][step % 4]
        ids = torch.tensor(pool)[torch.randint(len(pool), (9,), generator=g)]
        seeds = torch.randint(2**62, (9,), generator=g)
        yield torch.randn(9, 3, 6, generator=g, dtype=dtype), torch.randint(3, (9,), generator=g), ids, seeds


def mixed_batch():
    x, labels, *_ = next(batches(torch.float64))
    return x, labels, torch.tensor([0, 1, 2, -1, 2, 1, 0, 1, 2])


def losses(m, x, labels):
    return F.cross_entropy(m(x).mean(1), labels, reduction="none")


def optimiser(parameters):
    return torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1)


def own(m, name):
    return {n: p for n, p in m.named_parameters() if f".{name}." in n}


def together(dtype, dropout):
    m = model(dtype, dropout)
    optimizer = optimiser([p for name in RANKS for p in own(m, name).values()])
    for x, labels, ids, seeds in batches(dtype):
        with fastlora.use_adapters(m, ids, row_seeds=seeds if dropout else None):
            fastlora.per_adapter_mean(losses(m, x, labels), ids).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: {n: p.detach() for n, p in own(m, name).items()} for name in RANKS}


def alone(name, dtype, dropout):
    m = model(dtype, dropout)
    optimizer = optimiser(own(m, name).values())
    for x, labels, ids, seeds in batches(dtype):
        mine = ids == list(RANKS).index(name)
        if not mine.any():
            continue
        with fastlora.use_adapters(m, name, row_seeds=seeds[mine] if dropout else None):
            losses(m, x[mine], labels[mine]).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return {n: p.detach() for n, p in own(m, name).items()}


@pytest.mark.parametrize("dropout", [0.0, 0.2], ids=["", "dropout by row seeds"])
def test_together_equals_alone_in_float64(dropout):
    got = together(torch.float64, dropout)
    for name in RANKS:
        want = alone(name, torch.float64, dropout)
        assert all(bool(p.any()) for p in want.values())
        for n, p in want.items():
            torch.testing.assert_close(got[name][n], p, rtol=0, atol=1e-9)


@pytest.mark.parametrize("dropout", [0.0, 0.2], ids=["", "dropout by row seeds"])
def test_together_equals_alone_within_the_error_of_float32(dropout):
    got = together(torch.float32, dropout)
    for name in RANKS:
        exact, low = alone(name, torch.float64, dropout), alone(name, torch.float32, dropout)
        for n, p in exact.items():
            error = (low[n].double() - p).abs().max()
            assert (got[name][n].double() - p).abs().max() <= 4 * error + 1e-7


def test_row_seeds_differ_between_layers_and_places():
    m = model(torch.float32, 0.5)
    seen = {}
    for n, layer in fastlora.nn.linear.adapted_layers(m).items():
        with torch.no_grad():
            layer.lora_B["default"].weight.normal_()
        layer.register_forward_hook(lambda module, args, out, n=n: seen.setdefault(n, []).append(out.detach()))
    x = torch.ones(2, 3, 6)
    for _ in range(2):
        with fastlora.use_adapters(m, "default", row_seeds=torch.tensor([7, 7])):
            m(x)
    first = seen["0.query"]
    assert torch.equal(first[0], first[1])  # the seeds alone decide
    assert torch.equal(first[0][0], first[0][1])  # and not the place in the batch
    assert not torch.equal(first[0][0, 0], first[0][0, 1])  # but the place in the sample does
    layers = list(fastlora.nn.linear.adapted_layers(m).values())
    assert len({(layer.dropout_salt, layer.stream) for layer in layers}) == len(layers)


def statistics(m, x, labels, ids, name, **options):
    with fastlora.track(m, adapter=name, ema=None, every=1, **options) as tracker:
        if ids is None:
            with fastlora.use_adapters(m, name):
                losses(m, x, labels).mean().backward()
        else:
            with fastlora.use_adapters(m, ids):
                fastlora.per_adapter_mean(losses(m, x, labels), ids).backward()
        tracker.step()
        return {kind: dict(tracker.scores(kind)) for kind in options["statistics"]}


OPTIONS = {
    "probe": {"estimator": "probe", "statistics": ("grad_sq", "act_var")},
    "exact": {"estimator": "exact", "statistics": ("grad_sq", "fisher", "grad_abs", "act_var")},
}


@pytest.mark.parametrize("estimator", OPTIONS)
def test_statistics_of_an_adapter_are_those_of_its_own_rows(estimator):
    m = model(torch.float64)
    x, labels, ids = mixed_batch()
    for g, name in enumerate(RANKS):
        got = statistics(m, x, labels, ids, name, **OPTIONS[estimator])
        want = statistics(m, x[ids == g], labels[ids == g], None, name, **OPTIONS[estimator])
        for kind in want:
            for key in want[kind]:
                assert got[kind][key] == pytest.approx(want[kind][key], rel=1e-9), (kind, key)


def test_fisher_by_probes_is_unbiased_over_an_adapters_own_samples():
    m = model(torch.float64)
    x, labels, ids = mixed_batch()
    exact = statistics(m, x[ids == 1], labels[ids == 1], None, "b", estimator="exact", statistics=("fisher",))["fisher"]
    total = dict.fromkeys(exact, 0.0)
    rounds = 60
    for seed in range(rounds):
        found = statistics(m, x, labels, ids, "b", probes=16, seed=seed, statistics=("fisher",))["fisher"]
        total = {key: total[key] + found[key] / rounds for key in total}
    for key in exact:
        # 60 rounds of 16 probes: a relative error of about sqrt(2 / 960) a sample at worst
        assert total[key] == pytest.approx(exact[key], rel=0.25)


def test_two_trackers_of_one_batch():
    m = model(torch.float64)
    x, labels, ids = mixed_batch()
    with (
        fastlora.track(m, adapter="b", ema=None, every=1) as b,
        fastlora.track(m, adapter="c", ema=None, every=1, probes=2) as c,
    ):
        with fastlora.use_adapters(m, ids):
            fastlora.per_adapter_mean(losses(m, x, labels), ids).backward()
        b.step(), c.step()
        both = dict(b.scores()), dict(c.scores())
    for g, (name, probes, got) in enumerate(zip(("b", "c"), (4, 2), both, strict=True), 1):
        own = ids == g
        want = statistics(m, x[own], labels[own], None, name, probes=probes, statistics=("grad_sq",))["grad_sq"]
        assert got == pytest.approx(want, rel=1e-9)


def test_hold_absent_keeps_weights_and_state_where_gradients_are_zero():
    m = model(torch.float64)
    optimizer = optimiser([p for name in RANKS for p in own(m, name).values()])
    fastlora.freeze_unused_adapters(m, optimizer)
    x, labels, ids = mixed_batch()
    with fastlora.use_adapters(m, ids):
        fastlora.per_adapter_mean(losses(m, x, labels), ids).backward()
    optimizer.step()
    before = {n: p.detach().clone() for n, p in own(m, "c").items()}
    state = {n: optimizer.state[p]["exp_avg"].clone() for n, p in own(m, "c").items()}
    for p in m.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    with fastlora.use_adapters(m, torch.where(ids == 2, 0, ids)):
        fastlora.per_adapter_mean(losses(m, x, labels), ids).backward()
    optimizer.step()
    for n, p in own(m, "c").items():
        assert torch.equal(p, before[n]) and torch.equal(optimizer.state[p]["exp_avg"], state[n])
    assert all(optimizer.state[p]["step"] == 2 for p in own(m, "b").values())


def test_forwards_with_hooks_on_saved_tensors_do_not_pile_up():
    m = model(torch.float32)
    batches_before = sum(type(item) is AdapterBatch for item in gc.get_objects())
    with torch.autograd.graph.save_on_cpu():
        for x, _, ids, _ in itertools.islice(batches(torch.float32), 6):
            with fastlora.use_adapters(m, ids):
                m(x).sum().backward()
    assert sum(type(item) is AdapterBatch for item in gc.get_objects()) <= batches_before + 2
