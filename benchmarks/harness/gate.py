"""The correctness gate: no variant is timed before its numbers agree with float64."""

from __future__ import annotations

import torch
from torch import Tensor

import fastlora
from fastlora.nn.probe_rows import refreshes_norms

from .peers import HookStatistics, NaiveStatistics, Variant

# Relative error in the Frobenius norm: fp32 sums of up to 2048 terms, and one rounding of inputs kept in bf16.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


def check(variant: Variant) -> dict[str, float]:
    """Relative errors of output, gradients and statistics against float64; ``AssertionError`` names what is wrong."""
    problem = variant.problem
    _settle(variant)
    probe_rows = [] if variant.tracker is None else _probe_rows(variant.tracker)
    found, expected = variant.gradients(), problem.expected(variant.projections)
    errors = {name: _error(found[name], value) for name, value in expected.items()}
    if variant.tracker is not None:
        errors |= _statistics(variant, probe_rows, expected["y"])
    if isinstance(variant, (NaiveStatistics, HookStatistics)):
        variant.call()
        errors |= _naive(variant)
    wrong = {name: error for name, error in errors.items() if not error <= TOLERANCE[problem.dtype]}
    assert not wrong, f"{variant.name}: relative errors above {TOLERANCE[problem.dtype]}: {wrong}"
    return errors


def _settle(variant: Variant) -> None:
    """Columns are drawn by the norms of the first steps, which show them: what is judged and timed comes after."""
    if variant.tracker is None or variant.tracker.probe_kind != "columns":
        return
    while not variant.tracker.steps or refreshes_norms(variant.tracker.steps):
        variant.call()
        variant.tracker.step()
    for kind in variant.tracker.kinds:
        variant.tracker._averages.values[kind].zero_()
        variant.tracker._averages.counts[kind].zero_()


def _probe_rows(tracker: fastlora.Tracker) -> list[Tensor | None]:
    """P [k, K] of every matrix as rows whose squares are divided by k; None under the exact estimator."""
    if tracker.probe_kind != "columns":
        return [_copy(tracker.layers[path].probes["default"].P) for path, _ in tracker.matrices]
    drawn, found = tracker._sampler, []
    for i, (path, _) in enumerate(tracker.matrices):
        one_hot = torch.nn.functional.one_hot(drawn.index[i], tracker.layers[path].in_features)
        found.append(one_hot * (tracker.probes * drawn.weight[i]).sqrt().unsqueeze(1))
    return found


def _error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


def _statistics(variant: Variant, probe_rows: list[Tensor | None], y: Tensor) -> dict[str, float]:
    """Errors of one step's numbers: ``||dy^T x P^T||^2 / k`` (exact: ``||dy^T x||^2``), column variances of y."""
    tracker, problem = variant.tracker, variant.problem
    tracker.step()
    scores = {kind: list(tracker.scores(kind).values()) for kind in tracker.kinds}
    x, dy = problem.flat(problem.x), problem.flat(problem.dy)
    errors = {}
    for i, (P, p) in enumerate(zip(probe_rows, variant.projections, strict=True)):
        mine = dy[:, p.columns]
        expected = {
            "grad_sq": _squared(mine, x) if P is None else _squared(mine, x @ P.double().t()) / P.shape[0],
            "act_var": y[:, p.columns].var(dim=0, correction=0).sum(),
        }
        for kind in tracker.kinds:
            errors[f"{kind}[{i}]"] = abs(scores[kind][i] - float(expected[kind])) / float(expected[kind])
    return errors


def _copy(P: Tensor | None) -> Tensor | None:
    return None if P is None else P.clone()


def _squared(dy: Tensor, x: Tensor) -> Tensor:
    return (dy.t() @ x).square().sum()


def _naive(variant: NaiveStatistics | HookStatistics) -> dict[str, float]:
    x, dy = variant.problem.flat(variant.problem.x), variant.problem.flat(variant.problem.dy)
    expected = [_squared(part, x) for part in dy.split(list(variant.problem.shape.outputs), dim=1)]
    return {
        f"grad_sq[{i}]": abs(float(found) - float(value)) / float(value)
        for i, (found, value) in enumerate(zip(variant.grad_sq, expected, strict=True))
    }
