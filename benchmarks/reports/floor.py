"""The floor of a CPU: what one core's multiply-adds can reach, and what the matmuls of the layer shapes do reach.

    OMP_NUM_THREADS=1 python -m benchmarks.reports.floor --out benchmarks/results

Writes ``floor.json`` and ``floor.md``. The peak is a loop of independent multiply-adds in registers, compiled here for
the widest instructions that the processor has. A matmul near it leaves nothing to gain by another library, and an
adapted layer that takes little longer than its matmuls leaves little to gain at all.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from fastlora.ops.matmul import LINEAR, ONEDNN, PACKED, MatmulEngines, onednn_reason

from ..harness import result_files
from ..harness.machine import cpu_name
from ..harness.shapes import DTYPES, SHAPES

ROUNDS = 15
# Sums start from what the caller gives, so that no two of them are one to the compiler.
SOURCE = r"""
#include <immintrin.h>
#define LOOP(T, LOAD, STEP)                                                                                    \
  T s0 = LOAD(v), s1 = LOAD(v + 16), s2 = LOAD(v + 32), s3 = LOAD(v + 48), s4 = LOAD(v + 64), s5 = LOAD(v + 80),   \
    s6 = LOAD(v + 96), s7 = LOAD(v + 112), s8 = LOAD(v + 128), s9 = LOAD(v + 144), sa = LOAD(v + 160),             \
    sb = LOAD(v + 176);                                                                                        \
  for (long i = 0; i < n; ++i) {                                                                               \
    STEP(s0) STEP(s1) STEP(s2) STEP(s3) STEP(s4) STEP(s5) STEP(s6) STEP(s7) STEP(s8) STEP(s9) STEP(sa) STEP(sb)    \
  }
#define SUM(add) add(add(add(add(s0, s1), add(s2, s3)), add(add(s4, s5), add(s6, s7))), add(add(s8, s9), add(sa, sb)))
#define FMA512(s) s = _mm512_fmadd_ps(a, s, b);
#define FMA256(s) s = _mm256_fmadd_ps(a, s, b);
#define PAIRS(s) s = _mm512_dpbf16_ps(s, a, b);
extern "C" int has_avx512() { return __builtin_cpu_supports("avx512f"); }
extern "C" int has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
extern "C" int has_bf16() { return __builtin_cpu_supports("avx512bf16"); }
extern "C" __attribute__((target("avx512f"))) float fma512(long n, const float* v) {
  const __m512 a = _mm512_loadu_ps(v + 192), b = _mm512_loadu_ps(v + 208);
  LOOP(__m512, _mm512_loadu_ps, FMA512)
  return _mm512_reduce_add_ps(SUM(_mm512_add_ps));
}
extern "C" __attribute__((target("avx2,fma"))) float fma256(long n, const float* v) {
  const __m256 a = _mm256_loadu_ps(v + 192), b = _mm256_loadu_ps(v + 208);
  LOOP(__m256, _mm256_loadu_ps, FMA256)
  return _mm256_cvtss_f32(SUM(_mm256_add_ps));
}
extern "C" __attribute__((target("avx512f,avx512bf16"))) float pairs512(long n, const float* v) {
  const __m512bh a = (__m512bh)_mm512_loadu_ps(v + 192), b = (__m512bh)_mm512_loadu_ps(v + 208);
  LOOP(__m512, _mm512_loadu_ps, PAIRS)
  return _mm512_reduce_add_ps(SUM(_mm512_add_ps));
}
"""
# name in the library -> (what says that the processor has it, operations of one call's iteration, dtype)
LOOPS = {
    "fma256": ("has_avx2", 12 * 16, "fp32"),
    "fma512": ("has_avx512", 12 * 32, "fp32"),
    "pairs512": ("has_bf16", 12 * 64, "bf16"),
}


def peaks() -> dict[str, float]:
    """GFLOP/s of one core's multiply-adds by dtype, the best of the loops that the processor has."""
    with tempfile.TemporaryDirectory() as folder:
        source, binary = Path(folder) / "peak.cpp", Path(folder) / "peak.so"
        source.write_text(SOURCE)
        subprocess.run(["g++", "-O2", "-shared", "-fPIC", str(source), "-o", str(binary)], check=True)
        library = ctypes.CDLL(str(binary))
        found: dict[str, float] = {}
        for name, (supported, operations, dtype) in LOOPS.items():
            if not getattr(library, supported)():
                continue
            loop = getattr(library, name)
            loop.argtypes, loop.restype = [ctypes.c_long, ctypes.c_void_p], ctypes.c_float
            count, start = 1_000_000, torch.rand(14 * 16)
            seconds = _best(functools.partial(loop, count, start.data_ptr()))
            found[dtype] = max(found.get(dtype, 0.0), operations * count / seconds / 1e9)
    return found


def _best(call: Callable[[], object]) -> float:
    call()
    times = []
    for _ in range(ROUNDS):
        start = time.thread_time()
        call()
        times.append(time.thread_time() - start)
    return min(times)


def matmuls(name: str, dtype: str) -> dict[str, dict[str, float]]:
    """Milliseconds (median) and GFLOP/s of every engine on the base products of a shape, forward and backward."""
    shape, engines = SHAPES[name], MatmulEngines()
    outputs = (sum(shape.outputs),) if shape.fused else shape.outputs
    x = torch.randn(shape.rows, shape.width, dtype=DTYPES[dtype])
    weights = [torch.randn(n, shape.width, dtype=DTYPES[dtype]) for n in outputs]
    grads = [torch.randn(shape.rows, n, dtype=DTYPES[dtype]) for n in outputs]
    names = (LINEAR, ONEDNN, PACKED) if onednn_reason() is None else (LINEAR,)
    times: dict[str, list[float]] = {engine: [] for engine in names}
    for turn in range(ROUNDS + 2):
        for engine in names if turn % 2 else reversed(names):
            start = time.thread_time()
            for weight, grad in zip(weights, grads, strict=True):
                if engine == LINEAR:
                    F.linear(x, weight)
                    torch.mm(grad, weight)
                else:
                    engines.forward(x, weight, None, engine)
                    engines.backward(grad, weight, engine)
            if turn > 1:
                times[engine].append(time.thread_time() - start)
    operations = 4 * shape.rows * shape.width * sum(outputs)
    return {
        engine: {"ms": statistics.median(t) * 1e3, "gflops": operations / statistics.median(t) / 1e9}
        for engine, t in times.items()
    }


def markdown(found: dict) -> str:
    """The table, with each matmul as a share of the peak."""
    lines = [
        "# The floor: multiply-adds of one core, and the matmuls of the layer shapes",
        "",
        f"{found['hardware']}. One thread, CPU time, `{found['command']}`.",
        "",
        "Peak of multiply-adds in registers: "
        + ", ".join(f"{dtype} {value:.0f} GFLOP/s" for dtype, value in found["peaks"].items())
        + ". The base products of q, k and v forward (x Wᵀ) and backward (dy W); medians of interleaved rounds.",
        "",
        "| shape | engine | ms | GFLOP/s | of the peak |",
        "|---|---|---:|---:|---:|",
    ]
    for row in found["rows"]:
        peak = found["peaks"].get(row["dtype"])
        share = f"{row['gflops'] / peak:.0%}" if peak else "-"
        numbers = f"{row['ms']:.2f} | {row['gflops']:.0f} | {share}"
        lines.append(f"| {row['shape']} {row['dtype']} | {row['engine']} | {numbers} |")
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reports.floor", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for floor.json and floor.md")
    out = parser.parse_args(argv).out
    torch.set_num_threads(1)
    found = {
        "hardware": f"{cpu_name()}, torch {torch.__version__}",
        "command": "OMP_NUM_THREADS=1 python -m benchmarks.reports.floor --out benchmarks/results",
        "peaks": peaks(),
        "rows": [
            {"shape": name, "dtype": dtype, "engine": engine, **numbers}
            for name in SHAPES
            for dtype in DTYPES
            for engine, numbers in matmuls(name, dtype).items()
        ],
    }
    out.mkdir(parents=True, exist_ok=True)
    result_files.write(out / "floor.json", found)
    (out / "floor.md").write_text(markdown(found), encoding="utf-8")
    sys.stdout.write(markdown(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
