"""Scores from a few backward passes, with the model left as it was."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .choices import unknown
from .nn.linear import DEFAULT
from .parallel import ranks_of, several_processes, unwrapped
from .progress import Report, reporting
from .restoring import restored
from .scores import Scores, composite
from .tracker import Tracker, track
from .update_variance import UpdateVariance


class Calibration(Scores):
    """Scores that know how they settled: still a mapping of matrix key to importance."""

    __slots__ = ("_settled",)

    def __init__(self, scores: Scores, settled: Sequence[float]):
        super().__init__(dict(scores), scores.kind, scores.signed, scores.costs)
        object.__setattr__(self, "_settled", tuple(settled))

    @property
    def settled(self) -> tuple[float, ...]:
        """Spearman's rank correlation of each estimate with the one before it, from the second batch on.

        Near 1 at the end: more batches would hardly change the order. NaN where an estimate was missing or constant.
        """
        return self._settled

    def __reduce__(self) -> tuple:
        return Calibration, (Scores(dict(self), self.kind, self.signed, self.costs), self._settled)


class Method(NamedTuple):
    """What to collect during the passes, and the scores it makes: ``score(collector)`` is called after each batch."""

    collect: Callable[[nn.Module, str, Any], AbstractContextManager]  # of model, adapter, process_group
    score: Callable[[Any], Mapping[str, float]]


def _exact(*kinds: str) -> Callable[[nn.Module, str, Any], AbstractContextManager[Tracker]]:
    return lambda model, adapter, group: track(
        model, "exact", ema=None, statistics=kinds, adapter=adapter, process_group=group
    )


def _update_variance(centred: bool) -> Callable[[nn.Module, str, Any], AbstractContextManager[UpdateVariance]]:
    return lambda model, adapter, group: UpdateVariance(model, adapter, centred, group)


def _composite(normalise: str) -> Callable[[Tracker], Scores]:
    def score(tracker: Tracker) -> Scores:
        parts = tracker.scores("grad_sq", reduce="mean"), tracker.scores("grad_abs"), tracker.scores("act_var")
        return composite(*parts, normalise=normalise)

    return score


METHODS: dict[str, Method] = {
    "fc": Method(_exact("grad_sq", "grad_abs", "act_var"), _composite("zscore")),
    "fc_original": Method(_exact("grad_sq", "grad_abs", "act_var"), _composite("minmax")),
    "fim": Method(_update_variance(False), UpdateVariance.scores),
    "fw": Method(_exact("grad_sq"), lambda tracker: tracker.scores("grad_sq")),
}


def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    loss_fn: Callable[[nn.Module, Any], Tensor],
    steps: int | None = 8,
    method: str | Callable[[Tracker], Mapping[str, float]] = "fc",
    *,
    centred: bool = False,
    progress: bool | Report | None = None,
    adapter: str = DEFAULT,
    process_group: Any = "auto",
) -> Calibration:
    """One score a matrix from ``steps`` backward passes; ``allocate`` makes ranks of them.

    - ``"fc"``: ``0.6 z(grad_sq / NK) + 0.2 z(grad_abs) + 0.2 z(act_var)`` (FC-LoRA); ``"fc_original"``: min-max for
      z, as published; ``"fw"``: mean ``grad_sq`` (FW-LoRA). All exact.
    - ``"fim"``: mean over entries and passes of dB² at B = 0 (FIM-LoRA); ``centred`` subtracts the squared mean.
    - a callable gets the tracker, which holds exact grad_sq, fisher, grad_abs and act_var, after each batch.

    ``loss_fn(model, batch)`` returns a scalar loss. Exactly ``steps`` items are taken from ``batches``; None takes all.
    ``progress``: True shows a bar (tqdm), None does so in a terminal and logs otherwise, False does neither; a callable
    gets ``(done, steps, rank correlation with the estimate before)``, which ``settled`` of the result keeps.

    ``process_group``: whose ranks take part, each with its own batches and all of them in this call; their batches are
    one, and every rank gets the same scores. ``"auto"``: the ranks that train the model, or all processes that
    ``torch.distributed`` runs; None: this one alone.

    Gradients, requires_grad, buffers, modes and RNG states are put back, also after an error. Raises ``ValueError``
    naming the argument: batches that run out, a loss that is not a finite scalar or has no gradient, gradients that
    are never finite, a matrix that no gradient reaches, B that is not zero under ``"fim"``.
    """
    chosen = _chosen(method, centred)
    _check_call(batches, loss_fn, steps)
    inner, group = unwrapped(model), _group(model, process_group)
    ranks = ranks_of(model, group)
    with (
        restored(inner, adapter),
        chosen.collect(model, adapter, group) as collector,
        reporting(progress, steps) as report,
    ):
        done, estimate, settled = 0, None, []
        items = itertools.islice(batches, steps)
        for batch in items if ranks is None else ranks.in_step(items):
            loss = loss_fn(model, batch)
            _check_loss(loss, done)
            loss.backward()
            collector.step()
            done, before, estimate = done + 1, estimate, _estimate(chosen, collector)
            if done > 1:
                settled.append(_correlation(before, estimate))
            report(done, steps, settled[-1] if settled else math.nan)
        _check_enough(done, steps, collector.skipped)
        if estimate is None:
            estimate = _final(chosen, collector, done, callable(method))
        found = Calibration(estimate, settled)
        # Sums are the same everywhere, but kinds of processors may round what is made of them differently.
        return found if ranks is None else ranks.from_first(found)


def _check_call(batches: Any, loss_fn: Any, steps: Any) -> None:
    if steps is not None and (isinstance(steps, bool) or not isinstance(steps, int) or steps < 1):
        raise ValueError(f"steps: expected a positive integer or None for all batches, got {steps!r}")
    if not isinstance(batches, Iterable) and not hasattr(batches, "__getitem__"):
        raise ValueError(f"batches: expected an iterable of batches, got {type(batches).__name__}")
    if not callable(loss_fn):
        raise ValueError(f"loss_fn: expected a callable (model, batch) -> loss, got {type(loss_fn).__name__}")


def _group(model: nn.Module, process_group: Any) -> Any:
    alone = isinstance(process_group, str) and ranks_of(model, process_group) is None
    return torch.distributed.group.WORLD if alone and several_processes() else process_group


def _chosen(method: Any, centred: bool) -> Method:
    if callable(method):
        chosen = Method(_exact("grad_sq", "fisher", "grad_abs", "act_var"), method)
    elif isinstance(method, str) and method in METHODS:
        chosen = METHODS[method]
    else:
        raise unknown("method", method, tuple(METHODS), " or a callable")
    if not isinstance(centred, bool):
        raise ValueError(f"centred: expected True or False, got {centred!r}")
    if not centred:
        return chosen
    if method != "fim":
        raise ValueError(f"centred: works with method='fim' only, got method={method!r}")
    return chosen._replace(collect=_update_variance(True))


def _as_scores(found: Any) -> Scores:
    if isinstance(found, Scores):
        return found
    if not isinstance(found, Mapping):
        raise ValueError(f"method: expected to return a mapping of matrix keys to scores, got {type(found).__name__}")
    return Scores(found, "custom")


def _estimate(chosen: Method, collector: Any) -> Scores | None:
    """Scores so far, or None while a matrix has none."""
    try:
        return _as_scores(chosen.score(collector))
    except RuntimeError:
        return None


def _final(chosen: Method, collector: Any, done: int, custom: bool) -> Scores:
    """The estimate that was missing, so that its error is seen."""
    try:
        return _as_scores(chosen.score(collector))
    except RuntimeError as error:
        if custom:
            raise
        raise ValueError(f"batches: after {done} of them there is {error}") from error


def _correlation(before: Scores | None, after: Scores | None) -> float:
    if before is None or after is None or len(before.keys() & after.keys()) < 2:
        return math.nan
    return after.rank_correlation(before)


def _check_loss(loss: Any, index: int) -> None:
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        shape = f" of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else ""
        raise ValueError(f"loss_fn: expected a scalar tensor, got {type(loss).__name__}{shape} for batch {index}")
    if not loss.requires_grad:
        raise ValueError(
            f"loss_fn: the loss of batch {index} has no gradient; it must come from the model in grad mode"
        )
    if not bool(loss.isfinite()):
        raise ValueError(f"loss_fn: the loss of batch {index} is {loss.item()}")


def _check_enough(done: int, steps: int | None, skipped: int) -> None:
    if done == 0:
        raise ValueError("batches: yielded nothing, at least one batch is needed")
    if steps is not None and done < steps:
        raise ValueError(
            f"batches: ran out after {done} of steps={steps}; pass more, or steps=None to take what there is"
        )
    if skipped == done:
        raise ValueError("batches: every backward pass gave gradients that are not finite")
