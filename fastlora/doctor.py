"""``fastlora doctor``: what is installed, what of it is used, and whether each backend computes what it should."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from . import native
from .engines import onednn_reason
from .injection import refuse_peft
from .parallel import refuse_parallel
from .self_test import self_tests

PACKAGES = (
    "fastlora", "torch", "triton", "numpy", "safetensors", "packaging", "transformers", "peft", "timm", "accelerate",
    "lightning", "torchao", "bitsandbytes", "torchvision", "open_clip_torch", "matplotlib", "rich", "tqdm",
)  # fmt: skip


def report(model: nn.Module | None = None) -> dict[str, Any]:
    """Versions, devices, compilers, the native library, a self-test of every operator and backend, clashes; JSON types.

    ``model``: one that is to be adapted, or does not work as expected; what stands in the way of it is under
    ``"model"``. ``passed``: no backend is wrong, and nothing stands in the model's way.
    """
    tests, about = list(self_tests()), [] if model is None else list(model_clashes(model))
    return {
        "platform": f"{platform.platform()}, Python {platform.python_version()}",
        "packages": {name: _version(name) for name in PACKAGES},
        "devices": _devices(),
        "compilers": {name: _first_line(name) for name in ("c++", "g++", "clang++", "nvcc", "ninja")},
        "native": {
            "available": native.available(),
            "reason": native.reason(),
            "path": str(native.LIBRARY),
            "instruction_set": native.isa() if native.available() else None,
            "onednn": onednn_reason() or "available",
        },
        "environment": {name: value for name, value in sorted(os.environ.items()) if name.startswith("FASTLORA_")},
        "self_tests": tests,
        "clashes": list(clashes()),
        "model": about,
        "passed": not about and not any(test["verdict"] == "wrong" for test in tests),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _devices() -> dict[str, Any]:
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "cpu": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, "
        f"torch uses {torch.backends.cpu.get_cpu_capability()}",
        "cuda": names,
        "torch_cuda": torch.version.cuda,
    }


def _first_line(program: str) -> str | None:
    path = shutil.which(program)
    if path is None:
        return None
    try:
        done = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{path} does not answer: {error}"
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    # nvcc's first line is only its name.
    return next((line for line in lines if "release" in line), lines[0]) if lines else path


def clashes() -> Iterator[str]:
    """What is installed beside fastlora and gets in its way or in that of its users."""
    found = importlib.util.find_spec("kernels")
    if found is not None and found.origin and not importlib.util.find_spec("fastlora.kernels"):
        yield f"a package named kernels at {found.origin} hides fastlora.kernels"
    try:
        importlib.import_module("torchvision")
    except ModuleNotFoundError:
        pass
    except Exception as error:
        yield f"torchvision does not import beside this torch ({error}); see fastlora.testing.enable_torchvision"
    if not native.available():
        yield f"the native library is not used: {native.reason()}"
    for variable in ("FASTLORA_CPU_ISA", "FASTLORA_CPU_ENGINE", "FASTLORA_LIBRARY"):
        if variable in os.environ:
            yield f"{variable}={os.environ[variable]} overrides what would be chosen"


def model_clashes(model: nn.Module) -> Iterator[str]:
    """What stands in the way of adapting a model: PEFT's wrappers, data- or tensor-parallel ones."""
    for check in (refuse_peft, lambda model: refuse_parallel(model, "inject")):
        try:
            check(model)
        except ValueError as error:
            yield str(error)


def found_model(where: str) -> nn.Module:
    """The model that ``module:name`` names, or that a function of this name returns; ``ValueError`` if it is none."""
    module, colon, name = where.partition(":")
    if not colon:
        raise ValueError(f"--model: expected MODULE:NAME of a model or of a function that makes one, got {where!r}")
    sys.path.insert(0, os.getcwd())  # as ``python -m`` does
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"--model: {error}") from error
    finally:
        sys.path.remove(os.getcwd())
    model = found if isinstance(found, nn.Module) or not callable(found) else found()
    if not isinstance(model, nn.Module):
        raise ValueError(f"--model: {where} gives a {type(model).__name__}, expected a torch.nn.Module")
    return model


def lines(found: dict[str, Any]) -> Iterator[str]:
    """The report as text, self-tests last."""
    yield found["platform"]
    yield "packages: " + ", ".join(f"{name} {version or '-'}" for name, version in found["packages"].items())
    yield f"devices: {found['devices']['cpu']}; CUDA: {', '.join(found['devices']['cuda']) or 'none'}"
    yield "compilers: " + "; ".join(f"{name}: {line or '-'}" for name, line in found["compilers"].items())
    library = found["native"]
    used = f"yes, {library['instruction_set']}" if library["available"] else f"no: {library['reason']}"
    yield f"native library: {used} ({library['path']}); oneDNN: {library['onednn']}"
    for clash in found["clashes"]:
        yield f"note: {clash}"
    for clash in found["model"]:
        yield f"clash: {clash}"
    for test in found["self_tests"]:
        where = f"{test['operator']} by {test['backend']} {test['device']} {test['dtype']}"
        told = f"error {test['error']:.1e}, allowed {test['allowed']:.1e}" if "error" in test else test["reason"]
        yield f"{test['verdict']:8} {where}: {told}"
