"""What is checked of the null GPU, in a process of its own."""

from __future__ import annotations

import ctypes
import struct

import torch
import triton
import triton.language as tl
from child import run
from triton.runtime import driver
from triton.runtime.errors import OutOfResources
from triton.tools.tensor_descriptor import TensorDescriptor

import fastlora
from benchmarks.host import records
from benchmarks.host.null_gpu import null_gpu
from benchmarks.host.records import Kind

MAX_DYNAMIC_SHARED = 8  # CUfunction_attribute
INVALID_VALUE, NO_BINARY = 1, 209  # CUresult
CLUSTER_DIMENSION, CLUSTER_SCHEDULING = 4, 5  # CUlaunchAttributeID


@triton.jit
def add_kernel(p_out, p_x, pair, n, factor, flag, BLOCK: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    b_x = tl.load(p_x + o, mask=o < n) * factor + tl.load(pair[0] + o, mask=o < n) + pair[1] + flag
    tl.store(p_out + o, b_x, mask=o < n)


@triton.jit
def copy_kernel(x_desc, out_desc, BLOCK: tl.constexpr):
    out_desc.store([0, 0], x_desc.load([0, 0]))


@triton.jit
def large_kernel(p_x, p_out, BLOCK: tl.constexpr):
    o = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    b_x = tl.load(p_x + o)
    tl.store(p_out + o, tl.dot(b_x, tl.dot(b_x, tl.trans(b_x)).to(tl.bfloat16)))


def vectors(gpu, count=3, size=1000):
    return [torch.empty(size, device=gpu.device) for _ in range(count)]


def add(out, x, other, number=2**33, n=1000, factor=0.5, flag=3, BLOCK=128, **options):
    grid = (triton.cdiv(1000, BLOCK), 2)
    add_kernel[grid](out, x, (other, number), n, factor, flag, BLOCK=BLOCK, **options)


def launch_is_written_down(gpu):
    out, x, other = vectors(gpu)
    (launch,) = gpu.record(lambda: add(out, x, other))
    assert (launch.function, launch.grid, launch.block) == ("add_kernel", (8, 2, 1), (128, 1, 1)), launch
    assert (launch.cluster, launch.stream, launch.attributes) == ((1, 1, 1), 0, ()), launch
    addresses = [struct.pack("<Q", t.data_ptr()) for t in (out, x, other)]
    numbers = [struct.pack("<q", 2**33), struct.pack("<i", 1000), struct.pack("<f", 0.5), struct.pack("<i", 3)]
    # Triton appends two pointers to scratch memory, which this kernel has none of.
    assert launch.arguments == (*addresses, *numbers, bytes(8), bytes(8)), launch.arguments
    assert launch.pointers == (True, True, True, False, False, False, False, True, True), launch.pointers


def parameters_are_told(gpu):
    """cuFuncGetParamInfo: what a launcher that packs arguments itself asks."""
    out, x, other = vectors(gpu)
    add(out, x, other)
    kernel = add_kernel.warmup(out, x, (other, 2**33), 1000, 0.5, 3, BLOCK=128, grid=(1,))
    kernel._init_handles()
    ask, found = ctypes.CDLL("libcuda.so.1").cuFuncGetParamInfo, []
    ask.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p, ctypes.c_void_p]
    offset, size = ctypes.c_size_t(), ctypes.c_size_t()
    while ask(kernel.function, len(found), ctypes.byref(offset), ctypes.byref(size)) == 0:
        found.append((offset.value, size.value))
    assert found == [(0, 8), (8, 8), (16, 8), (24, 8), (32, 4), (36, 4), (40, 4), (48, 8), (56, 8)], found


def any_argument_makes_a_difference(gpu):
    out, x, other = vectors(gpu)
    first = gpu.record(lambda: add(out, x, other))
    assert records.difference(first, gpu.record(lambda: add(out, x, other))) is None
    changed = {
        "argument 0": lambda: add(x, x, other),
        "argument 1": lambda: add(out, x[4:], other),
        "argument 3": lambda: add(out, x, other, number=2**33 + 1),
        "argument 4": lambda: add(out, x, other, n=1008),
        "argument 5": lambda: add(out, x, other, factor=0.25),
        "argument 6": lambda: add(out, x, other, flag=5),
        "grid": lambda: add(out, x, other, BLOCK=256),
        "block": lambda: add(out, x, other, num_warps=8),
        "1 and 2 launches": lambda: (add(out, x, other), add(out, x, other)),
    }
    for name, call in changed.items():
        found = records.difference(first, gpu.record(call))
        assert found is not None and name in found, (name, found)


def memory_of_a_record_is_told_by_its_use(gpu):
    x, other = vectors(gpu, 2)

    def run(swapped=False, order=(0, 1), spare=False):
        made = {}
        for i in order:
            made[i] = torch.empty(1000, device=gpu.device)
        kept = torch.empty(10, device=gpu.device) if spare else None
        first, second = (1, 0) if swapped else (0, 1)
        add(made[0], x, other)
        add(made[first], made[second], other)
        return kept

    ours = gpu.trace(run)
    assert records.difference(records.launches(ours), gpu.record(run)) is not None
    same = [gpu.trace(run), gpu.trace(lambda: run(order=(1, 0))), gpu.trace(lambda: run(spare=True))]
    for theirs in same:
        found = records.difference(records.canonical(ours), records.canonical(theirs))
        assert found is None, found
    theirs = gpu.trace(lambda: run(swapped=True))
    assert records.difference(records.canonical(ours), records.canonical(theirs)) is not None


def freed_memory_is_found(gpu):
    x, other = vectors(gpu, 2)

    def late(keep):
        out = torch.empty(1000, device=gpu.device)
        address = out.data_ptr()
        kept = out if keep else None
        del out

        class There:
            dtype = torch.float32

            def data_ptr(self):
                return address

        add(There(), x, other)
        return kept

    assert records.dangling(gpu.trace(lambda: late(keep=True))) == []
    (found,) = records.dangling(gpu.trace(lambda: late(keep=False)))
    assert found == "add_kernel: argument 0 points into freed memory", found


def tensor_maps_are_written_down(gpu):
    x, out = (torch.empty(64, 128, dtype=torch.bfloat16, device=gpu.device) for _ in range(2))

    def call(block=32):
        maps = [TensorDescriptor.from_tensor(t, [block, block]) for t in (x, out)]
        copy_kernel[(1,)](*maps, BLOCK=block)

    call()
    trace = gpu.trace(call)
    first, second = (r for r in trace if isinstance(r, records.TensorMap))
    assert (first.address, second.address) == (x.data_ptr(), out.data_ptr())
    assert (first.sizes, first.strides, first.box, first.steps) == ((128, 64), (256,), (32, 32), (1, 1)), first
    (launch,) = records.launches(trace)
    assert len(launch.arguments[0]) == 128 and struct.unpack_from("<Q", launch.arguments[0]) == (x.data_ptr(),)
    call(block=16)
    assert records.difference([launch], gpu.record(lambda: call(block=16))) is not None

    def own(rows=64):
        new = torch.empty(rows, 128, dtype=torch.bfloat16, device=gpu.device)
        copy_kernel[(1,)](TensorDescriptor.from_tensor(new, [32, 32]), TensorDescriptor.from_tensor(out, [32, 32]), 32)

    ours, theirs, other = (records.canonical(gpu.trace(lambda rows=rows: own(rows))) for rows in (64, 64, 32))
    assert records.difference(ours, theirs) is None and records.difference(ours, other) is not None


def clusters_are_attributes(gpu):
    out, x, other = vectors(gpu)
    (launch,) = gpu.record(lambda: add(out, x, other, num_ctas=2))
    assert (launch.grid, launch.cluster) == ((16, 2, 1), (2, 1, 1)), launch
    assert dict(launch.attributes)[CLUSTER_DIMENSION] == struct.pack("<3I", 2, 1, 1), launch
    assert len(dict(launch.attributes)[CLUSTER_SCHEDULING]) == 4, launch


def streams_are_written_down(gpu):
    out, x, other = vectors(gpu)
    with gpu.stream(7):
        (launch,) = gpu.record(lambda: add(out, x, other))
    (after,) = gpu.record(lambda: add(out, x, other))
    assert (launch.stream, after.stream) == (7, 0)


def large(gpu):
    x = torch.empty(128, 128, dtype=torch.bfloat16, device=gpu.device)
    large_kernel[(1,)](x, torch.empty(128, 128, device=gpu.device), BLOCK=128)


def shared_memory_is_limited(gpu):
    (launch,) = gpu.record(lambda: large(gpu))
    assert launch.shared_bytes > 48 << 10, launch
    with null_gpu(shared_bytes=launch.shared_bytes) as exact:
        large(exact)
    with null_gpu(shared_bytes=launch.shared_bytes - 1) as small:
        try:
            large(small)
        except OutOfResources as error:
            assert str(launch.shared_bytes - 1) in str(error), error
        else:
            raise AssertionError("a block got more shared memory than there is")
        gpu_driver = driver.active.utils.get_device_properties(0)
        assert gpu_driver["max_shared_mem"] == launch.shared_bytes - 1, gpu_driver


def a_block_gets_the_shared_memory_that_was_asked_for(gpu):
    """Beyond the limit of the function itself, 48 KiB unless cuFuncSetAttribute raised it, nothing starts."""
    large(gpu)
    x = torch.empty(128, 128, dtype=torch.bfloat16, device=gpu.device)
    kernel = large_kernel.warmup(x, torch.empty(128, 128, device=gpu.device), BLOCK=128, grid=(1,))
    raise_limit = ctypes.CDLL("libcuda.so.1").cuFuncSetAttribute
    raise_limit.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_int]
    assert raise_limit(kernel.function, MAX_DYNAMIC_SHARED, kernel.metadata.shared - 1) == 0
    try:
        large(gpu)
    except RuntimeError as error:
        assert "error 1 of the null driver" in str(error), error
    else:
        raise AssertionError("a launch with more shared memory than the function's was taken")
    assert raise_limit(kernel.function, MAX_DYNAMIC_SHARED, kernel.metadata.shared) == 0
    large(gpu)
    assert raise_limit(kernel.function, MAX_DYNAMIC_SHARED, (227 << 10) + 1) == INVALID_VALUE


def capability_is_compiled_for(gpu):
    out, x, other = vectors(gpu)
    with null_gpu(capability=(8, 0), multiprocessors=7):
        assert torch.cuda.get_device_capability() == (8, 0) and driver.active.get_current_target().arch == 80
        assert driver.active.utils.get_device_properties(0)["multiprocessor_count"] == 7
        add(out, x, other)
        compiled = add_kernel.warmup(out, x, (other, 2**33), 1000, 0.5, 3, BLOCK=128, grid=(1,))
    binary = compiled.asm["cubin"]
    with null_gpu(capability=(9, 0)):
        try:
            driver.active.utils.load_binary("add_kernel", binary, 0, 0)
        except RuntimeError as error:
            assert str(NO_BINARY) in str(error), error
        else:
            raise AssertionError("a binary for sm_80 was loaded on sm_90")


def driver_refuses_what_it_must(gpu):
    out, x, other = vectors(gpu)
    with gpu.failing("cuLaunchKernelEx", INVALID_VALUE):
        try:
            add(out, x, other)
        except RuntimeError as error:
            assert "error 1 of the null driver" in str(error), error
        else:
            raise AssertionError("a launch that failed was not told of")
    add(out, x, other)
    try:
        add_kernel[(1, 70000)](out, x, (other, 1), 1000, 0.5, 3, BLOCK=128)
    except RuntimeError as error:
        assert "error 1 of the null driver" in str(error), error
    else:
        raise AssertionError("a grid of 70000 blocks in y was taken")


def copies_are_counted(gpu):
    here = torch.ones(8)
    counts = gpu.count(lambda: here.to(gpu.device))
    assert (counts.to_device, counts.to_host, counts.allocations, counts.kernels) == (1, 0, 1, 0), counts
    there = here.to(gpu.device)
    counts = gpu.count(lambda: (there.cpu(), there.sum().item()))
    assert (counts.to_device, counts.to_host, counts.kernels) == (0, 2, 1), counts
    assert gpu.count(lambda: torch.tensor([1.0], device=gpu.device)).to_device == 1
    trace = gpu.trace(lambda: here.to(gpu.device))
    assert [r.kind for r in trace] == [Kind.ALLOCATE, Kind.TO_DEVICE, Kind.FREE], trace


def operators_without_a_kernel_give_shapes(gpu):
    x = torch.empty(4, 6, device=gpu.device)
    found = []
    counts = gpu.count(lambda: found.extend([torch.softmax(x, 1), *torch.topk(x, 2, dim=1), x[1:].tanh_()]))
    assert counts.fallbacks == 3, counts
    softmax, values, indices, changed = found
    assert softmax.shape == x.shape and values.shape == indices.shape == (4, 2) and indices.dtype == torch.int64
    assert changed.data_ptr() == x.data_ptr() + 6 * 4 and {t.device for t in found} == {x.device}
    out = torch.empty(0, device=gpu.device)
    assert x.tanh_() is x and torch.cumsum(x, 1, out=out) is out and out.shape == x.shape


def layers_launch_triton_kernels(gpu):
    layer = fastlora.nn.Linear(768, 768, r=8, device=gpu.device, dtype=torch.bfloat16)
    x = torch.randn(512, 768, device=gpu.device, dtype=torch.bfloat16, requires_grad=True)

    def step():
        y = layer(x)
        torch.autograd.backward(y, torch.empty_like(y))

    step()
    trace = gpu.trace(step)
    names = [launch.function for launch in records.launches(trace)]
    assert {"shrink_linear_kernel", "shrink_linear_backward_kernel", "wgrad_kernel"} <= set(names), names
    assert records.dangling(trace) == []
    first, last = 0x700000000000, 0x7E0000000000
    for launch in records.launches(trace):
        # Every address is known as one: it is by these that launches are compared.
        values = [int.from_bytes(argument, "little") for argument in launch.arguments]
        assert all(pointer == (first <= v < last) or v == 0 for v, pointer in zip(values, launch.pointers, strict=True))
    again = gpu.trace(step)
    assert records.difference(records.canonical(trace), records.canonical(again)) is None
    counts = gpu.count(step)
    assert counts.launches == len(names) and counts.fallbacks == counts.to_host == counts.to_device == 0, counts


def everything_is_put_back(gpu):
    from benchmarks.host import activate

    parts = activate._parts()
    inside = [parts.backends.BACKENDS["triton"], parts.triton.unsupported_reason, torch.cuda.current_device]
    with null_gpu(capability=(8, 0)):
        nested = [parts.backends.BACKENDS["triton"], parts.triton.unsupported_reason, torch.cuda.current_device]
    again = [parts.backends.BACKENDS["triton"], parts.triton.unsupported_reason, torch.cuda.current_device]
    assert inside == again and all(a is not b for a, b in zip(inside, nested, strict=True))


def unknown_cards_are_refused(gpu):
    for arguments, name in (
        ({"capability": (3, 5)}, "capability"),
        ({"shared_bytes": 0}, "shared_bytes"),
        ({"multiprocessors": 1.5}, "multiprocessors"),
    ):
        try:
            with null_gpu(**arguments):
                pass
        except ValueError as error:
            assert str(error).startswith(f"{name}: expected"), error
        else:
            raise AssertionError(f"{arguments} was taken")


CHECKS = (
    launch_is_written_down, parameters_are_told, any_argument_makes_a_difference, memory_of_a_record_is_told_by_its_use,
    freed_memory_is_found, tensor_maps_are_written_down, clusters_are_attributes, streams_are_written_down,
    shared_memory_is_limited, a_block_gets_the_shared_memory_that_was_asked_for,
    capability_is_compiled_for, driver_refuses_what_it_must, copies_are_counted,
    operators_without_a_kernel_give_shapes, layers_launch_triton_kernels, everything_is_put_back,
    unknown_cards_are_refused,
)  # fmt: skip


if __name__ == "__main__":
    run(CHECKS)
