"""Scores from a few backward passes; FIM-LoRA's lora_b_var; the model put back as it was."""

from __future__ import annotations

import itertools
import math
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .._utils.distributed import ranks_of, several_processes, unwrapped, whole
from .._utils.errors import check_choice, check_flag, check_instance, check_integer, wrong_type, wrong_value
from .._utils.reporting import Report, reporting
from ..importance.scores import Scores
from ..nn.active import NO_ADAPTERS, chosen_adapter
from ..nn.linear import adapted_layers, matrix_key
from .all_reduce import averaged
from .checks import checked_layers
from .tracker import Tracker, track


class UpdateVariance:
    r"""``lora_b_var`` of each matrix: mean over the entries of B [N, r] of the mean over passes of dB².

    .. math:: \frac{1}{N r} \sum_{ij} \Big( \overline{dB_{ij}^2} - \big(\overline{dB_{ij}}\big)^2 \Big)

    with bars for means over passes and the last term with ``centered`` only. dB carries the scale s. At B = 0 dA is 0
    and dB is not, so B alone is read: N r numbers where the weight's own gradient has N K. A pass with a gradient that
    is not finite is left out. dB is averaged over the ranks of ``process_group`` before it is squared.

    Raises ``ValueError`` for a model without adapters or whose B is not zero.
    """

    def __init__(self, model: nn.Module, adapter: str, centered: bool = False, process_group: Any = None):
        self._ranks, model = ranks_of(model, process_group), unwrapped(model)
        layers = checked_layers(model, adapter)
        self._centered = centered
        self._matrices: dict[str, Tensor] = {}
        self._costs: dict[str, int] = {}
        for path, layer in layers.items():
            for name, B in layer.lora_B[adapter].tensors().items():
                if B is None:
                    continue
                key = matrix_key(path, name)
                if not B.is_leaf:
                    raise ValueError(f"model: B of {key!r} is parametrized or pruned and has no gradient of its own")
                if bool(B.detach().any()):
                    raise ValueError(f"model: B of {key!r} is not zero; 'fim' scores an adapter before its training")
                self._matrices[key] = B
                self._costs[key] = layer.slices[name] + layer.in_features
        device = next(iter(layers.values())).weight.device
        self._squares = torch.zeros(len(self._matrices), dtype=torch.float64, device=device)
        self._counts = torch.zeros_like(self._squares)
        self._skipped = torch.zeros((), dtype=torch.int64, device=device)
        self._sums: dict[str, Tensor] = {}

    def __enter__(self) -> UpdateVariance:
        return self

    def __exit__(self, *exc: object) -> None:
        self._sums.clear()

    @torch.no_grad()
    def step(self) -> None:
        """Take in the gradients of one backward pass and clear them."""
        taken = {key: whole(B.grad) for key, B in self._matrices.items() if B.grad is not None}
        if self._ranks is not None:
            shapes = {key: B.shape for key, B in self._matrices.items()}
            taken = averaged(taken, shapes, self._ranks, self._squares.device)
        device = self._squares.device
        zero = self._squares.new_zeros(())
        means = [taken[k].double().square().mean().to(device) if k in taken else zero for k in self._matrices]
        squares = torch.stack(means)
        finite = squares.isfinite().all()
        self._squares += torch.where(finite, squares, 0.0)
        self._counts += finite * torch.tensor([key in taken for key in self._matrices], device=device)
        self._skipped += ~finite
        for key, grad in taken.items():
            if self._centered:
                kept = torch.where(finite.to(grad.device), grad.double(), 0.0)
                self._sums[key] = kept + self._sums.get(key, 0.0)
        for B in self._matrices.values():
            B.grad = None

    @property
    def skipped(self) -> int:
        """Passes left out because a gradient was not finite (reads back from the device)."""
        return int(self._skipped)

    def scores(self) -> Scores:
        """The statistic by matrix key; ``RuntimeError`` while a matrix has none."""
        counts = self._counts.tolist()
        missing = [key for key, count in zip(self._matrices, counts, strict=True) if count == 0]
        if missing or not counts:
            shown = ", ".join(missing[:3]) + (" ..." if len(missing) > 3 else "") or "any matrix: every rank is 0"
            raise RuntimeError(f"no lora_b_var yet for {shown}")
        if self._centered and min(counts) < 2:
            raise RuntimeError("no centered lora_b_var yet: it takes two passes or more")
        values = (self._squares / self._counts).tolist()
        if self._centered:
            means = [
                (self._sums[key] / count).square().mean() for key, count in zip(self._matrices, counts, strict=True)
            ]
            values = [max(v - float(m), 0.0) for v, m in zip(values, means, strict=True)]
        return Scores(dict(zip(self._matrices, values, strict=True)), "lora_b_var", costs=self._costs)


@contextmanager
def preserve_model_state(model: nn.Module, adapter: str) -> Iterator[None]:
    """Gradients, requires_grad, buffers, modes and RNG states after the block are those from before it.

    Inside, gradients start empty, grad mode is on, and the adapter's factors require gradients, so that passes reach
    them although a schedule may hold them frozen. Parameters themselves are not copied: the block must not step an
    optimizer. RNG: torch's (CPU and the model's CUDA devices), Python's, and NumPy's where it is loaded.

    Raises ``ValueError`` for a model without adapters.
    """
    layers = adapted_layers(model) if isinstance(model, nn.Module) else {}
    if not layers:
        raise ValueError(NO_ADAPTERS)
    check_instance("adapter", adapter, str, "the name of an adapter")
    parameters = [(p, p.grad, p.requires_grad) for p in model.parameters()]
    # By name too: a forward may assign a new tensor instead of writing into the old one.
    buffers = [
        (m, n, b, None if b is None else b.detach().clone()) for m in model.modules() for n, b in m._buffers.items()
    ]
    modes = [(m, m.training) for m in model.modules()]
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    put_back = _python_generators()
    with torch.random.fork_rng(devices=devices), torch.enable_grad():
        try:
            for p, _, _ in parameters:
                p.grad = None
            for layer in layers.values():
                if adapter in layer.adapter_specs:
                    layer.lora_A[adapter].requires_grad_(True)
                    layer.lora_B[adapter].requires_grad_(True)
            yield
        finally:

            def restore() -> None:
                for p, grad, needs in parameters:
                    p.grad = grad
                    p.requires_grad_(needs)
                with torch.no_grad():
                    for module, name, buffer, value in buffers:
                        module._buffers[name] = buffer
                        if buffer is not None:
                            buffer.copy_(value)
                for module, training in modes:
                    module.training = training
                put_back()

            uninterrupted(restore)


def uninterrupted(work: Callable[[], None]) -> None:
    """Call ``work``, which may begin anew at any point, to its end: Ctrl-C meanwhile is passed on afterwards."""
    try:
        work()
    except KeyboardInterrupt:
        work()
        raise


def _python_generators() -> Callable[[], None]:
    state, numpy = random.getstate(), sys.modules.get("numpy")
    numpy_state = None if numpy is None else numpy.random.get_state()

    def put_back() -> None:
        random.setstate(state)
        if numpy is not None:
            numpy.random.set_state(numpy_state)

    return put_back


class Calibration(Scores):
    """Scores that know how they converged: still a mapping of matrix key to importance."""

    __slots__ = ("_convergence",)

    def __init__(self, scores: Scores, convergence: Sequence[float]):
        super().__init__(dict(scores), scores.kind, scores.signed, scores.costs)
        object.__setattr__(self, "_convergence", tuple(convergence))

    @property
    def convergence(self) -> tuple[float, ...]:
        """Spearman's rank correlation of each estimate with the one before it, from the second batch on.

        Near 1 at the end: more batches would hardly change the order. NaN where an estimate was missing or constant.
        """
        return self._convergence

    def __reduce__(self) -> tuple:
        return Calibration, (Scores(dict(self), self.kind, self.signed, self.costs), self._convergence)


class Method(NamedTuple):
    """What to collect during the passes, and the scores it makes: ``score(collector)`` is called after each batch."""

    collect: Callable[[nn.Module, str, Any], AbstractContextManager]  # of model, adapter, process_group
    score: Callable[[Any], Mapping[str, float]]


def _exact(*kinds: str) -> Callable[[nn.Module, str, Any], AbstractContextManager[Tracker]]:
    return lambda model, adapter, group: track(
        model, estimator="exact", ema=None, statistics=kinds, adapter=adapter, process_group=group
    )


def _update_variance(centered: bool) -> Callable[[nn.Module, str, Any], AbstractContextManager[UpdateVariance]]:
    return lambda model, adapter, group: UpdateVariance(model, adapter, centered, group)


def _composite(normalize: str) -> Callable[[Tracker], Scores]:
    def score(tracker: Tracker) -> Scores:
        parts = tracker.scores("grad_sq", reduce="mean"), tracker.scores("grad_abs"), tracker.scores("act_var")
        return Scores.composite(*parts, normalize=normalize)

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
    *,
    steps: int | None = 8,
    method: str | Callable[[Tracker], Mapping[str, float]] = "fc",
    centered: bool = False,
    progress: bool | Report | None = None,
    adapter: str | None = None,
    process_group: Any = "auto",
) -> Calibration:
    """One score a matrix from ``steps`` backward passes; ``allocate`` makes ranks of them.

    - ``"fc"``: ``0.6 z(grad_sq / NK) + 0.2 z(grad_abs) + 0.2 z(act_var)`` (FC-LoRA); ``"fc_original"``: min-max for
      z, as published; ``"fw"``: mean ``grad_sq`` (FW-LoRA). All exact. Ranks by ``"fc"`` did as well as uniform ones
      on one model: +0.12 ± 0.37 points of accuracy (``docs/experiment.md``).
    - ``"fim"``: mean over entries and passes of dB² at B = 0 (FIM-LoRA); ``centered`` subtracts the squared mean.
    - a callable gets the tracker, which holds exact grad_sq, fisher, grad_abs and act_var, after each batch.

    ``loss_fn(model, batch)`` returns a scalar loss. Exactly ``steps`` items are taken from ``batches``; None takes all.
    ``progress``: True shows a bar (tqdm), None does so in a terminal when it takes a second and logs otherwise, False
    does neither; a callable gets ``(done, steps, rank correlation with the estimate before)``, the last of which
    ``convergence`` of the result keeps.

    ``adapter``: whose layers, the active one's unless named.
    ``process_group``: whose ranks take part, each with its own batches and all of them in this call; their batches are
    one, and every rank gets the same scores. ``"auto"``: the ranks that train the model, or all processes that
    ``torch.distributed`` runs; None: this one alone.

    Gradients, requires_grad, buffers, modes and RNG states are put back, also after an error. Raises ``TypeError`` or
    ``ValueError`` naming the argument: batches that run out, a loss that is not a finite scalar or has no gradient,
    gradients that are never finite, a matrix that no gradient reaches, B that is not zero under ``"fim"``.

    >>> model = nn.Sequential(fastlora.nn.Linear(8, 8, r=2))
    >>> found = fastlora.calibrate(model, [torch.ones(4, 8)], lambda m, x: m(x).square().mean(), steps=1, method="fw")
    >>> list(found)
    ['0']
    """
    chosen = _chosen(method, centered)
    _check_call(batches, loss_fn, steps)
    adapter = chosen_adapter(model, adapter)
    inner, group = unwrapped(model), _group(model, process_group)
    ranks = ranks_of(model, group)
    with (
        preserve_model_state(inner, adapter),
        chosen.collect(model, adapter, group) as collector,
        reporting(progress, steps, "calibrate", "batch") as report,
    ):
        done, estimate, convergence = 0, None, []
        items = itertools.islice(batches, steps)
        for batch in items if ranks is None else ranks.in_step(items):
            loss = loss_fn(model, batch)
            _check_loss(loss, done)
            loss.backward()
            collector.step()
            done, before, estimate = done + 1, estimate, _estimate(chosen, collector)
            if done > 1:
                convergence.append(_correlation(before, estimate))
            report(done, steps, convergence[-1] if convergence else math.nan)
        _check_enough(done, steps, collector.skipped)
        if estimate is None:
            estimate = _final(chosen, collector, done, callable(method))
        found = Calibration(estimate, convergence)
        # Sums are the same everywhere, but kinds of processors may round what is made of them differently.
        return found if ranks is None else ranks.from_first(found)


def backward_passes(
    model: nn.Module, batches: Iterable[Any], loss_fn: Callable[[nn.Module, Any], Tensor], steps: int | None
) -> list[Any]:
    """Differentiate the loss of each of ``steps`` items of ``batches``, which are returned; errors as ``calibrate``."""
    _check_call(batches, loss_fn, steps)
    kept: list[Any] = []
    for batch in itertools.islice(batches, steps):
        loss = loss_fn(model, batch)
        _check_loss(loss, len(kept))
        loss.backward()
        kept.append(batch)
    _check_enough(len(kept), steps, 0 if kept else -1)
    return kept


def _check_call(batches: Any, loss_fn: Any, steps: Any) -> None:
    if steps is not None:
        check_integer("steps", steps, 1, "None for all batches, or an integer")
    if not isinstance(batches, Iterable) and not hasattr(batches, "__getitem__"):
        raise wrong_type("batches", "an iterable of batches", batches)
    if not callable(loss_fn):
        raise wrong_type("loss_fn", "a callable (model, batch) -> loss", loss_fn)


def _group(model: nn.Module, process_group: Any) -> Any:
    alone = isinstance(process_group, str) and ranks_of(model, process_group) is None
    return torch.distributed.group.WORLD if alone and several_processes() else process_group


def _chosen(method: Any, centered: bool) -> Method:
    if callable(method):
        chosen = Method(_exact("grad_sq", "fisher", "grad_abs", "act_var"), method)
    else:
        chosen = METHODS[check_choice("method", method, METHODS, " or a callable")]
    if not check_flag("centered", centered):
        return chosen
    if method != "fim":
        raise ValueError(f"centered: works with method='fim' only, got method={method!r}")
    return chosen._replace(collect=_update_variance(True))


def _as_scores(found: Any) -> Scores:
    if isinstance(found, Scores):
        return found
    return Scores(check_instance("method", found, Mapping, "to return a mapping of matrix keys to scores"), "custom")


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
    if check_instance("loss_fn", loss, Tensor, f"a scalar tensor for batch {index}").numel() != 1:
        raise wrong_value("loss_fn", f"a scalar tensor for batch {index}", loss)
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
