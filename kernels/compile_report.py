"""Compile every kernel with every committed tile that a GPU can run, without one, and tabulate what the compiler says.

``python -m fastlora.kernels.compile_report [--capability 9.0] [--output table.md]``. The host functions run on meta
tensors, so what is compiled is what a GPU would be given: the same flags, alignments and strides.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from . import (
    expand_backward,
    gradstat,
    grouped,
    linear,
    linear_backward,
    primitives,
    shrink,
    shrink_linear,
    shrink_linear_backward,
    wgrad,
)
from .tiling import Limits, TileConfig, committed, takes_unaligned

REGISTERS = 65536
# Kernels whose product is large enough to be meant for wgmma, in 16-bit types.
WGMMA = ("linear", "linear_moments", "linear_backward", "linear_backward_dropout", "shrink_linear",
         "shrink_linear_backward", "wgrad", "expand_backward", "gradstat", "gradstat_diagonal",
         "covariance")  # fmt: skip
# Bytes of shared memory that a program may ask for, by capability, as CUDA's documentation has them.
SHARED = {
    (8, 0): 163 << 10,
    (8, 6): 99 << 10,
    (8, 9): 99 << 10,
    (9, 0): 227 << 10,
    (10, 0): 227 << 10,
    (12, 0): 99 << 10,
}
THREADS = {(8, 6): 1536, (8, 9): 1536, (12, 0): 1536}
# Sizes whose rows are not aligned to 16 bytes.
UNALIGNED: dict[str, dict[str, Any]] = {
    ", unaligned x": {"K": 1021},
    ", unaligned dy": {"widths": (1021, 509, 509)},
    ", unaligned": {"K": 1021, "widths": (1021, 509, 509)},
}
COLUMNS = ("operation", "case", "dtype", "tile", "registers", "stack", "shared KiB", "resident", "wgmma",
           "16-byte copies", "TMA")  # fmt: skip


class Row(NamedTuple):
    """What the compiler says of one kernel at one tile."""

    operation: str
    case: str
    kernel: str
    dtype: str
    tile: TileConfig
    registers: int
    stack: int
    shared: int
    wgmma: bool
    wide_copies: bool
    tma: bool
    resident: int

    def faults(self, device: Limits) -> list[str]:
        """What breaks a promise: shared memory; on sm_90 also stack (where spilled registers live), missing wgmma."""
        found = []
        if self.stack and device.capability == (9, 0):
            found.append(f"{self.stack} bytes of stack (spilled registers)")
        if self.shared > device.shared:
            found.append(f"{self.shared} bytes of shared memory, the limit is {device.shared}")
        if not self.resident:
            found.append(f"{self.registers} registers a thread do not fit")
        if device.capability != (9, 0):
            return found
        if self.operation in WGMMA and self.dtype == "bf16" and "matmul" in self.case and not self.wgmma:
            found.append("no wgmma instruction")
        if self.tile.tma and self.operation != "reduce" and not self.tma:
            found.append("no TMA instruction")
        wide = "matmul" in self.case and "unaligned" not in self.case
        if wide and self.dtype == "bf16" and not (self.wide_copies or self.tma):
            found.append("no 16-byte asynchronous copy")
        return found


class Offline:
    """Stands for a driver, so that launches can be compiled on a machine without one."""

    def __init__(self, capability: tuple[int, int] = (9, 0)):
        self.target = GPUTarget("cuda", capability[0] * 10 + capability[1], 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


@contextmanager
def _compiling(record: Callable[[str, Any, dict], None], tf32: bool, capability: tuple[int, int]) -> Iterator[None]:
    def compile_only(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
        compiled = kernel.warmup(*arguments, grid=grid, **options)
        record(kernel.fn.__name__, compiled, options)

    driver.set_active(Offline(capability))
    matmul = torch.backends.cuda.matmul
    before = primitives.launcher, matmul.allow_tf32
    primitives.launcher, matmul.allow_tf32 = compile_only, tf32
    try:
        yield
    finally:
        primitives.launcher, matmul.allow_tf32 = before


def _resources(cubin: bytes) -> tuple[int, int]:
    """(registers a thread, bytes of stack) as cuobjdump reads them from machine code."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    if found is None:
        raise RuntimeError(f"cuobjdump printed no resource usage: {text!r}")
    return int(found[1]), int(found[2])


def _empty(*size: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(size, dtype=dtype, device="meta")


class _Operands:
    """A q, k, v group with grouped-query widths, on the meta device; factors fp32, as adapters are by default."""

    def __init__(
        self,
        dtype: torch.dtype,
        rank: int = 8,
        probes: int = 8,
        M: int = 4096,
        K: int = 1024,
        widths: tuple[int, int, int] = (1024, 512, 512),
    ):
        n = 3
        self.x = _empty(M, K, dtype=dtype)
        self.W = [_empty(w, K, dtype=dtype) for w in widths]
        self.bias: list[Tensor | None] = [_empty(w, dtype=dtype) for w in widths]
        self.A = [_empty(rank, K, dtype=torch.float32) for _ in widths]
        self.B = [_empty(w, rank, dtype=torch.float32) for w in widths]
        probes = probes if rank % 8 == 0 else 4
        self.P = _empty(probes, K, dtype=torch.float32)
        self.dy = [_empty(M, w, dtype=dtype) for w in widths]
        self.diagonal = _empty(sum(widths), K, dtype=torch.float32)
        self.h = _empty(M, n * rank + probes, dtype=dtype)
        self.dh = _empty(M, n * rank, dtype=dtype)
        self.seed = torch.empty((), dtype=torch.int64, device="meta")
        self.offsets = tuple(rank * i for i in range(n))
        self.ranks, self.scales, self.probes, self.rank = (rank,) * n, (2.0,) * n, probes, n * rank
        self.dropout = {"seed": self.seed, "threshold": 2**31, "keep_scale": 2.0}
        self.places = [(j, 0) for j in range(n)]
        self.lora_ranks = grouped.LoraRanks(((rank,) * n,) * 2, (probes,) * 2)
        numbers = [torch.empty(some, dtype=torch.int64, device="meta") for some in ((M,), (2, 2), (M // 16, 2))]
        self.batch = grouped.RowBatch(*numbers[:2], lambda *sizes: numbers[2])
        self.drop = grouped.Dropout(torch.empty(M, 2, dtype=torch.int64, device="meta"), (2**31,) * 2, (2.0,) * 2)


def _cases(operation: str, tile: TileConfig, o: _Operands) -> dict[str, Callable[[], Any]]:
    """The calls that reach every kernel of an operation with this tile, by name."""
    dropout = o.dropout if operation.endswith("dropout") else {}
    backward = dropout or operation == "linear_backward"

    def linear_forward(moments: bool) -> Any:
        strategy = "library" if operation == "expand" else "fused"
        return linear.linear(o.x, o.W, o.bias, o.h, o.B, o.places, o.offsets, o.scales, moments, strategy, tile)

    def dx(**options: Any) -> Any:
        strategy = "library" if operation.startswith("expand") else "fused"
        return linear_backward.linear_backward(
            o.dy, o.W, o.dh, o.A, o.offsets, strategy=strategy, tiles=tile, **options
        )

    pairs, twice, drop = (o.batch, o.lora_ranks), list(o.scales) * 2, o.drop if dropout else None
    if operation.startswith("grouped_shrink"):
        h = partial(grouped.grouped_shrink, o.x, [*o.A, o.P] * 2, *pairs, tile, drop)
        dh = partial(grouped.grouped_shrink_backward, o.dy, o.B * 2, *pairs, twice, tile)
        return {"x": h} if dropout else {"x": h, "dy": dh}
    if operation == "shrink_linear":
        rest = o.x, o.W, o.bias, o.A, o.P, o.B, o.places, o.offsets, o.scales
        return {"matmul": partial(shrink_linear.shrink_linear, *rest, strategy="fused", tiles=tile)}
    if operation == "shrink_linear_backward":
        rest = o.dy, o.W, o.B, o.A, o.places, o.offsets, o.scales
        return {"matmul": partial(shrink_linear_backward.shrink_linear_backward, *rest, strategy="fused", tiles=tile)}
    if operation.startswith("shrink"):
        h = partial(shrink.shrink, o.x, [*o.A, o.P], 1, tiles=tile, **dropout)
        dh = partial(shrink.shrink_backward, o.dy, o.B, o.offsets, o.scales, o.rank, tile)
        return {"dy": dh} if operation == "shrink_backward" else {"x": h}
    if operation == "expand_backward":
        rest = o.offsets, o.scales, o.rank, o.probes
        dy = partial(expand_backward.expand_backward, None, o.dy, o.h, o.B, *rest, strategy="fused", tiles=tile)
        return {"matmul": dy}
    if operation.startswith("wgrad"):
        x = o.x, o.dh, o.dy, o.h, o.offsets, o.ranks, o.scales, o.probes
        widths = [b.shape[0] for b in o.B]
        cases = {"matmul": lambda: wgrad.wgrad(*x, tiles=tile, **dropout)}
        some = o.x, o.dh, o.dy, o.h, widths, *pairs, twice, torch.float32, tile, drop
        return cases | {"matmul, adapters": lambda: grouped.grouped_wgrad(*some)}
    if operation == "gradstat":
        offsets, few = torch.empty(9, dtype=torch.int64, device="meta"), [part[:, :64] for part in o.dy[:1]]
        return {
            "matmul": lambda: gradstat.gradstat(o.x, o.dy, offsets, tile),
            "matmul, rows split": lambda: gradstat.gradstat(o.x, few, offsets[:2], tile),
        }
    if operation == "gradstat_diagonal":
        offsets, diagonal = torch.empty(9, dtype=torch.int64, device="meta"), o.diagonal
        return {"matmul": lambda: gradstat.gradstat(o.x, o.dy, offsets, tile, diagonal=diagonal)}
    if operation == "covariance":
        total, weight = _empty(*[o.x.shape[1]] * 2, dtype=torch.float32), _empty(dtype=torch.float32)
        return {
            "matmul": lambda: gradstat.covariance(o.x, tile),
            "matmul, added": lambda: gradstat.add_gram_(total, o.x, weight, tile),
        }
    y = partial(grouped.grouped_expand_, o.dy, o.h, o.W, o.B * 2, *pairs, o.places, twice, True, tile)
    adapters = partial(grouped.grouped_linear_backward_, o.x, o.dh, o.A * 2, *pairs, tile, drop)
    if operation == "expand":
        plain = {"y": partial(linear_forward, False), "y, moments": partial(linear_forward, True), "dx": dx}
        return plain | {"y, moments, adapters": y, "dx, adapters": adapters}
    if operation == "expand_dropout":
        return {"dx": partial(dx, **dropout), "dx, adapters": adapters}
    if backward:
        return {"matmul": partial(dx, **dropout)}
    return {"matmul": lambda: linear_forward(operation == "linear_moments")}


def device_of(capability: tuple[int, int]) -> Limits:
    """The limits of a capability."""
    return Limits(capability, SHARED[capability])


def compile_all(
    ranks: tuple[int, ...] = (8, 5, 64), operations: tuple[str, ...] = (), capability: tuple[int, int] = (9, 0)
) -> list[Row]:
    """Compile every committed tile that fits: bf16 at each rank a projection (one no multiple of 8), fp32, tf32.

    In bf16 also for rows of x, of dy and of both that are not aligned, where an operation takes such.
    """
    rows: dict[str, Row] = {}
    device = device_of(capability)
    for operation, kind, entry in committed():
        if operations and operation not in operations or not entry.tile.fits(4 if kind == "fp32" else 2, device):
            continue
        # The rank block of linear's kernels is fixed, so that only whether ranks are multiples of 8 changes their code.
        fixed_block = operation.startswith(("linear", "expand")) and operation != "expand_backward"
        # Beside a tile of y there is room for 32 ranks and probes.
        fixed = [rank for rank in ranks if rank <= 16] if fixed_block else ranks
        fixed = [min(rank, 24) for rank in ranks] if operation.startswith("shrink_linear") else fixed
        some = ranks[:1] if operation in ("gradstat", "gradstat_diagonal", "covariance") else fixed
        exact_only = operation.endswith("dropout") or operation == "expand"
        settings = [("bf16", rank, "") for rank in some]
        if kind == "fp32":
            settings = [(precision, ranks[0], "") for precision in (("fp32",) if exact_only else ("fp32", "tf32"))]
        elif takes_unaligned(operation, entry.tile):
            settings += [("bf16", ranks[0], of) for of in UNALIGNED]
        for precision, rank, unaligned in settings:
            sizes = UNALIGNED.get(unaligned, {})
            operands = _Operands(torch.bfloat16 if precision == "bf16" else torch.float32, rank, **sizes)
            for case, call in _cases(operation, entry.tile, operands).items():
                first = rank == ranks[0] and precision != "tf32"
                label = (case if rank == ranks[0] else f"{case}, r = {rank}") + unaligned
                if ("moments" in case or operation == "linear_moments") and not first:
                    continue

                what = partial(_row, device, operation, label, precision, entry.tile)

                def record(name: str, compiled: Any, options: dict, what=what):
                    if compiled.hash not in rows:
                        rows[compiled.hash] = what(name, compiled, options)

                with _compiling(record, precision == "tf32", capability):
                    call()
    return list(rows.values())


def _row(
    device: Limits, operation: str, case: str, dtype: str, tile: TileConfig, name: str, compiled: Any, options: dict
) -> Row:
    registers, stack = _resources(compiled.asm["cubin"])
    text, shared = compiled.asm["ptx"], compiled.metadata.shared
    threads = 32 * options["num_warps"]
    most = THREADS.get(device.capability, 2048) // threads
    resident = min(REGISTERS // (registers * threads), device.shared // max(shared, 1), most)
    if name.startswith("reduce") or name == "moments_kernel":
        operation, case = "reduce", "-"
    wide_copies = re.search(r"cp\.async\.cg\.shared\.global[^;]*0x10", text) is not None
    used = "wgmma" in text, wide_copies, "cp.async.bulk.tensor" in text
    return Row(operation, case, name, dtype, tile, registers, stack, shared, *used, resident)


def table(rows: list[Row], capability: tuple[int, int] = (9, 0)) -> str:
    """The rows as Markdown."""
    lines = [
        f"# What the compiler says for sm_{capability[0]}{capability[1]}",
        "",
        f"Triton {triton.__version__}, no GPU involved. A tile is rows x columns x depth of the sum, then warps and",
        "stages; `resident` is how many programs fit a multiprocessor; stack is where spilled registers would live.",
        "Factors are fp32, r = 8 a projection and k = 8 probes unless said; fp32 is exact, tf32 where torch allows it.",
        "Written by `python -m fastlora.kernels.compile_report`.",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|---" * len(COLUMNS) + "|",
    ]
    for row in rows:
        t = row.tile
        tile = "-" if row.operation == "reduce" else f"{t.rows}x{t.columns}x{t.depth}, {t.warps}w, {t.stages}s"
        flags = " | ".join("yes" if flag else "no" for flag in (row.wgmma, row.wide_copies, row.tma))
        case = row.kernel.removesuffix("_kernel") if row.operation == "reduce" else row.case
        lines.append(
            f"| {row.operation} | {case} | {row.dtype} | {tile} | {row.registers} | {row.stack} "
            f"| {row.shared / 1024:.1f} | {row.resident} | {flags} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Print the table, or write it, and fail if a promise is broken."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--output", type=Path, help="file for the Markdown table")
    parser.add_argument("--capability", default="9.0", choices=[f"{a}.{b}" for a, b in SHARED], help="of the GPU")
    parser.add_argument("--operations", nargs="*", default=[], help="only these operations")
    given = parser.parse_args()
    major, minor = map(int, given.capability.split("."))
    capability = major, minor
    rows = compile_all(operations=tuple(given.operations), capability=capability)
    if given.output:
        given.output.write_text(table(rows, capability))
    else:
        print(table(rows, capability))
    faults = [(r, fault) for r in rows for fault in r.faults(device_of(capability))]
    broken = [f"{r.operation} ({r.case}, {r.dtype}, {r.tile}): {fault}" for r, fault in faults]
    if broken:
        raise SystemExit("\n".join(broken))


if __name__ == "__main__":
    main()
