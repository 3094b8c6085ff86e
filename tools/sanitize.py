"""Run the tests of the native code against builds with AddressSanitizer and UBSan, and with ThreadSanitizer.

    python tools/sanitize.py [address,undefined | thread]

The instrumented builds lie beside the ordinary one, are incremental, and have no CUDA. ``tests/ops/native`` runs with
the processor's own instruction set; with AddressSanitizer what depends on the instruction set runs once more with the
portable code.

ThreadSanitizer does not see the barriers of the OpenMP runtime that torch brings: its build starts threads of its own
(``csrc/cpu/parallel.h``), takes any work to be worth one, and what torch itself does is not watched.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SANITIZERS = ("thread", "address,undefined")  # the longest first: they run side by side
THREADS = 3  # of torch, under ThreadSanitizer
# Tests that start others for each instruction set, read other builds, hang or end processes on purpose, or repeat on
# 10^6 rows what fewer rows show.
LEFT_OUT = (
    "test_instruction_sets.py::test_formulas_with",
    "test_instruction_sets.py::test_the_product_of_bf16_pairs_is_in_its_own_kernels_only",
    "test_grouped.py::test_other_instruction_sets",
    "test_threads.py::test_a_forked_child_gets_the_same_bits_and_does_not_hang",
    "test_emulated_cuda.py::test_more_rows_than_the_smallest_chunks_hold",
)
# The emulated GPU switches stacks, which ThreadSanitizer cannot follow; it has one thread of the processor anyway.
LEFT_OUT_THREADS = (*LEFT_OUT, "test_emulated_cuda.py", "test_abi.py")
OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=0",  # the interpreter keeps what it likes until it exits
    "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
    "TSAN_OPTIONS": "halt_on_error=1:ignore_noninstrumented_modules=1",
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
    code = "from fastlora.ops import native; print(native.isa())"
    command, environment = [sys.executable, "-c", code], {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.strip()


def build(sanitizers: str) -> Path:
    """The folder of the instrumented library and modules."""
    folder = Path("build") / f"sanitized-{sanitizers.replace(',', '-')}"
    environment = {"FASTLORA_SANITIZE": sanitizers, "FASTLORA_BUILD": "1", "FASTLORA_CUDA": "0"}
    environment["FASTLORA_ISAS"] = own_instruction_set()
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(folder)]
    subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, check=True)
    return ROOT / folder / "fastlora"


def test(sanitizers: str, folder: Path, isa: str | None = None) -> tuple[int, str]:
    """Exit status and output of one run of the tests, which may have others beside it."""
    races = sanitizers == "thread"
    libraries = [runtime("libtsan.so" if races else "libasan.so"), runtime("libstdc++.so.6")]
    environment = {
        **os.environ,
        **OPTIONS,
        "LD_PRELOAD": " ".join(libraries),
        "PYTHONPATH": str(ROOT),
        "FASTLORA_LIBRARY": str(folder / "_C.so"),
        "FASTLORA_CUDA": "0",
        "FASTLORA_SANITIZE": sanitizers,
    }
    left_out = LEFT_OUT_THREADS if races else LEFT_OUT
    selected = ["tests/ops/native", *(f"--deselect=tests/ops/native/{name}" for name in left_out)]
    if races:
        environment["OMP_NUM_THREADS"] = str(THREADS)
    if isa is not None:
        environment["FASTLORA_CPU_ISA"] = isa
        selected += ["-m", "every_isa"]
    # Reports go past pytest's capture, which an aborted process would not print.
    command = [sys.executable, __file__, "--run", str(folder), "-q", "-x", "-s", "-p", "no:cacheprovider", *selected]
    both = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    done = subprocess.run(command, cwd=ROOT, env=environment, text=True, errors="replace", **both)
    return done.returncode, done.stdout


def run(folder: Path, arguments: list[str]) -> int:
    """Pytest in this process, which takes the instrumented modules for the package's own."""
    import torch  # noqa: F401  # the modules are linked against its libraries and do not say where they lie

    for path in folder.glob("_[a-z]*.so"):
        name = f"fastlora.{path.name.partition('.')[0]}"
        spec = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        sys.modules[name] = module
    import pytest

    return pytest.main(arguments)


def main(arguments: list[str]) -> int:
    if arguments[:1] == ["--run"]:
        return run(Path(arguments[1]), arguments[2:])
    for sanitizers in arguments:
        if sanitizers not in SANITIZERS:
            raise SystemExit(f"sanitizers {sanitizers!r}; accepted: {' or '.join(SANITIZERS)}")
    runs: list[tuple[str, Path, str | None]] = []
    for sanitizers in arguments or SANITIZERS:
        folder = build(sanitizers)
        runs += [(sanitizers, folder, isa) for isa in ((None,) if sanitizers == "thread" else (None, "portable"))]
    failed = 0
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for (sanitizers, _, isa), (code, output) in zip(runs, pool.map(lambda run: test(*run), runs), strict=True):
            sys.stdout.write(f"== {sanitizers}, {isa or 'own'} instruction set\n{output}")
            sys.stdout.flush()
            failed = failed or code
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
