"""Operands of one group, the float64 oracle, and the tolerance, for the tests of the operator."""

from __future__ import annotations

import torch

from fastlora.ops import native, reference
from fastlora.ops.lora import checked_linear

BACKENDS = ["reference", "eager", *(["native"] if native.available() else [])]


def make(M=13, K=20, N=(12, 6, 6), r=(3, 0, 5), fused=False, k=0, dtype=torch.float32, seed=0, S=None, picks=False,
         blocks=()):  # fmt: skip
    """Random operands of one group, B not zero; k probe rows, or with ``picks`` k columns of x for each projection."""
    g = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    W = [rand(n, K) / K**0.5 for n in N]
    bias = [rand(n) for n in N]
    bias[-1] = None
    case = {
        "x": rand(M, K),
        "W": [torch.cat(W)] if fused else W,
        "bias": [torch.cat([b if b is not None else torch.zeros(N[-1], dtype=dtype) for b in bias])] if fused else bias,
        "A": [rand(rank, K) / K**0.5 for rank in r],
        "B": [rand(n, rank) for n, rank in zip(N, r, strict=True)],
        "scale": [0.5 + 0.25 * i for i in range(len(N))],
        "dy": [rand(M, sum(N))] if fused else [rand(M, n) for n in N],
        "blocks": blocks,
    }
    if picks:
        case["P"] = torch.randint(K, (len(N), k), generator=g)
    elif k:
        case["P"] = torch.where(torch.rand(k, K, generator=g) < 0.5, 1.0, -1.0)
    if S:
        case["sign"] = torch.where(torch.rand(S, k, generator=g) < 0.5, 1.0, -1.0)
    return case


def run(case, backend="auto", p=0.0, function=None, dtype=None, moments=False, probes=True, streams=()):
    """Outputs and gradients of x, A, B (and Z, V) as flat lists."""
    cast = (lambda t: t if t is None else t.detach().to(dtype)) if dtype else (lambda t: t if t is None else t.detach())
    x = cast(case["x"]).requires_grad_()
    A, B = [cast(a).requires_grad_() for a in case["A"]], [cast(b).requires_grad_() for b in case["B"]]
    W, bias = [cast(w) for w in case["W"]], [cast(b) for b in case["bias"]]
    P = case.get("P") if probes else None
    acc = reference.accumulate_dtype(x.dtype)
    k = 0 if P is None else P.shape[0] if P.is_floating_point() else P.shape[1]
    Z = [torch.zeros(b.shape[0], k, dtype=acc, requires_grad=True) for b in B] if P is not None else []
    V = [torch.zeros(2, w.shape[0] + 1, dtype=torch.float64, requires_grad=True) for w in W] if moments else []
    if function is None:
        torch.manual_seed(5)
        rest = (P, case.get("sign"), backend, "auto", streams, case["blocks"])
        y = checked_linear(x, W, bias, A, B, case["scale"], p, Z, V, *rest)
    else:
        torch.manual_seed(5)
        seed = torch.randint(2**62, (), dtype=torch.int64) if p > 0 else None
        y = function(x, W, bias, A, B, case["scale"], Z, P, case.get("sign"), seed, p, streams, case["blocks"])
    inputs = [x, *A, *B, *Z, *V]
    grads = torch.autograd.grad(y, inputs, [cast(g) for g in case["dy"]], allow_unused=True)
    return [t.detach() for t in y], [
        torch.zeros_like(i) if g is None else g for i, g in zip(inputs, grads, strict=True)
    ]


def oracle(case, **kwargs):
    return run(case, function=reference.lora_linear, dtype=torch.float64, **kwargs)


def assert_close_as(actual, expected, low):
    """No further from float64 than four times the plain formula in the same precision (and a few ulps of its scale)."""
    for a, e, p in zip(actual, expected, low, strict=True):
        assert a.shape == e.shape
        if e.numel() == 0:
            continue
        scale = e.abs().max()
        eps = torch.finfo(a.dtype).eps if a.is_floating_point() else 0.0
        tolerance = 4 * (p.double() - e).abs().max() + 4 * eps * scale
        assert (a.double() - e).abs().max() <= tolerance, ((a.double() - e).abs().max(), tolerance)
