"""What holds for every native operator: it is there, repeats, names bad arguments and can be traced."""

from __future__ import annotations

import os
import shutil

import pytest
import torch
from support.native_help import DTYPES, make, needs_library

from fastlora.ops import native

pytestmark = needs_library

ops = torch.ops.fastlora


def test_library_is_loaded():
    assert native.available(), native.reason()
    assert native.reason() is None
    assert native.isa().startswith(("avx512", "avx2", "portable"))
    for name in ("shrink", "expand_", "wgrad", "outer", "dropout", "dropout_rows"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fastlora::{name}", "CPU"), name


@pytest.mark.skipif(
    shutil.which("nvcc") is None or os.environ.get("FASTLORA_CUDA") == "0", reason="built without the CUDA compiler"
)
def test_cuda_operator_is_compiled_and_registered():
    for name in ("build_segments", "segment_tiles", "penalty", "philox_signs_"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fastlora::{name}", "CUDA"), name


def big_calls(dtype):
    """Calls large enough to be split over threads."""
    x, A, h = make(700, 130, dtype), make(33, 130, dtype), make(700, 37, dtype)
    wide, B = make(700, 3 * 130, dtype), [make(130, 11, dtype) for _ in range(3)]
    dy, seed = list(wide.split(130, 1)), torch.tensor(5)

    def expand():
        y = wide.clone()
        return y, ops.expand_(y, h, [factor.t() for factor in B], [0, 11, 22], [0, 130, 260], [1.0] * 3, True)

    def wgrad():
        dh, dA, dB, Q = ops.wgrad(x, dy, h, B, [0, 11, 22], [2.0] * 3, 33, 4, True)
        return dh, dA, *dB, *Q

    return {
        "shrink": lambda: (ops.shrink(x, A),),
        "expand": expand,
        "wgrad": wgrad,
        "outer": lambda: (ops.outer(h, x),),
        "dropout": lambda: (ops.dropout(wide, seed, 1, 0.3),),
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["shrink", "expand", "wgrad", "outer", "dropout"])
def test_threads_and_repeatability(name, dtype):
    call, results = big_calls(dtype)[name], {}
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results[threads] = call()
        for _ in range(3):
            assert all(map(torch.equal, call(), results[threads])), f"{threads} threads do not repeat"
    for threads in (2, 3):
        for one, other in zip(results[1], results[threads], strict=True):
            # Another order of about 700 fp32 additions.
            assert (one - other).abs().max() <= 64 * torch.finfo(torch.float32).eps * one.abs().max()


def x_and(**changes):
    arguments = {"x": torch.randn(4, 6), "A": torch.randn(3, 6), **changes}
    return arguments["x"], arguments["A"]


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: ops.shrink(*x_and(x=torch.randn(6))), "x has 1 dimensions"),
        (lambda: ops.shrink(*x_and(A=torch.randn(3, 5))), "A has 5 columns, but x has 6"),
        (lambda: ops.shrink(*x_and(A=torch.randn(3, 6).bfloat16())), "A has dtype BFloat16, but x has Float"),
        (lambda: ops.shrink(torch.ones(2, 2).double(), torch.ones(2, 2).double()), "x has dtype Double"),
        (lambda: ops.outer(torch.ones(3, 2), torch.ones(4, 2)), "d has 3 rows, but x has 4"),
        (lambda: ops.dropout(torch.ones(2, 2), torch.tensor(1), 0, 1.0), "p is 1"),
        (lambda: ops.dropout(torch.ones(2, 2), torch.ones(1), 0, 0.5), "seed has 1 dimensions"),
        (lambda: ops.dropout(torch.ones(2, 2), torch.tensor(1), -1, 0.5), "projection is -1"),
        (lambda: ops.dropout_rows(torch.ones(2, 2), torch.ones(2, 2), 0, 0.5), "keys has 2 dimensions and dtype"),
        (lambda: ops.dropout_rows(torch.ones(2, 2), torch.ones(3, 2).long(), 0, 0.5), "keys is 3 x 2"),
    ],
)
def test_errors_name_the_argument(call, message):
    with pytest.raises(RuntimeError, match=message):
        call()


@pytest.mark.parametrize(
    "position, value, message",
    [
        (0, torch.ones(3, 4), "h has 5 rows, but y has 3"),
        (0, torch.ones(4, 5).t(), "y has column stride 5"),
        (2, [torch.ones(3, 4)], "offsets: columns 0 to 3 of h were asked for, but it has 2"),
        (2, [torch.ones(2, 5)], "columns: 0 to 5 of y were asked for, but it has 4"),
        (2, [torch.ones(2, 4).bfloat16()], "factors has dtype BFloat16, but y has Float"),
        (3, [-1], "offsets: columns -1"),
        (3, [0, 1], "offsets has 2 entries, but factors has 1"),
        (4, [1], "columns: 1 to 5"),
        (5, [], "scales has 0 entries"),
    ],
)
def test_expand_errors(position, value, message):
    arguments = [torch.ones(5, 4), torch.ones(5, 2), [torch.ones(2, 4)], [0], [0], [1.0], False]
    arguments[position] = value
    with pytest.raises(RuntimeError, match=message):
        ops.expand_(*arguments)


@pytest.mark.parametrize(
    "position, value, message",
    [
        (1, [torch.ones(4, 4)], "dy has 4 rows, but x has 5"),
        (1, [], "B has 1 entries, but dy has 0"),
        (2, torch.ones(5, 2), "h has 2 columns; rank \\+ probes is 3"),
        (3, [torch.ones(3, 2)], "B has 3 rows, but dy has 4"),
        (4, [1], "offsets: ranks 1 to 3 were asked for, but rank is 2"),
        (6, -1, "rank is -1"),
        (7, -1, "probes is -1"),
    ],
)
def test_wgrad_errors(position, value, message):
    arguments = [torch.ones(5, 3), [torch.ones(5, 4)], torch.ones(5, 3), [torch.ones(4, 2)], [0], [1.0], 2, 1, True]
    arguments[position] = value
    with pytest.raises(RuntimeError, match=message):
        ops.wgrad(*arguments)


@pytest.mark.parametrize("dtype", DTYPES)
def test_schemas_and_fake_tensors(dtype):
    x, h, dy = make(6, 5, dtype), make(6, 4, dtype), [make(6, 7, dtype), make(6, 3, dtype)]
    B = [make(7, 1, dtype), make(3, 2, dtype)]
    calls = [
        (ops.shrink, (x, make(4, 5, dtype))),
        (ops.expand_, (make(6, 10, dtype), h, [b.t() for b in B], [0, 1], [0, 7], [1.0, 2.0], True)),
        (ops.expand_, (make(6, 10, dtype), h, [b.t() for b in B], [0, 1], [0, 7], [1.0, 2.0], False)),
        (ops.wgrad, (x, dy, h, B, [0, 1], [1.0, 2.0], 3, 1, True)),
        (ops.wgrad, (x, dy, h, B, [0, 1], [1.0, 2.0], 3, 1, False)),
        (ops.outer, (h, x)),
        (ops.dropout, (x, torch.tensor(4), 1, 0.5)),
        (ops.dropout_rows, (x, torch.ones(len(x), 2, dtype=torch.int64), 1, 0.5)),
    ]
    for operator, arguments in calls:
        torch.library.opcheck(operator.default, arguments, test_utils=("test_schema", "test_faketensor"))
