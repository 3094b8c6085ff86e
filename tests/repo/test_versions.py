"""``tools/versions.py`` counts what passed, failed and was skipped, and takes silence for a failure."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "tools"))
import versions  # noqa: E402

SOURCE = """
import pytest

class TestTable:
    @pytest.mark.parametrize("n", [1, 2])
    def test_good(self, n):
        pass

def test_bad():
    assert False

@pytest.fixture
def broken():
    raise OSError

def test_error(broken):
    pass

@pytest.mark.skip(reason="no such device")
def test_skipped():
    pass
"""


def test_counts_by_file(tmp_path):
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_some.py").write_text(SOURCE)
    (tmp_path / "tests" / "test_other.py").write_text("def test_good():\n    pass\n")
    files = versions.tested(sys.executable, tmp_path, ["tests/test_some.py", "tests/test_other.py"])
    some = files["tests/test_some.py"]
    assert some["passed"] == 2 and some["failed"] == ["test_bad", "test_error"]
    assert some["skipped"] == {"no such device": 1} and files["tests/test_other.py"]["passed"] == 1
    assert versions.total(files) == {
        "passed": 3, "failed": 2, "skipped": 1, "why skipped": {"no such device": 1},
        "failures": ["tests/test_some.py::test_bad", "tests/test_some.py::test_error"],
    }  # fmt: skip


def test_a_file_without_a_result_has_failed(tmp_path):
    (tmp_path / "test_gone.py").write_text("import no_such_module\n")
    for names in (["test_gone.py"], ["test_missing.py"]):
        files = versions.tested(sys.executable, tmp_path, names)
        assert versions.total(files)["failed"] == 1 and files[names[0]]["failed"], files
