"""Builds the native artefacts: ``fastlora/_C.so`` (stable-ABI operators) and the pybind11 modules of ``MODULES``.

Environment:
    FASTLORA_BUILD       auto (default): build if possible; 1: fail if not; 0: pure Python.
    FASTLORA_CUDA        0 skips the CUDA sources even if nvcc is there.
    FASTLORA_SANITIZE    for example address,undefined: instruments the CPU kernels (see CONTRIBUTING.md).
    FASTLORA_ISAS        for example avx2,avx512: the instruction sets to build kernels for, beside the portable ones.
    FASTLORA_TORCH_ROOT  folder of the torch package whose headers are used.
    CXX, NVCC            the compilers.
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
OPERATORS = "fastlora._C"
# Sources of the pybind11 modules.
MODULES = {"fastlora._plan": ("csrc/plan.cpp", "csrc/plan_bindings.cpp"), "fastlora._node": ("csrc/node.cpp",)}
# Has tensors in it, and so is for the version of torch that it is built with.
WITH_TORCH = "fastlora._node"
MINIMUM_TORCH = (2, 11)
TARGET_VERSION = "-DTORCH_TARGET_VERSION=0x020b000000000000"
CXX_FLAGS = ["-O3", "-std=c++20", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wno-psabi", "-DNDEBUG"]
SANITIZERS = os.environ.get("FASTLORA_SANITIZE", "")
# vptr would need the type information of torch's classes, which its stable ABI does not export; checks for null before
# every access double the time to compile, and a null access stops the process anyway.
SANITIZE_FLAGS = [f"-fsanitize={SANITIZERS}", "-fno-sanitize=vptr,null"] if SANITIZERS else []
if SANITIZERS:
    CXX_FLAGS += [*SANITIZE_FLAGS, "-g1", "-O1", "-fno-omit-frame-pointer"]
# The kernels under csrc/cpu/isa are compiled once per entry and chosen at run time, so no file needs -march=native.
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mprefer-vector-width=512"]
X86_VARIANTS = {
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": AVX512,
    "avx512_bf16": [*AVX512, "-mavx512bf16"],
    # For tests on processors without the instruction: the same kernels, the instruction written out in others.
    "avx512_bf16_emulated": [*AVX512, "-DFASTLORA_EMULATE_BF16"],
}
CUDA_TARGETS = [
    "-gencode=arch=compute_80,code=sm_80",
    "-gencode=arch=compute_90a,code=sm_90a",
    "-gencode=arch=compute_80,code=compute_80",
]


class BuildUnavailable(RuntimeError):
    """Something that the native build needs is missing or failed."""


def build_mode() -> str:
    mode = os.environ.get("FASTLORA_BUILD", "auto").lower()
    if mode not in ("0", "1", "auto"):
        raise SystemExit(f"FASTLORA_BUILD is {mode!r}; accepted: 0, 1, auto")
    return mode


def say(message: str) -> None:
    sys.stderr.write(f"fastlora: {message}\n")


def find_torch() -> Path:
    """Folder of the installed torch package; torch itself cannot be imported in pip's isolated build."""
    given = os.environ.get("FASTLORA_TORCH_ROOT")
    places = [Path(given), Path(given) / "torch"] if given else []
    places += [Path(sysconfig.get_paths()[key]) / "torch" for key in ("platlib", "purelib")]
    places += [Path(entry) / "torch" for entry in sys.path if entry]
    for place in places:
        if (place / "include/torch/csrc/stable/library.h").is_file():
            found = re.search(r"__version__\s*=\s*'(\d+)\.(\d+)", (place / "version.py").read_text())
            if found and tuple(map(int, found.groups())) >= MINIMUM_TORCH:
                return place.absolute()
    wanted = ".".join(map(str, MINIMUM_TORCH))
    raise BuildUnavailable(f"headers of torch >= {wanted} not found (install torch first, or set FASTLORA_TORCH_ROOT)")


def find_compiler() -> str:
    for name in filter(None, (os.environ.get("CXX"), "g++", "clang++", "c++")):
        if shutil.which(shlex.split(name)[0]):
            return name
    raise BuildUnavailable("no C++ compiler found (tried $CXX, g++, clang++, c++)")


def find_ninja() -> str:
    try:
        import ninja

        return str(Path(ninja.BIN_DIR) / "ninja")
    except ImportError:
        found = shutil.which("ninja")
    if not found:
        raise BuildUnavailable("the ninja program was not found")
    return found


def find_nvcc() -> str | None:
    if os.environ.get("FASTLORA_CUDA", "1") == "0" or SANITIZERS:
        return None
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    candidates = (os.environ.get("NVCC"), "nvcc", str(Path(home) / "bin" / "nvcc"))
    found = next((path for path in map(shutil.which, filter(None, candidates)) if path), None)
    if not found:
        say("nvcc not found: building the CPU operators only")
    return found


def pybind11_include() -> str:
    try:
        import pybind11
    except ImportError:
        raise BuildUnavailable("pybind11 is not installed") from None
    return pybind11.get_include()


def quote(text: str) -> str:
    """Escapes a word for the shell and for ninja."""
    return shlex.quote(text).replace("$", "$$")


def path_of(path: Path | str) -> str:
    """Escapes a path for a ninja build line."""
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


class NinjaFile:
    """Collects the rules and edges of one build.ninja."""

    def __init__(self, folder: Path, compiler: str, nvcc: str | None) -> None:
        self.folder, self.nvcc = folder, nvcc
        depfile = "\n  depfile = $out.d\n  deps = gcc\n"
        link_program = compiler if nvcc is None else f"{quote(nvcc)} -cudart static -ccbin {quote(compiler)}"
        self.lines = [
            "ninja_required_version = 1.5",
            f"builddir = {path_of(folder)}",
            f"rule cxx\n  command = {compiler} -MD -MF $out.d $flags -c $in -o $out{depfile}  description = cxx $out",
            f"rule link\n  command = {link_program} -shared $in -o $out $flags\n  description = link $out",
            f"rule module\n  command = {compiler} -shared $in -o $out $flags\n  description = link $out",
        ]
        if nvcc:
            command = f"{quote(nvcc)} -ccbin {quote(compiler)} -MD -MF $out.d $flags -c $in -o $out"
            self.lines.append(f"rule nvcc\n  command = {command}{depfile}  description = nvcc $out")

    def compile(self, rule: str, source: str, flags: list[str], variant: str = "") -> Path:
        target = self.folder / "objects" / variant / (source + ".o")
        self.edge(rule, target, [source], flags)
        return target

    def edge(self, rule: str, target: Path, inputs: list, flags: list[str]) -> None:
        words = " ".join(map(quote, flags))
        self.lines.append(f"build {path_of(target)}: {rule} {' '.join(map(path_of, inputs))}\n  flags = {words}")

    def run(self, ninja: str) -> None:
        script = self.folder / "build.ninja"
        script.parent.mkdir(parents=True, exist_ok=True)
        script.write_text("\n".join(self.lines) + "\n")
        # Run from the root, so that paths in messages and debug information are relative.
        done = subprocess.run([ninja, "-f", str(script)], cwd=ROOT)
        if done.returncode:
            raise BuildUnavailable(f"the compiler failed (ninja returned {done.returncode}); its output is above")


def sources(pattern: str) -> list[str]:
    return sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").glob(pattern))


def add_operators(build: NinjaFile, torch_root: Path) -> Path:
    headers = ["-isystem", str(torch_root / "include"), TARGET_VERSION, "-Icsrc"]
    variants = {"portable": [], **(X86_VARIANTS if platform.machine().lower() in ("x86_64", "amd64") else {})}
    if wanted := os.environ.get("FASTLORA_ISAS"):
        variants = {name: flags for name, flags in variants.items() if name in ("portable", *wanted.split(","))}
    available = [f"-DFASTLORA_WITH_{name.upper()}" for name in variants]
    objects = [build.compile("cxx", "csrc/library.cpp", CXX_FLAGS + headers)]
    objects += [build.compile("cxx", name, CXX_FLAGS + headers + available) for name in sources("cpu/*.cpp")]
    for variant, flags in variants.items():
        isa = [*CXX_FLAGS, "-ffp-contract=fast", "-Icsrc", f"-DFASTLORA_ISA={variant}", *flags]
        objects += [build.compile("cxx", name, isa, variant) for name in sources("cpu/isa/*.cpp")]
    link = [f"-L{torch_root / 'lib'}", "-ltorch_cpu", "-ldl", *SANITIZE_FLAGS]
    if build.nvcc:
        cuda = ["-O3", "-std=c++20", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-diag-suppress", "20012"]
        # ptxas reports spilled registers as a warning, and -Werror turns that into a failed build.
        cuda += [*CUDA_TARGETS, "-Xptxas", "-v,-warn-spills,-Werror", *headers]
        objects += [build.compile("nvcc", name, cuda) for name in sources("cuda/*.cu")]
        link = ["-Xlinker", "--exclude-libs=ALL", "-Xlinker", "--no-undefined", *link]
    target = build.folder / "_C.so"
    build.edge("link", target, objects, link)
    return target


def add_module(build: NinjaFile, name: str, sources: Sequence[str], suffix: str, torch_root: Path) -> Path:
    """Adds a pybind11 module."""
    folders, link = [Path(pybind11_include())], ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else []
    if name == WITH_TORCH:
        folders = [torch_root / "include", torch_root / "include/torch/csrc/api/include"]  # its own pybind11 in it
        link += [f"-L{torch_root / 'lib'}", "-ltorch_python", "-ltorch_cpu", "-lc10"]
    folders.append(Path(sysconfig.get_paths()["include"]))
    include = [word for folder in folders for word in ("-isystem", str(folder))]
    objects = [build.compile("cxx", path, [*CXX_FLAGS, *include, "-Icsrc"]) for path in sources]
    target = build.folder / f"{name.rpartition('.')[2]}{suffix}"
    build.edge("module", target, objects, link + SANITIZE_FLAGS)
    return target


def compile_all(nvcc: str | None, suffix: str, modules: Sequence[str]) -> dict[str, Path]:
    """Compiles the operators and these modules with ninja and returns where they are."""
    ninja, compiler, torch_root = find_ninja(), find_compiler(), find_torch()
    # A folder of our own: setuptools' temporary one changes from call to call, which would defeat incremental builds.
    kind = "-".join(["native", *filter(None, SANITIZERS.split(","))])
    folder = Path("build") / f"{kind}-{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
    build = NinjaFile(folder, compiler, nvcc)
    built = {OPERATORS: add_operators(build, torch_root)}
    built |= {name: add_module(build, name, MODULES[name], suffix, torch_root) for name in modules}
    build.run(ninja)
    return {name: ROOT / path for name, path in built.items()}


class BuildNative(build_ext):
    """Replaces setuptools' compilation by one parallel, incremental ninja run."""

    def build_extensions(self) -> None:
        try:
            artefacts = self.compile_with_fallback()
        except BuildUnavailable as problem:
            if build_mode() == "1":
                raise SystemExit(f"fastlora: native build failed: {problem}") from None
            say(f"native library not built: {problem}; installing in pure Python")
            return
        for name, artefact in artefacts.items():
            target = Path(self.get_ext_fullpath(name))
            target.parent.mkdir(parents=True, exist_ok=True)
            # Replaced by a rename, so that a process which has the old file mapped is not disturbed.
            temporary = target.with_name(target.name + ".new")
            shutil.copy2(artefact, temporary)
            os.replace(temporary, target)

    def compile_with_fallback(self) -> dict[str, Path]:
        suffix, nvcc = sysconfig.get_config_var("EXT_SUFFIX"), find_nvcc()
        plain = [name for name in MODULES if name != WITH_TORCH]
        attempts = [("everything", nvcc, list(MODULES)), (f"without {WITH_TORCH}", nvcc, plain)]
        attempts += [("the CPU operators only", None, plain)] if nvcc else []
        problem = None
        for what, compiler, modules in attempts:
            if problem is not None:
                say(f"building failed: trying {what}")
            try:
                return compile_all(compiler, suffix, modules)
            except BuildUnavailable as failed:
                problem = failed
                if build_mode() == "1" or "compiler failed" not in str(failed):
                    break
        raise problem

    def get_ext_filename(self, fullname: str) -> str:
        if fullname.rpartition(".")[2] == "_C":
            # A library of operators, not a Python module: it works with every CPython.
            return os.path.join(*fullname.split(".")) + ".so"
        return super().get_ext_filename(fullname)


class Wheel(bdist_wheel):
    """Tags a wheel for this platform only where something native is in it."""

    def run(self) -> None:
        self.run_command("build")
        built = self.get_finalized_command("build_ext")
        if not any(Path(built.get_ext_fullpath(extension.name)).is_file() for extension in built.extensions or ()):
            self.root_is_pure, self.distribution.ext_modules = True, []
        self.skip_build = True  # it is done
        super().run()


def extensions() -> list[Extension]:
    if build_mode() == "0":
        return []
    optional = build_mode() == "auto"
    artefacts = {OPERATORS: ("csrc/library.cpp",), **MODULES}
    return [Extension(name, list(files), optional=optional) for name, files in artefacts.items()]


setup(
    packages=[*find_packages(include=["fastlora", "fastlora.*"]), "fastlora.kernels"],
    package_dir={"fastlora.kernels": "kernels"},
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildNative, "bdist_wheel": Wheel},
)
