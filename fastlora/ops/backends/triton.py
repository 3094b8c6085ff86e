"""The backend over ``fastlora.kernels``, which are imported on first use."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from packaging.version import Version
from torch import Tensor

from ..._utils.torch_compat import unsafe_view
from ..layout import Dropout, Gradients, Layout, LoraCall, Need, Rows, as_rows, picks_columns
from ..reference import keep_threshold

if TYPE_CHECKING:
    from collections.abc import Callable


MINIMUM_TRITON = "3.6"
MINIMUM_CAPABILITY = (8, 0)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@functools.cache
def _missing() -> str | None:
    """Why Triton cannot be used at all."""
    if importlib.util.find_spec("triton") is None:
        return f"triton is not installed; install triton >= {MINIMUM_TRITON}"
    try:
        found = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        found = importlib.import_module("triton").__version__
    if Version(found).release < Version(MINIMUM_TRITON).release:
        return f"triton {found} is installed; install triton >= {MINIMUM_TRITON}"
    return None


def unsupported_reason(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernels cannot run for tensors of this device and dtype, or None; never imports triton for the CPU."""
    if device.type != "cuda":
        return f"its kernels run on CUDA GPUs, the tensors are on {device.type}; move them to a GPU"
    if dtype not in DTYPES:
        return f"its kernels take float32, bfloat16 and float16, not {str(dtype).removeprefix('torch.')}"
    if _missing() is not None:
        return _missing()
    capability = torch.cuda.get_device_capability(device)
    if torch.version.hip is None and capability < MINIMUM_CAPABILITY:
        wanted, found = ".".join(map(str, MINIMUM_CAPABILITY)), ".".join(map(str, capability))
        return f"its kernels need compute capability {wanted} or newer, {device} has {found}"
    return None


@functools.cache
def _kernel(name: str) -> Any:
    return importlib.import_module(f"fastlora.kernels.{name}")


@functools.lru_cache(maxsize=64)
def _offsets_on(offsets: tuple[int, ...], device: torch.device) -> Tensor:
    # Runs of one length come back step after step: kept, so that a step copies nothing to the device.
    return torch.tensor(offsets, dtype=torch.int64, device=device)


def _one_dtype(factors: Sequence[Tensor]) -> list[Tensor]:
    """Factors of one dtype, which the kernels convert as they load: their own where they agree, else fp32."""
    dtypes = {f.dtype for f in factors}
    if len(dtypes) == 1 and dtypes <= set(DTYPES):
        return list(factors)
    return [f.to(torch.float32) for f in factors]


def _same_device(**tensors: Tensor | Sequence[Tensor | None] | None) -> None:
    """Every tensor on one device, or ``ValueError`` that names the one which is not."""
    first = None
    for name, given in tensors.items():
        for tensor in [given] if isinstance(given, Tensor) else given or ():
            if tensor is None:
                continue
            first = first or (name, tensor.device)
            if tensor.device != first[1]:
                raise ValueError(
                    f"{name}: is on {tensor.device}, {first[0]} on {first[1]}; the backend takes one device"
                )


def _dropout(drop: Dropout | None) -> dict[str, Any]:
    """What the kernels of one adapter read of its dropout."""
    if drop is None or not drop.p[0]:
        return {}
    return {
        "seed": drop.key,
        "threshold": keep_threshold(drop.p[0]),
        "keep_scale": 1.0 / (1.0 - drop.p[0]),
        "streams": tuple(drop.streams),
    }


def _row_dropout(drop: Dropout | None) -> Any:
    """What the kernels of several adapters read of the rows' dropout, None where no adapter has any."""
    if drop is None or not any(drop.p):
        return None
    thresholds, scales = tuple(keep_threshold(p) if p else 0 for p in drop.p), tuple(1.0 / (1.0 - p) for p in drop.p)
    return _kernel("grouped").Dropout(drop.key.contiguous(), thresholds, scales, tuple(drop.streams))


def _reshaped(y: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Not a view, which autograd would let nobody change in place."""
    return unsafe_view(y, shape)


def signs_(out: Tensor, seed: Tensor, step: int, block: Tensor, group: Tensor, tag: int) -> Tensor:
    """Fill ``out`` float32 [128 C] with the signs of the counters (block_i, step, group_i, tag), i < C."""
    return _kernel("signs").signs_(out, seed, step, block, group, tag)


@dataclass(frozen=True)
class TritonBackend:
    """The protocol as fused kernels; who multiplies by W is decided by ``kernels.tiling.choose_strategy``."""

    name: str = "triton"
    unsupported_reason: Callable[[torch.device, torch.dtype], str | None] = unsupported_reason
    plannable: bool = True
    whole: ClassVar[None] = None

    def forward(self, call: LoraCall) -> tuple[list[Tensor], Tensor, list[Tensor]]:
        """As ``Backend.forward``."""
        key = None if call.drop is None else call.drop.key
        _same_device(x=call.x, weight=call.W, bias=call.bias, lora_A=call.A, lora_B=call.B, P=call.P, key=key)
        return self._forward_one(call) if call.rows is None else self._forward_many(call)

    def _forward_one(self, call: LoraCall) -> tuple[list[Tensor], Tensor, list[Tensor]]:
        x, layout, P = as_rows(call.x), call.layout.of(0), call.P[0] if call.P else None
        columns = picks_columns(P)
        factors = _one_dtype([*call.A, *([] if P is None or columns else [P])])
        A, rows = factors[: len(call.A)], next(iter(factors[len(call.A) :]), None)
        places = list(zip(layout.outputs, layout.columns, strict=True))
        y, h, sums = _kernel("shrink_linear").shrink_linear(
            x, call.W, call.bias, A, rows, _one_dtype(call.B), places, layout.offsets, call.scale, call.moments,
            runs=runs_of(layout), **_dropout(call.drop),
        )  # fmt: skip
        if columns:
            h = torch.cat([h, x.index_select(1, P.reshape(-1))], dim=1)
        return [_reshaped(out, (*call.x.shape[:-1], out.shape[1])) for out in y], h, sums

    def _forward_many(self, call: LoraCall) -> tuple[list[Tensor], Tensor, list[Tensor]]:
        x, layout, n = as_rows(call.x), call.layout.of(0), call.layout.projections
        # A call plan repeats these as they are; behind F.linear stand five calls more.
        y = [
            torch.mm(x, w.t()) if b is None else torch.addmm(b, x, w.t())
            for w, b in zip(call.W, call.bias, strict=True)
        ]
        kernels, batch, ranks = _kernel("grouped"), _batch(call.rows), _ranks(call)
        factors = _one_dtype([*call.A, *call.P])
        A, probes = factors[: len(call.A)], factors[len(call.A) :]
        stacked = [f for g in range(len(ranks.by_adapter)) for f in (*A[g * n : g * n + n], *probes[g : g + 1])]
        h = kernels.grouped_shrink(x, stacked, batch, ranks, drop=_row_dropout(call.drop))
        places = list(zip(layout.outputs, layout.columns, strict=True))
        B, options = _one_dtype(call.B), (places, call.scale, call.moments)
        sums = kernels.grouped_expand_(y, h, call.W, B, batch, ranks, *options, runs=runs_of(layout))
        return [_reshaped(out, (*call.x.shape[:-1], out.shape[1])) for out in y], h, sums

    def backward(self, call: LoraCall, h: Tensor, dy: Sequence[Tensor | None], need: Need) -> Gradients:
        """As ``Backend.backward``."""
        return (self._backward_one if call.rows is None else self._backward_many)(call, h, dy, need)

    def _backward_one(self, call: LoraCall, h: Tensor, dy: Sequence[Tensor | None], need: Need) -> Gradients:
        layout, drop = call.layout.of(0), _dropout(call.drop)
        parts, B, runs = _parts(dy, layout), _one_dtype(call.B), runs_of(layout)
        probes = call.probes[0] if call.probes and need.dZ else 0
        some = [part is not None for part in parts]
        h = h if probes else h[:, : layout.rank]
        x = as_rows(call.x) if need.dA else None
        A, dx, dh = _one_dtype(call.A), None, None
        if need.dx and not drop:
            places = list(zip(layout.outputs, layout.columns, strict=True))
            together = _kernel("shrink_linear_backward").shrink_linear_backward
            dx, dh = together(parts, call.W, B, A, places, layout.offsets, call.scale, runs=runs) or (None, None)
        rest = (layout.offsets, call.scale, layout.rank, probes, dh)
        dh, dA, dB, Q = _kernel("expand_backward").expand_backward(x, parts, h, B, *rest, runs=runs, **drop)
        placed = [iter(grads) for grads in (dB, Q)]
        dB, Q = [[next(grads) if there else None for there in some] for grads in placed]
        dA = [grad if there else None for grad, there in zip(dA, some, strict=True)] if need.dA else []
        if need.dx and dx is None:
            live = [j for j, grad in enumerate(dy) if grad is not None]
            backward = _kernel("linear_backward").linear_backward
            dx = backward([dy[j] for j in live], [call.W[j] for j in live], dh, A, layout.offsets, **drop)
        return Gradients(dx, dA, dB, Q)

    def _backward_many(self, call: LoraCall, h: Tensor, dy: Sequence[Tensor | None], need: Need) -> Gradients:
        layout, kernels, batch, ranks = call.layout.of(0), _kernel("grouped"), _batch(call.rows), _ranks(call)
        drop, dx = _row_dropout(call.drop), None
        if need.dx:
            first, *rest = [(g, w) for g, w in zip(dy, call.W, strict=True) if g is not None]
            dx = torch.mm(*first)
            for grad, w in rest:
                dx.addmm_(grad, w)
        A, B, parts, runs = _one_dtype(call.A), _one_dtype(call.B), _parts(dy, layout), runs_of(layout)
        dh = h
        if need.dx or need.dA:
            dh = kernels.grouped_shrink_backward(parts, B, batch, ranks, call.scale, runs=runs)
        if need.dx:
            kernels.grouped_linear_backward_(dx, dh, A, batch, ranks, drop=drop)
        x, outer = as_rows(call.x) if need.dA else None, parts if need.dB or any(call.probes) else [None] * len(parts)
        dA, dB, Q = kernels.grouped_wgrad(
            x, dh, outer, h, layout.widths, batch, ranks, call.scale, B[0].dtype, drop=drop, runs=runs
        )
        return Gradients(dx, dA, dB if need.dB else [], Q if any(call.probes) else [])

    def gradstat(
        self,
        x: Tensor,
        dy: Sequence[Tensor],
        offsets: Sequence[int] | Tensor,
        absolute: bool = True,
        diagonal: Tensor | None = None,
    ) -> Tensor:
        """As ``Backend.gradstat``; all sums come out of one launch.

        ``diagonal``: contiguous fp32 [sum N_i, K] to which the runs' squared entries are added.
        """
        _same_device(x=x, dy=dy, diagonal=diagonal)
        if isinstance(offsets, Tensor):
            return _kernel("gradstat").gradstat(x, dy, offsets, diagonal=diagonal)
        return _kernel("gradstat").gradstat(x, dy, _offsets_on(tuple(offsets), x.device), diagonal=diagonal)

    def moments(self, y: Tensor) -> Tensor:
        """As ``Backend.moments``."""
        squares = torch.linalg.vector_norm(y, dim=0, dtype=torch.float64).square()
        return torch.stack([y.sum(0, dtype=torch.float64), squares])

    def outer(self, dy: Tensor, columns: Tensor) -> Tensor:
        """As ``Backend.outer``."""
        _same_device(dy=dy, columns=columns)
        count = columns.shape[1]
        _, (found,), _ = _kernel("wgrad").wgrad(None, columns[:, :0], [dy], columns, [0], [count], [1.0], 0)
        return found

    def add_gram_(self, total: Tensor, rows: Tensor, weight: Tensor) -> None:
        """As ``Backend.add_gram_``, by half of the tiles; below the diagonal it is undefined."""
        _same_device(total=total, rows=rows, weight=weight)
        _kernel("gradstat").add_gram_(total, rows, weight.to(torch.float32))


def _batch(rows: Rows) -> Any:
    return _kernel("grouped").RowBatch(rows.order, rows.ranges, lambda ranges, count, block: rows.schedule(block))


def _ranks(call: LoraCall) -> Any:
    return _kernel("grouped").LoraRanks(call.layout.ranks, tuple(call.probes) or (0,) * call.rows.ranges.shape[0])


def runs_of(layout: Layout) -> Any:
    """What the kernels read where projections interleave."""
    if layout.runs == layout.widths:
        return None
    gaps = [
        0 if run == width else stride - run
        for run, width, stride in zip(layout.runs, layout.widths, layout.strides, strict=True)
    ]
    return _kernel("primitives").Runs(layout.runs, tuple(gaps))


def _parts(dy: Sequence[Tensor | None], layout: Layout) -> list[Tensor | None]:
    """The columns of dy that are each projection's; with ``runs_of`` as many from the first on."""
    if runs_of(layout) is not None:
        dy = [None if grad is None else _kernel("primitives").unit_last(grad) for grad in dy]
    return [
        None if dy[j] is None else dy[j].narrow(1, column, width)
        for j, column, width in zip(layout.outputs, layout.columns, layout.widths, strict=True)
    ]
