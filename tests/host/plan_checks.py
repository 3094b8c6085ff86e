"""What is checked of call plans over the null GPU, in a process of its own.

Prints a JSON object of check and None or what failed. With names as arguments, those checks alone.
"""

from __future__ import annotations

import contextlib
import functools
import json
import sys
import traceback
from unittest import mock

import torch
from fastlora.kernels import tiling
from plan_cases import AXES, Case, Example, directions, pairs
from plan_program import (
    a_function_of_another_context_is_refused,
    another_device_is_the_current_one_for_its_launches,
    changes_are_seen,
    every_strategy_is_repeated,
    forbidden,
    same,
    storages,
    strides_beyond_32_bits_are_repeated,
    with_plans,
)

import fastlora
from benchmarks.host import records
from benchmarks.host.limits import GPUS
from benchmarks.host.null_gpu import NAME, null_gpu
from fastlora.ops import native
from fastlora.ops.backends import BACKENDS, plan, planned
from fastlora.ops.backends.plan import Plans

INVALID_VALUE = 1  # CUresult
# As where the library was built with CUDA; the null GPU has kernels for them.
NATIVE = {("segment_tiles", NAME), ("build_segments", NAME)}
PLAIN = Case(*(values[0] for values in AXES))


@torch.no_grad()
def one_tensor_given_twice_is_two_inputs(gpu):
    case = PLAIN._replace(dy="shared")
    direction = directions(case, gpu.device)["backward"]
    first = len(direction.inputs) - 3
    assert direction.inputs[first] is direction.inputs[first + 1]
    plans = with_plans(direction)
    apart = [torch.empty_like(t) if i >= first else t for i, t in enumerate(direction.inputs)]
    theirs = gpu.trace(lambda: direction.compute(list(apart)))
    ours = gpu.trace(lambda: plans.run(direction.key, apart, forbidden))
    problem = records.difference(records.canonical(ours), records.canonical(theirs))
    assert problem is None, problem


@torch.no_grad()
def anything_else_gets_a_plan_of_its_own(gpu):
    """Shapes, strides, alignment and keys: a call that differs in one of them does not run another's plan."""
    forward = directions(PLAIN, gpu.device)["forward"]
    x, rest = forward.inputs[0], forward.inputs[1:]
    rows, columns = x.shape
    others = {
        "rows": torch.empty(rows * 2, columns, dtype=x.dtype, device=x.device),
        "stride": torch.empty(rows, columns + 8, dtype=x.dtype, device=x.device)[:, :columns],
        "alignment": torch.empty(rows * columns + 1, dtype=x.dtype, device=x.device)[1:].view(rows, columns),
        "dimensions": x.view(2, rows // 2, columns),
    }
    plans = with_plans(forward)
    for what, other in others.items():
        inputs = [other, *rest]
        theirs = gpu.trace(lambda: forward.compute(list(inputs)))  # noqa: B023
        for turn in range(3):
            ours = gpu.trace(lambda: plans.run(forward.key, inputs, forward.compute))  # noqa: B023
            problem = records.difference(records.canonical(ours), records.canonical(theirs))
            assert problem is None, (what, turn, problem)
    assert len(plans) == 1 + len(others)
    weights = [t.half() if t.dtype == torch.float32 and t.dim() == 2 else t for t in rest]
    theirs = gpu.trace(lambda: forward.compute([x, *weights]))
    for _ in range(3):
        ours = gpu.trace(lambda: plans.run(forward.key, [x, *weights], forward.compute))
        assert records.difference(records.canonical(ours), records.canonical(theirs)) is None
    before = len(plans)
    plans.run((*forward.key, "another"), forward.inputs, forward.compute)
    assert len(plans) == before, "a key that was never seen had a plan"


@torch.no_grad()
def owners_of_an_equal_scope_share_plans(gpu):
    forward = directions(PLAIN._replace(ranks="odd"), gpu.device)["forward"]
    called = []

    def counted(given):
        called.append(1)
        return forward.compute(given)

    def run(own):
        called.clear()
        own.run(forward.key, forward.fresh(), counted)
        return len(called)

    first, second, other, alone = Plans(("scale", 1.0)), Plans(("scale", 1.0)), Plans(("scale", 2.0)), Plans()
    assert [run(first), run(first), run(first)] == [1, 1, 0]
    assert [run(second), run(other), run(other), run(alone), run(alone)] == [0, 1, 1, 1, 1]
    assert [run(own) for own in (first, second, other, alone)] == [0, 0, 0, 0]


def layers_of_other_scales_have_other_plans(gpu):
    """Everything but the scale is equal: it is an argument of kernels."""
    x = torch.empty(512, 768, device=gpu.device, dtype=torch.bfloat16, requires_grad=True)

    def step(layer, launcher="native"):
        with mock.patch.object(plan, "_wanted", lambda: launcher):
            torch.autograd.backward(layer(x), torch.empty_like(x))

    def numbers(launches):
        return [[a for a, p in zip(la.arguments, la.pointers, strict=True) if not p] for la in launches]

    for alpha in (16, 32):
        layer = fastlora.nn.Linear(768, 768, r=8, lora_alpha=alpha, device=gpu.device, dtype=torch.bfloat16)
        theirs = gpu.record(lambda: step(layer, "triton"))  # noqa: B023
        for _ in range(3):
            step(layer)
        assert numbers(gpu.record(lambda: step(layer))) == numbers(theirs), alpha  # noqa: B023


@torch.no_grad()
def a_flag_of_torchs_has_plans_of_its_own(gpu):
    """fp32 products in tf32 or not: another kernel."""
    forward = directions(PLAIN._replace(dtype=torch.float32, columns=1056), gpu.device)["forward"]
    plans = with_plans(forward)
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        torch.backends.cuda.matmul.fp32_precision = "tf32" if before != "tf32" else "ieee"
        theirs = gpu.trace(lambda: forward.compute(list(forward.inputs)))
        for _ in range(4):
            ours = gpu.trace(lambda: plans.run(forward.key, forward.inputs, forward.compute))
        assert records.difference(records.canonical(ours), records.canonical(theirs)) is None and len(plans) == 2
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


@torch.no_grad()
def plans_are_bounded_and_freed(gpu):
    forward = directions(PLAIN, gpu.device)["forward"]
    plans = Plans(capacity=2)
    x, rest = forward.inputs[0], forward.inputs[1:]
    numbers = []
    for rows in (16, 32, 48, 64):
        inputs = [torch.empty(rows, x.shape[1], dtype=x.dtype, device=x.device), *rest]
        for _ in range(2):
            plans.run(forward.key, inputs, forward.compute)
        numbers.append(plan._known[next(reversed(plan._known))][0])
        assert len(plans) <= 2
    assert [plan.find(n) is not None for n in numbers] == [False, False, True, True]
    for step in range(50):
        plans.run((*forward.key, step), forward.inputs, forward.compute)
        plans.run((*forward.key, step), forward.inputs, forward.compute)
    assert len(plans) <= 2 and len(plans._variants) <= 4 * 2 + 1, len(plans._variants)
    del plans
    assert plan.find(numbers[-1]) is None, "a plan outlived its owner"


@torch.no_grad()
def streams_and_threads_are_the_callers(gpu):
    import threading

    forward = directions(PLAIN, gpu.device)["forward"]
    plans = with_plans(forward)

    def run():
        with torch.no_grad():
            return plans.run(forward.key, forward.inputs, forbidden)

    with gpu.stream(7):
        assert {launch.stream for launch in gpu.record(run)} == {7}
    assert {launch.stream for launch in gpu.record(run)} == {0}
    failed = []

    def elsewhere():
        try:
            run()
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=elsewhere) for _ in range(4)]
    launches = gpu.record(lambda: [*[t.start() for t in threads], *[t.join() for t in threads]])
    assert not failed and len(launches) == 4 * len(gpu.record(run)), failed


@torch.no_grad()
def what_cannot_be_written_down_is_said(gpu):
    x = torch.empty(4, 8, device=gpu.device)
    elsewhere = torch.empty(4, 8, device=gpu.device)
    from fastlora.kernels.reduce import reduce_partials

    def reads_elsewhere(given):
        out = torch.empty(8, device=gpu.device)
        reduce_partials(elsewhere, [out], [1.0])
        return [out]

    cases = {
        "neither an input nor made by the call": reads_elsewhere,
        "takes 2 as": lambda given: [torch.pow(given[0], 2)],
        "changes a tensor that it did not make": lambda given: [given[0].zero_()],
        "makes a tensor on cpu": lambda given: [given[0].cpu().to(gpu.device)],
        "to the host": lambda given: given[0].sum().item() or [given[0]],
    }
    for i, (words, compute) in enumerate(cases.items()):
        plans = Plans()
        for _ in range(3):
            plans.run(("said", i), [x], compute)
        assert plans.reason is not None and words in plans.reason and len(plans) == 0, (words, plans.reason)
        assert plans.reason in plan._said


@torch.no_grad()
def a_launch_that_fails_goes_to_triton(gpu):
    forward = directions(PLAIN, gpu.device)["forward"]
    plans, tried = with_plans(forward), []

    def compute(given):
        # Triton's launcher succeeds where the native one failed.
        tried.append(1)
        failing.close()
        return forward.compute(given)

    with contextlib.ExitStack() as failing:
        failing.enter_context(gpu.failing("cuLaunchKernelEx", INVALID_VALUE))
        out = plans.run(forward.key, forward.inputs, compute)
    assert len(out) == 4 and tried == [1]
    name, reason = plan.launcher()
    assert name == "triton" and "shrink_linear_kernel failed" in reason and reason in plan._said, (name, reason)
    assert len(gpu.record(lambda: plans.run(forward.key, forward.inputs, forward.compute))) > 0 and len(plans) == 0
    plan._disabled.clear()
    plans = with_plans(forward)
    with gpu.failing("cuLaunchKernelEx", INVALID_VALUE):
        try:
            plans.run(forward.key, forward.inputs, forward.compute)
        except RuntimeError as error:
            assert "error 1 of the null driver" in str(error), error
        else:
            raise AssertionError("a launch that fails on both ways was not told of")
    plan._disabled.clear()


@torch.no_grad()
def memory_that_is_missing_is_tritons_error(gpu):
    """An error that is not a launch's keeps its type, and the plans."""
    forward = directions(PLAIN, gpu.device)["forward"]
    plans = with_plans(forward)
    real, plan._run_plan = plan._run_plan, lambda *given: (_ for _ in ()).throw(RuntimeError("no memory"))

    def compute(given):
        raise torch.OutOfMemoryError("no memory")

    try:
        plans.run(forward.key, forward.inputs, compute)
    except torch.OutOfMemoryError:
        pass
    else:
        raise AssertionError("the error was lost")
    finally:
        plan._run_plan = real
    assert plan.launcher() == ("native", None) and len(plans) == 1
    assert len(plans.run(forward.key, forward.inputs, forbidden)) == 4


def a_driver_without_a_symbol_is_said(gpu):
    opened = torch.ops.fastlora.open_plans
    assert "cannot be loaded" in opened(plan.registry(), "libnotthere.so.1")
    assert "has no cuLaunchKernelEx" in opened(plan.registry(), "libm.so.6")
    assert opened(plan.registry(), plan.DRIVER) == ""


def other_cards_have_plans_of_their_own(gpu):
    """Triton compiles for each capability what its shared memory holds, and plans start what was compiled."""
    alone = PLAIN._replace(layout="one")
    for capability in [known for known in GPUS if known >= (8, 0)]:
        with null_gpu(capability=capability) as card:
            plan._known.clear()
            assert tiling.limits(card.device) == (capability, *GPUS[capability]), capability
            cases = [alone] if capability != (8, 6) else [alone, PLAIN._replace(rows=9000)]
            for case in cases:
                same(card, case)
                for name, direction in directions(case, card.device).items():
                    plans = with_plans(direction)
                    started = card.record(functools.partial(plans.run, direction.key, direction.inputs, forbidden))
                    most = max(launch.shared_bytes for launch in started)
                    assert 0 < most <= GPUS[capability].shared_bytes, (capability, name, most)
    plan._known.clear()


def library_calls(given):
    """Operators of torch alone: views, products, casts, changes in place, results of every kind."""
    x, w, b, other, index = given
    rows = x.reshape(-1, x.shape[-1])
    y = torch.nn.functional.linear(rows, w, b)
    y.addmm_(other.t(), other[:, :4])
    z = torch.addmm(b, rows, w.t()).mul_(torch.mm(rows, w.t()))
    halves = torch.cat([y, z], dim=1).to(torch.bfloat16).float()
    first, second = halves.split([3, halves.shape[1] - 3], dim=1)
    copies = [torch.empty_like(part, memory_format=torch.contiguous_format) for part in (first, second)]
    torch._foreach_copy_(copies, [first, second])
    picked = rows.index_select(1, index)
    signs = rows.new_zeros(2, 1).expand(2, 3).repeat(1, 2).unsqueeze(1).contiguous()
    signs.mul_(picked[:1, :1].unsqueeze(0))
    filled = [torch.full_like(picked, 2.5), rows.new_full((2, 3), 7, dtype=torch.int64), torch.empty_like(y).fill_(-1)]
    total = y.narrow(0, 1, 3).sum(0, keepdim=True, dtype=torch.float64)
    deep = y.t()[1:].view(-1, 1, y.shape[0])[:, 0]
    return [
        y.view(*x.shape[:-1], -1),
        None,
        total,
        deep,
        *copies,
        picked,
        signs,
        x,
        y[2:, 1:],
        rows.new_empty(0, 4),
        *filled,
    ]


@torch.no_grad()
def numbers_of_library_calls_are_torchs(gpu):
    def given(seed):
        torch.manual_seed(seed)
        x, w, b = torch.randn(2, 5, 8)[:, :, 1:7], torch.randn(4, 6), torch.randn(4)
        return [x, w, b, torch.randn(10, 3).t(), torch.tensor([5, 0, 5])]

    plans = Plans()
    for turn in range(4):
        inputs = given(turn)
        wanted = library_calls(inputs)
        torch.manual_seed(100)
        found = plans.run("library", inputs, library_calls if turn < 2 else forbidden)
        assert plans.reason is None, plans.reason
        assert storages(found) == storages(wanted), (storages(found), storages(wanted))
        for a, b in zip(found, wanted, strict=True):
            assert (a is None and b is None) or torch.equal(a, b), turn
        assert found[8] is inputs[0] or turn < 2, "an input that is a result is the input"
    assert len(plans) == 1


@torch.no_grad()
def backends_with_plans_give_the_same(gpu):
    """Structure and kinds of what a PlannedBackend returns, at every call."""
    raw = BACKENDS["triton"]
    for case in pairs():
        example, own = Example(case, gpu.device), planned.PlannedBackend(raw)
        for name in ("forward", "backward"):
            wanted = getattr(example, name)(raw)
            for turn in range(4):
                found = getattr(example.again() if turn else example, name)(own)
                assert type(found) is type(wanted), (case, name, turn)
                for a, b in zip(found, wanted, strict=True):
                    a, b = ([t] if isinstance(t, torch.Tensor) or t is None else t for t in (a, b))
                    if name == "backward" and not a:
                        continue  # not needed, and so left out
                    a, b = ([None if t is None else (t.shape, t.dtype, t.stride()) for t in some] for some in (a, b))
                    assert a == (b or [None] * len(a)), (case, name, turn, a, b)
        assert own.plans.reason is None and len(own.plans) == 2, (case, own.plans.reason)


@torch.no_grad()
def compiled_kernels_are_kept(gpu):
    import gc

    from fastlora.kernels.shrink_linear import shrink_linear_kernel

    forward = directions(PLAIN, gpu.device)["forward"]
    plans = with_plans(forward)
    shrink_linear_kernel.device_caches.clear()
    gc.collect()
    launches = gpu.record(lambda: plans.run(forward.key, forward.inputs, forbidden))
    assert "shrink_linear_kernel" in {launch.function for launch in launches}
    assert {kernel.name for kernel in plan._kernels.values()} >= {launch.function for launch in launches}


def tritons_launcher_is_a_choice(gpu):
    """Nothing is recorded, and nothing is said of what was asked for."""
    with mock.patch.object(plan, "_wanted", lambda: "triton"):
        before = plan.said()
        own = planned.PlannedBackend(BACKENDS["triton"])
        example = Example(PLAIN, gpu.device)
        for _ in range(3):
            example.forward(own)
        assert len(own.plans) == 0 and plan.said() == before
        assert plan.launcher() == ("triton", "FASTLORA_TRITON_LAUNCHER says so")
        assert planned.launch_remarks(own.backend) == ["launched by Triton: FASTLORA_TRITON_LAUNCHER says so"]


def explain_says_who_launches(gpu):
    layer = torch.nn.Sequential(fastlora.nn.Linear(64, 64, r=8, device=gpu.device, dtype=torch.bfloat16))
    plan._said.clear()
    assert fastlora.explain(layer).rows[0].remarks == ""
    plan._say("a reason")
    assert "in some calls launched by Triton: a reason" in str(fastlora.explain(layer))
    with mock.patch.object(plan, "_missing", lambda: "no driver"):
        assert fastlora.explain(layer).rows[0].remarks == "launched by Triton: no driver"
    assert planned.launch_remarks(BACKENDS["reference"]) == []


class Attention(torch.nn.Module):
    def __init__(self, gpu):
        super().__init__()
        kind = {"device": gpu.device, "dtype": torch.bfloat16}
        self.query, self.key, self.value = (torch.nn.Linear(768, 768, **kind) for _ in range(3))

    def forward(self, x):
        return [self.query(x), self.key(x), self.value(x)]


def layers_use_plans(gpu):
    """q, k and v, with and without autocast: from the third step on nothing of Triton's Python runs."""
    from triton.runtime.jit import JITFunction

    model = torch.nn.Sequential(Attention(gpu)).requires_grad_(False)
    fastlora.inject(model, fastlora.LoraConfig(r=8, target_modules=["query", "key", "value"]), check="off")
    leaves = [p for p in model.parameters() if p.requires_grad]
    x = torch.empty(512, 768, device=gpu.device, dtype=torch.bfloat16, requires_grad=True)
    dy = [torch.empty_like(x) for _ in range(3)]

    def step(cast):
        x.grad = None
        with torch.autocast(gpu.device.type, torch.bfloat16, enabled=cast):
            y = model(x)
        torch.autograd.backward(y, dy)
        for leaf in leaves:
            assert leaf.grad.shape == leaf.shape and leaf.grad.dtype == leaf.dtype
            leaf.grad = None

    for cast in (False, True):
        theirs = gpu.trace(lambda: step(cast))  # noqa: B023
        step(cast)
        step(cast)
        with mock.patch.object(JITFunction, "run", forbidden):
            ours = gpu.trace(lambda: step(cast))  # noqa: B023
        problem = records.difference(records.canonical(ours), records.canonical(theirs))
        assert problem is None, (cast, problem)
        assert records.dangling(ours) == []


CHECKS = (
    changes_are_seen, one_tensor_given_twice_is_two_inputs, anything_else_gets_a_plan_of_its_own,
    owners_of_an_equal_scope_share_plans, layers_of_other_scales_have_other_plans,
    a_flag_of_torchs_has_plans_of_its_own, plans_are_bounded_and_freed, streams_and_threads_are_the_callers,
    what_cannot_be_written_down_is_said, a_launch_that_fails_goes_to_triton, memory_that_is_missing_is_tritons_error,
    a_driver_without_a_symbol_is_said, other_cards_have_plans_of_their_own, numbers_of_library_calls_are_torchs,
    backends_with_plans_give_the_same, layers_use_plans, another_device_is_the_current_one_for_its_launches,
    a_function_of_another_context_is_refused, strides_beyond_32_bits_are_repeated,
    compiled_kernels_are_kept, every_strategy_is_repeated, tritons_launcher_is_a_choice, explain_says_who_launches,
)  # fmt: skip


def main() -> None:
    checks = {check.__name__: check for check in CHECKS}
    checks |= {str(case): functools.partial(same, case=case) for case in pairs()}
    wanted, found = sys.argv[1:], {}
    for name, check in checks.items():
        if wanted and name not in wanted:
            continue
        try:
            with null_gpu() as gpu, mock.patch.object(native, "_KERNELS", native._KERNELS | NATIVE):
                assert plan.launcher() == ("native", None), plan.launcher()
                check(gpu)
            found[name] = None
        except Exception:
            found[name] = traceback.format_exc()
        plan._disabled.clear()
        plan._known.clear()
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
