"""Columns of x as probes: in the operator, in layers, over steps, without bias; and the signs of many groups."""

from __future__ import annotations

import copy

import pytest
import torch
from support.column_help import KINDS, columns, every_draw, shown
from support.op_help import BACKENDS, assert_close_as, make, oracle, run
from support.tracker_help import (
    Attention,
    Twice,
    assert_scale_divided_out,
    assert_scores,
    data,
    loss_of,
    model,
    per_sample_gradients,
    track,
    tracked_in_parts,
    weight_gradients,
)
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastlora
from fastlora.nn.adapter import WHOLE
from fastlora.nn.probe_rows import REFRESH_EVERY, REFRESH_FIRST, ColumnSampler, refreshes_norms
from fastlora.ops import native, reference
from fastlora.ops.lora import lora_linear
from fastlora.ops.multi_tensor import Signs


@pytest.mark.parametrize("backend", ["reference", "eager", "native"])
@pytest.mark.parametrize("layer,targets", [(Attention, ("query", "key", "value")), (Twice, ("fc1",))])
def test_the_expectation_over_all_draws_is_the_exact_value(layer, targets, backend):
    dtype = torch.float64 if backend == "reference" else torch.float32
    m, batches = model(dtype, layer, targets=targets, dropout=0.5), [data(dtype, seed=s) for s in (1, 2)]
    for adapted in fastlora.nn.linear.adapted_layers(m).values():
        adapted.backend = backend

    def run():
        torch.manual_seed(3)  # dropout: the probes see x without it
        for batch in batches:
            (loss_of(m, batch) / 2).backward()

    with columns(m, probes=1) as tracker:
        run()
        tracker.step()
        found = every_draw(tracker, run)
    with track(m, estimator="exact", ema=None, statistics=("grad_sq", "grad_abs")) as exact:
        run()
        exact.step()
    sizes = [exact.layers[path].slices[n] * exact.layers[path].in_features for path, n in exact.matrices]
    assert_scores(found["grad_sq"], dict(exact.scores("grad_sq")), rtol=1e-9 if dtype == torch.float64 else 1e-5)
    mean = {key: value / size for (key, value), size in zip(found["grad_abs"].items(), sizes, strict=True)}
    assert_scores(mean, dict(exact.scores("grad_abs")), rtol=1e-9 if dtype == torch.float64 else 1e-5)


def test_shares_are_those_of_the_norms_with_a_tenth_of_uniform():
    norms = torch.tensor([[4.0, 1.0, 0.0, 0.0], [0.0] * 4], dtype=torch.float64)
    squares = reference.column_shares(norms, True, False)
    assert squares[0].tolist() == pytest.approx([0.9 * 0.8 + 0.025, 0.9 * 0.2 + 0.025, 0.025, 0.025])
    assert reference.column_shares(norms, False, True)[0, 0].item() == pytest.approx(0.9 * 2 / 3 + 0.025)
    assert reference.column_shares(norms, True, True)[0, 0].item() == pytest.approx(0.9 * (0.4 + 1 / 3) + 0.025)
    assert squares[1].tolist() == [0.25] * 4


def test_fisher_over_all_draws_and_signs_is_exact():
    m, batch = model(), data(samples=3)
    own = per_sample_gradients(m, batch)
    with columns(m, "fisher", probes=1) as tracker:
        shown(m, tracker, batch)
        total = dict.fromkeys(tracker.keys, 0.0)
        for bits in range(8):
            sign = torch.tensor([[1.0 - 2 * (bits >> i & 1)] for i in range(3)])

            def run(sign=sign):
                tracker._step.signs_for = lambda x, samples: sign.to(x.dtype)
                tracker._step.signs.samples[1] = 3
                loss_of(m, batch).backward()

            found = every_draw(tracker, run, ("fisher",))["fisher"]
            total = {key: total[key] + found[key] / 8 for key in total}
    assert_scores(total, {k: g.square().sum((1, 2)).mean() for k, g in own.items()})


def test_norms_are_sums_over_tokens_of_all_micro_batches():
    m, batches = model(), [data(seed=s) for s in (1, 2)]
    kept = {}
    for path, layer in fastlora.nn.linear.adapted_layers(m).items():
        layer.register_forward_hook(lambda _, args, y, path=path: kept.setdefault(path, []).append((args[0], y)))
    for batch in batches:
        loss = loss_of(m, batch)
        for calls in kept.values():
            calls[-1] += tuple(torch.autograd.grad(loss, calls[-1][1], retain_graph=True))
    want = {
        path: sum((dy.square().sum(-1, keepdim=True) * x.square()).sum((0, 1)) for x, _, dy in calls)
        for path, calls in kept.items()
    }
    with columns(m) as tracker:
        for batch in batches:
            loss_of(m, batch).backward()
        for path, layer in tracker.layers.items():
            torch.testing.assert_close(layer.probes[tracker.adapter].norms[WHOLE].grad, want[path])
        tracker.step()
        for share, path in zip(tracker._sampler.norms[0], tracker.layers, strict=True):
            torch.testing.assert_close(share / share.sum(), want[path] / want[path].sum())


def test_a_first_step_shows_norms_and_is_not_counted():
    m = model()
    with columns(m) as tracker:
        shown(m, tracker)
        assert tracker._averages.counts["grad_sq"].unique().tolist() == [0.0]
        assert tracker._averages.counts["act_var"].unique().tolist() == [1.0]
        with pytest.raises(RuntimeError, match="no grad_sq yet for 0.query"):
            tracker.scores("grad_sq")
        shown(m, tracker)
        assert tracker._averages.counts["grad_sq"].unique().tolist() == [1.0]
        assert all(value > 0 for kind in KINDS for value in tracker.scores(kind).values())


def test_a_layer_without_gradient_is_zero_and_known():
    m = model()
    with columns(m) as tracker:
        for _ in range(2):
            (0.0 * loss_of(m, data())).backward()
            tracker.step()
    assert set(tracker.scores("grad_sq").values()) == set(tracker.scores("grad_abs").values()) == {0.0}


def test_draws_follow_the_norms_and_depend_on_seed_step_and_matrix():
    rows = ColumnSampler([5, 5, 7], 64, 3, torch.device("cpu"), ("grad_sq",))
    norms = [torch.tensor([0.0, 8.0, 0.0, 2.0, 0.0]), torch.ones(5), torch.ones(7)]
    rows.learn(norms, torch.tensor([True, True, False]))
    drawn = []
    for step in range(200):
        rows.draw(step)
        drawn.append(rows.index.clone())
    assert rows.known.tolist() == [True, True, False]
    drawn = torch.stack(drawn)
    p = torch.tensor([0.02, 0.74, 0.02, 0.20, 0.02], dtype=torch.float64)
    seen = drawn[:, 0].flatten().bincount(minlength=5).double()
    # 12800 draws: chi-squared of 4 degrees is above 23.5 once in 10^4
    assert float(((seen - 12800 * p).square() / (12800 * p)).sum()) < 23.5
    rows.draw(7)
    assert torch.equal(rows.index, drawn[7]) and rows.index[2].max() < 7
    torch.testing.assert_close(rows.weight[0], 1 / (64 * p[rows.index[0]]), rtol=1e-9, atol=0)
    assert not torch.equal(drawn[7], drawn[8]) and not torch.equal(drawn[7, 0], drawn[7, 1])
    rows.restart(4)
    rows.draw(7)
    assert not torch.equal(rows.index, drawn[7])


def test_norms_are_measured_in_few_steps():
    m = model()
    with columns(m) as tracker:
        probe = tracker.layers["0.query"].probes["default"]
        for step in range(2 * REFRESH_EVERY + 2):
            loss_of(m, data()).backward()
            assert (probe.norms[WHOLE].grad is not None) == refreshes_norms(step)
            tracker.step()
    assert REFRESH_FIRST == REFRESH_EVERY and tracker._sampler.counts.unique().tolist() == [REFRESH_FIRST + 2]


def test_a_step_that_is_not_finite_teaches_nothing():
    m = model()
    with columns(m) as tracker:
        shown(m, tracker)
        before = copy.deepcopy(tracker._sampler.state_dict())
        (x, y), (bad, _) = data(), data()
        bad[0, 0, 0] = torch.inf
        loss_of(m, (bad, y)).backward()
        tracker.step()
        m.zero_grad()
        assert tracker.skipped == 1
        torch.testing.assert_close(tracker._sampler.state_dict(), before, rtol=0, atol=0)
        loss_of(m, (x, y)).backward()
        tracker.step()
    assert tracker._averages.counts["grad_sq"].unique().tolist() == [1.0]


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_counts_once(reentrant):
    found = []
    for wrapped in (False, True):
        m, (x, y) = model(), data()
        x.requires_grad_()
        with columns(m) as tracker:
            for _ in range(2):
                h = x
                for block in m[:-1]:
                    h = checkpoint(block, h, use_reentrant=reentrant) if wrapped else block(h)
                nn.functional.cross_entropy(m[-1](h).mean(1), y).backward()
                tracker.step()
        found.append(({kind: dict(tracker.scores(kind)) for kind in KINDS}, tracker._sampler.norms))
    for kind in KINDS:
        assert_scores(found[1][0][kind], found[0][0][kind])
    torch.testing.assert_close(found[1][1], found[0][1])


def test_what_runs_without_backward_or_is_asked_for_alone_counts_nothing():
    m, batch = model(), data()
    trained = [p for p in m.parameters() if p.requires_grad]
    with columns(m) as tracker:
        shown(m, tracker)
        m(batch[0])
        torch.autograd.grad(loss_of(m, batch), trained)
        tracker.step()
        assert tracker._averages.counts["grad_sq"].unique().tolist() == [0.0]
        grads = torch.autograd.grad(loss_of(m, batch), trained, create_graph=True)
        sum(g.square().sum() for g in grads).backward()


def test_create_graph_gives_the_same_columns():
    m, batch, found = model(), data(), []
    for create in (False, True):
        with columns(m) as tracker:
            loss_of(m, batch).backward(create_graph=create)
            found.append(
                [z.grad.detach() for layer in tracker.layers.values() for z in layer.probes[tracker.adapter].Z.values()]
            )
        m.zero_grad()
    torch.testing.assert_close(found[0], found[1])


def test_loss_scale_is_divided_out():
    m, batch = model(torch.float32), data(torch.float32)
    assert_scale_divided_out(m, batch, KINDS, lambda: columns(m), steps=2)


def test_autocast_multiplies_rounded_columns():
    m, batch, found = model(torch.float32), data(torch.float32), []
    for low in (False, True):
        with columns(m, probes=8) as tracker:
            for _ in range(2):
                with torch.autocast("cpu", dtype=torch.bfloat16, enabled=low):
                    loss = loss_of(m, batch)
                loss.backward()
                tracker.step()
        found.append(dict(tracker.scores("grad_sq")))
    # each entry of x and dy has a few roundings to bf16, of 2^-9
    assert_scores(found[1], found[0], rtol=16 * 2**-9)


@pytest.mark.parametrize("kinds", [("grad_sq", "grad_abs", "act_var"), ("fisher",)])
def test_compiled_model_gives_the_same_statistics(kinds):
    torch._dynamo.reset()
    batch, found = data(dtype=torch.float32), []
    for compiled in (False, True):
        m = model(dtype=torch.float32)
        with columns(m, kinds) as tracker:
            run = torch.compile(m, backend="aot_eager", fullgraph=True) if compiled else m
            for _ in range(REFRESH_FIRST + 2):
                loss_of(run, batch).backward()
                tracker.step()
        found.append(tracker)
    for kind in kinds:
        assert_scores(found[1].scores(kind), dict(found[0].scores(kind)), rtol=1e-4)


def test_a_saved_state_goes_on_bit_for_bit():
    m, found = model(), []
    for stops in ((20,), (3, 13, 20)):
        _, state = tracked_in_parts(m, stops, lambda: columns(m, ema=0.9))
        found.append({k: state[k] for k in ("values", "counts", "columns", "skipped")})
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)


def test_a_state_of_the_other_kind_is_refused():
    m = model()
    with track(m) as tracker:
        state = tracker.state_dict()
    with columns(m, ("grad_sq",)) as tracker:
        with pytest.raises(ValueError, match="state: expected the probe_kind columns, got rademacher"):
            tracker.load_state_dict(state)


def test_rank_changes_leave_columns_alone():
    m, batch = model(), data()
    with columns(m, probes=1) as tracker:
        shown(m, tracker)
        fastlora.set_ranks(m, {key: 1 + i % 3 for i, key in enumerate(tracker.keys)})
        G = weight_gradients(m, [batch])
        found = every_draw(tracker, lambda: loss_of(m, batch).backward())
    assert_scores(found["grad_sq"], {key: g.square().sum() for key, g in G.items()})


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.4])
def test_outputs_and_gradients(backend, dtype, fused, p):
    for shape in (dict(), dict(M=1, r=(0, 0, 0)), dict(M=70, K=37, N=(5, 33, 17), r=(1, 8, 3)), dict(N=(9,), r=(2,))):
        case = make(k=3, picks=True, dtype=dtype, fused=fused, **shape)
        y, grads = run(case, backend, p, moments=True)
        want_y, want = oracle(case, p=p)
        low_y, low = run(case, p=p, function=reference.lora_linear)
        assert_close_as(y, want_y, low_y)
        assert_close_as(grads[: len(want)], want, low)


@pytest.mark.parametrize("backend", BACKENDS)
def test_signs_and_a_projection_without_gradient(backend):
    case = make(k=2, S=13, picks=True)
    _, grads = run(case, backend)
    per_sample = [torch.einsum("mn,mk->mnk", dy.double(), case["x"].double()) for dy in case["dy"]]
    for found, each, index in zip(grads[7:], per_sample, case["P"], strict=True):
        wanted = torch.einsum("snk,sk->nk", each[:, :, index], case["sign"].double())
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)
    del case["sign"]
    for p in (0.0, 0.4):
        Z = [torch.zeros(b.shape[0], 2, requires_grad=True) for b in case["B"]]
        operands = (case[name] for name in ("x", "W", "bias", "A", "B", "scale"))
        y = lora_linear(*operands, Z=Z, P=case["P"], p=p, backend=backend)
        torch.autograd.backward([y[0], y[2]], [case["dy"][0], case["dy"][2]])
        for i in (0, 2):
            wanted = reference.column_gradients(case["x"].double(), case["dy"][i].double(), case["P"][i])
            torch.testing.assert_close(Z[i].grad.double(), wanted, rtol=1e-5, atol=1e-5)
        assert not Z[1].grad.any()


def test_gradgradcheck():
    case = make(M=4, K=5, N=(3, 2), r=(2, 1), dtype=torch.float64, k=2, picks=True)
    A, B = [a.requires_grad_() for a in case["A"]], [b.requires_grad_() for b in case["B"]]

    def function(x, *factors):
        Z = [torch.zeros(b.shape[0], 2, dtype=torch.float64, requires_grad=True) for b in B]
        return lora_linear(x, case["W"], case["bias"], factors[:2], factors[2:], case["scale"], Z=Z, P=case["P"])

    inputs = (case["x"].requires_grad_(), *A, *B)
    assert torch.autograd.gradcheck(function, inputs) and torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.skipif(not native.available(), reason="the native library was not built")
@pytest.mark.parametrize("index", [-1, 20])
def test_the_kernel_refuses_a_column_that_is_not_there(index):
    case = make(k=1, picks=True)
    case["P"][1, 0] = index
    with pytest.raises(RuntimeError, match=f"P names column {index}; x has 20"):
        run(case, "native")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_norms_are_those_of_tokens_that_do_not_add_up(dtype):
    x, dy = torch.randn(9, 6).to(dtype), [torch.randn(9, n).to(dtype) for n in (4, 7)]
    wanted = torch.stack([(g.double().square().sum(1, keepdim=True) * x.double().square()).sum(0) for g in dy])
    torch.testing.assert_close(reference.column_norms(x, dy).double(), wanted, rtol=1e-5, atol=1e-6)


def test_an_adapter_of_a_mixed_batch_is_measured_on_its_own_rows():
    m = model()
    fastlora.add_adapter(m, "b", fastlora.LoraConfig(r=1, target_modules=["query", "value"], init_lora_weights=False))
    x, y = data()
    for ids in (torch.tensor([1, 0, 1, -1, 1, 0]), torch.tensor([0, 1, -1, 1, 0, 1]).repeat_interleave(5).view(6, 5)):
        mine = ids == 1

        def loss(m, ids=ids, mine=mine):
            with fastlora.use_adapters(m, ids):
                logits = m(x)
            each = nn.functional.cross_entropy(logits.flatten(0, 1), y.repeat_interleave(5), reduction="none")
            return (each.view(6, 5) * (mine if ids.dim() == 2 else mine[:, None])).sum()

        with fastlora.track(m, estimator="exact", ema=None, adapter="b", statistics=("grad_sq",)) as exact:
            loss(m).backward()
            exact.step()
        with columns(m, ("grad_sq",), adapter="b", probes=1) as tracker:
            loss(m).backward()
            tracker.step()
            found = every_draw(tracker, lambda loss=loss: loss(m).backward(), ("grad_sq",))
        assert_scores(found["grad_sq"], dict(exact.scores("grad_sq")))


def test_an_adapter_that_is_absent_neither_learns_nor_counts():
    m = model()
    fastlora.add_adapter(m, "b", fastlora.LoraConfig(r=1, target_modules=["query"], init_lora_weights=False))
    with columns(m, ("grad_sq",), adapter="b") as tracker:
        for _ in range(2):
            with fastlora.use_adapters(m, torch.tensor([0, 0, -1, 0, 0, 0])):
                loss_of(m, data()).backward()
            tracker.step()
    assert tracker._sampler.counts.tolist() == [0, 0] and tracker._averages.counts["grad_sq"].tolist() == [0.0, 0.0]


class Cross(nn.Module):
    """Query, key and value of one stacked matrix; the query sees other rows."""

    def __init__(self):
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x, other):
        return self.attn(x, other, other, need_weights=False)[0]


@pytest.mark.parametrize("target", ["qkv", ["in_proj"]])
def test_parts_of_a_layer_that_see_other_rows(target):
    torch.manual_seed(0)
    m = Cross().double()
    fastlora.inject(m, fastlora.LoraConfig(r=2, target_modules=target, init_lora_weights=False))
    x, other = data()[0], data(seed=2, tokens=7)[0]

    def run():
        m(x, other).square().sum().backward()

    kinds = ("grad_sq", "grad_abs", "act_var")
    with columns(m, kinds, probes=1) as tracker:
        run()
        tracker.step()
        found = every_draw(tracker, run)
    with track(m, estimator="exact", ema=None, statistics=kinds) as exact:
        run()
        exact.step()
    assert_scores(found["grad_sq"], dict(exact.scores("grad_sq")))
    assert dict(tracker.scores("act_var")) == pytest.approx(dict(exact.scores("act_var")))


def test_scores_over_many_steps_are_as_near_as_the_draws_allow():
    m, batch, steps, k = model(), data(), 400, 3
    G = weight_gradients(m, [batch])
    with columns(m, ("grad_sq", "grad_abs"), probes=k) as tracker:
        for _ in range(steps + 1):
            loss_of(m, batch).backward()
            tracker.step()
            m.zero_grad()
    shares = tracker._sampler._shares[0][0].double()
    p = shares / shares.sum(1, keepdim=True)
    for kind, power, size in (("grad_sq", 2, 1), ("grad_abs", 1, None)):
        found = tracker.scores(kind)
        for i, (key, g) in enumerate(G.items()):
            each = g.abs().pow(power).sum(0)  # by column; one draw is each / p
            expected = each.sum()
            spread = ((each.square() / p[i]).sum() / expected.square() - 1).clamp(min=0).sqrt() / (steps * k) ** 0.5
            off = found[key] * (size or g.numel()) / expected - 1
            assert abs(float(off)) < 5 * float(spread) + 1e-9, (kind, key)


@pytest.mark.parametrize("how", ["native", "formula"])
@pytest.mark.parametrize("first", [0, 7])
def test_every_group_has_the_signs_of_its_own_counters(first, how, monkeypatch):
    if how == "formula":
        monkeypatch.setattr(native, "has_kernel", lambda operator, device: False)
    elif not native.available():
        pytest.skip(native.reason())
    counts, seed, signs = [2, 0, 5, 1], torch.tensor(-3), Signs([2, 0, 5, 1], 4, torch.device("cpu"), first)
    for step in (0, 9):  # what is kept between steps serves both
        signs.fill_(found := torch.full((128 * sum(counts),), torch.nan), seed, step)
        for g, (part, count) in enumerate(zip(found.split([128 * c for c in counts]), counts, strict=True)):
            words = map(torch.tensor, (step, first + g, 4))
            assert torch.equal(part, reference.signs(seed, *words, 128 * count))
