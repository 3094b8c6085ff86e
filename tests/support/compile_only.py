"""Makes the kernel cases compile every launch for sm_90, as a GPU would be given it, and run none.

The interpreter neither specialises a kernel on arguments of 1 or on alignment nor checks types: this does, and no
number that a case then finds means anything.
"""

from __future__ import annotations

import pytest
from fastlora.kernels import primitives
from fastlora.kernels.compile_report import Offline
from triton.runtime import driver

from support import triton_help


def apply() -> None:
    """Replace the launches and the comparisons."""
    driver.set_active(Offline())
    primitives.launcher = lambda kernel, grid, *arguments, **options: kernel.warmup(*arguments, grid=grid, **options)
    triton_help.assert_close = lambda *given: None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item):
    """A case may not fail on its numbers."""
    try:
        return (yield)
    except AssertionError:
        pytest.skip("compiled")
