"""Calibration of a classifier: a scalar temperature, the expected calibration error, the reliability diagram."""

from __future__ import annotations

import logging
import math
from typing import NamedTuple

import torch
from torch import Tensor

from .._utils.errors import check_instance, check_integer, check_number, wrong_value

logger = logging.getLogger(__name__)

MIN_TEMPERATURE = 0.05
MAX_TEMPERATURE = 20.0
_TOLERANCE = 1e-11
_CHUNK_ELEMENTS = 1 << 22


class Reliability(NamedTuple):
    """Per-bin numbers of a reliability diagram, on the CPU; confidence and accuracy of an empty bin are NaN."""

    edges: Tensor
    """float64 [bins + 1], from 0 to 1; bin i holds confidences in (edges[i], edges[i + 1]]."""
    counts: Tensor
    """int64 [bins], samples in the bin."""
    confidence: Tensor
    """float64 [bins], mean top-label probability."""
    accuracy: Tensor
    """float64 [bins], share of right predictions."""


def fit_temperature(logits: Tensor, labels: Tensor, max_iter: int = 100) -> float:
    """T that minimises the mean negative log likelihood of softmax(logits / T), within [0.05, 20].

    logits [n, classes] floating, labels [n] integer. The loss is convex in 1/T: safeguarded Newton on its slope in
    float64, the same result in every run, after at most ``max_iter`` steps. Where the loss has no minimum the bound is
    returned (all predictions right: 0.05), where it does not depend on T, 1. Raises ``TypeError`` or ``ValueError``
    naming the argument for empty, non-finite or one-class logits, labels out of range, and wrong shapes or dtypes.
    Source: Guo et al., "On Calibration of Modern Neural Networks" (ICML 2017).

    >>> logits, labels = torch.tensor([[4.0, 0.0], [4.0, 0.0], [4.0, 0.0]]), torch.tensor([0, 0, 1])
    >>> fastlora.training.fit_temperature(logits, labels) > 1  # too sure: 2 of 3 are right
    True
    """
    _check(logits, labels)
    check_integer("max_iter", max_iter, 1)
    lowest, highest = 1.0 / MAX_TEMPERATURE, 1.0 / MIN_TEMPERATURE
    slope_lowest, _ = _slope_and_curvature(logits, labels, lowest)
    slope_highest, _ = _slope_and_curvature(logits, labels, highest)
    if slope_lowest == 0.0 and slope_highest == 0.0:
        return 1.0
    if slope_lowest >= 0.0:
        return MAX_TEMPERATURE
    if slope_highest <= 0.0:
        return MIN_TEMPERATURE
    inverse = 1.0
    for _ in range(max_iter):
        slope, curvature = _slope_and_curvature(logits, labels, inverse)
        if slope == 0.0:
            break
        lowest, highest = (inverse, highest) if slope < 0.0 else (lowest, inverse)
        target = inverse - slope / curvature if curvature > 0.0 else math.nan
        if abs(target - inverse) <= _TOLERANCE * inverse or highest - lowest <= _TOLERANCE * inverse:
            break
        # Newton may leave the bracket where the slope is nearly flat: then bisect, on log T.
        inverse = target if lowest < target < highest else math.sqrt(lowest * highest)
    else:
        logger.warning("fit_temperature stopped after max_iter=%d at T=%.6g, not converged", max_iter, 1.0 / inverse)
    return min(max(1.0 / inverse, MIN_TEMPERATURE), MAX_TEMPERATURE)


def ece(logits: Tensor, labels: Tensor, bins: int = 15, temperature: float = 1.0) -> float:
    """Expected calibration error ``sum_b (n_b / n) |accuracy_b - confidence_b|`` of the top label.

    logits [n, classes] floating, labels [n] integer; ``bins`` of equal width over [0, 1], closed on the right;
    probabilities are softmax(logits / temperature) in float64. Raises ``TypeError`` or ``ValueError`` as
    ``fit_temperature`` does. Source: Naeini et al., "Obtaining Well Calibrated Probabilities Using Bayesian Binning"
    (AAAI 2015).

    >>> fastlora.training.ece(torch.tensor([[0.0, 0.0], [0.0, 0.0]]), torch.tensor([0, 1]))
    0.0
    """
    diagram = reliability(logits, labels, bins, temperature)
    filled = diagram.counts > 0
    gaps = (diagram.accuracy[filled] - diagram.confidence[filled]).abs()
    return float((gaps * diagram.counts[filled]).sum() / diagram.counts.sum())


def reliability(logits: Tensor, labels: Tensor, bins: int = 15, temperature: float = 1.0) -> Reliability:
    """Counts, mean confidence and accuracy per confidence bin: n_b, conf_b and acc_b of :func:`ece`.

    Arguments and errors are those of :func:`ece`.

    >>> fastlora.training.reliability(torch.tensor([[9.0, 0.0]]), torch.tensor([0]), bins=2).counts
    tensor([0, 1])
    """
    _check(logits, labels)
    check_integer("bins", bins, 1)
    check_number("temperature", temperature, above=0)
    confidences, hits = [], []
    for rows, row_labels in _chunks(logits, labels):
        top, predicted = (rows / temperature).softmax(dim=1).max(dim=1)
        confidences.append(top.cpu())
        hits.append((predicted == row_labels).cpu())
    confidence = torch.cat(confidences).clamp(max=1.0)
    hit = torch.cat(hits).double()
    edges = torch.linspace(0.0, 1.0, bins + 1, dtype=torch.float64, device="cpu")
    index = torch.bucketize(confidence, edges[1:-1])
    counts = torch.bincount(index, minlength=bins)
    mean_confidence = torch.bincount(index, weights=confidence, minlength=bins) / counts
    accuracy = torch.bincount(index, weights=hit, minlength=bins) / counts
    return Reliability(edges, counts, mean_confidence, accuracy)


def _slope_and_curvature(logits: Tensor, labels: Tensor, inverse: float) -> tuple[float, float]:
    """First and second derivative of the mean negative log likelihood in the inverse temperature."""
    slope = curvature = 0.0
    for rows, row_labels in _chunks(logits, labels):
        probabilities = (inverse * rows).softmax(dim=1)
        mean = (probabilities * rows).sum(dim=1, keepdim=True)
        slope += float((mean - rows.gather(1, row_labels[:, None])).sum())
        curvature += float((probabilities * (rows - mean) ** 2).sum())
    return slope / len(labels), curvature / len(labels)


def _chunks(logits: Tensor, labels: Tensor):
    """Pairs of float64 rows, shifted so that the largest is 0, and int64 labels: bounds the float64 copies."""
    # MPS has no float64.
    device = "cpu" if logits.device.type == "mps" else logits.device
    rows = max(1, _CHUNK_ELEMENTS // logits.shape[1])
    for part, part_labels in zip(logits.detach().split(rows), labels.split(rows), strict=True):
        wide = part.to(device).double()
        yield wide - wide.amax(dim=1, keepdim=True), part_labels.to(device).long()


def _check(logits: Tensor, labels: Tensor) -> None:
    for name, value in (("logits", logits), ("labels", labels)):
        check_instance(name, value, Tensor, "a tensor")
    if not logits.is_floating_point() or logits.dim() != 2 or logits.shape[0] == 0 or logits.shape[1] < 2:
        raise wrong_value("logits", "floating [n, classes], n >= 1 and at least 2 classes", logits)
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise wrong_value("labels", "integers", labels)
    if tuple(labels.shape) != (logits.shape[0],):
        raise wrong_value("labels", f"shape [{logits.shape[0]}], one for each row of logits", labels)
    if not bool(torch.isfinite(logits).all()):
        raise ValueError("logits: expected finite numbers, got NaN or infinity")
    smallest, largest = int(labels.min()), int(labels.max())
    if smallest < 0 or largest >= logits.shape[1]:
        raise ValueError(f"labels: expected 0..{logits.shape[1] - 1}, got values from {smallest} to {largest}")
