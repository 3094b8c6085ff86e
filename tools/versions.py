"""Build and test with other versions of Python and torch: ``python tools/versions.py --out RESULT.json PYTHON...``

Every PYTHON is one of an environment that has torch and what the tests need. The committed state is cloned for each,
built there, and the test suite is run, some files a process; counts by file go into the JSON after every process, so
that a run which was stopped goes on where it was; each row names its commit. Then every environment's tests of
operators run once more with each library that another built. ``tests/repo/test_versions.py`` has it count.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import result_file

ROOT = Path(__file__).resolve().parent.parent
# Operators from both sides of the C interface: shapes, dtypes, errors, the module layer on top.
ABI_TESTS = (*(f"tests/ops/native/test_{name}.py" for name in ("abi", "kernels", "passes", "grouped", "multi_tensor",
             "dropout", "contracts")), "tests/ops/test_lora.py")  # fmt: skip
IDENTITY = """
import importlib.util, json, platform, torch
names = ("triton", "torchvision", "numpy", "transformers", "peft", "timm", "lightning")
found = {n: __import__("importlib.metadata").metadata.version(n) for n in names if importlib.util.find_spec(n)}
print(json.dumps({"python": platform.python_version(), "torch": torch.__version__, **found}))
"""
LOADED = "from fastlora.ops import native; assert native.available(), native.reason(); print(native.LIBRARY)"
Document = dict[str, Any]


def call(command: list[str], folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """A process in a checkout, on one thread, its output kept."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(folder), **environment}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def must(command: list[str], folder: Path, **environment: str) -> str:
    done = call(command, folder, **environment)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: exit {done.returncode}\n{done.stdout[-4000:]}{done.stderr[-4000:]}")
    return done.stdout.strip()


def checked_out(folder: Path) -> Path:
    """A clone of the committed state, so that nothing that was built lies in it."""
    if not folder.exists():
        must(["git", "clone", "-q", "--shared", str(ROOT), str(folder)], ROOT)
    must(["git", "fetch", "-q", str(ROOT), "HEAD"], folder)
    must(["git", "checkout", "-q", "--detach", "FETCH_HEAD"], folder)
    return folder


def counted(report: Path) -> dict[str, Document]:
    """What pytest's XML says, by test file."""
    files: dict[str, Document] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        # A file that could not be imported has no class name; its own is the test's.
        words = (case.get("classname") or case.get("name", "")).split(".")
        while words and not words[-1].startswith(("test_", "cases_")):  # a class of tests
            words.pop()
        name = "/".join(words) + ".py"
        row = files.setdefault(name, {"passed": 0, "failed": [], "skipped": {}, "seconds": 0.0})
        row["seconds"] = round(row["seconds"] + float(case.get("time", 0)), 2)
        skipped = case.find("skipped")
        if case.find("failure") is not None or case.find("error") is not None:
            row["failed"].append(case.get("name"))
        elif skipped is not None:
            reason = skipped.get("message", "")
            row["skipped"][reason] = row["skipped"].get(reason, 0) + 1
        else:
            row["passed"] += 1
    return files


def tested(python: str, folder: Path, files: list[str], **environment: str) -> dict[str, Document]:
    """Counts of one pytest process; a file that gave none is a failure, with the end of what was printed."""
    with tempfile.TemporaryDirectory() as temporary:
        report = Path(temporary) / "junit.xml"
        command = [python, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", f"--junitxml={report}",
                   "--continue-on-collection-errors"]  # fmt: skip
        done = call([*command, *files], folder, **environment)
        found = counted(report) if report.exists() else {}
    bad = [name for name in files if name not in found] + [name for name, row in found.items() if row["failed"]]
    if bad:
        sys.stderr.write(done.stdout[-8000:] + done.stderr[-2000:])
    nothing = {"passed": 0, "failed": [f"pytest ended with {done.returncode}"], "skipped": {}, "seconds": 0.0}
    return {name: found.get(name, nothing) for name in sorted({*files, *found})}


def total(files: dict[str, Document]) -> Document:
    """Sums over files; failures and reasons by name."""
    reasons: Counter[str] = Counter()
    for row in files.values():
        reasons.update(row["skipped"])
    failed = [f"{name}::{test}" for name, row in files.items() for test in row["failed"]]
    return {"passed": sum(row["passed"] for row in files.values()), "failed": len(failed),
            "skipped": sum(reasons.values()), "failures": failed,
            "why skipped": dict(sorted(reasons.items()))}  # fmt: skip


class Environment:
    """One Python with its checkout and its part of the document."""

    def __init__(self, python: str, checkouts: Path):
        self.python = os.path.abspath(python)
        self.versions = json.loads(must([self.python, "-c", IDENTITY], ROOT).splitlines()[-1])
        self.key = f"Python {self.versions['python']}, torch {self.versions['torch']}"
        self.folder = checked_out(checkouts / self.key.replace(", ", "-").replace(" ", ""))
        self.library = self.folder / "fastlora" / "_C.so"

    def build(self) -> None:
        """In place for the tests, and as an install into a folder."""
        must([self.python, "setup.py", "-q", "build_ext", "--inplace"], self.folder, FASTLORA_BUILD="1")
        with tempfile.TemporaryDirectory() as target:
            words = [self.python, "-m", "pip", "install", "-q", "--no-build-isolation", "--no-deps", "--target", target]
            must([*words, "."], self.folder, FASTLORA_BUILD="1")
            loaded = must([self.python, "-c", LOADED], Path(target))
            if not loaded.splitlines()[-1].startswith(os.path.realpath(target)):
                raise SystemExit(f"{self.key}: the install was not what was loaded, but {loaded}")


def suite(environment: Environment, files: list[str], batch: int, entry: Document, save: Any) -> None:
    """All test files that have no row yet."""
    rows, commit = entry.setdefault("files", {}), must(["git", "rev-parse", "--short", "HEAD"], environment.folder)
    waiting = [name for name in files if name not in rows]
    for i in range(0, len(waiting), batch):
        found = tested(environment.python, environment.folder, waiting[i : i + batch])
        rows |= {name: {"commit": commit, **row} for name, row in found.items()}
        entry["suite"] = total(rows)
        save()


def pairs(environments: list[Environment], document: Document, save: Any) -> None:
    """Each library with every Python that did not build it."""
    for loads in environments:
        for builds in environments:
            if loads is builds:
                continue
            found = tested(loads.python, loads.folder, list(ABI_TESTS), FASTLORA_LIBRARY=str(builds.library))
            path = must([loads.python, "-c", LOADED], loads.folder, FASTLORA_LIBRARY=str(builds.library))
            assert path.splitlines()[-1] == str(builds.library), path
            document["libraries"][f"built with {builds.key}; loaded with {loads.key}"] = total(found)
            save()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pythons", nargs="+", help="interpreters of the environments")
    parser.add_argument("--out", type=Path, required=True, help="JSON file; the rows that it has are kept")
    parser.add_argument("--checkouts", type=Path, help="folder for the clones, kept (default: a temporary one)")
    parser.add_argument("--tests", nargs="*", help="test files (default: all under tests/)")
    parser.add_argument("--again", nargs="*", default=[], help="test files whose rows are made anew")
    parser.add_argument("--batch", type=int, default=8, help="test files a process (%(default)s)")
    parser.add_argument("--no-pairs", action="store_true", help="leave out the libraries of other environments")
    given = parser.parse_args()
    empty: Document = {"environments": {}, "libraries": {}}
    document = result_file.read(given.out) if given.out.exists() else empty

    def save() -> None:
        result_file.write(given.out, document)

    with tempfile.TemporaryDirectory() as temporary:
        checkouts = given.checkouts or Path(temporary)
        checkouts.mkdir(parents=True, exist_ok=True)
        environments = [Environment(python, checkouts.resolve()) for python in given.pythons]
        for environment in environments:
            environment.build()
            entry = document["environments"].setdefault(environment.key, {"versions": environment.versions})
            for name in given.again:
                entry.get("files", {}).pop(name, None)
            tests = (p for pattern in ("test_*.py", "cases_*.py") for p in (ROOT / "tests").rglob(pattern))
            # cases_device.py wants a GPU.
            everything = sorted(p.relative_to(ROOT).as_posix() for p in tests if p.name != "cases_device.py")
            suite(environment, given.tests or everything, given.batch, entry, save)
            sys.stdout.write(f"{environment.key}: {json.dumps(entry['suite'])}\n")
        if not given.no_pairs:
            pairs(environments, document, save)
    sums = [e["suite"] for e in document["environments"].values()] + [*document["libraries"].values()]
    return int(any(each["failed"] for each in sums))


if __name__ == "__main__":
    sys.exit(main())
