"""The operator for many adapters against the float64 formula: forward, every gradient, every statistic."""

from __future__ import annotations

import pytest
import torch
from op_help import BACKENDS, assert_close_as
from torch.utils._python_dispatch import TorchDispatchMode

from fastlora.ops import layout, reference
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


def make(ids, K=20, N=(12, 6), ranks=((3, 5), (1, 0), (17, 2)), probes=(2, 0, 3), dtype=torch.float32, seed=0, signs=0):
    g = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    M, names = len(ids), [f"a{i}" for i in range(len(ranks))]
    return {
        "x": rand(M, K),
        "W": [rand(n, K) / K**0.5 for n in N],
        "bias": [rand(N[0]), *[None] * (len(N) - 1)],
        "A": [rand(r, K) / K**0.5 for each in ranks for r in each],
        "B": [rand(n, r) for each in ranks for n, r in zip(N, each, strict=True)],
        "scale": [0.5 + 0.1 * i for i in range(len(ranks) * len(N))],
        "P": [torch.where(torch.rand(k, K, generator=g) < 0.5, 1.0, -1.0) for k in probes],
        "sign": [torch.where(torch.rand(signs, k, generator=g) < 0.5, 1.0, -1.0) for k in probes] if signs else [],
        "batch": AdapterBatch(names, torch.tensor(ids, dtype=torch.int64)),
        "dy": [rand(M, n) for n in N],
    }


def run(case, backend=None, p=(), dtype=None, moments=False):
    """Outputs and gradients of x, A, B, Z and V; the reference without a backend."""

    def cast(t):
        return t if t is None else t.detach().to(dtype or t.dtype)

    x = cast(case["x"]).requires_grad_()
    A, B = ([cast(t).requires_grad_() for t in case[f]] for f in "AB")
    W, bias = [cast(w) for w in case["W"]], [cast(b) for b in case["bias"]]
    acc = reference.accumulate_dtype(x.dtype)
    Z = [torch.zeros(w.shape[0], P.shape[0], dtype=acc, requires_grad=True) for P in case["P"] for w in case["W"]]
    V = [torch.zeros(2, w.shape[0] + 1, dtype=torch.float64, requires_grad=True) for _ in case["P"] for w in W]
    V = V if moments else []
    torch.manual_seed(5)
    if backend is None:
        seed = torch.randint(2**62, (), dtype=torch.int64) if any(p) else None
        keys = None if seed is None else case["batch"].keys(x, seed, 0)
        y = reference.lora_grouped(
            x, W, bias, A, B, case["scale"], case["batch"].ids, Z, case["P"], case["sign"], keys, p
        )
    else:
        y = lora_grouped(
            x, W, bias, A, B, case["scale"], case["batch"], p=p, Z=Z, V=V, P=case["P"], sign=case["sign"],
            backend=backend,
        )  # fmt: skip
    inputs = [x, *A, *B, *Z, *V]
    grads = torch.autograd.grad(y, inputs, [cast(g) for g in case["dy"]], allow_unused=True)
    return [t.detach() for t in y] + [
        torch.zeros_like(i) if g is None else g for i, g in zip(inputs, grads, strict=True)
    ]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("ids", IDS)
@pytest.mark.parametrize("p", [(), (0.3, 0.0, 0.5)], ids=["", "dropout"])
def test_forward_and_gradients(ids, dtype, backend, p):
    case = make(IDS[ids], dtype=dtype)
    assert_close_as(run(case, backend, p), run(case, None, p, torch.float64), run(case, None, p))


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
