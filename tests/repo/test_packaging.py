"""What an sdist and a wheel hold, and what happens where nothing can be compiled."""

from __future__ import annotations

import importlib.metadata
import os
import pathlib
import shutil
import subprocess
import sys
import tarfile
import zipfile

import pytest
from packaging.requirements import Requirement

import fastlora

ROOT = pathlib.Path(__file__).parents[2]
NEEDED = ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "csrc", "fastlora", "kernels")


@pytest.fixture
def checkout(tmp_path):
    """A copy of the sources without anything that was built."""
    for name in NEEDED:
        source, target = ROOT / name, tmp_path / "source" / name
        target.parent.mkdir(exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        else:
            shutil.copy(source, target)
    return tmp_path / "source"


def run(checkout, *words, **environment):
    return subprocess.run(
        [sys.executable, *words], cwd=checkout, env={**os.environ, **environment}, capture_output=True, text=True
    )


def test_sdist_holds_every_source(checkout):
    done = run(checkout, "setup.py", "-q", "sdist", FASTLORA_BUILD="0")
    assert done.returncode == 0, done.stderr
    (archive,) = (checkout / "dist").glob("*.tar.gz")
    names = {name.partition("/")[2] for name in tarfile.open(archive).getnames()}
    sources = {p.relative_to(ROOT).as_posix() for d in ("csrc", "kernels", "fastlora") for p in (ROOT / d).rglob("*")}
    wanted = {n for n in sources if n.endswith((".py", ".cpp", ".h", ".cu", ".cuh"))}
    assert any(n.endswith(".cu") for n in wanted) and wanted - names == set()


def test_a_wheel_without_a_compiler_is_pure_python_and_says_why_in_one_line(checkout):
    command = ("-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "-w", "dist", "-v")
    done = run(checkout, *command, PATH="/nonexistent", CXX="no-such-compiler")
    assert done.returncode == 0, done.stderr
    said = [line for line in (done.stdout + done.stderr).splitlines() if "native library not built" in line]
    assert len(said) == 1 and "no C++ compiler found" in said[0] and "pure Python" in said[0]
    (wheel,) = (checkout / "dist").glob("*.whl")
    assert wheel.name == f"fastlora_kernels-{fastlora.__version__}-py3-none-any.whl"
    names = zipfile.ZipFile(wheel).namelist()
    assert not any(name.endswith(".so") for name in names)
    assert {"fastlora/__init__.py", "fastlora/py.typed", "fastlora/kernels/__init__.py"} <= set(names)
    assert not any(name.startswith(("kernels/", "tests/", "benchmarks/")) for name in names)
    required = run(checkout, *command, PATH="/nonexistent", CXX="no-such-compiler", FASTLORA_BUILD="1")
    assert required.returncode != 0 and "no C++ compiler found" in required.stdout + required.stderr


def test_the_pure_python_install_computes_the_same(checkout):
    """Without the library the pure-Python backend runs, says so, and gives the same numbers."""
    code = (
        "import torch, fastlora\n"
        "from fastlora.ops import native\n"
        "assert not native.available() and 'not built' in native.reason()\n"
        "torch.manual_seed(0)\n"
        "layer = fastlora.nn.Linear(8, 6, r=2, init_lora_weights=False)\n"
        "x = torch.randn(3, 8)\n"
        "layer(x).sum().backward()\n"
        "a, b, s = layer.pairs()[0]\n"
        "torch.testing.assert_close(layer(x), x @ layer.weight.T + layer.bias + s * x @ a.T @ b.T)\n"
        "text = str(fastlora.explain(torch.nn.Sequential(layer)))\n"
        "assert ' eager ' in text and 'not built' in text\n"
        "try: fastlora.nn.Linear(8, 6, r=2, backend='native')(x)\n"
        "except RuntimeError as error: assert 'native' in str(error) and 'not built' in str(error)\n"
        "else: raise AssertionError('a backend asked for by name fell back')\n"
    )
    done = run(checkout, "-c", code, PYTHONPATH=str(checkout))
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("native library was not built") == 1 and "FASTLORA_BUILD=1 pip install" in done.stderr


@pytest.mark.parametrize("mixed", [True, False])
def test_another_projects_package_of_the_same_name_is_found(checkout, tmp_path, mixed):
    """Its files among ours are refused at first use; elsewhere on the path, doctor names it."""
    elsewhere = checkout if mixed else tmp_path / "elsewhere"
    info = elsewhere / "fastlora-4.2.1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: fastlora\nVersion: 4.2.1\n")
    (info / "RECORD").write_text("fastlora/__init__.py,,\n")
    (elsewhere / "fastlora").mkdir(exist_ok=True)
    (elsewhere / "fastlora" / "__init__.py").touch()  # Python 3.12 lists no file that is not there
    code = (
        "import importlib, fastlora\n"
        "try: fastlora.inject\n"
        "except ImportError as error: print(error)\n"
        "print(list(importlib.import_module('fastlora.cli.doctor').clashes()))\n"
    )
    done = run(checkout, "-c", code, PYTHONPATH=f"{checkout}{os.pathsep}{elsewhere}")
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    refused = f"{checkout / 'fastlora'} also belongs to fastlora 4.2.1, another project, and their files are mixed"
    assert (refused in said[0]) == mixed
    assert f"fastlora 4.2.1, another project with the import name fastlora, is installed in {elsewhere}" in said[-1]


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_the_command_answers_without_torch(option):
    code = (
        "import sys\n"
        "from fastlora.cli.__main__ import main\n"
        "try: main(sys.argv[1:])\n"
        "finally: sys.stderr.write(str('torch' in sys.modules))\n"
    )
    done = run(ROOT, "-c", code, option, PYTHONPATH=str(ROOT))
    assert done.returncode == 0 and done.stderr == "False" and "fastlora" in done.stdout


def test_the_public_names_come_at_first_use():
    code = (
        "import sys, fastlora\n"
        "assert 'torch' not in sys.modules\n"
        "assert fastlora.inject.__module__ == 'fastlora.model.inject' and 'torch' in sys.modules\n"
        "assert set(fastlora.__all__) <= set(dir(fastlora))\n"
        "assert not hasattr(fastlora, 'no_such_name')\n"
        "from fastlora import *\n"
        "assert inject is fastlora.inject and nn is sys.modules['fastlora.nn']\n"
    )
    done = run(ROOT, "-c", code, PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr


def needed_by(requirements: list[str], found: dict[str, importlib.metadata.Distribution]) -> None:
    """What pip would install for these, by name."""
    for requirement in map(Requirement, requirements):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        if requirement.name not in found:
            found[requirement.name] = importlib.metadata.distribution(requirement.name)
            needed_by(found[requirement.name].requires or [], found)


ALONE = """
import copy, sys
sys.path[:0] = sys.argv[1:3]
import torch, fastlora
from torch import nn
from fastlora.cli.__main__ import main
base = nn.Sequential(nn.Linear(8, 8))
model = fastlora.inject(copy.deepcopy(base), fastlora.LoraConfig(r=2, target_modules=["0"]))
optimizer = torch.optim.AdamW(fastlora.param_groups(model))
with fastlora.track(model, every=1) as tracker:
    model(torch.ones(3, 8)).sum().backward()
    tracker.step()
    optimizer.step()
fastlora.save(model, "adapter")
again = fastlora.load(base, "adapter")
assert torch.equal(again(torch.ones(3, 8)), model(torch.ones(3, 8)))
print(fastlora.summary(again), fastlora.explain(again), tracker.scores())
for ask in (
    lambda: fastlora.to_peft(again), lambda: fastlora.from_peft(again), lambda: fastlora.merge(again, progress=True),
    lambda: __import__("fastlora.integrations.hf"), lambda: __import__("fastlora.integrations.lightning"),
):
    try: ask()
    except ImportError as error: print("SAID", error)
assert main(["inspect", "adapter"]) == 0 and main(["doctor"]) == 0
for words in (["inspect", "adapter", "--plot", "map.svg"], ["merge", "base", "adapter", "out"], ["demo"]):
    assert main(words) == 2
"""


def test_the_wheel_of_the_sdist_runs_with_torch_alone_and_says_what_is_missing(checkout, tmp_path):
    """Beside it what its metadata asks for, and nothing else of this environment."""
    assert run(checkout, "setup.py", "-q", "sdist", FASTLORA_BUILD="0").returncode == 0
    (archive,) = (checkout / "dist").glob("*.tar.gz")
    command = ("-m", "pip", "wheel", str(archive), "--no-deps", "--no-build-isolation", "-w", str(tmp_path))
    done = run(checkout, *command, FASTLORA_BUILD="0")
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "installed")
    (info,) = (tmp_path / "installed").glob("*.dist-info")
    needed: dict[str, importlib.metadata.Distribution] = {}
    needed_by(importlib.metadata.Distribution.at(info).requires or [], needed)
    assert "torch" in needed and not {"transformers", "peft", "rich", "tqdm", "matplotlib"} & set(needed)
    (tmp_path / "site").mkdir()
    for distribution in needed.values():
        for top in {file.parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}:
            link = tmp_path / "site" / top
            if not link.is_symlink():  # distributions may share a folder, as those of CUDA do
                link.symlink_to(distribution.locate_file(top))
    done = run(tmp_path, "-I", "-S", "-c", ALONE, str(tmp_path / "installed"), str(tmp_path / "site"))
    assert done.returncode == 0, done.stdout + done.stderr
    said = [line.removeprefix("SAID ") for line in done.stdout.splitlines() if line.startswith("SAID")]
    assert said == [
        "fastlora.to_peft needs peft: pip install 'fastlora-kernels[peft]'",
        "fastlora.from_peft needs peft: pip install 'fastlora-kernels[peft]'",
        "progress: True needs tqdm (pip install tqdm); None logs instead",
        "fastlora.integrations.hf needs transformers: pip install 'fastlora-kernels[hf]'",
        "fastlora.integrations.lightning needs lightning: pip install 'fastlora-kernels[lightning]'",
    ]
    for missing in ("matplotlib: pip install 'fastlora-kernels[demo]'", "transformers: pip install", "the demo needs"):
        assert missing in done.stderr
    assert "native library was not built" in done.stderr
