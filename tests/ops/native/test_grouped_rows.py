"""Many adapters in one batch: what a row's result may depend on, repeatability, and the work that is done."""

from __future__ import annotations

import os

import pytest
import torch
from support.counted_help import multiply_adds, needs_counting
from support.native_grouped_help import DTYPES, draw_ids, make, segments

pytestmark = pytest.mark.skipif(
    os.environ.get("FASTLORA_BUILD") == "0", reason="FASTLORA_BUILD=0: the native library is left out on purpose"
)


@pytest.fixture(autouse=True)
def _seed_and_threads():
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def run(batch, probes=None):
    """h, y, moments, dx and the gradients, from copies of y and dx."""
    y, dx = [t.clone() for t in batch.y], batch.dx.clone()
    batch.y, kept_y = y, batch.y
    batch.dx, kept_dx = dx, batch.dx
    h, moments = batch.forward()
    gradients = batch.backward(h, probes=probes)
    batch.y, batch.dx = kept_y, kept_dx
    return h, y, moments, dx, gradients


def select(batch, rows: torch.Tensor):
    """The same adapters on some rows of the batch, in another order."""
    ids = batch.ids[rows]
    order, ranges = segments(ids, batch.adapters)
    taken = {
        "x": batch.x[rows],
        "dx": batch.dx[rows],
        "y": [t[rows] for t in batch.y],
        "dy": [t[rows] for t in batch.dy],
    }
    changed = {"ids": ids, "order": order, "ranges": ranges, **taken}
    return type(batch)(**{**vars(batch), **changed})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fused", [True, False])
def test_a_row_is_the_same_alone_and_in_any_company(dtype, fused):
    """h, y and dx of a row, bit for bit, whatever the other rows are and wherever it stands among them."""
    ids = torch.cat([draw_ids("zipf", 120, 7), torch.full((40,), 2)])
    batch = make(ids, 7, 1100, [75, 40, 33], [5, 2, 9, 0, 16], dtype, torch.float32, fused, probes=(0, 3))
    whole = run(batch)
    subsets = [(ids == g).nonzero()[:, 0] for g in range(7)] + [torch.randperm(160)[:n] for n in (1, 2, 5, 31, 160)]
    for threads in (1, 3):
        torch.set_num_threads(threads)
        for rows in subsets:
            part = run(select(batch, rows))
            assert torch.equal(part[0], whole[0][rows])
            assert torch.equal(part[3], whole[3][rows])
            assert all(torch.equal(a, b[rows]) for a, b in zip(part[1], whole[1], strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("distribution", ["identical", "skewed", "zipf", "distinct"])
def test_threads_and_repeatability(distribution, dtype):
    adapters = 128 if distribution == "distinct" else 9
    batch = make(
        draw_ids(distribution, 500, adapters), adapters, 130, [90] * 3, [11, 2, 20], dtype, torch.float32, True
    )

    def flat():
        h, y, moments, dx, gradients = run(batch)
        return [h, *y, *moments, dx, *gradients[0], *gradients[1]]

    results = {}
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results[threads] = flat()
        assert all(map(torch.equal, flat(), results[threads])), f"{threads} threads do not repeat"
    for threads in (2, 3):
        for one, other in zip(results[1], results[threads], strict=True):
            allowed = 64 * torch.finfo(torch.float32).eps * max(one.abs().max(), 1.0)
            assert (one - other).abs().max() <= allowed
        assert torch.equal(results[1][0], results[threads][0])


def forward_work(batch) -> int:
    """Sum over adapters of own rows times own ranks."""
    total = 0
    for g in range(batch.adapters):
        rows, (A, B, _) = int((batch.ids == g).sum()), batch.factors(g)
        shrink = (sum(len(a) for a in A) + batch.probes[g]) * batch.x.shape[1]
        total += rows * (shrink + sum(b.numel() for b in B))
    return total


def backward_work(batch) -> int:
    total = 0
    for g in range(batch.adapters):
        rows, (A, B, _) = int((batch.ids == g).sum()), batch.factors(g)
        for a, b in zip(A, B, strict=True):
            total += rows * (2 * b.numel() + batch.probes[g] * len(b) + 2 * a.numel())
    return total


def work(batch) -> tuple[int, int]:
    h = batch.forward()[0]
    return batch.forward(op=multiply_adds("forward")), batch.backward(h, op=multiply_adds("backward"))


@needs_counting
@pytest.mark.parametrize("distribution", ["uniform", "zipf", "skewed", "identical", "distinct", "base"])
def test_work_is_own_rows_times_own_ranks(distribution):
    """Counted in the calls of the kernels, with one thread and several."""
    ids = draw_ids(distribution, 400, 12)
    batch = make(ids, 12, 65, [33, 20], [1, 3, 64, 2, 17], torch.float32, fused=True, probes=(0, 4))
    for threads in (1, 3):
        torch.set_num_threads(threads)
        assert work(batch) == (forward_work(batch), backward_work(batch))


@needs_counting
def test_work_grows_with_the_rank_of_the_rows_own_adapter_only():
    ids = torch.tensor([0] * 90 + [1] * 10)
    found = {rank: work(make(ids, 2, 32, [16], [4, rank])) for rank in (4, 8, 128)}
    for rank in (8, 128):
        more = 10 * (rank - 4) * (32 + 16)
        assert found[rank] == (found[4][0] + more, found[4][1] + 2 * more)
