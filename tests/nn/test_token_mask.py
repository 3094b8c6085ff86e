"""Tokens that do not count in ``act_var`` and covariances: those of a padded batch are those of its tokens."""

from __future__ import annotations

import contextlib

import pytest
import torch
from support.tracker_help import assert_scores, data, loss_of, model, track
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastlora

LENGTHS = (5, 3, 1, 4, 5, 2)


def padding(lengths=LENGTHS, tokens=5):
    """As a tokenizer gives it: int64, 1 a token."""
    return (torch.arange(tokens) < torch.tensor(lengths)[:, None]).long()


def variances(m, kept):
    """Trace of the covariance of each matrix's outputs over the rows that ``kept`` picks of each batch, in float64."""
    outputs = {}
    layers = fastlora.nn.linear.adapted_layers(m)
    handles = [
        layer.register_forward_hook(lambda _, args, y, path=path: outputs.setdefault(path, []).append(y.detach()))
        for path, layer in layers.items()
    ]
    with torch.no_grad():
        for (x, _), mask in kept:
            m(x)
            for out in outputs.values():
                out[-1] = out[-1][mask.bool()]
    for handle in handles:
        handle.remove()
    return {path: torch.cat(out).double().var(0, correction=0).sum() for path, out in outputs.items()}


def act_var(m, run, **kwargs):
    with track(m, statistics=("act_var",), ema=None, **kwargs) as tracker:
        run(tracker)
        tracker.step()
    return dict(tracker.scores("act_var"))


@pytest.mark.parametrize("kind", [torch.int64, torch.bool, torch.uint8])
@pytest.mark.parametrize("estimator", ["probe", "exact"])
def test_a_padded_batch_has_the_variance_of_its_tokens(kind, estimator):
    m, (x, y), mask = model(), data(), padding()
    expected = variances(m, [((x, y), mask)])

    def run(tracker):
        with tracker.mask(mask.to(kind)):
            loss_of(m, (x, y)).backward()

    found = act_var(m, run, estimator=estimator)
    assert_scores(found, expected)
    everything = act_var(m, lambda tracker: loss_of(m, (x, y)).backward())
    assert_scores(everything, variances(m, [((x, y), torch.ones_like(mask))]))
    assert all(found[key] != pytest.approx(everything[key], rel=1e-3) for key in found)


@pytest.mark.parametrize("backend", ["reference", "eager", "native"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_backend_in_low_precision(backend, dtype):
    m, (x, y), mask = model(dtype), data(dtype), padding()
    for layer in fastlora.nn.linear.adapted_layers(m).values():
        layer.backend = backend

    def run(tracker):
        with tracker.mask(mask):
            loss_of(m, (x, y)).backward()

    # y is what the layer gave, in its dtype; the native kernel sums blocks of rows, here all 20, in fp32
    rtol = 20 * 2**-24 if backend == "native" else 1e-9
    assert_scores(act_var(m, run), variances(m, [((x, y), mask)]), rtol=rtol)


def test_rows_without_samples():
    m, (x, _), mask = model(layer=Rows), data(), padding()

    def run(tracker):
        with tracker.mask(mask.flatten()):
            m(x.flatten(0, 1)).square().sum().backward()

    assert_scores(act_var(m, run), variances(m, [((x.flatten(0, 1), None), mask.flatten())]))


class Rows(nn.Module):
    """Layers on a matrix of rows."""

    def __init__(self, d):
        super().__init__()
        self.query, self.key, self.value = nn.Linear(d, d), nn.Linear(d, d), nn.Linear(d, d)

    def forward(self, x):
        return self.query(x) * self.key(x) + self.value(x)


@pytest.mark.parametrize("late", [False, True])
def test_micro_batches_have_masks_of_their_own(late):
    m = model()
    batches = [data(seed=1), data(seed=2, samples=4, tokens=7)]
    masks = [padding(), padding((7, 2, 1, 3), 7)]

    def run(tracker):
        losses = []
        for batch, mask in zip(batches, masks, strict=True):
            with tracker.mask(mask):
                losses.append(loss_of(m, batch))
            if not late:
                losses.pop().backward()
        for loss in losses:
            loss.backward()

    assert_scores(act_var(m, run), variances(m, list(zip(batches, masks, strict=True))))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_takes_the_mask_of_the_forward_that_it_repeats(reentrant):
    m = model()
    batches, masks = [data(seed=1), data(seed=2)], [padding(), padding((1, 5, 2, 2, 3, 4))]

    def run(tracker):
        losses = []
        for (x, y), mask in zip(batches, masks, strict=True):
            x.requires_grad_()
            with tracker.mask(mask):
                h = x
                for block in m[:-1]:
                    h = checkpoint(block, h, use_reentrant=reentrant)
                losses.append(nn.functional.cross_entropy(m[-1](h).mean(1), y))
            if reentrant:  # cannot tell its forwards apart
                losses.pop().backward()
        for loss in losses:
            loss.backward()

    assert_scores(act_var(m, run), variances(m, list(zip(batches, masks, strict=True))))


def test_reentrant_checkpoints_that_cannot_be_told_apart_raise():
    m, (x, _) = model(), data()
    with track(m, statistics=("act_var",)) as tracker:
        outputs = []
        for lengths in (LENGTHS, LENGTHS[::-1]):
            with tracker.mask(padding(lengths)):
                outputs.append(checkpoint(m[0], x.requires_grad_(), use_reentrant=True))
        with pytest.raises(RuntimeError, match="cannot be told from others with other adapters or masks"):
            outputs[0].sum().backward()


def test_compiled_without_a_graph_break():
    torch._dynamo.reset()
    batches, masks = [data(torch.float32, seed=s) for s in (1, 2)], [padding(), padding(LENGTHS[::-1])]
    m = model(torch.float32)
    compiled = torch.compile(m, backend="aot_eager", fullgraph=True)

    def run(tracker):
        for batch, mask in zip(batches, masks, strict=True):
            with tracker.mask(mask):
                loss_of(compiled, batch).backward()

    assert_scores(act_var(m, run), variances(m, list(zip(batches, masks, strict=True))), rtol=1e-5)


@pytest.mark.parametrize("inside", [False, True])
def test_an_adapter_of_a_mixed_batch(inside):
    m, (x, y), mask = model(), data(), padding()
    fastlora.add_adapter(m, "b", fastlora.LoraConfig(r=1, target_modules="qkv", init_lora_weights=False))
    ids = torch.tensor([1, 0, 1, -1, 1, 0])
    with fastlora.use_adapters(m, "b"):
        expected = variances(m, [((x, y), mask * (ids == 1)[:, None])])

    def run(tracker):
        contexts = [tracker.mask(mask), fastlora.use_adapters(m, ids)]
        with contextlib.ExitStack() as stack:
            for context in contexts[:: -1 if inside else 1]:
                stack.enter_context(context)
            loss_of(m, (x, y)).backward()
        assert m[0].query.router.current().mask is None

    found = act_var(m, run, adapter="b")
    # later layers see what the batch's other adapters made of nothing: samples are apart
    assert_scores(found, expected)


def test_a_token_that_is_not_finite_and_does_not_count():
    m, (x, y), mask = model(), data(), padding()
    x[1, 4] = torch.nan  # of a sample with 3 tokens

    def run(tracker):
        with tracker.mask(mask):
            (m(x)[mask.bool()].square().sum()).backward()

    expected = variances(m, [((x, y), mask)])
    assert all(value.isfinite() for value in expected.values())
    assert_scores(act_var(m, run), expected)


def covariances(m, run, **kwargs):
    with track(m, estimator="exact", statistics=("act_cov", "grad_cov"), **kwargs) as tracker:
        run(tracker)
        tracker.step()
    return {kind: tracker.covariances(kind) for kind in ("act_cov", "grad_cov")}


def rows_of(m, batches, kept):
    """x and dy of every layer in float64, the rows that ``kept`` picks of each batch's loss."""
    found, layers = {"act_cov": {}, "grad_cov": {}}, fastlora.nn.linear.adapted_layers(m)

    def keep(path, mask):
        def hook(module, args, y):
            found["act_cov"].setdefault(path, []).append(args[0].detach()[mask].double())
            y.register_hook(lambda g: found["grad_cov"].setdefault(path, []).append(g.detach()[mask].double()) or None)

        return hook

    for batch, mask in zip(batches, kept, strict=True):
        handles = [layer.register_forward_hook(keep(path, mask)) for path, layer in layers.items()]
        loss_of(m, batch).backward()
        for handle in handles:
            handle.remove()
        m.zero_grad()
    products = {kind: {path: torch.cat(parts) for path, parts in by.items()} for kind, by in found.items()}
    return {kind: {path: rows.T @ rows / len(rows) for path, rows in by.items()} for kind, by in products.items()}


@pytest.mark.parametrize("kind", [torch.int64, torch.bool])
def test_covariances_of_a_padded_batch_are_those_of_its_tokens(kind):
    """In two micro-batches of different lengths, with masks of their own."""
    m, batches = model(), [data(seed=1), data(seed=2, samples=4, tokens=7)]
    masks = [padding(), padding((7, 2, 1, 3), 7)]
    expected = rows_of(m, batches, [mask.bool() for mask in masks])
    everything = rows_of(m, batches, [torch.ones_like(mask).bool() for mask in masks])

    def run(tracker):
        for batch, mask in zip(batches, masks, strict=True):
            with tracker.mask(mask.to(kind)):
                loss_of(m, batch).backward()

    found = covariances(m, run)
    for name, by_path in expected.items():
        for path, value in by_path.items():
            torch.testing.assert_close(found[name][path], value, rtol=1e-10, atol=1e-14)
            assert not torch.allclose(value, everything[name][path], rtol=1e-3)


@pytest.mark.parametrize("tokens", [False, True])
@pytest.mark.parametrize("names", [["default", "b"], ["b", "default"]])
def test_covariances_of_an_adapter_in_a_mixed_batch(tokens, names):
    m, (x, y), mask = model(), data(), padding()
    fastlora.add_adapter(m, "b", fastlora.LoraConfig(r=1, target_modules="qkv", init_lora_weights=False))
    ids = torch.tensor([names.index("b"), 0, names.index("b"), 1, -1, 1])
    mine = (ids == 1)[:, None] & mask.bool()
    given = ids[:, None].expand(6, 5).reshape(-1) if tokens else ids

    def run(tracker):
        with tracker.mask(mask), fastlora.use_adapters(m, given):
            loss_of(m, (x, y)).backward()

    with fastlora.use_adapters(m, given):
        expected = rows_of(m, [(x, y)], [mine])
    found = covariances(m, run, adapter="b")
    for name, by_path in expected.items():
        for path, value in by_path.items():
            torch.testing.assert_close(found[name][path], value, rtol=1e-10, atol=1e-14)


def test_a_token_that_is_not_finite_and_does_not_count_in_covariances():
    m, (x, _), mask = model(), data(), padding()
    x[1, 4] = torch.nan  # of a sample with 3 tokens

    def run(tracker):
        with tracker.mask(mask):
            m(x)[mask.bool()].square().sum().backward()

    assert all(value.isfinite().all() for by in covariances(m, run).values() for value in by.values())


@pytest.mark.parametrize("reentrant", [False, True])
def test_covariances_under_checkpointing(reentrant):
    m, (x, y), mask = model(), data(), padding()
    x.requires_grad_()

    def run(tracker):
        with tracker.mask(mask):
            h = x
            for block in m[:-1]:
                h = checkpoint(block, h, use_reentrant=reentrant)
            loss = nn.functional.cross_entropy(m[-1](h).mean(1), y)
        loss.backward()

    expected = rows_of(m, [(x.detach(), y)], [mask.bool()])
    found = covariances(m, run)
    for name, by_path in expected.items():
        for path, value in by_path.items():
            torch.testing.assert_close(found[name][path], value, rtol=1e-10, atol=1e-14)


def test_weights_statistics_are_not_touched():
    m, batch, found = model(), data(), []
    for masked in (False, True):
        with track(m, statistics=("grad_sq", "act_var")) as tracker:
            with tracker.mask(padding()) if masked else contextlib.nullcontext():
                loss_of(m, batch).backward()
            tracker.step()
        found.append(dict(tracker.scores("grad_sq")))
    assert_scores(found[1], found[0])


def test_columns_and_a_mask_together():
    m, batch, mask = model(), data(), padding()

    def run(tracker):
        with tracker.mask(mask):
            loss_of(m, batch).backward()

    with track(m, statistics=("grad_sq", "act_var"), ema=None, probe_kind="columns") as tracker:
        for _ in range(2):
            run(tracker)
            tracker.step()
    assert_scores(tracker.scores("act_var"), variances(m, [(batch, mask)]))


def test_another_shape_is_refused_by_both_names():
    m, batch = model(), data()
    with track(m, statistics=("act_var",)) as tracker:
        for shape in ((6, 4), (5, 6), (6,)):
            with pytest.raises(
                ValueError, match=rf"mask: expected the tokens \(6, 5\) that a layer sees, got \({shape[0]},"
            ):
                with tracker.mask(torch.ones(shape, dtype=torch.bool)):
                    m(batch[0])
        assert m[0].query.router.current().mask is None
        loss_of(m, batch).backward()
        tracker.step()
    assert tracker._averages.counts["act_var"].unique().tolist() == [1.0]
