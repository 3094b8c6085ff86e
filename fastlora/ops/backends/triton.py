"""The Triton backend: the verbs of ``verbs.Backend`` on ``fastlora.kernels``, which are imported on first use."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from packaging.version import Version
from torch import Tensor

from ..._utils.torch_compat import unsafe_view
from .. import layout, native, reference
from ..reference import keep_threshold

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..layout import Layout, Layouts


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


def _dropout(seed: Tensor | None, p: float) -> dict[str, Any]:
    if p == 0.0:
        return {}
    return {"seed": seed, "threshold": keep_threshold(p), "keep_scale": 1.0 / (1.0 - p)}


def _reshaped(y: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Not a view, which autograd would let nobody change in place."""
    return unsafe_view(y, shape)


def signs_(out: Tensor, seed: Tensor, step: int, block: Tensor, group: Tensor, tag: int) -> Tensor:
    """Fill ``out`` float32 [128 C] with the signs of the counters (block_i, step, group_i, tag), i < C."""
    return _kernel("signs").signs_(out, seed, step, block, group, tag)


@dataclass(frozen=True)
class TritonBackend:
    """The verbs of an adapted group as fused kernels; their meaning is that of ``verbs.Backend``."""

    name: str = "triton"
    unsupported_reason: Callable[[torch.device, torch.dtype], str | None] = unsupported_reason

    def shrink(self, x: Tensor, A: Sequence[Tensor], P: Tensor | None, seed: Tensor | None, p: float) -> Tensor:
        """``h = [dropout(x) A_i^T ... | x P^T]``; x [M, K] -> [M, R + k]. One pass over x computes every mask."""
        _same_device(x=x, lora_A=A, P=P, seed=seed)
        if P is not None and not P.is_floating_point():
            return torch.cat([self.shrink(x, A, None, seed, p), x.index_select(1, P.reshape(-1))], dim=1)
        factors = _one_dtype([*A, *([] if P is None else [P])])
        return _kernel("shrink").shrink(x, factors, 0 if P is None else 1, **_dropout(seed, p))

    def linear(
        self,
        x: Tensor,
        W: Sequence[Tensor],
        bias: Sequence[Tensor | None],
        h: Tensor,
        B: Sequence[Tensor],
        layout: Layout,
        scale: Sequence[float],
        moments: bool,
        engine: str = "auto",
    ) -> tuple[list[Tensor], list[Tensor]]:
        """``y_j = x W_j^T + bias_j + s h B^T``; returns y and its column moments.

        ``engine`` is about the CPU's matmul; ``kernels.tiling.choose_strategy`` decides here.
        """
        _same_device(x=x, weight=W, bias=bias, lora_B=B)
        y, sums = _kernel("linear").linear(
            x.reshape(-1, x.shape[-1]),
            W,
            bias,
            h,
            _one_dtype(B),
            list(zip(layout.outputs, layout.columns, strict=True)),
            layout.offsets,
            scale,
            moments,
        )
        return [_reshaped(out, (*x.shape[:-1], out.shape[1])) for out in y], sums

    def linear_backward(
        self,
        dy: Sequence[Tensor | None],
        W: Sequence[Tensor],
        dh: Tensor,
        A: Sequence[Tensor],
        layout: Layout,
        seed: Tensor | None,
        p: float,
        engine: str = "auto",
    ) -> Tensor:
        """``dx = sum_j dy_j W_j + dh A``; dy_j [M, N_j] -> [M, K]."""
        live = [j for j, grad in enumerate(dy) if grad is not None]
        return _kernel("linear_backward").linear_backward(
            [dy[j] for j in live], [W[j] for j in live], dh, _one_dtype(A), layout.offsets, **_dropout(seed, p)
        )

    def wgrad(
        self,
        x: Tensor,
        dy: Sequence[Tensor | None],
        h: Tensor,
        B: Sequence[Tensor],
        layout: Layout,
        scale: Sequence[float],
        probes: int,
        need_dA: bool,
        seed: Tensor | None,
        p: float,
    ) -> tuple[Tensor, list[Tensor | None], list[Tensor | None], list[Tensor | None]]:
        """dh [M, R], and dA_i, dB_i, Q_i of every projection whose dy is defined (None for the others)."""
        parts, B = _parts(dy, layout), _one_dtype(B)
        dh = _kernel("shrink").shrink_backward(parts, B, layout.offsets, scale, layout.rank)
        dA, dB, Q = _kernel("wgrad").wgrad(
            x if need_dA else None,
            dh,
            parts,
            h,
            layout.offsets,
            layout.ranks,
            scale,
            probes,
            dtype=B[0].dtype,
            **_dropout(seed, p),
        )
        some = [part is not None for part in parts]
        found = [iter(grads) for grads in (dB, Q)]
        placed = [[next(grads) if there else None for there in some] for grads in found]
        dA = [grad if there else None for grad, there in zip(dA, some, strict=True)] if need_dA else [None] * len(B)
        return dh, dA, placed[0], placed[1]

    def shrink_moments(
        self, x: Tensor, A: Sequence[Tensor], P: Tensor | None, seed: Tensor | None, p: float
    ) -> tuple[Tensor, Tensor]:
        """``shrink``, and in the same pass the sums of the columns of x and of their squares: float64 [2, K]."""
        _same_device(x=x, lora_A=A, P=P, seed=seed)
        factors = _one_dtype([*A, *([] if P is None else [P])])
        moments = torch.empty(2, x.shape[1], dtype=torch.float64, device=x.device)
        options = _dropout(seed, p)
        return _kernel("shrink").shrink(x, factors, 0 if P is None else 1, moments=moments, **options), moments

    def gradstat(
        self,
        x: Tensor,
        dy: Tensor,
        offsets: Sequence[int] | Tensor,
        absolute: bool = True,
        diagonal: Tensor | None = None,
    ) -> Tensor:
        """Sum of squares and of absolute values of dy^T x per run of rows: [runs, 2]; both come out of one pass.

        ``diagonal``: contiguous fp32 [N, K] to which the runs' squared entries are added.
        """
        _same_device(x=x, dy=dy, diagonal=diagonal)
        if isinstance(offsets, Tensor):
            return _kernel("gradstat").gradstat(x, dy, offsets, diagonal=diagonal)
        longest = max((b - a for a, b in zip(offsets[:-1], offsets[1:], strict=True)), default=0)
        return _kernel("gradstat").gradstat(
            x, dy, _offsets_on(tuple(offsets), x.device), longest=longest, diagonal=diagonal
        )

    def column_moments(self, y: Tensor) -> Tensor:
        """Column sums of y [M, N] and of its squares: float64 [2, N]."""
        squares = torch.linalg.vector_norm(y, dim=0, dtype=torch.float64).square()
        return torch.stack([y.sum(0, dtype=torch.float64), squares])

    def skinny(self, dy: Tensor, columns: Tensor) -> Tensor:
        """``dy^T columns``: dy [M, N], columns [M, k] in its dtype -> fp32 [N, k]."""
        _same_device(dy=dy, columns=columns)
        count = columns.shape[1]
        _, (found,), _ = _kernel("wgrad").wgrad(None, columns[:, :0], [dy], columns, [0], [count], [1.0], 0)
        return found

    def add_gram_(self, total: Tensor, rows: Tensor, weight: Tensor) -> None:
        """``total += weight rows^T rows`` on and above the diagonal, by half of the tiles; below it is undefined.

        total fp32 [D, D], rows [M, D], weight a scalar tensor; 0 adds nothing, whatever the rows hold.
        """
        _same_device(total=total, rows=rows, weight=weight)
        _kernel("gradstat").add_gram_(total, rows, weight.to(torch.float32))

    def grouped_forward(
        self, x: Tensor, W: Sequence[Tensor], bias: Sequence[Tensor | None], A: Sequence[Tensor], P: Sequence[Tensor],
        B: Sequence[Tensor], rows: layout.Rows, layouts: Layouts, scale: Sequence[float],
        moments: bool, engine: str = "auto",
    ) -> tuple[list[Tensor], Tensor, list[Tensor]]:  # fmt: skip
        """``y_j = x W_j^T + bias_j``, then ``y[m] += s_gi h_gi[m] B_gi^T`` for the rows of every adapter g.

        A, B, scale have one entry for each adapter and projection (``g * n + i``), P none or one [k_g, K] for each
        adapter. Returns y_j, h [M, max_g (R_g + k_g)] and, with ``moments``, float64 [2, N_j] over each adapter's rows,
        entry ``g * len(y) + j``.
        """
        _same_device(x=x, weight=W, bias=bias, lora_A=A, lora_B=B, P=P, order=rows.order, ranges=rows.ranges)
        y, seen = (
            [torch.nn.functional.linear(x, w, b) for w, b in zip(W, bias, strict=True)],
            x.reshape(-1, x.shape[-1]),
        )
        flat = [out.view(-1, out.shape[-1]) for out in y]
        layout, kernels, batch = layouts(0), _kernel("grouped"), self._batch(rows)
        own = kernels.Ranks(layouts.ranks, tuple(p.shape[0] for p in P) or (0,) * rows.ranges.shape[0])
        factors = _one_dtype([*A, *P])
        n, probes = len(layout.outputs), factors[len(A) :]
        stacked = [f for g in range(len(own.ranks)) for f in (*factors[g * n : g * n + n], *probes[g : g + 1])]
        h = kernels.grouped_shrink(seen, stacked, batch, own, drop=_dropout_of(rows))
        places = list(zip(layout.outputs, layout.columns, strict=True))
        return y, h, kernels.grouped_expand_(flat, h, W, _one_dtype(B), batch, own, places, scale, moments)

    def grouped_backward(
        self, dy: Sequence[Tensor | None], x: Tensor, h: Tensor, W: Sequence[Tensor], A: Sequence[Tensor],
        B: Sequence[Tensor], rows: layout.Rows, layouts: Layouts, scale: Sequence[float],
        probes: Sequence[int], need_dx: bool, need_dA: bool, need_dB: bool, engine: str = "auto",
    ) -> tuple[Tensor | None, list[Tensor], list[Tensor], list[Tensor]]:  # fmt: skip
        """dx [M, K] and, with an entry for each adapter and projection, dA, dB in the adapters' dtype and Q fp32.

        dy_j [M, N_j] or None, probes k_g by adapter. What is not needed is None or an empty list; Q is empty unless
        some k_g is positive. Adapters without rows get zeros. At least one dy is given.
        """
        layout, kernels, batch, dx = layouts(0), _kernel("grouped"), self._batch(rows), None
        drop = _dropout_of(rows)
        if need_dx:
            first, *rest = [(g, w) for g, w in zip(dy, W, strict=True) if g is not None]
            dx = torch.mm(*first)
            for grad, w in rest:
                dx.addmm_(grad, w)
        own = kernels.Ranks(layouts.ranks, tuple(probes) or (0,) * rows.ranges.shape[0])
        A, B, parts = _one_dtype(A), _one_dtype(B), _parts(dy, layout)
        dh = kernels.grouped_shrink_backward(parts, B, batch, own, scale) if need_dx or need_dA else h
        if need_dx:
            kernels.grouped_linear_backward_(dx, dh, A, batch, own, drop=drop)
        outer = parts if need_dB or any(probes) else [None] * len(parts)
        dA, dB, Q = kernels.grouped_wgrad(
            x if need_dA else None, dh, outer, h, layout.widths, batch, own, scale, B[0].dtype, drop=drop
        )
        return dx, dA, dB if need_dB else [], Q if any(probes) else []

    @staticmethod
    def _batch(rows: layout.Rows) -> Any:
        return _kernel("grouped").Batch(rows.order, rows.ranges, _segment_tiles)


def _segment_tiles(ranges: Tensor, rows: int, block: int) -> Tensor:
    if native.has_kernel("segment_tiles", ranges.device):
        return torch.ops.fastlora.segment_tiles(ranges, rows, block)
    return reference.segment_tiles(ranges, rows, block)


def _dropout_of(rows: layout.Rows) -> Any:
    """What the kernels read of the rows' dropout, None where no adapter has any."""
    if rows.keys is None or not any(rows.p):
        return None
    thresholds, scales = tuple(keep_threshold(p) if p else 0 for p in rows.p), tuple(1.0 / (1.0 - p) for p in rows.p)
    return _kernel("grouped").Dropout(rows.keys.contiguous(), thresholds, scales)


def _parts(dy: Sequence[Tensor | None], layout: Layout) -> list[Tensor | None]:
    """The columns of dy that are each projection's."""
    return [
        None if dy[j] is None else dy[j].narrow(1, column, width)
        for j, column, width in zip(layout.outputs, layout.columns, layout.widths, strict=True)
    ]
