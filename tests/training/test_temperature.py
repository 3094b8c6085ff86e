import logging
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.helpers import said
from torch.nn.functional import cross_entropy

from fastlora.training.temperature import ece, fit_temperature, reliability

PROPERTY = settings(max_examples=60, deadline=None)


def sampled(rows=4000, classes=10, true_temperature=1.0, seed=0, spread=2.0):
    """Logits whose labels are drawn from softmax(logits / true_temperature)."""
    generator = torch.Generator().manual_seed(seed)
    logits = spread * torch.randn(rows, classes, generator=generator, dtype=torch.float64)
    labels = torch.multinomial((logits / true_temperature).softmax(1), 1, generator=generator)[:, 0]
    return logits, labels


def loss_at(logits, labels, temperature):
    return cross_entropy(logits.double() / temperature, labels.long()).item()


@pytest.mark.parametrize("true_temperature", [0.4, 1.0, 2.5])
def test_a_known_temperature_is_recovered(true_temperature):
    logits, labels = sampled(20000, true_temperature=true_temperature)
    assert fit_temperature(logits, labels) == pytest.approx(true_temperature, rel=0.04)


@PROPERTY
@given(st.integers(0, 10_000), st.integers(1, 40), st.integers(2, 6), st.floats(0.01, 100))
def test_the_fit_is_the_minimum_within_its_bounds(seed, rows, classes, spread):
    generator = torch.Generator().manual_seed(seed)
    logits = spread * torch.randn(rows, classes, generator=generator, dtype=torch.float64)
    labels = torch.randint(classes, (rows,), generator=generator)
    best = fit_temperature(logits, labels)
    assert type(best) is float and 0.05 <= best <= 20.0
    lowest = loss_at(logits, labels, best)
    for other in torch.logspace(math.log10(0.05), math.log10(20.0), 60, dtype=torch.float64).tolist():
        assert lowest <= loss_at(logits, labels, other) * (1 + 1e-12) + 1e-12


def test_the_slope_vanishes_at_an_inner_minimum():
    logits, labels = sampled(500, true_temperature=3.0, seed=1)
    inverse = torch.tensor(1.0 / fit_temperature(logits, labels), dtype=torch.float64, requires_grad=True)
    cross_entropy(logits * inverse, labels).backward()
    assert abs(inverse.grad.item()) < 1e-10


def test_scaled_logits_scale_the_temperature():
    logits, labels = sampled(800, true_temperature=1.7, seed=2)
    base = fit_temperature(logits, labels)
    assert fit_temperature(4.0 * logits, labels) == pytest.approx(4.0 * base, rel=1e-9)
    # Sixty-fourths stay exact beside a large offset, so that the results must be equal.
    coarse = (64.0 * logits).round() / 64.0
    assert fit_temperature(coarse + 2.0**40, labels) == fit_temperature(coarse, labels)
    assert ece(coarse + 2.0**40, labels) == ece(coarse, labels)


def test_the_fit_repeats_and_leaves_its_input_alone():
    logits, labels = sampled(300, seed=3)
    logits.requires_grad_()
    before = logits.detach().clone()
    assert fit_temperature(logits, labels) == fit_temperature(logits, labels)
    assert torch.equal(logits, before) and logits.grad is None
    with torch.inference_mode():
        inside = fit_temperature(logits.detach(), labels)
    assert inside == fit_temperature(logits, labels)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_logits_are_read_exactly(dtype):
    logits, labels = sampled(300, seed=4)
    narrow = logits.to(dtype)
    assert fit_temperature(narrow, labels) == fit_temperature(narrow.double(), labels.to(torch.uint8))
    assert ece(narrow, labels) == ece(narrow.double(), labels.int())


def test_many_rows_are_worked_off_in_chunks(monkeypatch):
    logits, labels = sampled(1000, seed=5)
    whole = fit_temperature(logits, labels), ece(logits, labels)
    monkeypatch.setattr("fastlora.training.temperature._CHUNK_ELEMENTS", 170)
    assert (fit_temperature(logits, labels), ece(logits, labels)) == pytest.approx(whole, rel=1e-9)


def test_the_bounds_end_a_fit_that_has_no_minimum():
    right = torch.eye(4).repeat(3, 1)
    labels = torch.arange(4).repeat(3)
    assert fit_temperature(right, labels) == 0.05
    assert fit_temperature(100.0 * right, labels) == 0.05
    assert fit_temperature(right, (labels + 1) % 4) == 20.0
    assert fit_temperature(torch.zeros(5, 3), torch.tensor([0, 1, 2, 0, 1])) == 1.0
    assert fit_temperature(torch.full((2, 3), 0.1), torch.tensor([0, 1])) == 1.0
    # So far apart that no temperature within the bounds changes the loss.
    assert fit_temperature(1e6 * right, labels) == 1.0


def test_extreme_logits_end():
    logits, labels = sampled(50, seed=6)
    assert 0.05 <= fit_temperature(1e300 * logits, labels) <= 20.0
    assert fit_temperature(1e-300 * logits, labels) == 0.05
    one_wrong = torch.tensor([[8.0, 0.0]] * 99 + [[0.0, 8.0]])
    best = fit_temperature(one_wrong, torch.zeros(100, dtype=torch.int64))
    # The share of right answers is .99 where 8 / T = log 99.
    assert best == pytest.approx(8.0 / math.log(99.0), rel=1e-9)


def test_an_early_stop_is_reported(caplog):
    logits, labels = sampled(300, true_temperature=6.0, seed=7)
    with caplog.at_level(logging.WARNING, logger="fastlora.training.temperature"):
        rough = fit_temperature(logits, labels, max_iter=1)
    assert "max_iter=1" in caplog.text and 0.05 <= rough <= 20.0
    caplog.clear()
    fit_temperature(logits, labels)
    assert not said(caplog)


def test_temperature_lowers_the_calibration_error():
    logits, labels = sampled(5000, true_temperature=3.0, seed=8)
    before, after = ece(logits, labels), ece(logits, labels, temperature=fit_temperature(logits, labels))
    assert before > 0.2 and after < 0.03


def two_class(confidences, hits):
    """Two-class logits with these top-label confidences; label 0 where right."""
    p = torch.tensor(confidences, dtype=torch.float64)
    logits = torch.stack([p.log(), (1 - p).log()], dim=1)
    return logits, torch.tensor([0 if hit else 1 for hit in hits])


def test_ece_by_hand():
    logits, labels = two_class([0.95, 0.92, 0.61, 0.62], [True, True, True, False])
    # Bins of .1: (.9, 1] gap |1 - .935|, (.6, .7] gap |.5 - .615|, each with half of the samples.
    assert ece(logits, labels, bins=10) == pytest.approx(0.5 * 0.065 + 0.5 * 0.115, abs=1e-12)
    assert ece(logits, labels, bins=1) == pytest.approx(abs(0.75 - 0.775), abs=1e-12)
    diagram = reliability(logits, labels, bins=10)
    assert diagram.counts.tolist() == [0, 0, 0, 0, 0, 0, 2, 0, 0, 2]
    assert diagram.confidence[[6, 9]].tolist() == pytest.approx([0.615, 0.935])
    assert diagram.accuracy[[6, 9]].tolist() == [0.5, 1.0]
    assert diagram.confidence[0].isnan() and diagram.accuracy[0].isnan()
    assert diagram.edges.tolist() == pytest.approx([index / 10 for index in range(11)])


def test_bins_are_closed_on_the_right():
    logits = torch.zeros(3, 4)
    assert reliability(logits, torch.zeros(3, dtype=torch.int64), bins=4).counts.tolist() == [3, 0, 0, 0]
    sure = torch.tensor([[1000.0, 0.0]])
    assert reliability(sure, torch.tensor([0]), bins=4).counts.tolist() == [0, 0, 0, 1]


@PROPERTY
@given(st.integers(0, 10_000), st.integers(1, 60), st.integers(2, 8), st.integers(1, 30), st.floats(0.1, 5))
def test_ece_agrees_with_a_loop(seed, rows, classes, bins, temperature):
    logits, labels = sampled(rows, classes, seed=seed)
    confidence, predicted = (logits / temperature).softmax(1).max(1)
    total = 0.0
    for index in range(bins):
        inside = (confidence > index / bins) & (confidence <= (index + 1) / bins)
        if inside.any():
            gap = (predicted[inside] == labels[inside]).double().mean() - confidence[inside].mean()
            total += inside.sum().item() / rows * abs(gap.item())
    assert ece(logits, labels, bins=bins, temperature=temperature) == pytest.approx(total, abs=1e-12)
    assert reliability(logits, labels, bins, temperature).counts.sum().item() == rows


LOGITS, LABELS = torch.zeros(3, 2), torch.tensor([0, 1, 0])


@pytest.mark.parametrize("function", [fit_temperature, ece, reliability])
@pytest.mark.parametrize(
    ("logits", "labels", "error", "message"),
    [
        (LOGITS[:0], LABELS[:0], ValueError, "logits: expected .* n >= 1"),
        (LOGITS[:, :1], LABELS, ValueError, "logits: expected .* at least 2 classes"),
        (LOGITS[:, :0], LABELS, ValueError, "logits: expected .* at least 2 classes"),
        (LOGITS[0], LABELS[:2], ValueError, r"logits: expected floating \[n, classes\]"),
        (LOGITS[None], LABELS, ValueError, r"logits: expected floating \[n, classes\]"),
        (LOGITS.long(), LABELS, ValueError, "logits: expected floating .*, got torch.int64"),
        (LOGITS + math.nan, LABELS, ValueError, "logits: expected finite numbers, got NaN or infinity"),
        (LOGITS + math.inf, LABELS, ValueError, "logits: expected finite numbers, got NaN or infinity"),
        (LOGITS, LABELS[:2], ValueError, r"labels: expected shape \[3\]"),
        (LOGITS, LABELS[:, None], ValueError, r"labels: expected shape \[3\]"),
        (LOGITS, LABELS.float(), ValueError, "labels: expected integers, got torch.float32"),
        (LOGITS, LABELS.bool(), ValueError, "labels: expected integers, got torch.bool"),
        (LOGITS, LABELS + 1, ValueError, r"labels: expected 0..1, got values from 1 to 2"),
        (LOGITS, LABELS - 1, ValueError, r"labels: expected 0..1, got values from -1 to 0"),
        (LOGITS.tolist(), LABELS, TypeError, "logits: expected a tensor, got"),
        (LOGITS, LABELS.tolist(), TypeError, "labels: expected a tensor, got"),
    ],
)
def test_bad_input(function, logits, labels, error, message):
    with pytest.raises(error, match=message):
        function(logits, labels)


@pytest.mark.parametrize("bins, kind", [(0, ValueError), (-1, ValueError), (2.0, TypeError), (True, TypeError)])
def test_bad_bins(bins, kind):
    with pytest.raises(kind, match="bins: expected an integer >= 1"):
        ece(LOGITS, LABELS, bins=bins)


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan, math.inf, "1"])
def test_bad_temperature(temperature):
    with pytest.raises(
        TypeError if temperature == "1" else ValueError, match="temperature: expected a finite number > 0"
    ):
        ece(LOGITS, LABELS, temperature=temperature)


@pytest.mark.parametrize("max_iter, kind", [(0, ValueError), (1.5, TypeError)])
def test_bad_max_iter(max_iter, kind):
    with pytest.raises(kind, match="max_iter: expected an integer >= 1"):
        fit_temperature(LOGITS, LABELS, max_iter=max_iter)


def test_ece_is_that_of_torchmetrics():
    metrics = pytest.importorskip("torchmetrics.functional.classification", exc_type=ImportError)
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(500, 7, generator=generator, dtype=torch.float64)
    labels = torch.where(torch.rand(500, generator=generator) < 0.6, logits.argmax(1), 3)
    theirs = metrics.multiclass_calibration_error(logits.softmax(1), labels, 7, n_bins=15, norm="l1")
    assert ece(logits, labels) == pytest.approx(float(theirs), rel=1e-5)
