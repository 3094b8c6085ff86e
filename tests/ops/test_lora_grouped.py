"""The operator for many adapters against the float64 formula, on chosen and generated layouts, and its work."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.counted_help import multiply_adds, needs_counting
from support.grouped_op_help import make, run
from support.op_help import BACKENDS, assert_close_as
from torch.utils._python_dispatch import TorchDispatchMode

from fastlora.ops import layout, native, reference
from fastlora.ops.layout import AdapterBatch
from fastlora.ops.lora import lora_grouped

RANKS = (1, 2, 3, 5, 8, 16, 17)
IDS = {
    "scattered": [2, 0, 1, -1, 1, 2, -1, 0, 0, 2, -1, 1, 0],
    "runs": [0, 0, 0, 0, -1, -1, 2, 2, 2, 1, 1, 1, 1],
    "one has none": [0, 2, 2, 0, 0, -1, 2, 2, 0, 0, 0, 2, 2],
    "identical": [1] * 13,
    "base only": [-1] * 13,
    "one token": [2],
    "nothing": [],
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("ids", IDS)
@pytest.mark.parametrize("p", [(), (0.3, 0.0, 0.5)], ids=["", "dropout"])
def test_forward_and_gradients(ids, dtype, backend, p):
    case = make(IDS[ids], dtype=dtype)
    assert_close_as(run(case, backend, p), run(case, None, p, torch.float64), run(case, None, p))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("ids", IDS)
@pytest.mark.parametrize("p", [(), (0.3, 0.0, 0.5)], ids=["", "dropout"])
def test_projections_that_interleave(ids, dtype, backend, p):
    ranks = ((3, 5, 1), (1, 0, 2), (17, 2, 20))
    case = make(IDS[ids], N=(12, 6, 9), ranks=ranks, dtype=dtype, blocks=[3])
    assert_close_as(run(case, backend, p), run(case, None, p, torch.float64), run(case, None, p))


def test_the_formula_of_projections_that_interleave():
    """Each adapter's rows as ``lora_linear`` of these rows has them."""
    case = make(IDS["scattered"], N=(12, 6, 9), ranks=((3, 5, 1), (1, 0, 2), (17, 2, 20)), blocks=[3])
    y, ids = run(case, None, dtype=torch.float64)[0], case["batch"].ids
    for g in range(3):
        own = [[t.double() for t in case[f][3 * g : 3 * g + 3]] for f in "AB"]
        x, W, bias = case["x"].double()[ids == g], case["W"][0].double(), case["bias"][0].double()
        (want,) = reference.lora_linear(x, [W], [bias], *own, case["scale"][3 * g : 3 * g + 3], blocks=[3])
        torch.testing.assert_close(y[ids == g], want, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("backend", BACKENDS)
def test_masks_of_the_streams_that_are_named(backend):
    case, p = make(IDS["scattered"]), (0.3, 0.0, 0.5)
    other = [4, 0, 9][: len(case["W"])]
    want = run(case, None, p, torch.float64, streams=other)
    assert_close_as(run(case, backend, p, streams=other), want, run(case, None, p, streams=other))
    assert not torch.allclose(want[0], run(case, None, p, torch.float64)[0], atol=0.1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_rank_in_one_batch(backend):
    ids = torch.randint(-1, len(RANKS), (97,), generator=torch.Generator().manual_seed(3)).tolist()
    case = make(ids, K=33, N=(16, 7, 9), ranks=tuple((r, 1, r) for r in RANKS), probes=(4,) * len(RANKS))
    assert_close_as(run(case, backend), run(case, None, dtype=torch.float64), run(case))


@pytest.mark.parametrize("backend", BACKENDS)
def test_moments_are_of_an_adapters_own_rows(backend):
    case = make(IDS["scattered"])
    got = run(case, backend, moments=True)[-6:]
    y = [t.double() for t in run(case, None, dtype=torch.float64)[:2]]
    ids = case["batch"].ids
    want = []
    for g in range(3):
        for out in y:
            own = out[ids == g]
            sums = torch.stack([own.sum(0), own.square().sum(0)])
            want.append(torch.cat([sums, torch.full((2, 1), float(len(own)))], dim=1))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_signs_change_the_probe_columns_of_their_samples(backend):
    case = make(IDS["scattered"][:12], signs=4)
    want = run(case, None, dtype=torch.float64)
    assert_close_as(run(case, backend), want, run(case))
    without = run({**case, "sign": []}, None, dtype=torch.float64)
    assert any(not torch.equal(a, b) for a, b in zip(want, without, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_shuffled_routing_is_seen(backend):
    case = make(IDS["scattered"])
    other = {**case, "batch": AdapterBatch(case["batch"].names, case["batch"].ids.roll(1))}
    assert not torch.allclose(run(case, backend)[0], run(other, backend)[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_does_not_depend_on_the_others(backend):
    ids = torch.tensor(IDS["scattered"])
    case = make(ids.tolist())
    mixed = run(case, backend)
    for g in range(3):
        alone = run({**case, "batch": AdapterBatch(case["batch"].names, torch.where(ids == g, ids, -1))}, backend)
        for a, b in zip(mixed[:3], alone[:3], strict=True):  # y of both projections, dx
            assert torch.equal(a[ids == g], b[ids == g])


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_same_bits_again(backend):
    case = make(IDS["scattered"])
    for a, b in zip(run(case, backend), run(case, backend), strict=True):
        assert torch.equal(a, b)


def test_gradients_can_be_differentiated_again():
    case = make(IDS["scattered"], dtype=torch.float64)
    x, A = case["x"].requires_grad_(), [a.requires_grad_() for a in case["A"]]

    def function(x, *A):
        return tuple(lora_grouped(x, case["W"], case["bias"], A, case["B"], case["scale"], case["batch"]))

    assert torch.autograd.gradcheck(function, (x, *A))
    assert torch.autograd.gradgradcheck(function, (x, *A))


@pytest.mark.parametrize("shape", [(3,), (2, 3)])
def test_ids_that_do_not_fit_are_named(shape):
    case = make(IDS["scattered"])
    batch = AdapterBatch(["a0"], torch.zeros(shape, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"ids: .* given, but a layer sees an input of shape \(13, 20\)"):
        lora_grouped(case["x"], case["W"], case["bias"], case["A"], case["B"], case["scale"], batch)


class NothingIsReadBack(TorchDispatchMode):
    """Fails where the host would wait for a device's values."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name()
        assert not any(word in name for word in ("_local_scalar_dense", "nonzero", "masked_select", "equal")), name
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("p", [(), (0.3, 0.0, 0.5)], ids=["", "dropout"])
@pytest.mark.parametrize("ids", IDS)
def test_by_masks_where_reading_ranges_would_wait(ids, p, monkeypatch):
    """What the generic verbs do on a GPU that has no segmented kernels: the same numbers, with no value read back."""
    case = make(IDS[ids], dtype=torch.float64)
    case["x"][[i for i, g in enumerate(IDS[ids]) if g < 0]] = float("inf")  # rows that no adapter may look at
    want = run(case, "reference", p=p, moments=True)
    case["batch"].rows(case["x"])  # the native library builds them on a GPU without waiting
    monkeypatch.setattr(layout, "on_host", lambda device: False)
    for name in ("tolist", "item", "__bool__", "__int__", "__float__"):
        monkeypatch.setattr(torch.Tensor, name, lambda tensor, _name=name: pytest.fail(f"{_name} waits for the device"))
    with NothingIsReadBack():
        found = run(case, "reference", p=p, moments=True)
    monkeypatch.undo()
    for a, e in zip(found, want, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-12, equal_nan=True)


ALL_RANKS = [1, 2, 3, 5, 8, 16, 17, 64, 128]
ADAPTERS = [1, 8, 32, 128]
DISTRIBUTIONS = ["distinct", "uniform", "identical", "zipf", "skewed"]


def draw_ids(distribution: str, rows: int, adapters: int, base: float, generator: torch.Generator) -> list[int]:
    """Ids in no particular order; a row is base only with probability ``base``, and adapters may get no row."""
    weights = {
        "uniform": torch.ones(adapters),
        "zipf": 1.0 / torch.arange(1, adapters + 1),
        "skewed": torch.tensor([50.0 * adapters] + [1.0] * (adapters - 1)),
    }
    if rows == 0:
        return []
    if distribution == "distinct":
        ids = torch.randperm(max(rows, adapters), generator=generator)[:rows] % adapters
    elif distribution == "identical":
        ids = torch.full((rows,), adapters - 1)
    else:
        ids = torch.multinomial(weights[distribution], rows, replacement=True, generator=generator)
    return torch.where(torch.rand(rows, generator=generator) < base, -1, ids).tolist()


@st.composite
def layouts(draw):
    """Operands of one call: adapters, their ranks by projection, rows, ids, uneven projections, probes."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    adapters = draw(st.sampled_from(ADAPTERS) | st.integers(1, 40))
    rows = draw(st.sampled_from([0, 1, 133]) | st.integers(0, 133))
    N = draw(st.lists(st.integers(1, 40), min_size=1, max_size=3))
    # A rank of 128 is rare enough that forty adapters stay quick, and still comes up beside small ones.
    pool = draw(st.lists(st.sampled_from(ALL_RANKS), min_size=1, max_size=4))
    picks = torch.randint(len(pool), (adapters, len(N)), generator=generator)
    ranks = tuple(tuple(pool[i] for i in each) for each in picks.tolist())
    base = draw(st.sampled_from([0.0, 0.1, 1.0]))
    ids = draw_ids(draw(st.sampled_from(DISTRIBUTIONS)), rows, adapters, base, generator)
    probes = tuple(torch.randint(4, (adapters,), generator=generator).tolist())
    case = make(ids, K=draw(st.integers(1, 48)), N=tuple(N), ranks=ranks, probes=probes, seed=draw(st.integers(0, 999)))
    # Sums of up to 128 products keep the scale of the others.
    case["B"] = [b / max(b.shape[1], 1) ** 0.5 for b in case["B"]]
    return case


def magnitudes(case: dict) -> dict:
    """The same operands without signs: nothing cancels, so that their results are the sums of the terms' sizes."""

    def unsigned(value):
        if isinstance(value, torch.Tensor):
            return value.abs()
        return [unsigned(v) for v in value] if isinstance(value, list) else value

    return {name: unsigned(value) for name, value in case.items()}


def within_error(case: dict) -> None:
    """Four times the plain formula's own error in fp32, and four roundings of the terms, some of which cancel."""
    exact, terms = (run(operands, None, dtype=torch.float64) for operands in (case, magnitudes(case)))
    for a, e, size, p in zip(run(case, "auto"), exact, terms, run(case), strict=True):
        assert a.shape == e.shape
        if e.numel():
            allowed = 4 * (p - e).abs().max() + 4 * torch.finfo(torch.float32).eps * size
            assert ((a - e).abs() <= allowed).all(), ((a - e).abs().max(), e.abs().max())


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(layouts())
def test_generated_layouts(case):
    """Outputs, dx, and dA, dB and Q of every adapter that there is, with rows or without."""
    within_error(case)


@pytest.mark.parametrize("adapters", ADAPTERS)
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_every_distribution_and_every_rank(distribution, adapters):
    """What generated layouts may miss: each distribution with each number of adapters and all ranks among them."""
    generator = torch.Generator().manual_seed(adapters)
    for rows in (1, 133):
        ids = draw_ids(distribution, rows, adapters, 0.1, generator)
        ranks = tuple((ALL_RANKS[g % 9], ALL_RANKS[(g + 4) % 9]) for g in range(adapters))
        case = make(ids, K=24, N=(10, 6), ranks=ranks, probes=())
        case["B"] = [b / b.shape[1] ** 0.5 for b in case["B"]]
        within_error(case)


@pytest.fixture
def counted(monkeypatch) -> Counter:
    """Multiply-adds of both native passes by name: every call that the backend makes goes to its counting twin too."""
    found, ops = Counter(), torch.ops.fastlora

    def count(name: str, run_it, twin) -> None:
        def call(first, *rest):
            copy = [t.clone() for t in first] if isinstance(first, list) else first.clone()
            found[name] += twin(copy, *rest)
            return run_it(first, *rest)

        monkeypatch.setattr(ops, f"lora_grouped_{name}_", SimpleNamespace(default=call))

    count("forward", ops.lora_grouped_forward_.default, multiply_adds("forward"))
    count("backward", ops.lora_grouped_backward_.default, multiply_adds("backward"))
    return found


@needs_counting
@pytest.mark.skipif(not native.available(), reason="the native library is not there")
@pytest.mark.parametrize("adapters", [2, 8, 32])
def test_work_is_own_rows_times_own_ranks(counted, adapters):
    """Neither the sum of all ranks nor the largest rank for every row: one adapter's rank grows, for its rows only."""
    K, N = 24, (10, 6)
    ids = [m % adapters if m % 7 else -1 for m in range(120)]
    for large in ALL_RANKS:
        ranks = tuple((large, 1) if g == 1 else (2, 3) for g in range(adapters))
        case = make(ids, K=K, N=N, ranks=ranks, probes=())
        counted.clear()
        run(case, "native")
        work = sum(ids.count(g) * sum(r * (K + n) for r, n in zip(own, N, strict=True)) for g, own in enumerate(ranks))
        assert counted == {"forward": work, "backward": 2 * work}
