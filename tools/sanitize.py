"""Run the tests of the native code against a build with AddressSanitizer and UBSan, or with ThreadSanitizer.

    python tools/sanitize.py address,undefined
    python tools/sanitize.py thread

The instrumented build lies beside the ordinary one, is incremental, and has no CUDA. ``tests/native`` runs with the
processor's own instruction set, then what depends on the instruction set once more with the portable code.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RUNTIMES = {"address": "libasan.so", "thread": "libtsan.so"}
# Tests that start the suite again for each instruction set, or need another build.
LEFT_OUT = ["--deselect", "tests/native/test_instruction_sets.py::test_formulas_with"]
OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=0",  # the interpreter keeps what it likes until it exits
    "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
    "TSAN_OPTIONS": f"halt_on_error=1:ignore_noninstrumented_modules=1:suppressions={ROOT / 'tools/tsan.supp'}",
}


def runtime(name: str) -> str:
    """Path of one of the compiler's libraries."""
    compiler = os.environ.get("CXX", "g++").split()[0]
    found = subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True)
    path = Path(found.stdout.strip())
    if not path.is_absolute():
        raise SystemExit(f"{compiler} has no {name}: its sanitizers are not installed")
    return str(path.resolve())


def build(sanitizers: str) -> Path:
    """The folder of the instrumented _C and _layout."""
    folder = Path("build") / "sanitized" / sanitizers.replace(",", "-")
    environment = {"FASTLORA_SANITIZE": sanitizers, "FASTLORA_BUILD": "1", "FASTLORA_CUDA": "0"}
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(folder)]
    subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, check=True)
    return ROOT / folder / "fastlora"


def test(sanitizers: str, folder: Path, isa: str | None) -> int:
    libraries = [runtime(RUNTIMES[sanitizers.split(",")[0]]), runtime("libstdc++.so.6")]
    environment = {
        **os.environ,
        **OPTIONS,
        "LD_PRELOAD": " ".join(libraries),
        "PYTHONPATH": str(ROOT),
        "FASTLORA_LIBRARY": str(folder / "_C.so"),
        "FASTLORA_CUDA": "0",
        "FASTLORA_SANITIZE": sanitizers,
    }
    selected = [*LEFT_OUT, "tests/native"]
    if isa is not None:
        environment["FASTLORA_CPU_ISA"] = isa
        selected += ["-m", "every_isa"]
    # Reports go to the terminal past pytest's capture, which an aborted process would not print.
    command = [sys.executable, __file__, "--run", str(folder), "-q", "-x", "-s", "-p", "no:cacheprovider", *selected]
    return subprocess.run(command, cwd=ROOT, env=environment).returncode


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
    sanitizers = arguments[0] if arguments else "address,undefined"
    if sanitizers.split(",")[0] not in RUNTIMES:
        raise SystemExit(f"sanitizers: {sanitizers!r}; accepted: address,undefined and thread")
    folder = build(sanitizers)
    return test(sanitizers, folder, None) or test(sanitizers, folder, "portable")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
