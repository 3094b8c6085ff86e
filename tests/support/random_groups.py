"""Random groups of projections with everything that may come together, and their float64 answers."""

from __future__ import annotations

import dataclasses
import random
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastlora.ops import reference
from fastlora.ops.bound import BoundCall
from fastlora.ops.layout import AdapterBatch
from fastlora.ops.lora import LORA_LINEAR

RANKS = (0, 1, 3, 4, 8, 8, 16, 20)


@dataclass
class Group:
    """One drawn group: sizes, then tensors of them; ``adapters`` 0 is one for all rows, and k probes an adapter."""

    dtype: torch.dtype
    K: int
    shape: tuple[int, ...]
    blocks: list[int]
    widths: list[int]
    outputs: list[int]
    adapters: int
    ranks: list[list[int]]
    p: list[float]
    k: list[int]
    streams: list[int]
    moments: bool
    grads: tuple[bool, bool, bool, bool]  # of x, A, B, Z
    tensors: dict[str, Any] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        return torch.Size(self.shape).numel()


def draw(seed: int, dtypes: tuple[torch.dtype, ...], sizes: tuple[int, ...] = (5, 8, 20, 33, 64, 130)) -> Group:
    """The group of a seed."""
    r = random.Random(seed)
    blocks = [r.choice((1, 2, 3, 5)) for _ in range(r.choice((1, 1, 2, 3)))]
    each = [[b * r.choice((1, 2, 3, 4, 7, 16)) for _ in range(r.choice((1, 2, 3)))] for b in blocks]
    widths, adapters = [w for own in each for w in own], r.choice((0, 0, 0, 2, 3))
    number, dtype, probed = max(adapters, 1), r.choice(dtypes), r.random() < 0.6
    some = r.random() < 0.4
    group = Group(
        dtype=dtype, K=r.choice(sizes), shape=r.choice(((0,), (1,), (13,), (40,), (3, 7), (4, 11), (2, 3, 5))),
        blocks=blocks if r.random() < 0.7 else [], widths=widths, outputs=[sum(own) for own in each],
        adapters=adapters, ranks=[[8 if some else r.choice(RANKS) for _ in widths] for _ in range(number)],
        p=[r.choice((0.0, 0.1, 0.5)) for _ in range(number)], k=[r.choice((1, 4, 8)) * probed for _ in range(number)],
        streams=[] if r.random() < 0.5 else r.sample(range(40), len(widths)), moments=r.random() < 0.5,
        grads=(r.random() < 0.75, r.random() < 0.75, True, r.random() < 0.75),
    )  # fmt: skip
    fill(group, r)
    return group


def fill(group: Group, r: random.Random) -> None:
    """Tensors of the drawn sizes; without a gradient for some outputs, and without some biases."""
    g, K, samples = torch.Generator().manual_seed(r.randrange(2**30)), group.K, group.shape[0]
    factor_dtype, padding = r.choice((group.dtype, reference.accumulate_dtype(group.dtype))), r.choice((0, 0, 3))

    def rand(*size: int, dtype: torch.dtype = group.dtype) -> Tensor:
        whole = torch.randn(*size[:-1], size[-1] + padding, generator=g, dtype=torch.float64)
        return whole.to(dtype)[..., : size[-1]]

    def signs(*size: int) -> Tensor:
        return torch.where(torch.rand(*size, generator=g) < 0.5, 1.0, -1.0)

    own = group.tensors
    own["x"], own["W"] = rand(*group.shape, K), [rand(n, K) / K**0.5 for n in group.outputs]
    own["bias"] = [rand(n).contiguous() if r.random() < 0.6 else None for n in group.outputs]
    own["A"] = [rand(rank, K, dtype=factor_dtype) / K**0.5 for ranks in group.ranks for rank in ranks]
    own["B"] = [
        rand(n, q, dtype=factor_dtype) for ranks in group.ranks for n, q in zip(group.widths, ranks, strict=True)
    ]
    own["scale"] = [0.5 + 0.25 * i for i in range(len(own["A"]))]
    there = r.randrange(len(group.outputs))
    own["dy"] = [rand(*group.shape, n) if j == there or r.random() < 0.75 else None
                 for j, n in enumerate(group.outputs)]  # fmt: skip
    own["P"], own["sign"], own["batch"] = [], [], None
    if any(group.k):
        own["P"] = [signs(k, K) for k in group.k]
        if not group.adapters and r.random() < 0.5:
            own["P"] = [torch.randint(K, (len(group.widths), group.k[0]), generator=g)]
        if r.random() < 0.5:
            own["sign"] = [signs(samples if len(group.shape) > 1 else 1, k) for k in group.k]
    if group.adapters:
        each = samples if len(group.shape) > 1 and r.random() < 0.5 else group.rows
        ids = torch.randint(-1, group.adapters, (each,), generator=g)
        seeds = torch.randint(2**60, (each,), generator=g) if each != group.rows and r.random() < 0.5 else None
        own["batch"] = AdapterBatch([str(i) for i in range(group.adapters)], ids, seeds)


def on(group: Group, device: torch.device | str) -> Group:
    """The group with its tensors on a device; strides stay."""

    def moved(value: Any) -> Any:
        if isinstance(value, list):
            return [moved(item) for item in value]
        if isinstance(value, AdapterBatch):
            return AdapterBatch(value.names, moved(value.ids), moved(value.row_seeds))
        if not isinstance(value, Tensor):
            return value
        there = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)
        return there.copy_(value)

    return dataclasses.replace(group, tensors={name: moved(value) for name, value in group.tensors.items()})


def leaves(group: Group, dtype: torch.dtype | None) -> tuple:
    own, number = group.tensors, max(group.adapters, 1)
    device = own["x"].device
    of_x, of_A, of_B, of_Z = group.grads

    def cast(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.detach().to(dtype or t.dtype)

    acc = reference.accumulate_dtype(dtype or group.dtype)
    Z = [torch.zeros(n, k, dtype=acc, device=device, requires_grad=of_Z)
         for k in group.k for n in group.widths if any(group.k)]  # fmt: skip
    V = [torch.zeros(2, n + 1, dtype=torch.float64, device=device, requires_grad=True)
         for _ in range(number) for n in group.outputs]  # fmt: skip
    return (
        cast(own["x"]).requires_grad_(of_x), [cast(w) for w in own["W"]], [cast(b) for b in own["bias"]],
        [cast(a).requires_grad_(of_A) for a in own["A"]], [cast(b).requires_grad_(of_B) for b in own["B"]],
        Z, V if group.moments else [],
    )  # fmt: skip


def found(group: Group, y, x, A, B, Z, V, dtype: torch.dtype | None = None) -> dict[str, Tensor | None]:
    """Outputs, and the gradients of those leaves that want one."""
    wanted = {"dx": x} | {
        f"{n}{i}": t for n, ts in (("dA", A), ("dB", B), ("Q", Z), ("V", V)) for i, t in enumerate(ts)
    }
    wanted = {name: t for name, t in wanted.items() if t.requires_grad}
    live = [(out, g.to(dtype or g.dtype)) for out, g in zip(y, group.tensors["dy"], strict=True) if g is not None]
    outputs, grads = zip(*live, strict=True)
    for t in wanted.values():
        t.grad = None
    torch.autograd.backward(outputs, grads)  # no leaf is named: statistics count then
    return {f"y{j}": out.detach() for j, out in enumerate(y)} | {name: t.grad for name, t in wanted.items()}


def computed(group: Group, backend: str, bound: bool, again: bool, times: int = 2) -> dict[str, Tensor | None]:
    """By the operator, or (``bound``) several times by one ``BoundCall``; ``again`` under a checkpoint."""
    own = group.tensors
    x, W, bias, A, B, Z, V = leaves(group, None)
    batch, drops = own["batch"], any(group.p)
    held = BoundCall(W, bias, A, B, own["scale"], backend, "auto", (), group.streams, group.blocks)

    def call(x: Tensor) -> tuple[Tensor, ...]:
        rows, key = None if batch is None else batch.rows(x), None
        if drops:
            key = torch.randint(2**62, (), dtype=torch.int64).to(x.device)
            key = key if batch is None else batch.keys(x, key, 3)
        if bound:
            return tuple(held(x, held.run(rows, key, group.p if drops else (), Z, V, own["P"], own["sign"])))
        rest = own["scale"], group.p, group.streams, group.blocks, backend, "auto"
        y = LORA_LINEAR.apply(x, W, bias, A, B, Z, V, own["P"], own["sign"], key, list(rows or ()), [], *rest)
        return tuple(y[: len(W)])

    for _ in range(times if bound else 1):  # the second goes by the node that the first made
        torch.manual_seed(5)
        y = checkpoint(call, x, use_reentrant=False) if again else call(x)
        result = found(group, y, x, A, B, Z, V)
    return result


def formula(group: Group, dtype: torch.dtype) -> dict[str, Tensor | None]:
    """By the reference, with the same masks."""
    own = group.tensors
    x, W, bias, A, B, Z, V = leaves(group, dtype)
    torch.manual_seed(5)
    seed, batch = torch.randint(2**62, (), dtype=torch.int64) if any(group.p) else None, own["batch"]
    ids, rest = torch.zeros(group.rows, dtype=torch.int64), (group.streams, group.blocks)
    if batch is None:
        probes = [next(iter(own[name]), None) for name in ("P", "sign")]
        y = reference.lora_linear(x, W, bias, A, B, own["scale"], Z, *probes, seed, group.p[0], *rest)
    else:
        ids, keys = batch.rows(x).ids, None if seed is None else batch.keys(x, seed, 3)
        p = () if seed is None else group.p
        y = reference.lora_grouped(x, W, bias, A, B, own["scale"], ids, Z, own["P"], own["sign"], keys, p, *rest)
    result = found(group, y, x, A, B, Z, [], dtype)
    for i in range(len(V)):
        g, j = divmod(i, len(y))
        mine = y[j].detach().reshape(group.rows, group.outputs[j])[ids == g].double()
        result[f"V{i}"] = reference.counted_moments(mine)
    return result


def differences(group: Group, result: dict[str, Tensor | None]) -> list[tuple]:
    """What is further from float64 than the formula in the same precision may be; no gradient counts as zeros."""
    want, low, wrong = formula(group, torch.float64), formula(group, group.dtype), []
    assert result.keys() == want.keys()
    for name, exact in want.items():
        if name[0] == "V" and group.tensors["dy"][int(name[1:]) % len(group.outputs)] is None:
            continue
        value, exact = [torch.zeros(()) if t is None else t.double().cpu() for t in (result[name], exact)]
        if not (value.numel() and exact.numel()):
            continue
        rough = torch.zeros(()) if low[name] is None else low[name].double()
        eps = max(torch.finfo(group.dtype).eps, 1e-14)
        allowed = 4 * (rough - exact).abs().max() + 6 * eps * exact.abs().max()
        error = (value - exact).abs().max()
        if not error <= allowed:
            wrong.append((name, error.item(), allowed.item()))
    return wrong
