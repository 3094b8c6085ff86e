"""Writes down what a computation on a GPU does: what it allocates, what it asks of torch, which kernels it starts."""

from __future__ import annotations

import contextlib
import re
import struct
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextvars import copy_context
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..._utils.torch_compat import dispatch_mode, schema_of
from ...kernels import constants, primitives


class NotPlannable(Exception):
    """Why a computation cannot be written down."""


class Allocate(NamedTuple):
    out: int
    dtype: str
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    zero: bool


class Fill(NamedTuple):
    """Every element of ``out`` becomes the number."""

    out: int
    number: float


class View(NamedTuple):
    """Other sizes of ``base``'s memory, ``offset`` elements behind its first."""

    out: int
    base: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int


class Multiply(NamedTuple):
    """``out = added + a b`` by the library's matmul; added -1: nothing."""

    out: int
    added: int
    a: int
    b: int


class Call(NamedTuple):
    """Any other operator of torch. arguments: (kind, whether the schema says optional, value); results: -1 not kept."""

    name: str
    overload: str
    arguments: tuple[tuple[str, bool, Any], ...]
    results: tuple[int, ...]
    mutable: bool


class Launch(NamedTuple):
    """One start of a compiled kernel. values: the bytes of each argument in a word; holes: (position, slot, bytes)."""

    name: str
    function: int
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared_bytes: int
    attributes: tuple[tuple[int, tuple[int, ...]], ...]
    values: tuple[int, ...]
    holes: tuple[tuple[int, int, int], ...]


Step = Allocate | Fill | View | Multiply | Call | Launch


class Program(NamedTuple):
    """Steps over slots: first the inputs, and then, as they come, constants and what the steps make."""

    inputs: int
    constants: dict[int, Tensor]
    steps: tuple[Step, ...]
    results: tuple[int, ...]  # -1: None
    kernels: dict[int, Any]  # compiled, by function: Triton may unload what nobody holds


_ALLOCATES = {
    "aten::empty": False,
    "aten::empty_strided": False,
    "aten::empty_like": False,
    "aten::new_empty": False,
    "aten::new_empty_strided": False,
    "aten::zeros": True,
    "aten::zeros_like": True,
    "aten::new_zeros": True,
}
# Names of the number's argument.
_FILLS = {"aten::full": "fill_value", "aten::full_like": "fill_value", "aten::new_full": "fill_value"}
# New tensors with the values of another.
_COPIES = ("aten::contiguous", "aten::clone", "aten::to", "aten::_to_copy")
# CUlaunchAttributeID, in the order in which Triton's launcher sets them.
_PROGRAMMATIC, _COOPERATIVE, _CLUSTER, _CLUSTER_POLICY = 6, 2, 4, 5
_SPREAD = 1  # CU_CLUSTER_SCHEDULING_POLICY_SPREAD
_one_at_a_time = threading.Lock()
BUSY = "another thread is recording"


class Recorder(dispatch_mode):
    """Runs a computation as it is and writes down a program with the same effect, or the ``problem`` with that.

    Tensors are told apart by what they are and not by where they lie: two inputs that share memory today stay two.
    """

    def __init__(self, inputs: Sequence[Tensor]):
        super().__init__()
        # Objects of this recording alone, so that the same tensor given twice is two inputs.
        self.inputs = [t.detach() for t in inputs]
        self.device = self.inputs[0].device
        self.problem: str | None = None
        self._thread = threading.get_ident()
        self._slots: dict[int, int] = {id(t): i for i, t in enumerate(self.inputs)}
        # Slot -> (slot that owns the memory, elements from its first), and the tensors, whose ids must stay theirs.
        self._roots: dict[int, tuple[int, int]] = {}
        self._kept: list[Tensor] = []
        self._constants: dict[int, Tensor] = {}
        self._kernels: dict[int, Any] = {}
        self._steps: list[Step] = []
        self._next = len(self.inputs)
        self._scratch: Tensor | None = None

    def record(self, compute: Callable[[list], Sequence[Tensor | None]]) -> tuple[list[Tensor | None], Program | None]:
        """The computation's outputs and its program, None with a ``problem``."""
        if not _one_at_a_time.acquire(blocking=False):
            self.problem = BUSY
            return list(compute(self.inputs)), None
        try:
            with self._launches(), self:
                out = list(compute(self.inputs))
        finally:
            _one_at_a_time.release()
        results: tuple[int, ...] = ()
        if self.problem is None:
            with self._noting():
                results = tuple([-1 if t is None else self._slot(t, "the caller") for t in out])
        if self.problem is not None:
            return out, None
        return out, Program(len(self.inputs), self._constants, tuple(self._steps), results, self._kernels)

    @contextlib.contextmanager
    def _noting(self) -> Iterator[None]:
        try:
            yield
        except NotPlannable as problem:
            self.problem = str(problem)

    @contextlib.contextmanager
    def _launches(self) -> Iterator[None]:
        """Inside, launches of this thread come here."""
        before = primitives.launcher

        def launcher(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
            if threading.get_ident() != self._thread:
                before(kernel, grid, *arguments, **options)
                return
            self._scratch = None
            compiled = copy_context().run(self._start, kernel, grid, arguments, options)
            if self.problem is None:
                with self._noting():
                    self._note_launch(kernel, grid, arguments, options, compiled)

        primitives.launcher = launcher
        try:
            yield
        finally:
            primitives.launcher = before

    def _start(self, kernel: Any, grid: tuple[int, ...], arguments: tuple, options: dict[str, Any]) -> Any:
        import triton

        triton.set_allocator(self._workspace)
        return kernel[grid](*arguments, **options)

    def _workspace(self, size: int, alignment: int, stream: int | None) -> Tensor:
        self._scratch = torch.empty(size, dtype=torch.int8, device=self.device)
        return self._scratch

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if self.problem is None and not constants.making():
            with self._noting():
                self._note(schema_of(func), args, kwargs or {}, out)
        return out

    def _note(self, schema: Any, args: tuple, kwargs: dict[str, Any], out: Any) -> None:
        given = [
            args[i] if i < len(args) else kwargs.get(a.name, a.default_value) for i, a in enumerate(schema.arguments)
        ]
        given_tensors = list(_tensors(given))
        made = [t for t in _tensors([out]) if not any(t is other for other in given_tensors)]
        for tensor in made:
            if tensor.device != self.device:
                raise NotPlannable(f"{schema.name} makes a tensor on {tensor.device}, the inputs are on {self.device}")
        outputs = [] if out is None else list(out) if isinstance(out, (list, tuple)) else [out]
        if not all([isinstance(t, Tensor) for t in outputs]):
            raise NotPlannable(f"{schema.name} returns {type(out).__name__} to the host")
        if schema.name in _ALLOCATES:
            self._allocate(made[0], _ALLOCATES[schema.name])
            return
        if schema.name in _FILLS:
            names = [argument.name for argument in schema.arguments]
            self._fill(self._allocate(made[0]), given[names.index(_FILLS[schema.name])])
            return
        if schema.is_mutable:
            self._refuse_changed_inputs(schema, given)
            if (schema.name, schema.overload_name) == ("aten::fill_", "Scalar"):
                self._fill(self._slot(given[0], schema.name), given[1])
                return
        elif not made:
            return
        elif all([t.numel() == 0 or _owner(t, given_tensors) is not None for t in made]):
            for tensor in made:
                self._view(tensor, _owner(tensor, given_tensors))
            return
        if schema.name in _COPIES:
            source, target = self._slot(given[0], schema.name), self._allocate(made[0])
            arguments = (("tensor", False, target), ("tensor", False, source), ("bool", False, False))
            self._steps.append(Call("aten::copy_", "", arguments, (-1,), True))
        elif not self._multiply(schema, given, made):
            self._call(schema, given, outputs, made)

    def _refuse_changed_inputs(self, schema: Any, given: list) -> None:
        for argument, value in zip(schema.arguments, given, strict=True):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            for tensor in _tensors([value]):
                owner, _ = self._root(self._slot(tensor, schema.name))
                if owner < len(self.inputs) or owner in self._constants:
                    raise NotPlannable(f"{schema.name} changes a tensor that it did not make")

    def _allocate(self, tensor: Tensor, zero: bool = False) -> int:
        if tensor.layout != torch.strided:
            raise NotPlannable(f"a tensor of layout {tensor.layout} is made")
        out = self._new(tensor)
        self._steps.append(Allocate(out, _name(tensor.dtype), tuple(tensor.shape), tensor.stride(), zero))
        return out

    def _fill(self, out: int, number: Any) -> None:
        if not isinstance(number, (bool, int, float)) or float(number) != number:
            raise NotPlannable(f"a tensor is filled with {number!r}")
        self._steps.append(Fill(out, float(number)))

    def _view(self, tensor: Tensor, base: Tensor | None) -> None:
        if base is None or tensor.numel() == 0:
            # Nothing in it, and so nothing to share.
            self._allocate(tensor)
            return
        if tensor.dtype != base.dtype or tensor.layout != torch.strided:
            raise NotPlannable(f"a tensor of {base.dtype} is seen as {tensor.dtype}")
        slot = self._slot(base, "a view")
        offset = tensor.storage_offset() - base.storage_offset()
        if offset == 0 and tensor.shape == base.shape and tensor.stride() == base.stride():
            self._slots[id(tensor)] = slot
            self._kept.append(tensor)
            return
        out = self._new(tensor)
        owner, first = self._root(slot)
        self._roots[out] = owner, first + offset
        self._steps.append(View(out, owner, tuple(tensor.shape), tensor.stride(), first + offset))

    def _multiply(self, schema: Any, given: list, made: list[Tensor]) -> bool:
        """Whether it was a product of matrices that the library's own matmul makes from two or three tensors."""
        kind = schema.name, schema.overload_name
        if kind in (("aten::mm", ""), ("aten::mm", "out")):
            a, b = given[:2]
            target, added = (made[0] if made else given[2]), None
        elif kind in (("aten::addmm", ""), ("aten::addmm_", ""), ("aten::addmm", "out")) and given[3:5] == [1, 1]:
            added, a, b = given[:3]
            target = made[0] if made else given[5] if schema.overload_name else added
        else:
            return False
        operands = [-1 if t is None else self._slot(t, schema.name) for t in (added, a, b)]
        out = self._allocate(target) if made else self._slot(target, schema.name)
        self._steps.append(Multiply(out, *operands))
        return True

    def _call(self, schema: Any, given: list, outputs: list[Tensor], made: list[Tensor]) -> None:
        arguments = tuple(
            [self._argument(schema.name, a.real_type, value) for a, value in zip(schema.arguments, given, strict=True)]
        )
        if len(outputs) != len(schema.returns):
            raise NotPlannable(f"{schema.name} returns a list of tensors")
        results = tuple([self._new(t) if any(t is other for other in made) else -1 for t in outputs])
        self._steps.append(Call(schema.name, schema.overload_name, arguments, results, schema.is_mutable))

    def _argument(self, operator: str, kind: Any, value: Any) -> tuple[str, bool, Any]:
        optional = isinstance(kind, torch.OptionalType)
        if value is None:
            return "none", optional, None
        name = str(kind.getElementType() if optional else kind)
        if name == "Tensor" and isinstance(value, Tensor):
            return "tensor", optional, self._slot(value, operator)
        if name == "List[Tensor]":
            return "tensors", optional, tuple([self._slot(t, operator) for t in value])
        if isinstance(value, torch.dtype):
            return "dtype", optional, _name(value)
        if name in ("int", "SymInt") and type(value) is int:
            return "int", optional, value
        if name in ("List[int]", "List[SymInt]") and all([type(v) is int for v in value]):
            return "ints", optional, tuple(value)
        if name in ("bool", "float") and isinstance(value, (bool, int, float)):
            return name, optional, value
        raise NotPlannable(f"{operator} takes {value!r} as {name}, which torch's stable ABI cannot pass on")

    def _note_launch(
        self, kernel: Any, grid: tuple[int, ...], arguments: tuple, options: dict[str, Any], compiled: Any
    ) -> None:
        name = getattr(kernel, "__name__", repr(kernel))
        if compiled is None or getattr(compiled.metadata.target, "backend", None) != "cuda":
            raise NotPlannable(f"{name} was not compiled for a CUDA GPU")
        grid = (*grid, 1, 1)[:3]
        if 0 in grid:
            return
        words = list(self._words(name, compiled, kernel.arg_names, arguments, options))
        _check_parameters(name, compiled.asm.get("ptx", ""), [word.size for word in words])
        holes, metadata = [], compiled.metadata
        for position, word in enumerate(words):
            if word.tensor is not None and word.tensor.numel():
                owner, first = self._root(self._slot(word.tensor, name))
                holes.append((position, owner, first * word.tensor.element_size()))
        self._kernels[compiled.function] = compiled
        self._steps.append(
            Launch(
                name,
                compiled.function,
                (grid[0] * metadata.num_ctas, *grid[1:]),
                (metadata.num_warps * metadata.target.warp_size, 1, 1),
                metadata.shared,
                _attributes(metadata),
                tuple([word.number for word in words]),
                tuple(holes),
            )
        )

    def _words(
        self, name: str, compiled: Any, names: Sequence[str], arguments: tuple, options: dict[str, Any]
    ) -> Iterator[_Word]:
        """The arguments in the order in which the kernel takes them."""
        given = {**dict(zip(names, arguments, strict=False)), **options}
        for argument, kind in compiled.src.signature.items():
            if kind != "constexpr":
                yield from _flat(f"{name}'s {argument}", kind, given.get(argument))
        if compiled.metadata.profile_scratch_size:
            raise NotPlannable(f"{name} was compiled with instrumentation")
        if compiled.metadata.global_scratch_size and self._scratch is None:
            raise NotPlannable(f"{name} asked for memory that was not seen")
        yield _Word(0, 8, self._scratch)
        yield _Word(0, 8)

    def _new(self, tensor: Tensor) -> int:
        slot, self._next = self._next, self._next + 1
        self._slots[id(tensor)] = slot
        self._kept.append(tensor)
        return slot

    def _slot(self, tensor: Tensor, reader: str) -> int:
        slot = self._slots.get(id(tensor))
        if slot is None:
            if not constants.is_constant(tensor):
                raise NotPlannable(f"{reader} reads a tensor that is neither an input nor made by the call")
            slot = self._new(tensor)
            self._constants[slot] = tensor
        return slot

    def _root(self, slot: int) -> tuple[int, int]:
        return self._roots.get(slot, (slot, 0))


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def _owner(tensor: Tensor, given: Sequence[Tensor]) -> Tensor | None:
    """The tensor whose memory another one shares."""
    if tensor.layout != torch.strided:
        return None
    place = tensor.untyped_storage().data_ptr()
    return next((t for t in given if place and t.untyped_storage().data_ptr() == place), None)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class _Word(NamedTuple):
    """An argument of a kernel: its number and size in bytes, or the tensor whose address it is."""

    number: int
    size: int
    tensor: Tensor | None = None


_FLOATS = {"fp32": "<f", "f32": "<f", "fp64": "<d"}


def _flat(where: str, kind: Any, value: Any) -> Iterator[_Word]:
    """The words of one argument by its type in the kernel's signature; what was compiled in has none."""
    if isinstance(kind, tuple):
        for i, (inner, part) in enumerate(zip(kind, value, strict=True)):
            yield from _flat(f"{where}[{i}]", inner, part)
    elif kind == "constexpr":
        return
    elif kind.startswith("*") and isinstance(value, Tensor):
        yield _Word(0, 8, value)
    elif (bits := re.fullmatch(r"[iu](\d+)", kind)) and isinstance(value, (bool, int)):
        yield _Word(int(value) & 0xFFFFFFFFFFFFFFFF, max(int(bits[1]) // 8, 1))
    elif kind in _FLOATS and isinstance(value, (int, float)):
        encoded = struct.pack(_FLOATS[kind], value)
        yield _Word(int.from_bytes(encoded, "little"), len(encoded))
    else:
        raise NotPlannable(f"{where} is {type(value).__name__} for {kind}")


def _attributes(metadata: Any) -> tuple[tuple[int, tuple[int, ...]], ...]:
    """What Triton's launcher asks of the driver beside grid, block and shared memory."""
    found = []
    if metadata.launch_pdl:
        found.append((_PROGRAMMATIC, (1,)))
    if metadata.launch_cooperative_grid:
        found.append((_COOPERATIVE, (1,)))
    if metadata.num_ctas != 1:
        found += [(_CLUSTER, (metadata.num_ctas, 1, 1)), (_CLUSTER_POLICY, (_SPREAD,))]
    return tuple(found)


def _check_parameters(name: str, ptx: str, sizes: list[int]) -> None:
    """That the kernel takes arguments of just these sizes: another Triton may pass others."""
    entry = re.search(r"\.visible \.entry [^(]*\(([^)]*)\)", ptx)
    taken = [int(bits) // 8 for bits in re.findall(r"\.param \.[a-z](\d+)", entry[1])] if entry else []
    if taken != sizes:
        raise NotPlannable(f"{name} takes arguments of {taken} bytes, its signature says {sizes}")
