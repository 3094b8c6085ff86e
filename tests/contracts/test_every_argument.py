"""Bad input to every argument of every public function: an error that names it, and everything as it was.

The functions come from ``fastlora.__all__``: one without a right call in ``public_calls.GOOD`` fails here, as does an
argument without a row in ``bad_input_rows.ROWS``.
"""

from __future__ import annotations

import hashlib
import inspect
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from support.bad_input_rows import ROWS
from support.model_state import state_of
from support.public_calls import GOOD
from torch import nn

import fastlora

# Handed to every argument in turn: accepted, or refused by the argument's name. Never an error from further down.
GARBAGE = [None, "no such", 3.5, -1, float("nan"), [], {}, object(), True, torch.ones(2), {"zzz": 1}, ["x"], {1: 2}]
# What the user's own function makes of its batches is the user's.
NOT_OURS = {(name, "batches") for name in ("calibrate", "initialize_lora_ga", "recommend")}


def public() -> Iterator[tuple[str, Any]]:
    """Name and object of every public function, class, and method with arguments or a right call of its own."""
    for name in fastlora.__all__:
        found = getattr(fastlora, name)
        if inspect.ismodule(found):
            names = getattr(found, "__all__", [n for n in vars(found) if not n.startswith("_")])
            inside = [(n, getattr(found, n)) for n in names]
            yield from ((f"{name}.{n}", f) for n, f in inside if getattr(f, "__module__", "").startswith("fastlora"))
            continue
        yield name, found
        for method, function in vars(found).items() if inspect.isclass(found) else ():
            function = getattr(found, method)
            own = not method.startswith("_") and callable(function)
            if own and (set(inspect.signature(function).parameters) - {"self"} or f"{name}.{method}" in GOOD):
                yield f"{name}.{method}", function


def arguments(name: str) -> list[str]:
    """Arguments that are ours to check: torch checks those of the class that ours is a drop-in for."""
    function, base = PUBLIC[name], ()
    if inspect.isclass(function) and issubclass(function, (nn.Module, torch.optim.lr_scheduler.LRScheduler)):
        parent = next(c for c in function.__mro__ if not c.__module__.startswith("fastlora"))
        base = inspect.signature(parent.__init__).parameters
    named = inspect.signature(function).parameters.values()
    return [p.name for p in named if p.kind is not p.VAR_KEYWORD and p.name != "self" and p.name not in base]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch) -> None:
    """Relative paths among the bad values lead nowhere."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


PUBLIC = dict(public())
EVERY = [(name, argument) for name in PUBLIC for argument in arguments(name)]
TABLE = [(name, argument, row) for name, own in ROWS.items() for argument, rows in own.items() for row in rows]


def call(name: str, given: dict[str, Any]) -> Any:
    self = [given.pop("self")] if "self" in given else []
    found = PUBLIC[name](*self, **given)
    if isinstance(found, AbstractContextManager) and not isinstance(found, fastlora.Tracker):
        with found:
            pass
    return found


def state(value: Any) -> Any:
    """What a refused call must leave alone, in a form that can be compared."""
    if isinstance(value, nn.Module):
        taken = state_of(value)
        tensors = {k: (where, bytes(b.numpy())) for k, (where, b) in taken.pop("bytes").items()}
        names = [layer.adapter_names for layer in value.modules() if isinstance(layer, fastlora.nn.Linear)]
        return tensors, {k: repr(v) for k, v in taken.items()}, names
    if isinstance(value, torch.optim.Optimizer):
        return repr(value.state_dict()), [id(p) for g in value.param_groups for p in g["params"]]
    if isinstance(value, fastlora.Tracker):
        return repr(value.state_dict()), [state(layer) for layer in value.layers.values()]
    if isinstance(value, Path):
        files = sorted(p for p in value.parent.rglob("*") if p.is_file())
        return [(str(p), hashlib.sha256(p.read_bytes()).hexdigest()) for p in files]
    if isinstance(value, dict):
        return {key: state(each) for key, each in value.items()}
    return repr(value)


def refused(name: str, argument: str, bad: Any, good: dict[str, Any]) -> Exception | None:
    """The error of a call with one bad argument, or None; whatever is in the other arguments is unchanged."""
    given = {**good, argument: bad}
    before, generator = state({k: v for k, v in given.items() if v is not bad}), torch.get_rng_state()
    try:
        call(name, dict(given))
    except Exception as error:
        assert state({k: v for k, v in given.items() if v is not bad}) == before, f"{name} changed what it refused"
        assert torch.equal(torch.get_rng_state(), generator), f"{name} moved torch's generator"
        return error
    return None


def test_every_public_function_has_a_right_call_and_every_argument_a_row():
    assert set(PUBLIC) - set(GOOD) == set(), "add a right call to public_calls.GOOD"
    assert [(n, a) for n, a in EVERY if not ROWS.get(n, {}).get(a)] == [], "add a row to bad_input_rows.ROWS"
    assert [(n, a) for n, a, _ in TABLE if n not in PUBLIC or a not in inspect.signature(PUBLIC[n]).parameters] == []


@pytest.mark.parametrize("name", GOOD)
def test_the_right_call_is_right(name, tmp_path):
    if name != "Tracker.covariances":  # its tracker has none: every kind is bad
        call(name, GOOD[name](tmp_path))


@pytest.mark.parametrize("name, argument, row", TABLE, ids=[f"{n}-{a}-{row.label}" for n, a, row in TABLE])
def test_a_row(name, argument, row, tmp_path):
    good = {**GOOD[name](tmp_path), **{k: v() if inspect.isfunction(v) else v for k, v in row.also.items()}}
    error = refused(name, argument, row.bad(good) if inspect.isfunction(row.bad) else row.bad, good)
    assert error is not None, "accepted"
    assert isinstance(error, row.error) and re.search(row.match, str(error)), repr(error)


@pytest.mark.parametrize("name, argument", EVERY)
def test_garbage_is_refused_by_name_or_accepted(name, argument, tmp_path):
    if (name, argument) in NOT_OURS:
        pytest.skip("passed on to the user's own function")
    good = None
    for i, bad in enumerate(GARBAGE):
        (tmp_path / str(i)).mkdir()
        # What a refusal left as it was serves again.
        good = good or GOOD[name](tmp_path / str(i))
        error = refused(name, argument, bad, good)
        if error is None:
            good = None
        else:
            shown = f"{name}({argument}={bad!r}): {type(error).__name__}: {error}"
            assert isinstance(error, (ValueError, TypeError, FileNotFoundError)), shown
            named = re.search(rf"\b{argument}\b", str(error)) or isinstance(error, FileNotFoundError)
            assert named and "object has no attribute" not in str(error), shown
