"""Operands of many adapters, and the operator or its formula run on them."""

from __future__ import annotations

import torch

from fastlora.ops import reference
from fastlora.ops.layout import AdapterBatch
from fastlora.ops.lora import lora_grouped


def make(ids, K=20, N=(12, 6), ranks=((3, 5), (1, 0), (17, 2)), probes=(2, 0, 3), dtype=torch.float32, seed=0, signs=0,
         blocks=()):  # fmt: skip
    g = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    M, names, shapes = len(ids), [f"a{i}" for i in range(len(ranks))], [sum(N)] if blocks else N
    return {
        "x": rand(M, K),
        "W": [rand(n, K) / K**0.5 for n in shapes],
        "bias": [rand(shapes[0]), *[None] * (len(shapes) - 1)],
        "A": [rand(r, K) / K**0.5 for each in ranks for r in each],
        "B": [rand(n, r) for each in ranks for n, r in zip(N, each, strict=True)],
        "scale": [0.5 + 0.1 * i for i in range(len(ranks) * len(N))],
        "P": [torch.where(torch.rand(k, K, generator=g) < 0.5, 1.0, -1.0) for k in probes],
        "sign": [torch.where(torch.rand(signs, k, generator=g) < 0.5, 1.0, -1.0) for k in probes] if signs else [],
        "batch": AdapterBatch(names, torch.tensor(ids, dtype=torch.int64)),
        "dy": [rand(M, n) for n in shapes],
        "blocks": blocks,
    }


def run(case, backend=None, p=(), dtype=None, moments=False, streams=()):
    """Outputs and gradients of x, A, B, Z and V; the reference without a backend."""

    def cast(t):
        return t if t is None else t.detach().to(dtype or t.dtype)

    x = cast(case["x"]).requires_grad_()
    A, B = ([cast(t).requires_grad_() for t in case[f]] for f in "AB")
    W, bias = [cast(w) for w in case["W"]], [cast(b) for b in case["bias"]]
    acc, n = reference.accumulate_dtype(x.dtype), len(B) // len(case["batch"].names)
    Z = [torch.zeros(w.shape[0], P.shape[0], dtype=acc, requires_grad=True) for P in case["P"] for w in case["B"][:n]]
    V = [torch.zeros(2, w.shape[0] + 1, dtype=torch.float64, requires_grad=True) for _ in case["P"] for w in W]
    V = V if moments else []
    torch.manual_seed(5)
    if backend is None:
        seed = torch.randint(2**62, (), dtype=torch.int64) if any(p) else None
        keys = None if seed is None else case["batch"].keys(x, seed, 0)
        y = reference.lora_grouped(
            x,
            W,
            bias,
            A,
            B,
            case["scale"],
            case["batch"].ids,
            Z,
            case["P"],
            case["sign"],
            keys,
            p,
            streams,
            case["blocks"],
        )
    else:
        y = lora_grouped(
            x, W, bias, A, B, case["scale"], case["batch"], p=p, Z=Z, V=V, P=case["P"], sign=case["sign"],
            backend=backend, streams=streams, blocks=case["blocks"],
        )  # fmt: skip
    inputs = [x, *A, *B, *Z, *V]
    grads = torch.autograd.grad(y, inputs, [cast(g) for g in case["dy"]], allow_unused=True)
    return [t.detach() for t in y] + [
        torch.zeros_like(i) if g is None else g for i, g in zip(inputs, grads, strict=True)
    ]
