"""``summary`` and ``explain`` as text for logs and as rich's tables."""

from __future__ import annotations

import io

import pytest
import torch
from support.helpers import config
from torch import nn

import fastlora


@pytest.fixture
def model(build):
    model = fastlora.inject(build("timm_vit"), config(r=3, target_modules=["qkv", "fc1"], split_qkv=True))
    first = next(row.key for row in fastlora.summary(model).rows)
    return fastlora.set_ranks(model, {first: 1})


def on_a_console(value, width):
    rich = pytest.importorskip("rich.console")
    console = rich.Console(file=io.StringIO(), width=width, force_terminal=False)
    console.print(value)
    return console.file.getvalue()


def test_the_text_of_a_summary_can_be_read_by_a_program(model):
    summary = fastlora.summary(model)
    head, dashes, *lines = str(summary).splitlines()
    assert head.split() == ["matrix", "in", "out", "rank", "scale", "params"] and set(dashes) == {"-", " "}
    for row, line in zip(summary.rows, lines, strict=False):
        cells = line.replace(",", "").split()
        assert cells == [row.key, str(row.in_features), str(row.out_features), str(row.rank), f"{row.scale:g}", str(row.params)]  # fmt: skip  # noqa: E501
    assert len(lines) == len(summary.rows) + 2
    assert str(summary).isascii()


def test_rich_shows_every_cell_of_the_text(model):
    for shown in (fastlora.summary(model), fastlora.explain(model)):
        table = on_a_console(shown, width=300)
        assert "\u2503" in table  # lines between the columns
        for line in str(shown).splitlines():
            for cell in line.split("  "):
                # A key's [q] is no markup.
                assert not cell.strip("- ") or cell.strip() in table


def test_a_narrow_console_folds_and_loses_nothing(model):
    table = on_a_console(fastlora.summary(model), width=40)
    cells = [line.split("\u2502")[1].strip() for line in table.splitlines() if line.startswith("\u2502")]
    for row in fastlora.summary(model).rows:
        assert row.key in "".join(cells)


def test_a_compiled_model_has_the_keys_of_its_scores():
    model = fastlora.inject(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), config(target_modules=["0"]))
    compiled = torch.compile(model, backend="eager")
    with fastlora.track(compiled) as tracker:
        compiled(torch.randn(3, 8)).square().sum().backward()
        tracker.step()
        assert list(tracker.scores()) == list(fastlora.summary(compiled).costs) == ["0"]
    assert [row.path for row in fastlora.explain(compiled).rows] == ["0"]
