"""Run the tests of the native code against instrumented builds: python tools/sanitize.py

AddressSanitizer and UBSan: ``tests/native`` with the processor's own instruction set, then what depends on the
instruction set once more with the portable code. ThreadSanitizer: the tests that use several threads. It does not see
the barriers of the OpenMP runtime that torch brings and would take every second use of a buffer for a race, so torch's
``parallel_for`` is replaced by threads that are started and joined: the split into parts and what each part writes are
checked, torch's own operators (not instrumented, on one thread) are not. The builds lie beside the ordinary one, are
incremental, and have no CUDA.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MEMORY, THREADS = "address,undefined", "thread"
# Tests that start others for each instruction set, read other builds, hang or end processes on purpose, or repeat on
# 10^6 rows what fewer rows show.
LEFT_OUT = (
    "test_instruction_sets.py::test_formulas_with",
    "test_instruction_sets.py::test_the_product_of_bf16_pairs_is_in_its_own_kernels_only",
    "test_grouped.py::test_other_instruction_sets",
    "test_threads.py::test_a_forked_child_gets_the_same_bits_and_does_not_hang",
    "test_emulated_cuda.py::test_more_rows_than_the_smallest_chunks_hold",
)
THREADED = ("threads", "passes", "multi_tensor", "grouped", "grouped_rows", "kernels", "contracts")
FOUND_RACE = 66
OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=0",  # the interpreter keeps what it likes until it exits
    "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
    "TSAN_OPTIONS": f"halt_on_error=1:exitcode={FOUND_RACE}:history_size=4:ignore_noninstrumented_modules=1",
}


def runtime(name: str) -> str:
    """Path of one of the compiler's libraries."""
    compiler = os.environ.get("CXX", "g++").split()[0]
    found = subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True)
    path = Path(found.stdout.strip())
    if not path.is_absolute():
        raise SystemExit(f"{compiler} has no {name}: its sanitizers are not installed")
    return str(path.resolve())


def own_instruction_set() -> str:
    """What the ordinary build chooses on this processor."""
    code = "from fastlora import native; print(native.isa())"
    command, environment = [sys.executable, "-c", code], {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.strip()


def build(sanitizers: str) -> Path:
    """The folder of the instrumented _C and _layout."""
    folder = Path("build") / f"sanitized-{sanitizers.replace(',', '-')}"
    environment = {"FASTLORA_SANITIZE": sanitizers, "FASTLORA_BUILD": "1", "FASTLORA_CUDA": "0"}
    environment["FASTLORA_ISAS"] = own_instruction_set()
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(folder)]
    subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, check=True)
    return ROOT / folder / "fastlora"


def environment_of(folder: Path, *preloaded: str) -> dict[str, str]:
    """What a process needs to run with an instrumented build."""
    return {
        **os.environ,
        **OPTIONS,
        "LD_PRELOAD": " ".join([*preloaded, runtime("libstdc++.so.6")]),
        "PYTHONPATH": str(ROOT),
        "FASTLORA_LIBRARY": str(folder / "_C.so"),
        "FASTLORA_CUDA": "0",
    }


def pytest_command(folder: Path, *selected: str) -> list[str]:
    # Reports go to the terminal past pytest's capture, which an aborted process would not print.
    return [sys.executable, __file__, "--run", str(folder), "-q", "-x", "-s", "-p", "no:cacheprovider", *selected]


def test_memory(folder: Path, isa: str | None) -> int:
    environment = {**environment_of(folder, runtime("libasan.so")), "FASTLORA_SANITIZE": MEMORY}
    selected = ["tests/native", *(f"--deselect=tests/native/{name}" for name in LEFT_OUT)]
    if isa is not None:
        environment["FASTLORA_CPU_ISA"] = isa
        selected += ["-m", "every_isa"]
    return subprocess.run(pytest_command(folder, *selected), cwd=ROOT, env=environment).returncode


def test_threads(folder: Path) -> int:
    own = folder / "own_threads.so"
    flags = ["-std=c++20", "-O1", "-g", "-fPIC", "-shared", f"-fsanitize={THREADS}"]
    source = str(ROOT / "tests" / "native" / "own_threads.cpp")
    subprocess.run([*os.environ.get("CXX", "g++").split(), *flags, source, "-o", str(own)], check=True)
    environment = environment_of(folder, runtime("libtsan.so"), str(own))
    # torch's own operators stay on one thread, whatever number a test sets.
    environment |= {"OMP_NUM_THREADS": "1", "OMP_THREAD_LIMIT": "1"}
    bits = Path("/proc/sys/vm/mmap_rnd_bits")
    # The runtime of older compilers stops where addresses are drawn from more than these bits.
    plain = ["setarch", "-R"] if bits.exists() and int(bits.read_text()) > 28 else []
    race = [*plain, sys.executable, __file__, "--race", str(own)]
    seen = subprocess.run(race, cwd=ROOT, env=environment, capture_output=True, text=True)
    if seen.returncode != FOUND_RACE or "data race" not in seen.stderr:
        sys.stderr.write(f"ThreadSanitizer did not see a race made on purpose:\n{seen.stderr[-2000:]}\n")
        return 1
    selected = [
        *(f"tests/native/test_{name}.py" for name in THREADED),
        "-k",
        "not forked_child and not instruction_sets",
    ]
    return subprocess.run([*plain, *pytest_command(folder, *selected)], cwd=ROOT, env=environment).returncode


def run(folder: Path, arguments: list[str]) -> int:
    """Pytest in this process, which takes the instrumented layout module for the package's own."""
    path = next(folder.glob("_layout*.so"))
    spec = importlib.util.spec_from_file_location("fastlora._layout", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules["fastlora._layout"] = module
    import pytest

    return pytest.main(arguments)


def main(arguments: list[str]) -> int:
    if arguments[:1] == ["--run"]:
        return run(Path(arguments[1]), arguments[2:])
    if arguments[:1] == ["--race"]:
        return ctypes.CDLL(arguments[1]).race((ctypes.c_int64 * 1000)())
    folder = build(MEMORY)
    return test_memory(folder, None) or test_memory(folder, "portable") or test_threads(build(THREADS))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
