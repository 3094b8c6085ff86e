"""The operator against the float64 formula, and what torch asks of it: opcheck, gradcheck, compile, autocast."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support.op_help import BACKENDS, assert_close_as, make, oracle, run
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from fastlora.ops import native, reference
from fastlora.ops.lora import lora_linear

CASES = {
    "group": {},
    "one": {"N": (7,), "r": (3,)},
    "rank 1": {"N": (7,), "r": (1,)},
    "rank 0": {"N": (7,), "r": (0,)},
    "fused": {"fused": True},
    "fused uneven": {"fused": True, "N": (16, 4, 4), "r": (1, 2, 9)},
    "wide": {"M": 65, "K": 130, "N": (64, 33, 17), "r": (8, 16, 17)},
    "one row": {"M": 1},
    "no rows": {"M": 0},
    "odd": {"M": 3, "K": 5, "N": (1, 3), "r": (1, 1)},
    "interleaved": {"fused": True, "blocks": [3]},
    "interleaved uneven": {"fused": True, "N": (10, 5, 25), "r": (4, 17, 1), "blocks": [5]},
    "interleaved wide": {"M": 65, "K": 130, "fused": True, "N": (128, 66), "r": (8, 20), "blocks": [2]},
    "interleaved in part": {"N": (12, 6, 6), "blocks": [1, 1, 3]},
    "interleaved, no rows": {"M": 0, "fused": True, "blocks": [6]},
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_forward_and_gradients(name, dtype, backend, p):
    case = make(dtype=dtype, k=3, **CASES[name])
    y, grads = run(case, backend, p)
    want_y, want = oracle(case, p=p)
    low_y, low = run(case, function=reference.lora_linear, p=p)
    assert_close_as(y, want_y, low_y)
    assert_close_as(grads, want, low)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("picks", [False, True], ids=["probe rows", "columns of x"])
def test_masks_of_the_streams_that_are_named(dtype, backend, picks):
    case, streams = make(dtype=dtype, k=3, picks=picks), [4, 0, 9]
    y, grads = run(case, backend, 0.3, streams=streams)
    want_y, want = oracle(case, p=0.3, streams=streams)
    low_y, low = run(case, function=reference.lora_linear, p=0.3, streams=streams)
    assert_close_as(y, want_y, low_y)
    assert_close_as(grads, want, low)
    assert not torch.allclose(y[0].double(), oracle(case, p=0.3)[0][0], atol=0.1)


@pytest.mark.parametrize("p", [0.0, 0.4])
def test_interleaved_projections_are_those_of_a_sorted_weight(p):
    """Rows counted one by one: with W, bias and dy sorted into projections it is the contiguous operator."""
    N, heads = (12, 6, 9), 3
    case = make(dtype=torch.float64, k=2, N=N, r=(3, 2, 1), fused=True, blocks=[heads])
    order, block = [], sum(N) // heads
    for i, n in enumerate(N):
        order += [h * block + sum(N[:i]) // heads + j for h in range(heads) for j in range(n // heads)]
    rows = {name: [case[name][0][order]] for name in ("W", "bias")}
    (y,), grads = run(case, function=reference.lora_linear, p=p)
    (want,), want_grads = run(
        {**case, **rows, "dy": [case["dy"][0][:, order]], "blocks": ()}, function=reference.lora_linear, p=p
    )
    torch.testing.assert_close(y[:, order], want, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(grads, want_grads, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(y, want)


@pytest.mark.parametrize("blocks", [[], [3]], ids=["together", "interleaved"])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_float64_is_exact(p, blocks):
    case = make(dtype=torch.float64, k=2, fused=True, blocks=blocks)
    y, grads = run(case, p=p)
    want_y, want = oracle(case, p=p)
    for a, e in zip([*y, *grads], [*want_y, *want], strict=True):
        torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_float16(backend, p):
    case = make(dtype=torch.float16, k=2)
    y, grads = run(case, backend, p)
    want = sum(oracle(case, p=p), [])
    assert_close_as([*y, *grads], want, sum(run(case, function=reference.lora_linear, p=p), []))


def test_float64_goes_through_the_reference():
    case = make(dtype=torch.float64)
    with pytest.raises(RuntimeError, match="'native' was asked for and cannot run: .*"):
        run(case, "native")
    assert run(case, "auto")[0][0].dtype == torch.float64


@pytest.mark.parametrize("backend", BACKENDS)
def test_probe_leaf_collects_projected_weight_gradient(backend):
    case = make(k=4)
    _, grads = run(case, backend)
    Q = grads[1 + 3 + 3 :]
    for q, dy in zip(Q, case["dy"], strict=True):
        G = dy.double().T @ case["x"].double()
        torch.testing.assert_close(q.double(), G @ case["P"].double().T, rtol=1e-5, atol=1e-5)


def test_probes_do_not_change_outputs_or_gradients():
    case = make(k=4)
    with_probes, without = run(case), run(case, probes=False)
    assert all(torch.equal(a, b) for a, b in zip(with_probes[0], without[0], strict=True))
    for a, b in zip(with_probes[1], without[1], strict=False):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_probes_see_the_undropped_input():
    case = make(k=4, M=200)
    _, grads = run(case, p=0.5)
    G = case["dy"][0].double().T @ case["x"].double()
    torch.testing.assert_close(grads[7].double(), G @ case["P"].double().T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("fused", [True, False])
def test_moment_leaf_collects_column_sums(backend, fused):
    case = make(M=41, fused=fused)
    case["bias"] = [None if b is None else b + 300.0 for b in case["bias"]]  # mean far from zero: E y² - (E y)² cancels
    y, grads = run(case, backend, moments=True)
    for out, sums in zip(y, grads[7:], strict=True):
        assert float(sums[0, -1]) == 41
        mean, square = sums[:, :-1] / 41
        expected = out.double().var(dim=0, unbiased=False)
        torch.testing.assert_close(square - mean.square(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_sample_signs_give_per_sample_projections(backend):
    case = make(M=12, k=3, S=4)
    _, grads = run(case, backend)
    x, sign = case["x"].double().view(4, 3, -1), case["sign"].double()
    for q, dy in zip(grads[7:], case["dy"], strict=True):
        per_sample = torch.einsum("stn,stk->snk", dy.double().view(4, 3, -1), x)
        expected = torch.einsum("snk,pk,sp->np", per_sample, case["P"].double(), sign)
        torch.testing.assert_close(q.double(), expected, rtol=1e-5, atol=1e-5)


def test_gradient_of_one_output_only():
    case = make(k=2)
    x, A, B = (
        case["x"].requires_grad_(),
        [a.requires_grad_() for a in case["A"]],
        [b.requires_grad_() for b in case["B"]],
    )
    y = lora_linear(x, case["W"], case["bias"], A, B, case["scale"])
    dx, da0, da2, db2 = torch.autograd.grad(y[2], [x, A[0], A[2], B[2]], case["dy"][2], allow_unused=True)
    want = run(case, function=reference.lora_linear, dtype=torch.float64, probes=False)
    only = [torch.zeros_like(case["dy"][0]), torch.zeros_like(case["dy"][1]), case["dy"][2]]
    _, want = oracle({**case, "dy": only}, probes=False)
    for got, expected in ((dx, want[0]), (da0, want[1]), (da2, want[3]), (db2, want[6])):
        torch.testing.assert_close(
            torch.zeros_like(expected) if got is None else got.double(), expected, rtol=1e-5, atol=1e-5
        )


def test_trainable_weight_and_bias_get_their_gradient():
    case = make(fused=True)
    W, bias = case["W"][0].requires_grad_(), case["bias"][0].requires_grad_()
    y = lora_linear(case["x"], [W], [bias], case["A"], case["B"], case["scale"])[0]
    dW, db = torch.autograd.grad(y, [W, bias], case["dy"][0])
    torch.testing.assert_close(dW, case["dy"][0].T @ case["x"])
    torch.testing.assert_close(db, case["dy"][0].sum(0))


def test_saved_for_backward_is_x_and_h_only():
    case = make(k=4)
    x = case["x"].requires_grad_()
    parameters = {
        t.data_ptr() for t in (*case["W"], *[b for b in case["bias"] if b is not None], *case["A"], *case["B"])
    }
    B = [b.requires_grad_() for b in case["B"]]
    sizes = []

    def pack(tensor):
        if tensor.numel() and tensor.data_ptr() not in parameters:
            sizes.append(tuple(tensor.shape))
        return tensor

    Z = [torch.zeros(b.shape[0], 4, requires_grad=True) for b in B]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        lora_linear(x, case["W"], case["bias"], case["A"], B, case["scale"], Z=Z, P=case["P"])
    assert sizes == [(13, 20), (13, 3 + 0 + 5 + 4)]


def test_dropout_mask_is_a_function_of_seed_projection_row_and_column():
    x, seed = torch.ones(9, 11, dtype=torch.float64), torch.tensor(2**61 + 12345)
    whole = reference.dropout(x, seed, 1, 0.25)
    assert set(whole.unique().tolist()) == {0.0, 1 / 0.75}
    assert torch.equal(reference.dropout(x[:4], seed, 1, 0.25), whole[:4])
    assert torch.equal(reference.dropout(x[:, :6], seed, 1, 0.25), whole[:, :6])
    assert not torch.equal(reference.dropout(x, seed, 0, 0.25), whole)
    kept = (reference.dropout(torch.ones(400, 250), seed, 0, 0.25) != 0).double().mean()
    assert abs(float(kept) - 0.75) < 5 * (0.75 * 0.25 / 100_000) ** 0.5


def test_philox_known_answers():
    """The vectors of Random123's kat_vectors for philox4x32, 10 rounds."""
    ff, zero = 0xFFFFFFFF, 0
    vectors = [
        ((zero,) * 4, 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ff,) * 4, -1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            0x299F31D0_A4093822,
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ]
    for counter, seed, expected in vectors:
        words = reference.philox(torch.tensor(seed), *(torch.tensor(c) for c in counter))
        assert tuple(int(w) for w in words) == expected


def test_unknown_backend_and_bad_input_are_named():
    case = make()
    args = (case["W"], case["bias"], case["A"], case["B"], case["scale"])
    with pytest.raises(ValueError, match="backend: expected one of .*, got 'cuda-magic'"):
        lora_linear(case["x"], *args, backend="cuda-magic")
    with pytest.raises(ValueError, match="x: expected last dimension 20"):
        lora_linear(case["x"][:, :19], *args)
    with pytest.raises(ValueError, match="x: has dtype torch.float64"):
        lora_linear(case["x"].double(), *args)
    with pytest.raises(ValueError, match="x: is on meta"):
        lora_linear(case["x"].to("meta"), *args)


class Counter(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls: dict[str, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func).removesuffix(".default")
        self.calls[name] = self.calls.get(name, 0) + 1
        return func(*args, **(kwargs or {}))


def test_one_operator_forward_and_one_backward():
    case = make(k=2)
    x, A, B = (
        case["x"].requires_grad_(),
        [a.requires_grad_() for a in case["A"]],
        [b.requires_grad_() for b in case["B"]],
    )
    with Counter() as forward:
        y = lora_linear(x, case["W"], case["bias"], A, B, case["scale"])
    with Counter() as backward:
        torch.autograd.grad(y, [x, *A, *B], case["dy"])
    assert forward.calls == {"fastlora.lora_linear": 1}
    assert backward.calls == {"fastlora.lora_linear_backward": 1}


@pytest.mark.skipif(not native.available(), reason="counts calls of the native kernels")
def test_native_kernels_run_once_per_group():
    case = make()
    x, A, B = (
        case["x"].requires_grad_(),
        [a.requires_grad_() for a in case["A"]],
        [b.requires_grad_() for b in case["B"]],
    )
    with torch.profiler.profile() as profile:
        y = lora_linear(x, case["W"], case["bias"], A, B, case["scale"], backend="native")
        torch.autograd.grad(y, [x, *A, *B], case["dy"])
    counts = {e.key: e.count for e in profile.key_averages()}
    assert {k: v for k, v in counts.items() if k.startswith("fastlora::") and k.endswith("_")} == {
        "fastlora::lora_forward_": 1,
        "fastlora::lora_backward_": 1,
    }
    assert not {"aten::cat", "aten::clone", "aten::narrow", "aten::contiguous"} & set(counts)
    assert counts.get("aten::linear") == 3


@pytest.mark.parametrize("p, picks, blocks", [
    (0.0, False, []), (0.0, True, []), (0.4, False, []), (0.4, True, []), (0.4, False, [1, 3, 2]),
])  # fmt: skip
def test_opcheck(p, picks, blocks):
    case = make(k=2, S=13, picks=picks, blocks=blocks)
    seed = torch.tensor(7) if p else None
    x, A, B = (
        case["x"].requires_grad_(),
        [a.requires_grad_() for a in case["A"]],
        [b.requires_grad_() for b in case["B"]],
    )
    Z = [torch.zeros(b.shape[0], 2, requires_grad=True) for b in B]
    V = [torch.zeros(2, w.shape[0] + 1, dtype=torch.float64, requires_grad=True) for w in case["W"]]
    probes = ([case["P"]], [case["sign"]])
    args = (x, case["W"], case["bias"], A, B, Z, V, *probes, seed, [], [], case["scale"], [p], [], case["blocks"])
    torch.library.opcheck(torch.ops.fastlora.lora_linear.default, (*args, "auto", "auto"))
    h = torch.randn(13, 8 + (6 if picks else 2))
    back = (case["dy"], case["x"].detach(), h, case["W"], [a.detach() for a in A], [b.detach() for b in B], [2])
    torch.library.opcheck(
        torch.ops.fastlora.lora_linear_backward.default,
        (*back, seed, [], [], case["scale"], [p], [], case["blocks"], [True] * 6, "auto", "auto"),
    )


@pytest.mark.parametrize("blocks", [(), [2]], ids=["together", "interleaved"])
def test_gradcheck_and_gradgradcheck(blocks):
    case = make(M=4, K=5, N=(4, 2), r=(2, 1), dtype=torch.float64, k=2, fused=bool(blocks))
    inputs = [case["x"], *case["A"], *case["B"]]
    for t in inputs:
        t.requires_grad_()

    def function(x, a0, a1, b0, b1):
        return tuple(lora_linear(x, case["W"], case["bias"], [a0, a1], [b0, b1], case["scale"], blocks=blocks))

    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


def test_create_graph_reaches_the_probe_leaf():
    case = make(k=3, dtype=torch.float64)
    x = case["x"].requires_grad_()
    Z = [torch.zeros(b.shape[0], 3, dtype=torch.float64, requires_grad=True) for b in case["B"]]
    y = lora_linear(x, case["W"], case["bias"], case["A"], case["B"], case["scale"], Z=Z, P=case["P"])
    plain = torch.autograd.grad(y, Z, case["dy"], retain_graph=True)
    again = torch.autograd.grad(y, Z, case["dy"], create_graph=True)
    for a, b in zip(plain, again, strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(
        torch.autograd.grad(again[0].sum(), x)[0], case["dy"][0].sum(1, keepdim=True) * case["P"].double().sum(0)
    )


def test_two_backwards_of_one_graph_add_up():
    case = make(k=3)
    Z = [torch.zeros(b.shape[0], 3, requires_grad=True) for b in case["B"]]
    y = lora_linear(case["x"], case["W"], case["bias"], case["A"], case["B"], case["scale"], Z=Z, P=case["P"])
    torch.autograd.backward(y, case["dy"], retain_graph=True)
    once = Z[0].grad.clone()
    torch.autograd.backward(y, case["dy"])
    torch.testing.assert_close(Z[0].grad, 2 * once)


def test_forward_mode():
    case = make()

    def run(x):
        return lora_linear(x, case["W"], case["bias"], case["A"], case["B"], case["scale"])

    x, direction = case["x"].detach(), torch.randn_like(case["x"])
    with torch.autograd.forward_ad.dual_level():
        found = [
            torch.autograd.forward_ad.unpack_dual(y) for y in run(torch.autograd.forward_ad.make_dual(x, direction))
        ]
        for dual, after, before in zip(found, run(x + direction), run(x), strict=True):
            torch.testing.assert_close(dual.tangent, after - before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_fullgraph(dynamic):
    case = make(k=2)
    A, B = [a.requires_grad_() for a in case["A"]], [b.requires_grad_() for b in case["B"]]
    Z = [torch.zeros(b.shape[0], 2, requires_grad=True) for b in B]

    def function(x):
        return lora_linear(x, case["W"], case["bias"], A, B, case["scale"], Z=Z, P=case["P"])

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for rows in (13, 9):
        x, dy = case["x"][:rows], [g[:rows] for g in case["dy"]]
        got = torch.autograd.grad(compiled(x), [*A, *B, *Z], dy, allow_unused=True)
        want = torch.autograd.grad(function(x), [*A, *B, *Z], dy, allow_unused=True)
        for a, b in zip(got, want, strict=True):
            assert (a is None or not a.any()) if b is None else torch.equal(a, b)


def test_autocast_runs_in_low_precision_and_returns_parameter_dtypes():
    case = make(k=2)
    A, B = [a.requires_grad_() for a in case["A"]], [b.requires_grad_() for b in case["B"]]
    Z = [torch.zeros(b.shape[0], 2, requires_grad=True) for b in B]
    with torch.autocast("cpu", torch.bfloat16):
        y = lora_linear(case["x"], case["W"], case["bias"], A, B, case["scale"], Z=Z, P=case["P"])
    assert all(out.dtype == torch.bfloat16 for out in y)
    torch.autograd.backward(y, [g.bfloat16() for g in case["dy"]])
    assert all(t.grad.dtype == torch.float32 for t in (*A, *B, *Z))
    low = {key: [t if t is None else t.bfloat16() for t in case[key]] for key in ("W", "bias", "A", "B", "dy")}
    want, grads = run({**case, **low, "x": case["x"].bfloat16()})
    assert all(torch.equal(a, b) for a, b in zip(y, want, strict=True))
    torch.testing.assert_close(A[0].grad, grads[1].float(), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_checkpoint(reentrant, p):
    case = make(k=2)

    def gradients(wrap):
        A, B = [a.detach().requires_grad_() for a in case["A"]], [b.detach().requires_grad_() for b in case["B"]]
        Z = [torch.zeros(b.shape[0], 2, requires_grad=True) for b in B]
        x = case["x"].detach().requires_grad_()
        torch.manual_seed(3)
        y = wrap(
            lambda x: tuple(lora_linear(x, case["W"], case["bias"], A, B, case["scale"], p=p, Z=Z, P=case["P"])), x
        )
        torch.autograd.backward(y, case["dy"])
        return [t.grad for t in (x, *A, *B, *Z)]

    plain = gradients(lambda f, x: f(x))
    again = gradients(lambda f, x: checkpoint(f, x, use_reentrant=reentrant))
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True) if b is not None)


def test_functional_call():
    import fastlora

    layer = fastlora.nn.Linear(6, 4, r=2, init_lora_weights=False)
    other = {name: torch.randn_like(p) for name, p in layer.named_parameters()}
    x = torch.randn(3, 6)
    a, b = other["lora_A.default.weight"], other["lora_B.default.weight"]
    expected = F.linear(x, other["weight"], other["bias"]) + 4.0 * x @ a.T @ b.T
    torch.testing.assert_close(torch.func.functional_call(layer, other, x), expected)
