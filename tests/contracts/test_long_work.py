"""Work that may take more than a second: one argument ``progress``, and one logger for all that is said."""

from __future__ import annotations

import copy
import logging
import pathlib
import re

import pytest
import torch
from support.public_calls import GOOD

import fastlora
from fastlora._utils import reporting

LONG = {"merge": "layers", "load": "tensors", "calibrate": "batches", "initialize_eva": "layers"}


def call(name, folder, **fields):
    return getattr(fastlora, name)(**{**GOOD[name](folder), **fields})


@pytest.mark.parametrize("name", LONG)
class TestOneConvention:
    def test_a_callable_sees_every_piece(self, name, tmp_path):
        seen = []
        call(name, tmp_path, progress=lambda done, wanted, _: seen.append((done, wanted)))
        assert len(seen) > 0 and [done for done, _ in seen] == list(range(1, len(seen) + 1))
        assert {wanted for _, wanted in seen} == {len(seen)}

    def test_without_a_terminal_it_is_logged(self, name, tmp_path, caplog, capsys):
        with caplog.at_level(logging.INFO, "fastlora"):
            call(name, tmp_path, progress=None)
        said = [r.getMessage() for r in caplog.records if r.name == "fastlora._utils.reporting"]
        assert said and all(re.match(rf"{name}: \d+ of \d+ {LONG[name]}", text) for text in said)
        assert not any(capsys.readouterr())

    def test_a_bar(self, name, tmp_path, capsys):
        pytest.importorskip("tqdm")
        call(name, tmp_path, progress=True)
        assert f"{name}: 100%" in capsys.readouterr().err

    def test_silence(self, name, tmp_path, caplog, capsys):
        with caplog.at_level(logging.INFO, "fastlora._utils.reporting"):
            call(name, tmp_path, progress=False)
        assert not any(r.name == "fastlora._utils.reporting" for r in caplog.records)
        assert not any(capsys.readouterr())


@pytest.mark.parametrize("name", ["load", "initialize_eva"])
def test_one_that_raises_leaves_the_model_as_it_was(name, tmp_path):
    arguments = GOOD[name](tmp_path)
    before = copy.deepcopy(arguments["model"].state_dict())

    def stop(done, wanted, _):
        if done == wanted:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        getattr(fastlora, name)(**arguments, progress=stop)
    after = arguments["model"].state_dict()
    assert after.keys() == before.keys() and all(torch.equal(v, before[k]) for k, v in after.items())


@pytest.mark.parametrize("wanted, delay", [(None, 1.0), (True, 0.0)])
def test_a_bar_that_nobody_asked_for_waits_a_second(wanted, delay, monkeypatch):
    tqdm, seen = pytest.importorskip("tqdm").tqdm, []
    monkeypatch.setattr(reporting.sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(reporting, "_tqdm", lambda: lambda **given: seen.append(given["delay"]) or tqdm(**given))
    with reporting.reporting(wanted, 1, "work", "piece") as report:
        report(1, 1, float("nan"))
    assert seen == [delay]


def test_one_logger():
    """Below ``fastlora``, and nothing is printed or warned past it."""
    root = pathlib.Path(fastlora.__file__).parent
    for path in root.rglob("*.py"):
        text = path.read_text()
        assert set(re.findall(r"getLogger\((.*?)\)", text)) <= {"__name__"}, path
        assert not re.search(r"^\s*(print|warnings\.warn)\(", text, re.MULTILINE), path
        assert not re.search(r"logging\.(debug|info|warning|error)\(", text), path
