"""Running calls with and without plans on the null GPU, what they launch, and programs changed on purpose."""

from __future__ import annotations

import contextlib
from unittest import mock

import torch
from plan_cases import AXES, Case, directions

from benchmarks.host import records
from benchmarks.host.null_gpu import NAME, NullGpu, null_gpu
from benchmarks.host.records import Kind
from fastlora.ops.backends import plan, program, recorder
from fastlora.ops.backends.plan import Plans

INVALID_VALUE = 1  # CUresult
# As where the library was built with CUDA; the null GPU has kernels for them.
NATIVE = {("segment_tiles", NAME), ("build_segments", NAME)}
PLAIN = Case(*(values[0] for values in AXES))


def forbidden(_inputs):
    raise AssertionError("a call that has a plan went through Python")


def work(trace):
    """The library calls and the device's own kernels of a trace, in order, in place or not."""
    return [
        (r.kind, r.name.rstrip("_"))
        for r in trace
        if not isinstance(r, records.Launch) and r.kind in (Kind.GEMM, Kind.KERNEL)
    ]


def without(every, some):
    """What is left of a list without another, whose entries stand in it in the same order."""
    rest, wanted = [], list(some)
    for item in every:
        if wanted and wanted[0] == item:
            wanted.pop(0)
        else:
            rest.append(item)
    assert not wanted, f"{wanted} are not among {every}"
    return rest


def storages(tensors):
    """(shape, strides, dtype, which of the tensors' memories, offset) of each."""
    places: dict[int, int] = {}
    found = []
    for t in tensors:
        if t is None:
            found.append(None)
            continue
        place = places.setdefault(t.untyped_storage().data_ptr() if t.numel() else -1, len(places))
        found.append((tuple(t.shape), t.stride(), t.dtype, place, t.storage_offset(), t.requires_grad))
    return found


def traced(gpu: NullGpu, call):
    """(trace, outputs) of a call; its outputs live as long as the trace is made."""
    kept = []
    return gpu.trace(lambda: kept.extend(call())), kept


@torch.no_grad()
def with_plans(direction, plans=None):
    """Plans that hold one for a direction."""
    plans = plans or Plans()
    for _ in range(2):
        plans.run(direction.key, direction.inputs, direction.compute)
    assert plans.reason is None and len(plans) >= 1, plans.reason
    return plans


@torch.no_grad()
def same(gpu: NullGpu, case: Case) -> None:
    """A plan starts what Triton's launcher starts, byte for byte, with old inputs and with new ones."""
    for name, direction in directions(case, gpu.device).items():
        plans = with_plans(direction)
        for inputs in (direction.inputs, direction.fresh()):
            theirs, outputs = traced(gpu, lambda: direction.compute(list(inputs)))  # noqa: B023
            ours, found = traced(gpu, lambda: plans.run(direction.key, inputs, forbidden))  # noqa: B023
            problem = records.difference(records.canonical(ours), records.canonical(theirs))
            assert problem is None, f"{name}: {problem}"
            assert records.dangling(ours) == [], (name, records.dangling(ours))
            left_out = without(work(theirs), work(ours))
            assert case.rows == 0 or {kind for _, kind in left_out} <= {"zero"}, (name, left_out)
            assert storages(found) == storages(outputs), (name, storages(found), storages(outputs))


def changed(found, index, **fields):
    steps = list(found.steps)
    steps[index] = steps[index]._replace(**fields)
    return found._replace(steps=tuple(steps))


def swapped(values, i, j):
    values = list(values)
    values[i], values[j] = values[j], values[i]
    return tuple(values)


def mutants(found):
    """(what was changed, the program) for changes of each launch that must not go unseen."""
    for index, step in enumerate(found.steps):
        # What a library call reads leaves no trace on the null GPU; tests on a CPU's tensors compare numbers.
        if isinstance(step, recorder.View) and step.out in found.results:
            yield f"step {index}: stride", changed(found, index, strides=(step.strides[0] + 8, *step.strides[1:]))
        if not isinstance(step, recorder.Launch):
            continue
        at = f"step {index} ({step.name})"
        holes, values = step.holes, step.values
        position, slot, first = holes[0]
        yield f"{at}: offset", changed(found, index, holes=((position, slot, first + 2), *holes[1:]))
        other = next(h for h in holes if h[1] != slot)
        yield f"{at}: tensor", changed(found, index, holes=((position, other[1], first), *holes[1:]))
        order = [(b if p == position else position if p == b else p, s, o) for b in [other[0]] for p, s, o in holes]
        yield f"{at}: order of tensors", changed(found, index, holes=tuple(order))
        numbers = [i for i, v in enumerate(values) if v and all(i != p for p, _, _ in holes)]
        pair = next((i, j) for i in numbers for j in numbers if values[i] != values[j])
        yield f"{at}: order of numbers", changed(found, index, values=swapped(values, *pair))
        for i in numbers:
            yield f"{at}: number {i}", changed(found, index, values=(*values[:i], values[i] + 1, *values[i + 1 :]))
        yield f"{at}: grid", changed(found, index, grid=(step.grid[0] + 1, *step.grid[1:]))
        yield f"{at}: block", changed(found, index, block=(step.block[0] * 2, 1, 1))
        yield f"{at}: shared memory", changed(found, index, shared_bytes=step.shared_bytes + 16)
        yield f"{at}: attributes", changed(found, index, attributes=((2, (1,)),))
        yield f"{at}: left out", found._replace(steps=tuple(s for i, s in enumerate(found.steps) if i != index))
        yield f"{at}: twice", found._replace(steps=(*found.steps[: index + 1], *found.steps[index:]))


@torch.no_grad()
def changes_are_seen(gpu):
    for case in (PLAIN, PLAIN._replace(adapters=3, p=0.1, moments=True), PLAIN._replace(columns=1056, layout="fused")):
        for name, direction in directions(case, gpu.device).items():
            with_plans(direction)
            theirs, outputs = traced(gpu, lambda: direction.compute(list(direction.inputs)))  # noqa: B023
            _, found = recorder.Recorder(direction.inputs).record(direction.compute)
            assert run_program(gpu, direction, found, theirs, outputs) is None
            count = 0
            for what, mutant in mutants(found):
                problem = run_program(gpu, direction, mutant, theirs, outputs)
                assert problem is not None, f"{name} of {case}: {what} went unseen"
                count += 1
            assert count > 20, (name, count)


def run_program(gpu, direction, found, theirs, outputs):
    """The first difference that a program makes, in launches or results, None where there is none."""
    built = program.build(found)
    plans = Plans()
    plans._keep(direction.key, direction.inputs, built, list(found.constants.values()))
    try:
        ours, results = traced(gpu, lambda: plans.run(direction.key, direction.inputs, forbidden))
    except (RuntimeError, AssertionError) as error:
        return str(error)
    problem = records.difference(records.canonical(ours), records.canonical(theirs))
    return problem or (None if storages(results) == storages(outputs) else "results")


def every_strategy_is_repeated(gpu):
    """Those that no case of ``pairs`` is large enough, or too large, for."""
    from fastlora.kernels import expand_backward, linear, linear_backward, shrink_linear, shrink_linear_backward

    def run(strategies, case):
        with contextlib.ExitStack() as patched:
            for module, strategy in strategies.items():
                patched.enter_context(mock.patch.object(module, "choose_strategy", return_value=strategy))
            same(gpu, case)

    for ranks in ("even", "odd"):
        case = PLAIN._replace(ranks=ranks, probes="rows")
        apart = {shrink_linear: "separate", shrink_linear_backward: "separate"}
        run({linear: "augmented", linear_backward: "augmented", expand_backward: "fused", **apart}, case)
        run({shrink_linear: "fused", shrink_linear_backward: "fused"}, case)
        run({linear: "library", expand_backward: "separate", **apart}, case._replace(layout="fused"))
        # y and dx of three weights, both by TMA.
        run({linear: "fused", linear_backward: "fused"}, case._replace(rows=9000))


def reduced(given):
    """The sum of partial results, by one kernel."""
    from fastlora.kernels.reduce import reduce_partials

    out = torch.empty(8, device=given[0].device)
    reduce_partials(given[0], [out], [1.0])
    return [out]


@torch.no_grad()
def another_device_is_the_current_one_for_its_launches(gpu):
    """Tensors of the second GPU while the first is current: its stream, and the first again afterwards."""
    with null_gpu(devices=2) as both:
        plans, x = Plans(), torch.empty(4, 8, device="null:1")
        both.set_current_device(1)  # as ``primitives.launch`` does on a GPU
        for _ in range(2):
            plans.run("second", [x], reduced)
        with both.stream(9):
            both.set_current_device(0)
            (launch,) = both.record(lambda: plans.run("second", [x], forbidden))
            assert (launch.stream, both.current_device()) == (9, 0), launch
            both.set_current_device(1)
        both.set_current_device(0)
        (out,) = plans.run("second", [x], forbidden)
        assert out.device == x.device and len(plans) == 1
        with_first = torch.empty(4, 8, device="null:0")
        plans.run("second", [with_first], reduced)
        assert len(plans) == 1, "a plan of one GPU ran for another"


@torch.no_grad()
def a_function_of_another_context_is_refused(gpu):
    """As a driver does: a plan that were run on another device than its kernels were loaded on would not start."""
    with null_gpu(devices=2) as both:
        plans, x = Plans(), torch.empty(4, 8, device="null:1")
        for _ in range(2):
            plans.run("elsewhere", [x], reduced)  # loaded in the context of the first
        plans.run("elsewhere", [x], reduced)
        assert "reduce_kernel failed" in plan.launcher()[1] and both.current_device() == 0


@torch.no_grad()
def strides_beyond_32_bits_are_repeated(gpu):
    """They are arguments of 8 bytes; a plan of near rows is not theirs."""
    case = PLAIN._replace(rows=2)
    for name, direction in directions(case, gpu.device).items():
        x, (rows, columns) = direction.inputs[0], direction.inputs[0].shape
        far = torch.empty_strided((rows, columns), (2**32 + 16, 1), dtype=x.dtype, device=x.device)
        plans, inputs = with_plans(direction), [far, *direction.inputs[1:]]
        theirs = gpu.trace(lambda: direction.compute(list(inputs)))  # noqa: B023
        for turn in range(3):
            ours = gpu.trace(lambda: plans.run(direction.key, inputs, direction.compute))  # noqa: B023
            assert records.difference(records.canonical(ours), records.canonical(theirs)) is None, (name, turn)
        words = [a for launch in records.launches(ours) for a in launch.arguments]
        assert (2**32 + 16).to_bytes(8, "little") in words and len(plans) == 2, name
