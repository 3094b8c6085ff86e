"""What the null GPU wrote down, as Python reads it: launches, tensor maps, copies, allocations, in order."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from enum import IntEnum
from typing import NamedTuple

_ADDRESS, _MAP = 8, 128  # bytes of a pointer, and of a CUtensorMap, which begins with one here


class Kind(IntEnum):
    """NullGpuEvent of native/null_gpu.h."""

    LAUNCH = 0
    TENSOR_MAP = 1
    MEMORY = 2
    ATTRIBUTE = 3
    SYNCHRONIZE = 4
    ALLOCATE = 5
    FREE = 6
    KERNEL = 7
    GEMM = 8
    TO_DEVICE = 9
    TO_HOST = 10
    FALLBACK = 11


class Launch(NamedTuple):
    """One call of cuLaunchKernel or cuLaunchKernelEx; ``arguments`` has the bytes of each parameter of the kernel.

    ``attributes``: (CUlaunchAttributeID, bytes of its value); ``pointers``: which parameters point into global memory.
    """

    function: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    cluster: tuple[int, int, int]
    shared_bytes: int
    stream: int
    attributes: tuple[tuple[int, bytes], ...]
    arguments: tuple[bytes, ...]
    pointers: tuple[bool, ...]


class TensorMap(NamedTuple):
    """One call of cuTensorMapEncodeTiled, strides in bytes; all tuples have the fastest dimension first."""

    address: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    steps: tuple[int, ...]
    dtype: int
    interleave: int
    swizzle: int
    promotion: int
    fill: int


class Event(NamedTuple):
    """Anything else, with the bytes of its fields: see where native/ notes it."""

    kind: Kind
    name: str
    fields: tuple[bytes, ...]

    def numbers(self) -> tuple[int, ...]:
        return tuple(int.from_bytes(field, "little") for field in self.fields)


Record = Launch | TensorMap | Event


def parse(log: bytes) -> list[Record]:
    """The log of record.cpp."""
    return [_record(Kind(kind), name, fields) for kind, name, fields in _entries(log)]


def _entries(log: bytes) -> Iterator[tuple[int, str, list[bytes]]]:
    at = 0
    while at < len(log):
        kind, length = struct.unpack_from("<II", log, at)
        name = log[at + 8 : at + 8 + length].decode()
        at += 8 + length
        (count,) = struct.unpack_from("<I", log, at)
        at, fields = at + 4, []
        for _ in range(count):
            (size,) = struct.unpack_from("<I", log, at)
            fields.append(log[at + 4 : at + 4 + size])
            at += 4 + size
        yield kind, name, fields


def _record(kind: Kind, name: str, fields: list[bytes]) -> Record:
    if kind is Kind.LAUNCH:
        return _launch(name, fields)
    if kind is Kind.TENSOR_MAP:
        return _tensor_map(fields[0])
    return Event(kind, name, tuple(fields))


def _launch(name: str, fields: list[bytes]) -> Launch:
    grid, block, cluster = (struct.unpack("<3I", field) for field in fields[:3])
    shared, stream, count = (int.from_bytes(field, "little") for field in fields[3:6])
    pairs, rest = fields[6 : 6 + 2 * count], fields[6 + 2 * count :]
    attributes = tuple((int.from_bytes(i, "little"), value) for i, value in zip(pairs[::2], pairs[1::2], strict=True))
    return Launch(name, grid, block, cluster, shared, stream, attributes, tuple(rest[1:]), tuple(map(bool, rest[0])))


def _tensor_map(encoded: bytes) -> TensorMap:
    address, *numbers = struct.unpack("<Q5Q4Q5I5I8B", encoded)
    sizes, strides, box, steps = numbers[:5], numbers[5:9], numbers[9:14], numbers[14:19]
    dtype, rank, interleave, swizzle, promotion, fill, _, _ = numbers[19:]
    cut = (tuple(sizes[:rank]), tuple(strides[: rank - 1]), tuple(box[:rank]), tuple(steps[:rank]))
    return TensorMap(address, *cut, dtype, interleave, swizzle, promotion, fill)


def launches(records: Sequence[Record]) -> list[Launch]:
    return [record for record in records if isinstance(record, Launch)]


def canonical(records: Sequence[Record]) -> list[Launch]:
    """The launches with every pointer into memory allocated during the record as (which, offset), 12 bytes.

    So is the address in a tensor map. Allocations are numbered in the order in which the launches first use them, so
    that two records are equal where the same launches met the same memory, however it was allocated. Pointers to older
    memory stay.
    """
    spans = [r.numbers() for r in records if isinstance(r, Event) and r.kind is Kind.ALLOCATE]
    numbers: dict[int, int] = {}

    def place(argument: bytes) -> bytes:
        address = int.from_bytes(argument, "little")
        for start, size in spans:
            if start <= address < start + size:
                return struct.pack("<IQ", numbers.setdefault(start, len(numbers)), address - start)
        return argument

    return [
        launch._replace(
            arguments=tuple(
                place(argument[:_ADDRESS]) + argument[_ADDRESS:] if pointer or len(argument) == _MAP else argument
                for argument, pointer in zip(launch.arguments, launch.pointers, strict=True)
            )
        )
        for launch in launches(records)
    ]


def dangling(records: Sequence[Record]) -> list[str]:
    """Launches that were handed memory which had been freed by then."""
    live: dict[int, int] = {}
    gone: dict[int, int] = {}
    found = []
    for record in records:
        if isinstance(record, Launch):
            for i, (argument, pointer) in enumerate(zip(record.arguments, record.pointers, strict=True)):
                address = int.from_bytes(argument, "little")
                if pointer and any(start <= address < start + size for start, size in gone.items()):
                    found.append(f"{record.function}: argument {i} points into freed memory")
        elif isinstance(record, Event) and record.kind is Kind.ALLOCATE:
            start, size = record.numbers()
            live[start] = size
        elif isinstance(record, Event) and record.kind is Kind.FREE:
            (start,) = record.numbers()
            gone[start] = live.pop(start, 1)
    return found


def difference(ours: Sequence[Launch], theirs: Sequence[Launch]) -> str | None:
    """The first difference of two lists of launches in words, None where they are equal byte for byte."""
    for i, (a, b) in enumerate(zip(ours, theirs, strict=False)):
        where = f"launch {i} ({a.function})"
        for field in ("function", "grid", "block", "cluster", "shared_bytes", "stream", "attributes", "pointers"):
            if getattr(a, field) != getattr(b, field):
                return f"{where}: {field} {getattr(a, field)} and {getattr(b, field)}"
        for j, (one, other) in enumerate(zip(a.arguments, b.arguments, strict=True)):
            if one != other:
                return f"{where}: argument {j} of {len(a.arguments)} is {one.hex()} and {other.hex()}"
    if len(ours) != len(theirs):
        return f"{len(ours)} and {len(theirs)} launches"
    return None
