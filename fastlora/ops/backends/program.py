"""A recorded program, without what nobody reads, as a plan that the native library runs."""

from __future__ import annotations

from typing import Any

from ..._plan import Builder
from .recorder import Allocate, Call, Fill, Launch, Multiply, Program, Step, View


def build(program: Program) -> Any:
    """The finished plan: ``number`` is what the operators know it by."""
    steps = needed(program)
    builder = Builder(program.inputs, len(program.constants))
    slots = {i: i for i in range(program.inputs)} | {
        slot: program.inputs + i for i, slot in enumerate(program.constants)
    }
    last = _last_reader(program, steps)
    for i, step in enumerate(steps):
        _add(builder, step, slots)
        gone = [slots[slot] for slot, reader in last.items() if reader == i]
        if gone:
            builder.release(gone)
    return builder.finish([-1 if slot == -1 else slots[slot] for slot in program.results])


def needed(program: Program) -> list[Step]:
    """The steps that a launch, a change of memory or a result depends on."""
    live, kept = set(program.results), []
    for step in reversed(program.steps):
        pure = isinstance(step, (Allocate, View)) or (isinstance(step, Call) and not step.mutable)
        if pure and live.isdisjoint(_made(step)):
            continue
        live.update(_read(step))
        kept.append(step)
    return kept[::-1]


def _made(step: Step) -> tuple[int, ...]:
    if isinstance(step, Call):
        return step.results
    return (step.out,) if isinstance(step, (Allocate, View)) else ()


def _read(step: Step) -> list[int]:
    if isinstance(step, (View, Fill)):
        return [step.base if isinstance(step, View) else step.out]
    if isinstance(step, Multiply):
        return [slot for slot in step if slot != -1]
    if isinstance(step, Call):
        return [slot for kind, _, value in step.arguments for slot in _slots_of(kind, value)]
    return [slot for _, slot, _ in step.holes] if isinstance(step, Launch) else []


def _slots_of(kind: str, value: Any) -> tuple[int, ...]:
    if kind == "tensor":
        return (value,)
    return value if kind == "tensors" else ()


def _last_reader(program: Program, steps: list[Step]) -> dict[int, int]:
    """Of each tensor that a step makes and no result keeps: the last step that needs it.

    Memory stays as long as a view of it, which has its own reference.
    """
    last: dict[int, int] = {}
    for i, step in enumerate(steps):
        for slot in (*_made(step), *_read(step)):
            last[slot] = i
    kept = set(program.results) | set(range(program.inputs)) | set(program.constants) | {-1}
    return {slot: i for slot, i in last.items() if slot not in kept}


def _add(builder: Any, step: Step, slots: dict[int, int]) -> None:
    if isinstance(step, Allocate):
        slots[step.out] = builder.allocate(step.dtype, step.sizes, step.strides, step.zero)
    elif isinstance(step, Fill):
        builder.fill(slots[step.out], step.number)
    elif isinstance(step, View):
        slots[step.out] = builder.view(slots[step.base], step.sizes, step.strides, step.offset)
    elif isinstance(step, Multiply):
        builder.multiply(*[-1 if slot == -1 else slots[slot] for slot in step])
    elif isinstance(step, Call):
        arguments = [(kind, optional, _placed(kind, value, slots)) for kind, optional, value in step.arguments]
        found = builder.call(step.name, step.overload, arguments, [slot != -1 for slot in step.results])
        slots.update(zip([slot for slot in step.results if slot != -1], found, strict=True))
    else:
        holes = [(position, slots[slot], offset) for position, slot, offset in step.holes]
        builder.launch(
            step.name, step.function, step.grid, step.block, step.shared_bytes, step.attributes, step.values, holes
        )


def _placed(kind: str, value: Any, slots: dict[int, int]) -> Any:
    if kind == "tensor":
        return slots[value]
    return [slots[slot] for slot in value] if kind == "tensors" else value
