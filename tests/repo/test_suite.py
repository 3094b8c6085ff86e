"""The suite itself: what its files may import, how long they are, and processes that share them."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from xml.etree import ElementTree

import pytest

TESTS = Path(__file__).parents[1]
FILES = sorted(TESTS.rglob("*.py"))


def imported(path: Path) -> set[str]:
    """Every word of the names of the modules that a file imports, and of what it takes from them."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            names |= {node.module or "", *(alias.name for alias in node.names)}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {word for name in names for word in name.split(".")}


def test_no_file_imports_a_test():
    tests = {path.stem for path in FILES if path.name.startswith(("test_", "cases_"))}
    found = {path.relative_to(TESTS).as_posix(): imported(path) & tests for path in FILES}
    assert {name: words for name, words in found.items() if words} == {}, "what tests share belongs into support"


def test_no_file_is_too_long():
    lines = {path.relative_to(TESTS).as_posix(): len(path.read_text().splitlines()) for path in FILES}
    assert len(lines) > 100 and {name: count for name, count in lines.items() if count > 500} == {}


# The first file waits for another process where there is one.
SOURCES = {
    "conftest.py": 'pytest_plugins = ["support.processes"]\n',
    "cases_here.py": """
        import os
        def test_in_the_interpreter():
            assert os.environ["TRITON_INTERPRET"] == "1"
        def test_wrong():
            assert "this" == "that"
        """,
    **{
        f"test_{name}.py": """
        import os, time, warnings, pytest
        def test_once(request):
            assert "TRITON_INTERPRET" not in os.environ
            with open(os.environ["SEEN"], "a") as file:
                print(request.node.path.name, os.getpid(), file=file)
            wanted = min(int(request.config.option.processes), 2)
            while request.node.path.name == "test_a.py" and wanted > 1:
                wanted -= len({line.split()[1] for line in open(os.environ["SEEN"])}) > 1
                time.sleep(0.05)
        def test_skipped():
            pytest.skip("for a reason")
        def test_warns():
            warnings.warn("a word of warning")
        """
        for name in "abcdefgh"
    },
}


def suite(folder: Path, *words: str, **sources: str) -> tuple[subprocess.CompletedProcess[str], dict[str, str | None]]:
    """What a pytest of its own says of these files, and of each case the message of its failure."""
    for name, source in {**SOURCES, **{f"{name}.py": text for name, text in sources.items()}}.items():
        (folder / name).write_text(textwrap.dedent(source))
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(TESTS), "SEEN": str(folder / "seen"), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    command = [sys.executable, "-m", "pytest", "-o", "python_files=test_*.py cases_*.py", "-p", "no:cacheprovider"]
    command += [f"--junitxml={folder / 'report.xml'}", f"--rootdir={folder}", *words, str(folder)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)
    cases = {}
    for case in ElementTree.parse(folder / "report.xml").iter("testcase"):
        name, failure = f"{case.get('classname')}.{case.get('name')}", case.find("failure")
        assert name not in cases
        cases[name] = None if failure is None else failure.text
    return done, cases


@pytest.mark.parametrize("processes", [1, 3])
def test_every_case_runs_once_and_is_reported_by_name(processes, tmp_path):
    done, cases = suite(tmp_path, "--processes", str(processes))
    assert done.returncode == 1 and len(cases) == 2 + 3 * 8, done.stdout + done.stderr
    assert [name for name, failure in cases.items() if failure] == ["cases_here.test_wrong"]
    assert "FAILED cases_here.py::test_wrong" in done.stdout and "assert 'this' == 'that'" in done.stdout
    assert "1 failed, 17 passed, 8 skipped, 8 warnings in " in done.stdout.splitlines()[-1]
    assert "a word of warning" in done.stdout
    seen = [line.split() for line in (tmp_path / "seen").read_text().splitlines()]
    assert sorted(name for name, _ in seen) == [f"test_{name}.py" for name in "abcdefgh"]
    assert (len({pid for _, pid in seen}) > 1) is (processes > 1)


def test_a_process_that_dies_fails_its_case(tmp_path):
    dies = "import os\ndef test_before(): pass\ndef test_dies():\n    os._exit(7)\ndef test_after(): pass\n"
    done, cases = suite(tmp_path, cases_here=dies)
    assert done.returncode == 1
    failed = {name: failure for name, failure in cases.items() if failure}
    assert list(failed) == ["cases_here.test_dies", "cases_here.test_after"]
    assert all("exit 7" in failure for failure in failed.values())


def test_a_file_that_cannot_be_imported_there_fails_its_cases(tmp_path):
    source = "import os\nassert 'TRITON_INTERPRET' not in os.environ, 'not here'\ndef test_it(): pass\n"
    done, cases = suite(tmp_path, cases_here=source)
    assert done.returncode == 1 and "not here" in cases["cases_here.test_it"]


def test_a_selection_and_stopping_at_the_first_failure(tmp_path):
    done, cases = suite(tmp_path, "--processes", "2", "-k", "interpreter or skipped")
    assert done.returncode == 0 and len(cases) == 1 + 8, done.stdout
    done, cases = suite(tmp_path, "-x", "-k", "wrong")
    assert done.returncode == 1 and "stopping after 1 failures" in done.stdout
