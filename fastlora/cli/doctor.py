"""Versions, devices, self-tests against float64."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .._utils import distributed, torch_compat
from .._utils.distributed import refuse_parallel
from .._utils.installed import DISTRIBUTION, foreign
from ..model.inject import refuse_peft
from ..ops import native, node, penalty
from ..ops.backends import BACKENDS
from ..ops.layout import AdapterBatch
from ..ops.lora import lora_grouped, lora_linear
from ..ops.penalty import weighted_penalty

PACKAGES = (
    DISTRIBUTION, "torch", "triton", "numpy", "safetensors", "packaging", "transformers", "peft", "timm", "accelerate",
    "lightning", "torchao", "bitsandbytes", "torchvision", "open_clip_torch", "matplotlib", "rich", "tqdm",
)  # fmt: skip


def report(model: nn.Module | None = None) -> dict[str, Any]:
    """What is installed, torch's private names, a self-test of every operator and backend, clashes; JSON types.

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
            "onednn": torch_compat.onednn_reason() or "available",
            "autograd_node": node.REASON or "in C++",
        },
        "private_names": [n._asdict() for n in (*torch_compat.private_names(), *distributed.private_names())],
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
    other = foreign()
    if other is not None:
        yield f"{other[0]}, another project with the import name fastlora, is installed in {other[1].parent}: remove it"
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


def lines(found: dict[str, Any], verbose: bool = False) -> Iterator[str]:
    """The report as text, self-tests last: a line for each backend and device, every test of it with ``verbose``."""
    yield found["platform"]
    yield "packages: " + ", ".join(f"{name} {version or '-'}" for name, version in found["packages"].items())
    yield f"devices: {found['devices']['cpu']}; CUDA: {', '.join(found['devices']['cuda']) or 'none'}"
    yield "compilers: " + "; ".join(f"{name}: {line or '-'}" for name, line in found["compilers"].items())
    library = found["native"]
    used = f"yes, {library['instruction_set']}" if library["available"] else f"no: {library['reason']}"
    yield f"native library: {used} ({library['path']}); oneDNN: {library['onednn']}"
    yield f"autograd node: {library['autograd_node']}"
    names = found["private_names"]
    yield f"torch's private names: {sum(name['there'] for name in names)} of {len(names)} are there"
    for name in names:
        there = "is there" if name["there"] else "is gone"
        if verbose or not name["there"]:
            yield f"torch's {name['name']} {there}; without it: {name['when_gone']}"
    for clash in found["clashes"]:
        yield f"note: {clash}"
    for clash in found["model"]:
        yield f"clash: {clash}"
    if not verbose:
        yield from _by_backend(found["self_tests"])
    for test in found["self_tests"]:
        where = f"{test['operator']} by {test['backend']} {test['device']} {test['dtype']}"
        told = f"error {test['error']:.1e}, allowed {test['allowed']:.1e}" if "error" in test else test["reason"]
        if verbose or test["verdict"] == "wrong":
            yield f"{test['verdict']:8} {where}: {told}"


def _by_backend(tests: list[dict[str, Any]]) -> Iterator[str]:
    """What each backend does right, then what is not here, by reason; what is wrong has lines of its own."""
    right: dict[str, list[dict[str, Any]]] = {}
    absent: dict[str, list[str]] = {}
    for test in tests:
        place = f"{test['backend']} on {test['device']}"
        if test["verdict"] == "right":
            right.setdefault(place, []).append(test)
        elif test["verdict"] == "not here":
            absent.setdefault(test["reason"], []).append(place)
    for place, good in right.items():
        operators, dtypes = (", ".join(dict.fromkeys(test[key] for test in good)) for key in ("operator", "dtype"))
        worst = max(test["error"] / test["allowed"] for test in good)
        yield f"right    {place}: {operators} in {dtypes}; largest error {worst:.0%} of what is allowed"
    for reason, places in absent.items():
        missing = [place for place in dict.fromkeys(places) if place not in right]
        if missing:
            yield f"not here {', '.join(missing)}: {reason}"


DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_M, _K, _N, _R, _PROBES = 7, 19, (11, 5), (3, 2), 2
_SCALE = [0.5, 2.0]


def self_tests() -> Iterator[dict[str, Any]]:
    """Verdicts: right, wrong, or not here with the reason; outputs, gradients and statistics of each operator."""
    for name, backend in BACKENDS.items():
        for device in ("cpu", *(("cuda",) if torch.cuda.is_available() else ())):
            for dtype in DTYPES:
                found = {"backend": name, "device": device, "dtype": str(dtype).removeprefix("torch.")}
                reason = backend.unsupported_reason(torch.device(device), dtype)
                for operator, run in OPERATORS.items():
                    yield {"operator": operator, **found, **_verdict(run, name, torch.device(device), dtype, reason)}


def _verdict(
    run: Callable, backend: str, device: torch.device, dtype: torch.dtype, reason: str | None
) -> dict[str, Any]:
    if reason is not None:
        return {"verdict": "not here", "reason": reason}
    try:
        return _compared(run, backend, device, dtype)
    except Exception as error:  # whatever a broken build raises is what this is asked about
        return {"verdict": "wrong", "reason": f"{type(error).__name__}: {error}"}


def _compared(run: Callable, backend: str, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Largest error against float64 over the largest value, and what the formula itself has in this dtype."""
    operands = _operands(device, dtype)
    mine = run(backend, operands)
    if mine is None:
        return {"verdict": "not here", "reason": "this operator is another backend's"}
    exact, formula = run("reference", [t.double() for t in operands]), run("reference", operands)
    worst, allowed = 0.0, 0.0
    for own, plain, true in zip(mine, formula, exact, strict=True):
        scale = true.abs().max().clamp(min=1e-30)
        worst = max(worst, float((own.double() - true).abs().max() / scale))
        allowed = max(allowed, float((plain.double() - true).abs().max() / scale))
    # The operands are rounded once; sums of this length may be taken in another order.
    allowed = 4 * allowed + 2 * torch.finfo(dtype).eps
    return {"verdict": "right" if worst <= allowed else "wrong", "error": worst, "allowed": allowed}


def _operands(device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """x, two weights, A and B of each, and the gradients of the outputs."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(_M, _K), *((n, _K) for n in _N), *((r, _K) for r in _R), *zip(_N, _R, strict=True)]
    made = [torch.randn(shape, generator=generator) for shape in (*shapes, *((_M, n) for n in _N))]
    return [t.to(device, dtype) for t in made]


def _split(operands: list[Tensor]) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    x, *rest = [t.detach().clone() for t in operands]
    return x, rest[:2], rest[2:4], rest[4:6], rest[6:]


def _probes(x: Tensor, sets: int) -> tuple[list[Tensor], list[Tensor]]:
    """Leaves and probe rows of as many adapters."""
    acc = torch.float64 if x.dtype == torch.float64 else torch.float32
    leaves = [torch.zeros(n, _PROBES, dtype=acc, device=x.device, requires_grad=True) for _ in range(sets) for n in _N]
    P = torch.ones(_PROBES, _K, dtype=acc, device=x.device)
    P[1, ::2] = -1.0
    return leaves, [P] * sets


def _linear(backend: str, operands: list[Tensor]) -> list[Tensor]:
    """[y, dx, dA, dB, Q] of a group of two projections."""
    x, weights, A, B, dy = _split(operands)
    Z, P = _probes(x, 1)
    leaves = [t.requires_grad_() for t in (x, *A, *B)]
    y = lora_linear(x, weights, [None, None], A, B, _SCALE, Z=Z, P=P[0], backend=backend)
    torch.autograd.backward(y, dy)
    return [*(t.detach() for t in y), *(t.grad for t in (*leaves, *Z))]


def _grouped(backend: str, operands: list[Tensor]) -> list[Tensor]:
    """The same with two adapters, and rows that have none."""
    x, weights, A, B, dy = _split(operands)
    A, B = A + [a[:1] * 0.5 for a in A], B + [b[:, :1] * 2 for b in B]
    Z, P = _probes(x, 2)
    leaves = [t.detach().requires_grad_() for t in (x, *A, *B)]
    batch = AdapterBatch(("a", "b"), torch.tensor([0, 1, -1, 0, 1, 1, 0]))
    y = lora_grouped(
        leaves[0], weights, [None, None], leaves[1:5], leaves[5:], _SCALE * 2, batch, Z=Z, P=P, backend=backend
    )
    torch.autograd.backward(y, dy)
    return [*(t.detach() for t in y), *(t.grad for t in (*leaves, *Z))]


def _gradstat(backend: str, operands: list[Tensor]) -> list[Tensor]:
    """Squares and absolute values of dyᵀx of two runs of rows: the exact statistics."""
    x, _, _, _, dy = _split(operands)
    return [BACKENDS[backend].gradstat(x, torch.cat(dy, dim=1), [0, 3, _M])]


def _penalty(backend: str, operands: list[Tensor]) -> list[Tensor] | None:
    """FW-LoRA's penalty of two matrices and its gradients: one launch of the native library, or the formula."""
    if backend not in ("native", "reference"):
        return None
    _, _, A, B, _ = _split(operands)
    leaves = [t.requires_grad_() for t in (*A, *B)]
    weights = torch.tensor([0.25, 0.75], device=A[0].device)
    value = (penalty.penalty if backend == "native" else weighted_penalty)(A, B, _SCALE, weights, 0.1)
    value.backward()
    return [value.detach(), *(t.grad for t in leaves)]


OPERATORS: dict[str, Callable[[str, list[Tensor]], list[Tensor] | None]] = {
    "lora_linear": _linear,
    "lora_grouped": _grouped,
    "gradstat": _gradstat,
    "penalty": _penalty,
}
