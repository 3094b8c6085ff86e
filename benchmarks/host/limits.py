"""What GPUs of a compute capability have, as the driver tells it: CUdevice_attribute of the null driver."""

from __future__ import annotations

from typing import NamedTuple

# CUdevice_attribute
MAX_THREADS, MAX_BLOCK_X, MAX_BLOCK_Y, MAX_BLOCK_Z, MAX_GRID_X, MAX_GRID_Y, MAX_GRID_Z = 1, 2, 3, 4, 5, 6, 7
SHARED_PER_BLOCK, WARP, REGISTERS_PER_BLOCK, CLOCK, MULTIPROCESSORS = 8, 10, 12, 13, 16
MEMORY_CLOCK, BUS_WIDTH, L2_BYTES, THREADS_PER_MULTIPROCESSOR, MAJOR, MINOR = 36, 37, 38, 39, 75, 76
SHARED_PER_MULTIPROCESSOR, REGISTERS_PER_MULTIPROCESSOR, COOPERATIVE, SHARED_OPTIN = 81, 82, 95, 97
BLOCKS_PER_MULTIPROCESSOR, RESERVED_SHARED, CLUSTERS, TENSOR_MAPS = 106, 111, 120, 127

DEFAULT_SHARED = 48 << 10
RESERVED = 1 << 10  # of every block's shared memory, the system's own


class Gpu(NamedTuple):
    """Shared memory that a block may ask for, in bytes, and multiprocessors."""

    shared_bytes: int
    multiprocessors: int


# By capability, with the multiprocessors of the largest well-known card.
GPUS = {
    (7, 5): Gpu(64 << 10, 40),
    (8, 0): Gpu(163 << 10, 108),
    (8, 6): Gpu(99 << 10, 84),
    (8, 9): Gpu(99 << 10, 142),
    (9, 0): Gpu(227 << 10, 132),
    (10, 0): Gpu(227 << 10, 148),
    (12, 0): Gpu(99 << 10, 188),
}


def gpu(capability: tuple[int, int], shared_bytes: int | None, multiprocessors: int | None) -> Gpu:
    """The card of a capability with what was asked for instead; ``ValueError`` where nothing is known of it."""
    if capability not in GPUS and (shared_bytes is None or multiprocessors is None):
        known = ", ".join(map(str, GPUS))
        raise ValueError(f"capability: expected one of {known}, or shared_bytes and multiprocessors, got {capability}")
    known = GPUS.get(capability, Gpu(0, 0))
    found = Gpu(
        known.shared_bytes if shared_bytes is None else shared_bytes,
        known.multiprocessors if multiprocessors is None else multiprocessors,
    )
    for name, value in found._asdict().items():
        if type(value) is not int or value < 1:
            raise ValueError(f"{name}: expected a positive integer, got {value!r}")
    return found


def attributes(capability: tuple[int, int], card: Gpu) -> dict[int, int]:
    """Every attribute that the null driver answers."""
    modern = int(capability >= (9, 0))
    return {
        MAX_THREADS: 1024, MAX_BLOCK_X: 1024, MAX_BLOCK_Y: 1024, MAX_BLOCK_Z: 64,
        MAX_GRID_X: 2**31 - 1, MAX_GRID_Y: 65535, MAX_GRID_Z: 65535,
        SHARED_PER_BLOCK: DEFAULT_SHARED, SHARED_OPTIN: card.shared_bytes,
        SHARED_PER_MULTIPROCESSOR: card.shared_bytes + RESERVED, RESERVED_SHARED: RESERVED,
        WARP: 32, REGISTERS_PER_BLOCK: 65536, REGISTERS_PER_MULTIPROCESSOR: 65536,
        CLOCK: 1_980_000, MEMORY_CLOCK: 3_201_000, BUS_WIDTH: 6144, L2_BYTES: 50 << 20,
        MULTIPROCESSORS: card.multiprocessors, THREADS_PER_MULTIPROCESSOR: 2048, BLOCKS_PER_MULTIPROCESSOR: 32,
        MAJOR: capability[0], MINOR: capability[1], COOPERATIVE: 1, CLUSTERS: modern, TENSOR_MAPS: modern,
    }  # fmt: skip
