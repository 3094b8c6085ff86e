"""The pure-Python kernels: block edges, fp32 sums, memory, and when they are chosen (test_lora.py has the operator)."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from support.op_help import make
from torch.utils._python_dispatch import TorchDispatchMode

from fastlora.ops import reference
from fastlora.ops.backends import BACKENDS, choose
from fastlora.ops.backends import eager as plain

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CPU = torch.device("cpu")


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 4 rows and tiles of 5: a few dozen rows have whole blocks and a remainder."""
    monkeypatch.setattr(plain, "_ROWS", 4)
    monkeypatch.setattr(plain, "_WIDE_ROWS", 3)
    monkeypatch.setattr(plain, "_TILE_ROWS", 5)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def normal(*size, dtype=torch.float32, seed=0):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def wide(*tensors):
    return [t.double() for t in tensors]


def assert_as_close(found, low, exact):
    """No further from float64 than four times the reference on the same low-precision operands, and an ulp of scale."""
    assert found.dtype == low.dtype and found.shape == exact.shape
    if exact.numel():
        tolerance = 4 * (low.double() - exact).abs().max() + torch.finfo(low.dtype).eps * exact.abs().max()
        assert (found.double() - exact).abs().max() <= tolerance


class Made(TorchDispatchMode):
    """What operators inside return: the largest number of elements by dtype."""

    def __init__(self):
        super().__init__()
        self.largest: dict[torch.dtype, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(t, torch.Tensor):
                self.largest[t.dtype] = max(self.largest.get(t.dtype, 0), t.numel())
        return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("M", [0, 1, 4, 13, 16])
def test_shrink_outer_and_expand(M, dtype, small_blocks):
    x, A, d = normal(M, 9, dtype=dtype), normal(5, 9, dtype=dtype, seed=1), normal(M, 3, seed=2)
    assert_as_close(plain.shrink(x, A), reference.shrink(x, A), reference.shrink(*wide(x, A)))
    assert_as_close(plain.outer(d, x), reference.outer(d, x), reference.outer(*wide(d, x)))
    h, factors = normal(M, 6, dtype=dtype, seed=3), [normal(2, 4, dtype=dtype), normal(3, 5, dtype=dtype)]
    rest = ([0, 3], [1, 6], [0.5, 2.0])
    results = []
    for module, cast in ((plain, torch.clone), (reference, torch.clone), (reference, torch.Tensor.double)):
        y = cast(normal(M, 12, dtype=dtype, seed=4))
        module.expand_(y, cast(h), [cast(f) for f in factors], *rest, False)
        results.append(y)
    assert_as_close(*results)
    assert torch.equal(results[0][:, 0], normal(M, 12, dtype=dtype, seed=4)[:, 0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("probes", [0, 3])
@pytest.mark.parametrize("need_dA", [True, False])
def test_wgrad_over_block_edges_with_a_projection_missing(dtype, probes, need_dA, small_blocks):
    M, rank = 13, 6
    x, h = normal(M, 9, dtype=dtype), normal(M, rank + probes, dtype=dtype, seed=1)
    packed = normal(M, 12, dtype=dtype, seed=2)  # strided parts of one output, as in a fused matrix
    dy, B = [packed[:, :7], packed[:, 8:]], [normal(7, 2, dtype=dtype, seed=3), normal(4, 1, dtype=dtype, seed=4)]
    rest = ([0, 5], [0.5, 2.0], rank, probes, need_dA)
    found, low = plain.wgrad(x, dy, h, B, *rest), reference.wgrad(x, dy, h, B, *rest)
    exact = reference.wgrad(*wide(x), wide(*dy), *wide(h), wide(*B), *rest)
    for mine, same, e in zip(found, low, exact, strict=True):
        for a, b, c in zip(*([t] if isinstance(t, torch.Tensor) else t for t in (mine, same, e)), strict=True):
            assert_as_close(a, b, c)
    assert not found[0][:, 2:5].any()
    results = [*found[2], *found[3]]
    assert all(t.is_contiguous() for t in results)
    assert len({t.untyped_storage().data_ptr() for t in results if t.numel()}) == sum(t.numel() > 0 for t in results)


def test_a_sum_of_bf16_products_is_not_rounded_on_the_way():
    """1 + 1024 terms of 2^-9: in bf16 the sum stays at 1."""
    x, d = torch.full((1025, 1), 2.0**-9, dtype=torch.bfloat16), torch.ones(1025, 1, dtype=torch.bfloat16)
    x[0] = 1.0
    assert plain.outer(d, x).item() == 3.0
    _, _, (dB,), (Q,) = plain.wgrad(d, [x], torch.ones(1025, 2, dtype=torch.bfloat16), [d[:1]], [0], [1.0], 1, 1, False)
    assert dB.item() == Q.item() == 3.0
    assert plain.shrink(x.t(), d.t()).item() == 3.0


@pytest.mark.parametrize("dtype", DTYPES)
def test_low_precision_is_widened_block_by_block(dtype, small_blocks):
    M, K, N = 64, 16, 24
    x, dy, h, y = (normal(M, width, dtype=dtype) for width in (K, N, 3, N))
    A, B = normal(3, K, dtype=dtype), normal(N, 3, dtype=dtype)
    with Made() as made:
        plain.shrink(x, A)
        plain.expand_(y, h, [B.t()], [0], [0], [1.0], True)
        plain.wgrad(x, [dy], h, [B], [0], [1.0], 3, 0, True)
    # Views of the operands are as large as they are; in fp32 only dh, dA and blocks may be made.
    if dtype != torch.float32:
        assert made.largest[torch.float32] <= max(M * 3, 3 * K, 4 * N)
    assert made.largest[torch.float64] <= 3 * N


@pytest.mark.parametrize("dtype", DTYPES)
def test_moments_far_from_zero(dtype):
    y = (normal(100, 7) + 300).to(dtype)
    torch.testing.assert_close(plain.column_moments(y), reference.column_moments(y), rtol=1e-14, atol=0)


@pytest.mark.parametrize("shape", [(0, 5), (1, 1), (70, 9), (33, 8)])
@pytest.mark.parametrize("seed", [0, 2**61 + 12345])
def test_dropout_is_the_reference_bit_for_bit(shape, seed):
    x, seed = normal(*shape), torch.tensor(seed)
    for projection in (0, 2):
        assert torch.equal(plain.dropout(x, seed, projection, 0.3), reference.dropout(x, seed, projection, 0.3))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("absolute", [True, False])
def test_gradstat_in_tiles_and_as_gram(dtype, absolute, small_blocks):
    x, dy, offsets = normal(40, 9, dtype=dtype), normal(40, 11, dtype=dtype, seed=1), [0, 2, 2, 5, 40]
    found, low = (m.gradstat(x, dy, offsets, absolute) for m in (plain, reference))
    assert_as_close(found, low, reference.gradstat(*wide(x, dy), offsets, absolute))
    assert absolute or not found[:, 1].any()


def test_gradstat_keeps_no_gradient():
    x, dy = normal(60, 160), normal(60, 700)
    largest_allowed = max(dy.numel(), 256 * 160)  # views of the operands, and a tile
    assert largest_allowed < 160 * 700 / 2
    for offsets, absolute in (([0, 60], True), (list(range(0, 61, 10)), False)):
        with Made() as made:
            plain.gradstat(x, dy, offsets, absolute)
        assert max(made.largest.values()) <= largest_allowed


def test_results_do_not_depend_on_the_threads_beyond_rounding():
    case = make(M=1100, K=64, N=(48, 32), r=(4, 2))
    args = (case["x"], case["dy"], normal(1100, 9), case["B"], [0, 4], case["scale"], 6, 3, True)
    found, before = [], torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(plain.wgrad(*args))
        again = plain.wgrad(*args)
        assert all(
            torch.equal(a, b) for a, b in zip([*again[:2], *again[2]], [*found[-1][:2], *found[-1][2]], strict=True)
        )
    torch.set_num_threads(before)
    for a, b in zip(
        [*found[0][:2], *found[0][2], *found[0][3]], [*found[1][:2], *found[1][2], *found[1][3]], strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("p", [0.0, 0.4])
def test_opcheck(p):
    case = make(k=2, S=13)
    x, A, B = (t if isinstance(t, list) else [t] for t in (case["x"], case["A"], case["B"]))
    for t in (*x, *A, *B):
        t.requires_grad_()
    Z = [torch.zeros(b.shape[0], 2, requires_grad=True) for b in B]
    V = [torch.zeros(2, w.shape[0] + 1, dtype=torch.float64, requires_grad=True) for w in case["W"]]
    seed = torch.tensor(7) if p else None
    leaves = (
        A,
        B,
        Z,
        V,
        [case["P"]],
        [case["sign"]],
        seed,
        [],
        [],
        case["scale"],
        [p],
        list(range(len(B))),
        [],
        "eager",
        "linear",
    )
    torch.library.opcheck(torch.ops.fastlora.lora_linear.default, (x[0], case["W"], case["bias"], *leaves))


def test_order_of_the_table_and_what_python_refuses():
    assert list(BACKENDS) == ["triton", "native", "eager", "reference"]
    with pytest.raises(RuntimeError, match="backend 'eager' was asked for and cannot run: it takes float32, .*float64"):
        choose("eager", CPU, torch.float64)
    with pytest.raises(RuntimeError, match="'eager' .*a CPU's cache, the tensors are on cuda"):
        choose("eager", torch.device("cuda"), torch.float32)
    backend, passed = choose("auto", CPU, torch.float64)
    assert backend.name == "reference" and "float64" in passed["eager"]


CHOSEN_WITHOUT_A_LIBRARY = """
import torch, fastlora
from torch import nn
model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))
fastlora.inject(model, fastlora.LoraConfig(r=2, target_modules=["0"], lora_dropout=0.1))
with fastlora.track(model, statistics=("grad_sq", "act_var"), every=1) as tracker:
    model(torch.randn(5, 8)).sum().backward()
    tracker.step()
    assert all(value > 0 for value in tracker.scores("act_var").values())
print(fastlora.explain(model))
"""


def test_chosen_when_the_native_library_is_missing(tmp_path):
    environment = {**os.environ, "FASTLORA_LIBRARY": str(tmp_path / "missing.so")}
    command = [sys.executable, "-c", CHOSEN_WITHOUT_A_LIBRARY]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    row = next(line for line in done.stdout.splitlines() if line.startswith("0 "))
    assert row.split()[1] == "eager"
    assert "native: the native library is not there: " in row and "missing.so" in row
