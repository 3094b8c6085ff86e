"""What goes wrong in ``benchmarks/device`` on purpose, in a process of its own: a fault is said, and nothing lost."""

from __future__ import annotations

import contextlib
import tempfile
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from unittest import mock

import torch
from device import cases, measure, models, run, sweep
from device.cases import TINY
from fastlora.kernels import (
    expand_backward,
    gradstat,
    linear,
    linear_backward,
    primitives,
    shrink,
    shrink_linear,
    shrink_linear_backward,
    tiling,
    wgrad,
)
from triton.runtime import driver

from fastlora.testing import enable_torchvision


def fails(*given: object, **options: object) -> None:
    raise RuntimeError("on purpose")


def wrong_results_are_seen() -> None:
    for name in ("deit_base_qkv", "roberta_base_qkv"):
        operands = sweep.Operands(TINY[name], "cpu")
        assert len(operands.W) == (1 if TINY[name].fused else 3)
        for verb in sweep.VERBS:
            right = sweep.wanted(operands, verb)
            off = [part.clone() for part in right]
            off[0].view(-1)[: off[0].numel() // 8 + 1] = 0
            shapes = {
                "linear": lambda parts: ([parts[0]], []),
                "shrink_linear": lambda parts: ([parts[0]], parts[1], []),
                "gradstat_diagonal": lambda parts: tuple(parts),
            }
            shapes |= dict.fromkeys(
                ("wgrad", "expand_backward", "shrink_linear_backward"), lambda parts: tuple([part] for part in parts)
            )
            as_found = shapes.get(verb, lambda parts: parts[0])
            assert sweep.fault(verb, as_found(right), right) is None
            assert "wrong by" in sweep.fault(verb, as_found(off), right)
            off[0].fill_(float("nan"))
            assert "wrong by nan" in sweep.fault(verb, as_found(off), right)


def measurements_are_filed_where_kernels_look() -> None:
    """Under the sizes of a case that its kernels give to the choice of a tile, and of a strategy."""
    modules = linear, linear_backward, wgrad, shrink, gradstat, shrink_linear, shrink_linear_backward, expand_backward
    for case in cases.CASES.values():
        for verb in sweep.VERBS:
            asked: list[tuple[int, ...]] = []
            directions: list[tuple[int, ...]] = []

            def choose(operation, *sizes, asked=asked, verb=verb):
                asked.extend([sizes[:4]] if operation == verb else [])
                return tiling.TileConfig(16, 16, 16, 4, 2)

            def choose_strategy(direction, *sizes, asked=directions, verb=verb):
                asked.extend([sizes[:4]] if direction == sweep.DIRECTIONS.get(verb) else [])
                return {"forward": "library", "backward": "library"}.get(direction, "separate")

            def choose_filling(operation, programs, N, K, *rest, asked=asked, verb=verb):
                return choose(operation, 0, N, K, 0, asked=asked, verb=verb)

            with contextlib.ExitStack() as stack:
                answers = {"choose_tiles": choose, "choose_filling": choose_filling, "choose_strategy": choose_strategy}
                for module in modules:
                    for name, answer in answers.items():
                        if hasattr(module, name):
                            stack.enter_context(mock.patch.object(module, name, answer))
                stack.enter_context(mock.patch.object(primitives, "launcher", lambda *given, **options: None))
                operands = sweep.Operands(case, "meta")
                sweep.Job(verb, case, "fused", None).call(operands)()
                if verb in sweep.DIRECTIONS:
                    sweep.Job(verb, case, None, None).call(operands)()
            assert asked == [sweep.sizes(verb, case)], (verb, case, asked)
            if verb in sweep.DIRECTIONS:
                assert directions == [sweep.sizes(verb, case, strategy=True)], (verb, case, directions)


def a_candidate_that_fails_is_a_row() -> None:
    (jobs,) = [some[:1] for some in sweep.jobs({"tiny": TINY["deit_base_qkv"]}, True) if some[0].verb == "gradstat"]
    assert sweep.measure("cpu", [jobs], -1.0) == []
    with mock.patch.object(sweep, "calls", lambda *given: fails):
        (row,) = sweep.measure("cpu", [jobs], 60.0)
    assert row["error"] == "RuntimeError: on purpose"
    with mock.patch.object(sweep, "calls", lambda *given: lambda: torch.zeros(3, 1, 2)):
        (row,) = sweep.measure("cpu", [jobs], 60.0)
    assert row["error"].startswith("ArithmeticError: wrong by 1"), row
    before = primitives.launcher, driver._active
    try:
        assert sweep.compile_one(jobs[0], (9, 0)) is None
        with mock.patch.object(sweep, "calls", lambda *given: fails):
            assert sweep.compile_one(jobs[0], (9, 0)).endswith("RuntimeError: on purpose")
    finally:
        primitives.launcher, driver._active = before


def a_table_without_its_marks_is_refused() -> None:
    with tempfile.NamedTemporaryFile("w", suffix=".py") as file:
        try:
            sweep.fill(Path(file.name), {})
        except SystemExit as refused:
            assert "begin measured" in str(refused)
        else:
            raise AssertionError("nothing was refused")


def a_package_or_a_program_that_is_not_there_is_said() -> None:
    with mock.patch.object(run, "version", side_effect=PackageNotFoundError):
        assert set(run._versions().values()) == {"checkout"}
    assert run._output("no-such-program") == ""


def a_variant_that_fails_is_missing() -> None:
    kept = []
    with mock.patch.dict(cases.BUILDERS, frozen=fails):
        run.run([TINY["deit_base_qkv"]], ["frozen"], "cpu", 60.0, 1, lambda result, text: kept.append(text))
    assert "- missing: deit_base_qkv frozen: RuntimeError: on purpose" in kept[-1]


def a_step_that_cannot_be_captured_keeps_its_eager_row() -> None:
    case = models.model_cases(True)["llama_8_layers_step"]
    with measure.device_of("null") as device, mock.patch.object(measure, "captured", fails):
        rows = run._measure_model(case, "frozen", device, torch.bfloat16, (1.0, 1.0), 1)
    assert [row["mode"] for row in rows] == ["eager"]


if __name__ == "__main__":
    enable_torchvision()
    a_step_that_cannot_be_captured_keeps_its_eager_row()  # first: the null GPU comes before the first backward
    wrong_results_are_seen()
    measurements_are_filed_where_kernels_look()
    a_candidate_that_fails_is_a_row()
    a_table_without_its_marks_is_refused()
    a_variant_that_fails_is_missing()
    a_package_or_a_program_that_is_not_there_is_said()
