"""The law of the house: who may import whom, where private names may stand, how long a file may be."""

from __future__ import annotations

import ast
import graphlib
import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

import fastlora

PACKAGE = pathlib.Path(fastlora.__file__).parent
KERNELS = PACKAGE / "kernels" if (PACKAGE / "kernels").is_dir() else PACKAGE.parent / "kernels"
# A file imports from folders to the right of its own, or from its own folder.
ORDER = "cli demo integrations peft_io training model tracking nn config ops importance kernels _utils".split()
PURE = ("importance", "training")
COMPILED = ("_plan", "_node")  # extension modules: no files of Python's
OUTSIDE = ("__init__", "api", "testing", "__main__")  # the public names, above everything, and what nothing imports
PRIVATE_OF_TORCH = re.compile(r"\btorch(?:\.\w+)*\._(?!_)\w+|\bF\._[a-z]\w*|\bnn(?:\.\w+)*\._[A-Z]\w*")
DOORS = ("_utils.torch_compat", "_utils.distributed")
OPTIONAL = (
    "timm", "transformers", "peft", "matplotlib", "rich", "sklearn", "triton", "torchvision", "tqdm", "accelerate",
    "lightning", "pytorch_lightning", "torchao", "bitsandbytes",
)  # fmt: skip


def sources(folder: pathlib.Path) -> dict[str, pathlib.Path]:
    """Dotted name below the folder of every file in it."""
    return {".".join(p.relative_to(folder).with_suffix("").parts): p for p in sorted(folder.rglob("*.py"))}


FILES = {name: path for name, path in sources(PACKAGE).items() if not name.startswith("kernels.")}


def imports(name: str, text: str) -> list[tuple[str, str]]:
    """(file, name) of everything that a file imports from the package, wherever in it."""
    here, found = name.split(".")[:-1], []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found += [(a.name, "") for a in node.names]
        if not isinstance(node, ast.ImportFrom):
            continue
        base = [*here[: len(here) - node.level + 1], *filter(None, [node.module])] if node.level else [node.module]
        for alias in node.names:
            if node.level and alias.name in COMPILED:
                continue
            whole, origin = ".".join([*base, alias.name]), ".".join(base)
            places = (whole, f"{whole}.__init__", origin, f"{origin}.__init__" if origin else "__init__")
            found.append((next((p for p in places if node.level and p in FILES), origin), alias.name))
    return found


def broken(name: str, text: str) -> list[str]:
    """What of the law a file breaks, but for cycles."""
    own, wrong = name.split(".")[0], []
    for target, imported in imports(name, text):
        root = target.split(".")[0]
        if root in ORDER and own in ORDER and ORDER.index(root) < ORDER.index(own):
            wrong.append(f"{name} imports {target}, which is above it")
        if own in PURE and root in ORDER and root not in (own, "_utils"):
            wrong.append(f"{name} imports {target}; {own} needs torch and _utils alone")
        if root == "__init__" and not (own in ("cli", "demo") or name in OUTSIDE):
            wrong.append(f"{name} imports the public names")
        if imported.startswith("_") and not imported.startswith("__") and imported != "_utils" and target in FILES:
            wrong.append(f"{name} imports the private {target}.{imported}")
    if name not in DOORS:
        wrong += [f"{name} reads {found} of torch" for found in PRIVATE_OF_TORCH.findall(code_of(text))]
    if re.search(r"\btracker: Any\b", text):
        wrong.append(f"{name} takes a tracker of any type")
    lines = text.count("\n")
    return wrong + ([f"{name} has {lines} lines"] if lines > 500 else [])


def code_of(text: str) -> str:
    """A file without its docstrings and comments."""
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            node.value.value = ""
    return ast.unparse(tree)


@pytest.mark.parametrize("name", FILES)
def test_the_law(name):
    assert name.split(".")[0] in (*ORDER, *OUTSIDE)
    assert broken(name, FILES[name].read_text()) == []


def test_no_cycle_of_files():
    graph = {name: {t for t, _ in imports(name, path.read_text()) if t in FILES} for name, path in FILES.items()}
    list(graphlib.TopologicalSorter(graph).static_order())


def test_few_files_outside_of_folders():
    assert len(list(PACKAGE.glob("*.py"))) <= 6


@pytest.mark.parametrize(
    "name, text, says",
    [
        ("nn.linear", "from ..model.inject import inject", "above it"),
        ("config", "from .nn import Linear", "above it"),
        ("importance.scores", "from ..ops import reference", "torch and _utils alone"),
        ("training.schedule", "def f():\n    from ..importance import allocation", "torch and _utils alone"),
        ("nn.linear", "from .. import inject", "public names"),
        ("tracking.tracker", "from ..peft_io.save import save", "above it"),
        ("model.ranks", "from .inject import _named", "private"),
        ("ops.native", "x = torch._C._len_torch_dispatch_stack()", "of torch"),
        ("nn.attention", "F._canonical_mask(x)", "of torch"),
        ("ops.matmul", "torch.ops.aten._unsafe_view.default(y, shape)", "of torch"),
        ("model.trainable", "isinstance(m, nn.modules.batchnorm._BatchNorm)", "of torch"),
        ("tracking.checks", "def f(tracker: Any): ...", "any type"),
        ("nn.linear", "\n" * 501, "501 lines"),
    ],
)
def test_what_breaks_the_law_is_seen(name, text, says):
    assert says in " ".join(broken(name, text))


@pytest.mark.parametrize("name", [n for n in FILES if n.split(".")[0] not in ("cli", "demo")])
def test_only_hard_dependencies_at_the_top_of_a_module(name):
    tree = ast.parse(FILES[name].read_text())
    names = {a.name for n in tree.body if isinstance(n, ast.Import) for a in n.names}
    names |= {n.module for n in tree.body if isinstance(n, ast.ImportFrom) and not n.level}
    assert {n.split(".")[0] for n in names} <= {"torch", "safetensors", "packaging", *sys.stdlib_module_names}


def test_kernels_import_torch_triton_and_each_other():
    files = sources(KERNELS)
    assert files
    for name, path in files.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                roots = {a.name.split(".")[0] for a in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                roots = {node.module.split(".")[0]}
            else:
                continue
            assert roots <= {"torch", "triton", *sys.stdlib_module_names}, name


def test_import_fastlora_loads_nothing_optional():
    code = f"import sys, json, fastlora.api; print(json.dumps([m for m in {OPTIONAL} if m in sys.modules]))"
    plain = f"import sys, json, torch; print(json.dumps([m for m in {OPTIONAL} if m in sys.modules]))"

    def loaded(source):
        path = {"PYTHONPATH": str(PACKAGE.parent)}
        command = [sys.executable, "-c", source]
        run = subprocess.run(command, env={**os.environ, **path}, capture_output=True, check=False)
        assert run.returncode == 0, run.stderr.decode()
        return set(json.loads(run.stdout))

    assert loaded(code) - loaded(plain) == set()
