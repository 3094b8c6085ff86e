"""Which tile and which strategy a device gets, without a GPU: its limits are told."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")
from fastlora.kernels import compile_report, expand_backward, gradstat, linear, linear_backward, tiling  # noqa: E402
from fastlora.kernels.tiling import Limits, Measurement, TileConfig  # noqa: E402

from benchmarks.host.limits import GPUS  # noqa: E402

CPU = torch.device("cpu")
SIZES = [(M, N, K) for M in (1, 512, 4096, 25216) for N in (768, 2304, 6144) for K in (768, 4096)]
SUPPORTED = [capability for capability in GPUS if capability >= (8, 0)]


@pytest.fixture
def device(request, monkeypatch):
    """The limits of a capability, in place of those that a device would be asked for."""
    card = GPUS[request.param]
    found = Limits(request.param, card.shared_bytes, card.multiprocessors)
    monkeypatch.setattr(tiling, "limits", lambda device: found)
    return found


def test_the_compile_report_knows_every_capability():
    assert {c: GPUS[c].shared_bytes for c in SUPPORTED} == compile_report.SHARED


@pytest.mark.parametrize("device", SUPPORTED, indirect=True)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_chosen_tile_fits_its_device(device, dtype):
    kind = "fp32" if dtype == torch.float32 else "half"
    for (operation, of), (M, N, K) in itertools.product(tiling._TABLE, SIZES):
        if of == kind:
            tile = tiling.choose_tiles(operation, M, N, K, 24, dtype, CPU)
            assert tile.shared(dtype.itemsize) <= device.shared
            assert device.capability == (9, 0) or not tile.tma


@pytest.mark.parametrize("device", SUPPORTED, indirect=True)
def test_a_measured_tile_that_does_not_fit_is_passed_over(device, monkeypatch):
    large = TileConfig(128, 256, 64, 8, 4, tma=True)
    monkeypatch.setitem(tiling.MEASURED, ("linear", "half"), (Measurement(4096, 768, 768, 8, large, 0.1, "H200"),))
    tile = tiling.choose_tiles("linear", 4096, 768, 768, 8, torch.bfloat16, CPU)
    assert (tile == large) == (device.capability == (9, 0))


@pytest.mark.parametrize("device", [(7, 5)], indirect=True)
def test_where_no_tile_fits_the_library_multiplies(device):
    assert tiling.choose_strategy("forward", 512, 768, 768, 24, torch.bfloat16, CPU) == "library"
    with pytest.raises(ValueError, match=r"device: expected more shared memory for linear in torch.bfloat16, cpu has"):
        tiling.choose_tiles("linear", 512, 768, 768, 24, torch.bfloat16, CPU)


def test_a_measurement_counts_within_a_factor_of_two(monkeypatch):
    odd = TileConfig(64, 64, 32, 4, 2)
    measured = Measurement(4096, 2304, 768, 8, odd, 0.1, "H200")
    monkeypatch.setitem(tiling.MEASURED, ("linear", "half"), (measured,))
    strategy = measured._replace(choice="augmented")
    monkeypatch.setitem(tiling.MEASURED, ("forward", "half"), (strategy,))
    near, far = ((8192, 1152, 1536, 16), (2048, 4608, 768, 4)), ((256, 2304, 768, 8), (4096, 6144, 768, 8))
    for size in near:
        assert tiling.choose_tiles("linear", *size, torch.bfloat16, CPU) == odd
        assert tiling.choose_strategy("forward", *size, torch.bfloat16, CPU) == "augmented"
    for size in far:
        assert tiling.choose_tiles("linear", *size, torch.bfloat16, CPU) != odd
        assert tiling.choose_strategy("forward", *size, torch.bfloat16, CPU) != "augmented"


@pytest.mark.parametrize("device", SUPPORTED, indirect=True)
def test_a_tile_and_a_strategy_of_one_name_are_told_apart(device, monkeypatch):
    """And one kernel for two, which was measured on another device, is left to devices like it."""
    odd, size = TileConfig(64, 64, 32, 4, 2), (8192, 2304, 768, 16)
    for choices in ((odd, "fused"), ("fused", odd)):
        rows = tuple(Measurement(*size, choice, 0.1, "H200") for choice in choices)
        monkeypatch.setitem(tiling.MEASURED, ("shrink_linear", "half"), rows)
        assert tiling.choose_tiles("shrink_linear", *size, torch.bfloat16, CPU) == odd
        found = tiling.choose_strategy("shrink_linear", *size, torch.bfloat16, CPU)
        assert found == ("fused" if device.capability == (9, 0) else "separate")


def test_of_two_near_measurements_the_nearer_decides(monkeypatch):
    first, second = TileConfig(64, 64, 32, 4, 2), TileConfig(128, 64, 32, 4, 2)
    rows = [Measurement(M, 768, 768, 8, tile, 0.1, "H200") for M, tile in ((4096, first), (8192, second))]
    monkeypatch.setitem(tiling.MEASURED, ("linear", "half"), tuple(rows))
    assert tiling.choose_tiles("linear", 5000, 768, 768, 8, torch.bfloat16, CPU) == first
    assert tiling.choose_tiles("linear", 7000, 768, 768, 8, torch.bfloat16, CPU) == second


@pytest.mark.parametrize("device", SUPPORTED, indirect=True)
def test_one_pass_over_dy_is_for_much_of_it_in_half_precision_on_sm_90(device):
    def strategy(M: int, dtype: torch.dtype) -> str:
        return tiling.choose_strategy("expand_backward", M, 2304, 0, 32, dtype, CPU)

    assert strategy(25216, torch.bfloat16) == ("fused" if device.capability == (9, 0) else "separate")
    assert strategy(4096, torch.bfloat16) == strategy(25216, torch.float32) == "separate"


@pytest.mark.parametrize("device", SUPPORTED, indirect=True)
def test_h_is_summed_beside_y_where_the_matmul_is_small_on_sm_90(device):
    def strategy(M: int, N: int, K: int, R: int, dtype: torch.dtype = torch.bfloat16) -> str:
        return tiling.choose_strategy("shrink_linear", M, N, K, R, dtype, CPU)

    assert strategy(2048, 2304, 768, 16) == ("fused" if device.capability == (9, 0) else "separate")
    others = [(4096, 2304, 768, 16), (25216, 2304, 768, 16), (512, 768, 4096, 16), (2048, 2304, 768, 17)]
    assert {strategy(*size) for size in others} | {strategy(2048, 2304, 768, 16, torch.float32)} == {"separate"}


@pytest.mark.parametrize("device", SUPPORTED, indirect=True)
def test_factors_are_appended_where_outputs_are_much_wider_on_sm_90(device):
    def strategy(direction: str, M: int, N: int, K: int, dtype: torch.dtype = torch.bfloat16) -> str:
        return tiling.choose_strategy(direction, M, N, K, 16, dtype, CPU)

    wanted = "augmented" if device.capability == (9, 0) else "library"
    assert strategy("forward", 8192, 28672, 4096) == strategy("backward", 8192, 4096, 14336) == wanted
    others = [("forward", 512, 28672, 4096), ("forward", 8192, 6144, 4096), ("backward", 8192, 28672, 4096)]
    found = {strategy(*size) for size in others} | {strategy("forward", 8192, 28672, 4096, torch.float32)}
    assert found == {"library"}


@pytest.mark.parametrize("device", SUPPORTED, indirect=True)
def test_dx_of_several_weights_is_one_kernel_on_sm_90(device):
    """Which the library would write once for each of them."""

    def strategy(M: int, N: int, weights: int) -> str:
        return tiling.choose_strategy("backward", M, N, 768, 24, torch.bfloat16, CPU, weights)

    assert strategy(32768, 2304, 3) == ("fused" if device.capability == (9, 0) else "library")
    assert strategy(32768, 2304, 1) == strategy(32768, 6144, 2) == "library"
    tile = tiling.choose_tiles("linear_backward", 32768, 2304, 768, 24, torch.bfloat16, CPU)
    assert tile.tma == (device.capability == (9, 0))


@pytest.mark.parametrize("M", [1, 255, 257, 4096, 8192, 25216, 100000])
@pytest.mark.parametrize("widths", [(768,) * 3, (4096, 1024, 1024), (5, 9), (14336, 14336)])
def test_parts_of_dy_are_whole_steps_within_a_tile(M, widths):
    tile = TileConfig(256, 0, 64, 8, 2)
    rows, span = tiling.choose_parts(M, widths, tile)
    assert 0 < rows <= min(tile.rows, M) and span % tile.depth == 0 and span < min(widths) + tile.depth
    programs, slots = -(-M // rows) * sum(-(-width // span) for width in widths), 2 * tiling.PROGRAMS
    # The last of several waves leaves at most the programs of one part, and of rounding, idle.
    assert programs <= slots or -programs % slots < slots // 8


@pytest.mark.parametrize("N, K, runs", [(2304, 768, 1), (768, 768, 1), (4096, 4096, 1), (768, 768, 128)])
def test_sums_of_squares_fill_half_of_the_chip_where_their_matrix_can(N, K, runs):
    def programs(tile: TileConfig) -> int:
        return runs * -(-N // tile.rows) * -(-K // tile.columns)

    tile = tiling.choose_filling("gradstat", programs, N, K, torch.bfloat16, CPU)
    assert 2 * programs(tile) >= 132
    larger = [
        e.tile for e in tiling._TABLE["gradstat", "half"] if e.tile.rows * e.tile.columns > tile.rows * tile.columns
    ]
    assert all(2 * programs(other) < 132 for other in larger)


@pytest.mark.parametrize(("operation", "rows"), [("gradstat", 128), ("gradstat_diagonal", 64), ("covariance", 64)])
def test_unaligned_rows_leave_out_the_largest_tile(operation, rows, monkeypatch):
    """Compiled for them it keeps 96 to 368 bytes on the stack."""
    found, N = [], 4096
    monkeypatch.setattr(gradstat, "launch", lambda *given, TILE, OPTIONS: found.append(TILE))
    monkeypatch.setattr(gradstat, "reduce_pairs", lambda *given: None)
    offsets = torch.empty(2, dtype=torch.int64, device="meta")
    for K in (1024, 1023):
        x, dy = (torch.empty(8192, n, dtype=torch.bfloat16, device="meta") for n in (K, N))
        if operation == "covariance":
            gradstat.covariance(torch.empty(8192, 4 * K, dtype=torch.bfloat16, device="meta")[:, : 4 * 1023])
        else:
            diagonal = torch.empty(N, K, device="meta") if operation == "gradstat_diagonal" else None
            gradstat.gradstat(x, [dy], offsets, diagonal=diagonal)
    largest = next(entry.tile for entry in tiling._TABLE[operation, "half"])
    assert found[0] == largest != found[1] and found[1].rows == rows


def test_a_persistent_grid_has_a_program_for_every_place(monkeypatch):
    grids = []
    monkeypatch.setattr(linear, "launch", lambda kernel, grid, *rest, **options: grids.append(grid))
    x, W = (torch.empty(n, 64, dtype=torch.bfloat16, device="meta") for n in (65536, 4096))
    h, B = x[:, :8].contiguous(), torch.empty(4096, 8, device="meta")
    tile = TileConfig(128, 256, 64, 8, 4, tma=True)
    for own, programs in ((Limits(), 132), (Limits(multiprocessors=114), 114), (Limits(shared=400 << 10), 264)):
        monkeypatch.setattr(linear, "limits", lambda device, own=own: own)
        linear.linear(x, [W], [None], h, [B], [(0, 0)], [0], [1.0], strategy="fused", tiles=tile)
        assert grids.pop() == (programs,)


@pytest.mark.parametrize("rows", [512, 4096, 16384])
@pytest.mark.parametrize("moments", [False, True])
def test_rows_that_are_not_aligned_go_to_the_library(rows, moments, monkeypatch):
    """At every size: the tiles by pointers spill for them, too."""
    seen = []
    monkeypatch.setattr(linear, "launch", lambda kernel, grid, *rest, **options: seen.append(rest[1]))
    monkeypatch.setattr(linear, "reduce_moments", lambda *given: None)
    h, B = torch.empty(rows, 8, dtype=torch.bfloat16, device="meta"), torch.empty(768, 8, device="meta")
    for K, fused in ((768, True), (769, False), (772, False)):
        x, W = (torch.empty(n, K, dtype=torch.bfloat16, device="meta") for n in (rows, 768))
        linear.linear(x, [W], [None], h, [B], [(0, 0)], [0], [1.0], moments)
        # The kernel that multiplies takes x.
        assert (seen.pop() is not None) == fused


def test_dy_that_is_not_aligned_goes_to_the_library_and_to_two_kernels(monkeypatch):
    """In the backward its addresses spill, too."""
    seen = []
    for module in (linear_backward, expand_backward):
        monkeypatch.setattr(module, "launch", lambda kernel, *rest, **options: seen.append((kernel.fn.__name__, rest)))
        monkeypatch.setattr(module, "choose_strategy", lambda *size: "fused")
    monkeypatch.setattr(expand_backward, "reduce_partials", lambda *given: None)
    monkeypatch.setattr(expand_backward, "shrink_backward", lambda *given, **named: seen.append(("separate", ())))
    monkeypatch.setattr(expand_backward, "wgrad", lambda *given, **named: ())
    for N, rows, fused in ((768, 4096, True), (769, 4096, False), (768, 16384, True), (769, 16384, False)):
        dy, dh = (torch.empty(rows, n, dtype=torch.bfloat16, device="meta") for n in (N, 8))
        W, A = torch.empty(N, 512, dtype=torch.bfloat16, device="meta"), torch.empty(8, 512, device="meta")
        linear_backward.linear_backward([dy], [W], dh, [A], [0])
        assert (seen.pop()[1][4] is not None) == fused  # the kernel that multiplies takes dy and W
        expand_backward.expand_backward(None, [dy], dh, [torch.empty(N, 8, device="meta")], [0], [1.0], 8, 0)
        assert seen.pop()[0] == ("expand_backward_kernel" if fused else "separate")


CHILD = """
import sys
from fastlora.kernels import compile_report
capability = tuple(map(int, sys.argv[1].split(".")))
operations = "linear", "gradstat", "shrink"
rows = compile_report.compile_all(ranks=(8,), operations=operations, capability=capability)
assert {row.operation for row in rows} >= set(operations)
print(*[fault for row in rows for fault in row.faults(compile_report.device_of(capability))])
"""


@pytest.mark.parametrize("capability", ["8.0", "8.9", "12.0"])
def test_tiles_of_other_capabilities_compile_and_fit(capability, tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", CHILD, capability]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stdout.strip(), done.stderr[-4000:] + done.stdout
