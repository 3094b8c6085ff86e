"""Errors speak one language: ``argument: expected ..., got ...``, TypeError for types and ValueError for values."""

from __future__ import annotations

import ast
import pathlib
import re

import pytest
import torch

import fastlora
from fastlora._utils import errors

PACKAGE = pathlib.Path(fastlora.__file__).parent
# Messages that a caller puts behind the argument, or the file, that they are about.
INSIDE = ("cannot be quantized anew here", "is not a number", "has values too large for the model's")
NAMED = re.compile(r"(\{[^{}]*\}|--[a-z]+|(rank of |name of a slice|adapter )?[\w\[\]{}'!.]*): ")


def raised() -> list[tuple[str, str]]:
    """Where the package raises TypeError or ValueError with a text, and the text; expressions stand in braces."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        if "kernels" in path.parts:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            call = node.exc if isinstance(node, ast.Raise) else None
            kind = getattr(getattr(call, "func", None), "id", None)
            if kind in ("ValueError", "TypeError") and isinstance(call.args[0], (ast.Constant, ast.JoinedStr)):
                place = f"{path.relative_to(PACKAGE)}:{node.lineno}"
                found.append((place, ast.unparse(call.args[0]).lstrip("f").strip("\"'")))
    return found


def test_every_message_names_its_argument_first():
    messages = raised()
    assert len(messages) > 100
    assert [m for m in messages if not NAMED.match(m[1]) and not any(text in m[1] for text in INSIDE)] == []


def test_no_other_dialect():
    assert [m for m in raised() if re.search(r"\bmust (be|have|hold|lie|share|not be)\b", m[1])] == []


@pytest.mark.parametrize("text", ["budget must be an integer", "{name} must be finite", "the loss is nan"])
def test_another_dialect_is_seen(text):
    assert not NAMED.match(text)


@pytest.mark.parametrize("text", ["r: expected", "{name}: expected", "rank of {label}: a", "alpha['q']: expected"])
def test_the_dialect_is_known(text):
    assert NAMED.match(text)


class NoModel:
    """Shown by its type."""


CASES = [
    (lambda: errors.check_integer("r", 2.0, 1), TypeError, "r: expected an integer >= 1, got 2.0"),
    (lambda: errors.check_integer("r", True), TypeError, "r: expected an integer, got True"),
    (lambda: errors.check_integer("r", "x", accepted="'auto', or an integer"), TypeError, "r: expected 'auto', or an"),
    (lambda: errors.check_integer("r", 0, 1), ValueError, "r: expected an integer >= 1, got 0"),
    (lambda: errors.check_number("lr", "1"), TypeError, "lr: expected a finite number, got '1'"),
    (lambda: errors.check_number("lr", False), TypeError, "lr: expected a finite number, got False"),
    (lambda: errors.check_number("lr", float("nan")), ValueError, "lr: expected a finite number, got nan"),
    (lambda: errors.check_number("lr", 10**400), ValueError, "lr: expected a finite number, got 1000"),
    (lambda: errors.check_number("lr", -1, 0), ValueError, "lr: expected a finite number >= 0, got -1"),
    (lambda: errors.check_number("lr", 0, above=0), ValueError, "lr: expected a finite number > 0, got 0"),
    (
        lambda: errors.check_number("p", 1.0, 0, below=1),
        ValueError,
        "p: expected .* >= 0 and < 1, got 1.0",
    ),
    (lambda: errors.check_flag("keep", 1), TypeError, "keep: expected True or False, got 1"),
    (lambda: errors.check_choice("form", "delt", ("delta", True)), ValueError, "form: expected one of .*did you mean"),
    (lambda: errors.check_choice("form", 1, ("delta", True)), ValueError, "form: expected one of .*, got 1"),
    (
        lambda: errors.check_choice("form", ["delta"], ("delta",)),
        ValueError,
        r"one of .*, got \['delta'\]",
    ),
    (lambda: errors.check_choice("form", torch.ones(2), ("a",)), ValueError, r"got torch.float32 \(2,\)"),
    (
        lambda: errors.check_mapping("ranks", [1], "keys to ranks"),
        TypeError,
        "ranks: expected a mapping of keys",
    ),
    (lambda: errors.check_model("bert"), TypeError, "model: expected a torch.nn.Module, got 'bert'"),
    (lambda: errors.check_model(NoModel()), TypeError, "model: expected a torch.nn.Module, got NoModel"),
]


@pytest.mark.parametrize("call, kind, message", CASES)
def test_what_is_refused(call, kind, message):
    with pytest.raises(kind, match=message):
        call()


def test_what_is_accepted():
    numpy = pytest.importorskip("numpy")
    found = errors.check_integer("r", numpy.int64(3), 1)
    assert (found, type(found)) == (3, int)
    assert errors.check_number("lr", numpy.float64(0.5), 0) == 0.5 and errors.check_number("lr", 0, 0, below=1) == 0
    assert errors.check_choice("form", "".join("delta"), ("delta", None)) == "delta"
    assert errors.check_choice("form", None, ("delta", None)) is None and errors.check_flag("keep", False) is False
    model = torch.nn.Identity()
    assert errors.check_model(model) is model


def test_long_values_are_shown_short():
    assert len(errors.shown("x" * 10_000)) < 400 and len(errors.shown(list(range(10_000)))) < 100
    assert errors.shown(torch.zeros(2, 3)) == "torch.float32 (2, 3)" and errors.shown(torch.int8) == "torch.int8"
    assert errors.shown(object()) == "object"


def test_numbers_of_other_libraries_in_a_config_are_plain():
    numpy = pytest.importorskip("numpy")
    config = fastlora.LoraConfig(r=numpy.int64(4), rank_pattern={"q": numpy.int32(2)})
    assert (type(config.r), type(config.rank_pattern["q"])) == (int, int)
