"""The import law: arrows point down, statistics are pure, and ``import fastlora`` is light."""

from __future__ import annotations

import ast
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Iterator

import pytest

import fastlora

PACKAGE = pathlib.Path(fastlora.__file__).parent
KERNELS = PACKAGE / "kernels" if (PACKAGE / "kernels").is_dir() else PACKAGE.parent / "kernels"

# Bottom to top. A module imports from layers below its own, or from its own.
# fmt: off
LAYERS = (
    ("reference",),
    ("native", "native_shapes", "plain", "engines", "grouped"),
    ("verbs", "triton_backend", "multi_tensor"),
    ("backends", "segments", "signs"),
    ("_operator",),
    ("_ops",),
    ("_grouped_ops",),
    ("frozen_op", "column_probes", "column_rows", "kept_rows"),
    ("functional", "routing", "probes"),
    ("factors", "config", "committing", "parallel", "progress"),
    ("nn",),
    (
        "averages",
        "covariance",
        "exact_values",
        "reduction",
        "tracking_checks",
        "tracking_state",
        "regulariser",
        "restoring",
        "update_variance",
    ),
    ("targets", "learning_checks"),
    ("roles", "blocks", "parameter_roles", "presets"),
    ("injection", "ejection", "merging", "overview", "policies", "ranks", "tracker", "calibration"),
    ("adapter_set",),
    ("peft_names", "peft_attention", "peft_files", "peft_io", "peft_load"),
    ("handover", "migration"),
    ("integrations",),
    ("demo", "report", "cli", "bench", "doctor", "self_test", "inspecting", "__main__"),
)
# fmt: on
# Functions of tensors and dicts: anybody may import them, and they import nothing above themselves.
PURE = (
    "scores",
    "score_table",
    "allocation",
    "penalty",
    "temperature",
    "schedule",
    "diagnostics",
    "choices",
    "letting_go",
)
ANYWHERE = ("testing",)
ROOT = "__init__"  # the public names, above everything

LEVEL = {name: level for level, layer in enumerate(LAYERS) for name in layer}
OPTIONAL = (
    "timm", "transformers", "peft", "matplotlib", "rich", "sklearn", "triton", "torchvision", "tqdm", "accelerate",
    "lightning", "pytorch_lightning", "torchao", "bitsandbytes",
)  # fmt: skip


def sources(folder: pathlib.Path) -> dict[str, pathlib.Path]:
    """Dotted name below the package of every module in a folder."""
    found = {}
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)] = path
    return found


def at_run_time(node: ast.AST) -> Iterator[ast.AST]:
    """Every node but those that only a type checker sees."""
    yield node
    for child in ast.iter_child_nodes(node):
        if not (isinstance(child, ast.If) and getattr(child.test, "id", "") == "TYPE_CHECKING"):
            yield from at_run_time(child)


def imported(path: pathlib.Path, name: str, package: str) -> set[str]:
    """Absolute dotted names of everything a module imports, wherever in it."""
    is_package = path.name == "__init__.py"
    here = [package, *(name.split(".") if name != ROOT else [])]
    here = here if is_package else here[:-1]
    found = set()
    for node in at_run_time(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join([*here[: len(here) - node.level + 1], *([node.module] if node.module else [])])
            base = base if node.level else node.module
            found.update(f"{base}.{alias.name}" for alias in node.names)
    return found


def top(dotted: str) -> str | None:
    """Which module of the package an imported name comes from: ``fastlora.nn.linear.Linear`` -> ``nn``."""
    parts = dotted.split(".")
    if parts[0] != "fastlora":
        return None
    return parts[1] if len(parts) > 1 and (parts[1] in LEVEL or parts[1] in PURE + ANYWHERE + ("kernels",)) else ROOT


MODULES = {name: path for name, path in sources(PACKAGE).items() if not name.startswith("kernels")}


def violations(name: str, names: set[str]) -> list[str]:
    """Arrows of one module that point up."""
    own, bad = name.split(".")[0], []
    for dotted in sorted(names):
        target = top(dotted)
        if target is None or target == own or own == ROOT:
            continue
        if target == ROOT:
            # The command line may use the public names; anything else would import itself.
            allowed = own in LAYERS[-1] or own in LAYERS[-2]
        elif own in PURE:
            allowed = target in PURE
        elif target == "kernels":
            allowed = own in ("backends", "triton_backend")
        elif own in ANYWHERE or target in PURE:
            allowed = own not in ANYWHERE
        elif target in ANYWHERE:
            allowed = own in LAYERS[-1]
        else:
            allowed = LEVEL[target] <= LEVEL[own]
        if not allowed:
            bad.append(f"{name} -> {dotted}")
    return bad


def test_every_module_has_its_place():
    known = {*LEVEL, *PURE, *ANYWHERE, ROOT}
    assert {name.split(".")[0] for name in MODULES} <= known


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_down(name):
    assert violations(name, imported(MODULES[name], name, "fastlora")) == []


@pytest.mark.parametrize(
    "name, dotted",
    [
        ("_ops", "fastlora.nn.linear.Linear"),
        ("nn.linear", "fastlora.injection.inject"),
        ("config", "fastlora.nn.Linear"),
        ("scores", "fastlora.reference.signs"),
        ("penalty", "fastlora.tracker.Tracker"),
        ("tracker", "fastlora.peft_io.save"),
        ("reference", "fastlora.backends.choose"),
        ("nn.linear", "fastlora.inject"),
        ("tracker", "fastlora.kernels.shrink"),
        ("testing", "fastlora.nn.Linear"),
    ],
)
def test_an_arrow_that_points_up_is_seen(name, dotted):
    assert violations(name, {dotted}) == [f"{name} -> {dotted}"]


def test_relative_imports_are_resolved(tmp_path):
    path = tmp_path / "linear.py"
    path.write_text(
        "from ..config import LoraConfig\nfrom . import qkv\nfrom .. import native\n"
        "def f():\n    import timm\nif TYPE_CHECKING:\n    from .. import tracker\n"
    )
    assert imported(path, "nn.linear", "fastlora") == {
        "fastlora.config.LoraConfig", "fastlora.nn.qkv", "fastlora.native", "timm"
    }  # fmt: skip


@pytest.mark.parametrize("name", [n for n in MODULES if n.split(".")[0] not in LAYERS[-1]])
def test_only_hard_dependencies_at_the_top_of_a_module(name):
    tree = ast.parse(MODULES[name].read_text())
    names = {a.name for n in tree.body if isinstance(n, ast.Import) for a in n.names}
    names |= {n.module for n in tree.body if isinstance(n, ast.ImportFrom) and not n.level}
    assert {n.split(".")[0] for n in names} <= {"torch", "safetensors", "packaging", *sys.stdlib_module_names}


@pytest.mark.parametrize("name", PURE)
def test_statistics_need_torch_alone(name):
    roots = {dotted.split(".")[0] for dotted in imported(MODULES[name], name, "fastlora")}
    assert roots <= {"torch", "fastlora", *sys.stdlib_module_names}


def test_kernels_import_torch_triton_and_each_other():
    files = sources(KERNELS)
    assert files
    for name, path in files.items():
        for dotted in imported(path, name, "kernels"):
            root = dotted.split(".")[0]
            assert root in {"torch", "triton", "kernels", *sys.stdlib_module_names}, f"{name} -> {dotted}"
        absolute = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.ImportFrom) and not n.level]
        assert not any((n.module or "").split(".")[0] in ("kernels", "fastlora") for n in absolute), name


def test_import_fastlora_loads_nothing_optional():
    code = f"import sys, json, fastlora; print(json.dumps([m for m in {OPTIONAL} if m in sys.modules]))"
    plain = f"import sys, json, torch; print(json.dumps([m for m in {OPTIONAL} if m in sys.modules]))"

    def loaded(source):
        path = {"PYTHONPATH": str(PACKAGE.parent)}
        command = [sys.executable, "-c", source]
        run = subprocess.run(command, env={**os.environ, **path}, capture_output=True, check=False)
        assert run.returncode == 0, run.stderr.decode()
        return set(json.loads(run.stdout))

    assert loaded(code) - loaded(plain) == set()
