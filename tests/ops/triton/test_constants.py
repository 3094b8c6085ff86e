"""Tables on a device that are made of numbers: kept for good up to a bound, then the last; none in a capture."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
from fastlora.kernels import constants  # noqa: E402

CPU = torch.device("cpu")


@pytest.fixture
def made(monkeypatch):
    """(a function of a number and a device, the numbers that it was called for), of which three are kept for good."""
    monkeypatch.setattr(constants, "KEPT", 3)
    monkeypatch.setattr(constants, "RECENT", 2)
    calls = []
    table = constants.device_constant(lambda number, device: calls.append(number) or torch.tensor(number))
    return table, calls


def test_the_first_are_kept_for_good_and_of_the_rest_the_last(made):
    table, calls = made
    for _ in range(3):
        for number in range(7):
            assert table(number, CPU).item() == number
            assert constants.is_constant(table(number, CPU)) is (number < 3)
    assert calls == [0, 1, 2, *[3, 4, 5, 6] * 3]


def test_one_table_for_equal_numbers_of_one_device(made):
    table, _ = made
    assert table(1, CPU) is table(1, CPU) and table(1, CPU) is not table(1, torch.device("meta"))


def test_a_capture_reads_what_is_kept_for_good_alone(made, monkeypatch):
    table, calls = made
    for number in range(5):
        table(number, CPU)
    monkeypatch.setattr(constants, "CAPTURED", ("cpu",))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert table(2, CPU).item() == 2
    for number in (4, 9):  # there for now, and not there
        with pytest.raises(RuntimeError, match="adapters: expected ranks whose tables are on the device"):
            table(number, CPU)
    assert calls == [0, 1, 2, 3, 4]
