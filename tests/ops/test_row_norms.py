"""Lengths of the rows of W + s B A, and DoRA's rescaling by them."""

import pytest
import torch
from support.native_help import DTYPES, make, needs_library
from torch.utils.flop_counter import FlopCounterMode

from fastlora.ops import reference
from fastlora.ops.row_norms import RowLengths, row_norms

SIZES = [(1, 1, 1), (7, 5, 3), (33, 130, 8), (200, 64, 17), (5, 8, 0), (0, 8, 2), (4, 0, 2)]


def operands(N, K, r, dtype, factors=torch.float32):
    return make(N, K, dtype), make(r, K, factors), make(N, r, factors)


def expected(W, A, B, s):
    return reference.row_norms(W.double(), A.double(), B.double(), s)


@pytest.mark.parametrize("sizes", SIZES)
def test_the_formula_in_float64(sizes):
    W, A, B = operands(*sizes, torch.float64, torch.float64)
    torch.testing.assert_close(row_norms(W, A, B, 1.5), expected(W, A, B, 1.5), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(row_norms(W.t().contiguous().t(), A, B, 1.5), expected(W, A, B, 1.5))


@pytest.mark.parametrize("factors", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", SIZES)
def test_against_float64(sizes, dtype, factors):
    """The values as they are stored, summed in fp32: no rounding of A to the dtype of W."""
    W, A, B = operands(*sizes, dtype, factors)
    found = row_norms(W, A, B, 1.5)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected(W, A, B, 1.5), rtol=1e-5, atol=1e-6)


@needs_library
class TestNative:
    def test_is_the_one_that_runs(self, monkeypatch):
        calls = []
        monkeypatch.setattr(torch.ops.fastlora, "row_norms", Spy(torch.ops.fastlora.row_norms, calls))
        W, A, B = operands(6, 5, 2, torch.float32)
        row_norms(W, A, B, 1.0)
        row_norms(W.t().contiguous().t(), A, B, 1.0)  # a Conv1D's, which it would have to copy
        row_norms(W.double(), A.double(), B.double(), 1.0)
        assert calls == [(6, 5)]

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_threads_and_repeatability(self, dtype):
        W, A, B = operands(3000, 130, 33, dtype)
        found = {}
        try:
            for threads in (1, 3):
                torch.set_num_threads(threads)
                found[threads] = torch.ops.fastlora.row_norms(W, A, B, 0.5)
                assert torch.equal(torch.ops.fastlora.row_norms(W, A, B, 0.5), found[threads])
        finally:
            torch.set_num_threads(1)
        torch.testing.assert_close(found[3], found[1], rtol=1e-6, atol=0.0)

    def test_strides(self):
        W, A, B = make(20, 30, torch.float32)[::2, :15], make(15, 4, torch.float32).t(), make(4, 10, torch.float32).t()
        torch.testing.assert_close(torch.ops.fastlora.row_norms(W, A, B, 2.0).double(), expected(W, A, B, 2.0))

    def test_what_is_not_finite_stays(self):
        W, A, B = operands(3, 4, 2, torch.float32)
        W[1, 2], W[2, 0] = float("nan"), float("inf")
        found = torch.ops.fastlora.row_norms(W, A, B, 1.0)
        assert found[0].isfinite() and not found[1:].isfinite().any()

    @pytest.mark.parametrize(
        "change, message",
        [
            (dict(W=torch.ones(4)), "W has 1 dimensions"),
            (dict(W=torch.ones(4, 6).double()), "W has dtype Double"),
            (dict(A=torch.ones(2, 5)), "A has 5 columns, but W has 6"),
            (dict(B=torch.ones(4, 3)), "B has 3 columns, but A has 2 rows"),
            (dict(B=torch.ones(5, 2)), "B has 5 rows, but W has 4"),
        ],
    )
    def test_errors_name_the_argument(self, change, message):
        given = {"W": torch.ones(4, 6), "A": torch.ones(2, 6), "B": torch.ones(4, 2), **change}
        with pytest.raises(RuntimeError, match=message):
            torch.ops.fastlora.row_norms(*given.values(), 1.0)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_schema_and_fake_tensors(self, dtype):
        torch.library.opcheck(torch.ops.fastlora.row_norms.default, (*operands(6, 5, 2, dtype), 1.5))


def test_transforms_and_modes_see_torch_operators():
    (W, A, B), many = operands(6, 5, 2, torch.float32), torch.randn(3, 6, 5)
    wanted = torch.stack([row_norms(w, A, B, 1.5) for w in many])
    torch.testing.assert_close(torch.vmap(lambda w: row_norms(w, A, B, 1.5))(many), wanted)
    with FlopCounterMode(display=False) as counter:
        row_norms(W, A, B, 1.5)
    assert counter.get_total_flops() == 2 * 2 * (6 * 5 + 6 * 2 + 2 * 5)  # A w, (A A^T) b and A A^T


class Spy:
    def __init__(self, packet, calls):
        self.packet, self.calls = packet, calls

    def default(self, W, *rest):
        self.calls.append(tuple(W.shape))
        return self.packet.default(W, *rest)


class TestRowLengths:
    def lengths(self, dtype=torch.float64):
        """q and v of two heads together, of other ranks."""
        generator = torch.Generator().manual_seed(3)

        def draw(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

        q, v = [slice(0, 3), slice(5, 8)], [slice(3, 5), slice(8, 10)]
        parts = [(q, draw(2, 4), draw(6, 2), 1.5), (v, draw(3, 4), draw(4, 3), 0.5)]
        return RowLengths(draw(10, 4), parts, draw(10), draw(10)), draw(5, 10)

    def whole(self, lengths):
        W = lengths.W.clone()
        for runs, A, B, s in lengths.parts:
            for rows, own in zip(runs, B.chunk(2), strict=True):
                W[rows] += s * own @ A
        return W

    def test_rows_have_the_length_of_m(self):
        lengths, u = self.lengths()
        W = self.whole(lengths)
        torch.testing.assert_close(lengths.norms(), W.norm(dim=1))
        torch.testing.assert_close(lengths(u), u * lengths.magnitude / W.norm(dim=1) + lengths.bias)

    def test_gradients(self):
        """Of u and of m, twice differentiable; none of the factors, since the norms are constants."""
        lengths, u = self.lengths()
        for _, A, B, _ in lengths.parts:
            A.requires_grad_(), B.requires_grad_()

        def run(u, m, bias):
            return lengths._replace(magnitude=m, bias=bias)(u)

        given = [t.clone().requires_grad_() for t in (u, lengths.magnitude, lengths.bias)]
        assert torch.autograd.gradcheck(run, given) and torch.autograd.gradgradcheck(run, given)
        run(*given).sum().backward()
        assert all(A.grad is None and B.grad is None for _, A, B, _ in lengths.parts)

    def test_a_row_of_zeros_stays(self):
        lengths, u = self.lengths()
        for _, _, B, _ in lengths.parts:
            B.zero_()
        lengths.W[4] = 0.0
        u[:, 4] = 0.0
        lengths.magnitude.requires_grad_()
        y = lengths(u)
        y.sum().backward()
        torch.testing.assert_close(y[:, 4], lengths.bias[4].expand(5))
        assert lengths.magnitude.grad.isfinite().all()
