"""Fixtures of the native operators' tests."""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings

# A slow machine, or an instrumented build, is not a failure.
settings.register_profile("native", deadline=None)
settings.load_profile("native")


def pytest_configure(config) -> None:
    config.addinivalue_line("markers", "every_isa: runs once more for every instruction set that this processor has")


@pytest.fixture(autouse=True)
def _seed_and_threads():
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
