"""track, Tracker, its state dict."""

from __future__ import annotations

import contextlib
import weakref
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .._utils.distributed import unwrapped
from .._utils.errors import check_choice, suggestion, wrong_value
from ..importance.scores import Scores
from ..nn.active import adapted_models, chosen_adapter
from ..nn.linear import Linear
from ..nn.probe import LayerProbe, TrackedStep, checked_mask, masked, refuse_capture
from ..nn.probe_rows import ColumnSampler, RademacherProbes, SampleSigns, refreshes_norms
from .all_reduce import Reduction, Shared
from .checks import (
    ABSOLUTE_NEEDS,
    checked_decay,
    checked_kinds,
    checked_layers,
    checked_probe_kind,
    checked_probes,
    checked_reopening,
    checked_state,
    checked_steps,
    inverse_scale,
    refuse_missing,
    refuse_windows,
)
from .hooks import RANKS_AGREE, ForwardHook, StepWatch
from .penalty import FisherPenalty
from .record import TrackingRecord, keep_record
from .sample import Sample
from .sampling import Sampling, nothing_to_measure
from .statistics import COVARIANCES, Averages, Covariances, Tracked, all_finite, fisher_factor

_ONE_CODE = "so that compiled code is the same in all of them"


def track(
    model: nn.Module,
    *,
    estimator: str = "probe",
    probes: int | str = "auto",
    ema: float | None = 0.98,
    warmup: int | None = None,
    statistics: Sequence[str] = ("grad_sq",),
    seed: int = 0,
    loss_reduction: str = "mean",
    every: int | str = "auto",
    adapter: str | None = None,
    process_group: Any = "auto",
    probe_kind: str = "rademacher",
) -> Tracker:
    r"""Follow statistics of the weights that adapters leave frozen; use with ``with`` or call ``close``.

    .. math:: F \leftarrow \beta^n F + (1 - \beta^n) f,\quad \text{probe: } f = \lVert G_W P^\top \rVert_F^2 / k,\quad
              \text{exact: } f = \lVert G_W \rVert_F^2,\quad G_W = dy^\top x

    - ``estimator``: ``"probe"`` reads f off k probe rows P [k, K] that ride in the backward. ``"exact"`` keeps x and dy
      of every layer until ``step``; several backward passes count as one gradient.
    - ``statistics``: ``"grad_sq"`` or ``"fisher"`` (one of the two under ``probe``), ``"act_var"``; ``"grad_abs"`` with
      ``columns`` or ``exact``, which also takes the matrices ``"act_cov"``, ``"grad_cov"`` (see ``covariances``).
      Units: of the loss that was backpropagated, squared for grad_sq and fisher.
    - ``probes``: k, ``"auto"`` is 8 on CUDA and 4 elsewhere; P is redrawn at every step from ``(seed, step, layer)``.
    - ``probe_kind``: ``"rademacher"``, rows of ±1, or ``"columns"``: k columns j of x a matrix, drawn by their norms in
      past steps; ``f = Σ_i ‖G_{j_i}‖² / (k p_{j_i})``. A matrix's first step only shows its norms and is not counted.
    - ``ema``: β, the decay of one optimizer step, bias-corrected per matrix; None takes the plain mean.
    - ``every``: n, sample each n-th optimizer step; a sample then counts for n steps. ``"auto"``: every step, unless
      statistics are measured to cost over 1 % of a training step. On CPUs, half of the steps 8 to 31 are not sampled,
      to compare them; ``explain`` says what was found. Give a number for averages that no clock has a part in.
    - ``warmup``: steps after which importance is frozen for ``penalty`` and tracking stops.
    - ``loss_reduction``: how ``fisher`` undoes the loss's mean over samples.
    - ``adapter``: whose layers, and whose factors ``penalty`` weighs; the active one (``set_adapter``) unless named.
    - ``process_group``: whose ranks' gradients are one. ``"auto"``: DDP's or ``fully_shard``'s, else nobody's; every
      rank calls ``step``. Under ``exact`` that takes an all-reduce of G_W [N, K] for each layer, not one for all.

    Padding tokens count in ``act_var`` and covariances outside of ``tracker.mask(attention_mask)``. Raises
    ``TypeError`` or ``ValueError`` naming the argument. Source: FW-LoRA and FC-LoRA, see ``docs/methods.md``.

    >>> model = nn.Sequential(fastlora.nn.Linear(8, 8, r=2))
    >>> with fastlora.track(model, estimator="exact", statistics=("grad_sq", "act_cov")) as tracker:
    ...     with tracker.mask(torch.tensor([1, 1, 1, 0])):
    ...         model(torch.ones(4, 8)).sum().backward()
    ...     tracker.step()
    ...     list(tracker.scores()), tracker.covariances("act_cov")["0"].shape
    ...
    (['0'], torch.Size([8, 8]))
    """
    return Tracker(
        model, estimator, probes, ema, warmup, statistics, seed, loss_reduction, every, adapter, process_group,
        probe_kind,
    )  # fmt: skip


class Tracker:
    """See :func:`track`.

    >>> model = nn.Sequential(fastlora.nn.Linear(8, 8, r=2))
    >>> tracker = fastlora.track(model, every=1)
    >>> model(torch.ones(4, 8)).sum().backward()
    >>> tracker.step()
    >>> tracker.steps, tracker.every, tracker.skipped, list(tracker.scores()), tracker.penalty().item()
    (1, 1, 0, ['0'], 0.0)
    >>> tracker.load_state_dict(tracker.state_dict())
    >>> [tracker.apply_penalty(), tracker.discard(), tracker.close()]
    [None, None, None]
    """

    adapter: str  #: whose layers are tracked
    layers: Mapping[str, Linear]  #: the tracked layers by path
    keys: list[str]  #: their matrices: the keys of scores
    estimator: str  #: ``"probe"`` or ``"exact"``
    kinds: tuple[str, ...]  #: the statistics that are numbers
    probes: int  #: k, as ``"auto"`` chose it
    probe_kind: str  #: ``"rademacher"`` or ``"columns"``
    ema: float | None  #: β, or None for the plain mean
    warmup: int | None  #: steps until importance is frozen
    seed: int  #: that of the probes
    loss_reduction: str  #: how the loss sums samples, for ``fisher``
    importance: Tensor | None  #: one number a key [keys] once the warmup is over, None before

    def __init__(
        self, model, estimator, probes, ema, warmup, statistics, seed, loss_reduction, every, adapter, process_group,
        probe_kind="rademacher",
    ):  # fmt: skip
        self._reduction, model = Reduction(model, process_group), unwrapped(model)
        self.adapter = chosen_adapter(model, adapter)
        self.layers = checked_layers(model, self.adapter)
        self.estimator = check_choice("estimator", estimator, ("probe", "exact"))
        self.loss_reduction = check_choice("loss_reduction", loss_reduction, ("mean", "sum"))
        self.probe_kind = checked_probe_kind(probe_kind, estimator, self.layers)
        kinds = checked_kinds(statistics, estimator, probe_kind, self.layers)
        self.kinds = tuple(kind for kind in kinds if kind not in COVARIANCES)
        covariances = tuple(kind for kind in kinds if kind in COVARIANCES)
        self.per_sample, self.device = "fisher" in kinds, next(iter(self.layers.values())).weight.device
        self._device_type = self.device.type
        self.probes = checked_probes(probes, self.device)
        checked_steps(warmup, every, seed, self.kinds)
        if self.per_sample:
            refuse_windows(model, self.layers)
        self.ema, self.warmup, self.seed = checked_decay(ema), warmup, seed
        self._step = TrackedStep(frozenset(kinds), estimator, self.probes, probe_kind)
        layer_probes = {path: LayerProbe(layer, self._step) for path, layer in self.layers.items()}
        self._tracked = Tracked(self.layers, layer_probes, estimator, self.kinds, covariances, loss_reduction)
        self.matrices, self.keys = self._tracked.matrices, self._tracked.keys
        self._shapes = [(self.layers[path].slices[name], self.layers[path].in_features) for path, name in self.matrices]
        self.importance: Tensor | None = None
        self._averages = Averages(self.kinds, len(self.keys), self.ema, self.device)
        self._covariances = Covariances(covariances)
        self._penalty = FisherPenalty(self.layers, self.matrices)
        self._sampling = Sampling(every, nothing_to_measure(estimator, self.device))
        by_signs = estimator == "probe" and probe_kind != "columns"
        self._native = self._averages.of_leaves(self._tracked) if by_signs else None
        self._record = TrackingRecord(self.adapter, warmup, self._sampling, self._step)
        # Held weakly: the model holds its hook, and what the hook leads to would hold the model.
        self._model, self._adapted = weakref.ref(model), [weakref.ref(m) for m in adapted_models(model).values()]
        self._attach(model)

    def _attach(self, model: nn.Module) -> None:
        self._sampler = self._new_sampler()
        if self._sampler is not None:
            self._sampler.draw(0)
            if self.per_sample:
                self._step.signs = SampleSigns(self._sampler.seed, self.probes)
                self._step.signs.place = self._reduction.place()
        if self._reduction.ranks is not None:
            self._sampling.fix(RANKS_AGREE)
        self._record.closed = self._record.frozen = False
        for path, probe in self._tracked.probes.items():
            self.layers[path].probes[self.adapter] = probe
            self.layers[path].has_changed()
        keep_record(self._record, self.layers.values())
        self._watch = StepWatch(self.layers)
        hook = ForwardHook(self._step, self._watch, self._reduction, self._sampling)
        self._hook = hook.handle = model.register_forward_pre_hook(hook, with_kwargs=True)

    def _new_sampler(self) -> RademacherProbes | ColumnSampler | None:
        """What draws the probes, P or the columns, which the layers' probes see; None without any."""
        if self.estimator != "probe" or not self._tracked.weight_kinds:
            return None
        pairs = [(layer, self._tracked.probes[path]) for path, layer in self.layers.items()]
        if self.probe_kind == "columns":
            # Each matrix has its own: how large the columns are differs between q, k and v.
            widths = [layer.in_features for layer, _ in pairs for _ in layer.slices]
            sizes = [len(layer.slices) for layer, _ in pairs]
            sampler = ColumnSampler(widths, self.probes, self.seed, self.device, self.kinds, sizes)
            for i, (layer, probe) in enumerate(pairs):
                probe.columns = sampler.columns.on(layer.weight.device)[i]
            return sampler
        groups: dict[tuple[int, int], list[tuple[Linear, LayerProbe]]] = {}
        for layer, probe in pairs:  # those that share an input share P
            groups.setdefault((id(layer.group or layer), layer.in_features), []).append((layer, probe))
        dtypes = {a.dtype for layer, _ in pairs for a, _, _ in layer.pairs(self.adapter)}
        sampler = RademacherProbes([width for _, width in groups], self.probes, self.seed, self.device, dtypes)
        for i, members in enumerate(groups.values()):
            for layer, probe in members:
                probe.P = sampler.rows.on(layer.weight.device)[i]
        return sampler

    @property
    def steps(self) -> int:
        """Optimizer steps so far."""
        return self._step.index

    @property
    def every(self) -> int | None:
        """Every how many steps a sample is taken; None while ``"auto"`` has not chosen."""
        return self._sampling.every

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, kind: object, *exc: object) -> None:
        self._detach(over=True)
        if kind is None:
            self._record.warn()

    def close(self) -> None:
        """Stop tracking; scores and importance stay readable. Warns of a warmup or a penalty that never acted."""
        self._detach(over=True)
        self._record.warn()

    def _detach(self, over: bool) -> None:
        self._record.closed, self._record.over = True, over or self._record.over
        self._hook.remove()
        for path, probe in self._tracked.probes.items():
            if getattr(self.layers[path], "probes", {}).get(self.adapter) is probe:  # none once unloaded
                del self.layers[path].probes[self.adapter]
                self.layers[path].has_changed()

    @contextlib.contextmanager
    def mask(self, mask: Tensor) -> Iterator[Tracker]:
        """Inside, ``act_var`` and covariances of this thread's forwards are of the tokens where ``mask`` is 1.

        They are what they would be without padding. ``mask`` is [S, T] (a tokenizer's ``attention_mask``) or [M],
        booleans or 0 and 1; without one every token counts. Backward may run after the context has closed, under
        checkpointing too. The gradients of weights are not touched: padding has a gradient there or has none. Raises
        ``TypeError`` or ``ValueError`` for another kind of mask, and ``ValueError`` in a layer that sees other tokens.
        """
        with masked(self.layers, checked_mask(mask)):
            yield self

    def step(self, scaler: Any = None) -> None:
        """Fold the gradients since the last call into the averages: after backward, once per optimizer step.

        With a ``GradScaler`` pass it, before ``scaler.update()``. A step with a gradient that is not finite is left out
        and counted in ``skipped``: it neither decays the averages nor adds to them, and a matrix whose layer did not
        run keeps its own. Nothing is read back to the host. Raises ``TypeError`` for another ``scaler``,
        ``RuntimeError`` in the capture of a CUDA graph.
        """
        if not self._record.closed:
            refuse_capture(self._device_type)
        inverse = None if scaler is None else inverse_scale(scaler, self.device)
        self._watch.missed = 0
        for model in self._adapted:
            if check := getattr(model(), "fastlora_learning", None):
                check.examine()
        if self._record.closed:
            return
        if self._step.sampled:
            self._fold(inverse)
        else:
            self._clear()
        self._advance()

    def _fold(self, inverse: Tensor | None) -> None:
        """Take this step's sample; ``inverse``: of the loss scale."""
        tracked, signs, ranks = self._tracked, self._step.signs, self._reduction
        samples = 0 if signs is None else signs.count()
        alone = ranks.ranks is None and not ranks.searching
        shared = None if alone else ranks.run(tracked, samples, self._agreement)
        n = self._sampling.stands_for(self._step.index)
        if self._native is not None and shared is None and inverse is None and not isinstance(samples, Tensor):
            factor = fisher_factor(self.loss_reduction, samples) if self.per_sample else 1.0
            if self._native.fold(factor / self.probes, self._averages.weight(n), n):
                return
        Q, V = [leaf.grad for leaf in tracked.Z], [leaf.grad for leaf in tracked.V]
        self._fold_sample(Sample(tracked, self._sampler, Q, V, samples, shared, inverse), n)
        self._clear()

    @torch.no_grad()
    def _fold_sample(self, sample: Sample, n: int) -> None:
        tracked, shared, columns = self._tracked, sample.shared, isinstance(self._sampler, ColumnSampler)
        finite, taken = None if shared is None else shared.finite, {}
        if tracked.covariances:
            taken = tracked.taken()
            finite = all_finite(taken, self.device) if shared is None else finite
        folded = finite
        if self.kinds:
            drawn = self._sampler.known if columns else None  # those drawn by norms that had been seen
            folded = self._averages.add(sample.read(), finite, drawn, n)
        else:
            self._averages.skipped.add_(~finite)
        if columns and self._step.refreshes_norms:
            self._learn(self._sampler, shared, folded)
        if taken:
            self._add_covariances(taken, shared, folded, sample.inverse)

    def _learn(self, sampler: ColumnSampler, shared: Shared | None, keep: Tensor) -> None:
        """Let ``columns`` see this step's norms, where it counts."""
        norms = [self._tracked.probes[path].norms[name].grad for path, name in self.matrices]
        if shared is not None:
            keep = keep & shared.present[self._tracked.weight_kinds[0]]
        if any(norm is not None for norm in norms):
            measured = torch.tensor([norm is not None for norm in norms], device="cpu")
            sampler.learn(norms, keep & measured.to(self.device, non_blocking=True))

    def discard(self) -> None:
        """Forget the gradients since the last ``step``: those of a step that failed or was given up."""
        self._clear()
        self._begin(self.steps)

    def _clear(self) -> None:
        for probe in self._tracked.probes.values():
            probe.clear()

    def _begin(self, step: int) -> None:
        sampling, columns = self._sampling, self.probe_kind == "columns"
        self._step.begin(step, sampling.sampled(step), columns and refreshes_norms(sampling.number(step)))

    def _add_covariances(self, taken: dict, shared: Shared | None, finite: Tensor, inverse: Tensor | None) -> None:
        inverse = torch.ones((), dtype=torch.float64, device=self.device) if inverse is None else inverse
        if shared is not None:
            self._reduction.add_covariances(self._tracked, self._covariances, taken, finite, inverse)
        else:
            self._covariances.add(taken, finite, inverse, {path: layer.backend for path, layer in self.layers.items()})

    def _advance(self) -> None:
        step, sampling = self._step, self._sampling
        if sampling.every is None:
            if step.compiled:
                sampling.fix(_ONE_CODE)
            # Before anything is drawn for the next step, whose cost that is.
            sampling.ended(step.index)
        self._begin(step.index + 1)
        if self._sampler is not None and step.sampled:
            self._sampler.draw(step.index)
        if self.warmup is not None and step.index >= self.warmup:
            self._freeze(self._averages.corrected("fisher" if self.per_sample else "grad_sq"))

    def _freeze(self, importance: Tensor) -> None:
        self.importance, self._record.frozen = importance, True
        self._detach(over=False)

    def _agreement(self) -> dict[str, int]:
        """P and the steps that count are the same on all ranks if these numbers are."""
        names = (*self.kinds, *self._covariances.kinds, self.estimator)
        return {
            "seed": self.seed,
            "steps": self.steps,
            "probes": self.probes,
            "every": self.every,
            "warmup": self.warmup or 0,
            "matrices": zlib.crc32(" ".join(self.keys).encode()),
            "probe_kind": zlib.crc32(self.probe_kind.encode()),
            "statistics": zlib.crc32(" ".join(names).encode()),
        }

    @property
    def skipped(self) -> int:
        """Steps that were left out because a gradient was not finite (reads back from the device)."""
        return int(self._averages.skipped)

    def scores(self, kind: str = "grad_sq", reduce: str = "sum", missing: str = "raise") -> Scores:
        """Averages of ``kind`` by matrix key. ``reduce="mean"``: grad_sq and fisher over N·K, as grad_abs always is.

        ``missing``: what becomes of matrices that have none, whose layers never ran or got no gradient: ``"raise"``, or
        ``"skip"`` for the scores of the others. Raises ``ValueError`` for a statistic that is not tracked,
        ``RuntimeError`` with the names of the matrices that have none, or where none has.
        """
        check_choice("reduce", reduce, ("sum", "mean"))
        check_choice("missing", missing, ("raise", "skip"))
        if kind not in self.kinds:
            hint = f"; {ABSOLUTE_NEEDS}" if kind == "grad_abs" and self.probe_kind != "columns" else ""
            raise wrong_value("kind", f"what is tracked, {self.kinds}", kind, hint or suggestion(kind, self.kinds))
        rows = zip(
            self.keys,
            self._averages.corrected(kind).tolist(),
            self._averages.counts[kind].tolist(),
            self._shapes,
            strict=True,
        )
        there, absent, per_entry = {}, [], kind == "grad_abs" or (reduce == "mean" and kind != "act_var")
        for key, value, count, (n, k) in rows:
            if count == 0:
                absent.append(key)
            else:
                there[key] = value / (n * k) if per_entry else value
        if absent and (missing == "raise" or not there):
            refuse_missing(kind, absent, len(there))
        costs = {key: n + k for key, (n, k) in zip(self.keys, self._shapes, strict=True) if key in there}
        return Scores(there, kind, costs=costs)

    def covariances(self, kind: str) -> dict[str, Tensor]:
        """``kind`` by module path: ``"act_cov"``: x^T x / M [K, K], ``"grad_cov"``: dy^T dy / M [N, N]; M tokens.

        Raises ``ValueError`` for a kind that is not tracked.
        """
        if kind not in self._covariances.kinds:
            known = tuple(self._covariances.kinds)
            hint = suggestion(kind, known) if known else "; name it in statistics and use estimator='exact'"
            raise wrong_value("kind", f"what is tracked, {known}", kind, hint)
        return self._covariances.read(kind)

    def penalty(
        self, weight: float = 1e-4, *, form: str = "delta", normalize: str = "sum", adapter: str | None = None
    ) -> Tensor:
        r"""FW-LoRA's penalty, differentiable in A and B; add it to the loss once per optimizer step.

        .. math:: \lambda \sum_m (1 - I_m) \lVert \Delta W_m \rVert_F^2,\qquad I_m = F_m / \textstyle\sum F

        Zero before ``warmup`` steps, when importance is frozen; without a warmup the current averages weigh.
        ``form="decay"`` is the paper's shortcut, weight decay of A and B with the coefficient λ (1 - I_m).
        ``normalize="relative"`` takes ``I_m / max I``, ``"uniform"`` the mean of the weights everywhere (a control).
        ``weight``: λ. ``adapter``: whose factors, the tracked one's unless named. Returns a scalar in the unit of
        ``weight``. Raises ``TypeError`` or ``ValueError`` naming the argument. ``docs/experiment.md``: on one model, at
        the smallest of three λ, which tuned best, ``"sum"`` did as well as ``"uniform"``, -0.01 ± 0.03 points of
        accuracy, and as none, +0.08 ± 0.11 points.
        """
        return self._penalty.value(*self._weighing(), weight, form, normalize, self._whose(adapter))

    def apply_penalty(
        self, weight: float = 1e-4, *, form: str = "delta", normalize: str = "sum", adapter: str | None = None
    ) -> None:
        r"""Add the gradient of :meth:`penalty`, worked out by hand, to ``.grad`` of A and B; no graph is built.

        .. math:: dA = 2\lambda (1 - I) s^2 (B^\top B) A,\qquad dB = 2\lambda (1 - I) s^2 B (A A^\top)

        Call it after backward (and after ``scaler.unscale_``), before clipping and the optimizer's step. ``weight``,
        ``form``, ``normalize``, ``adapter`` and errors (``TypeError``, ``ValueError``) are those of :meth:`penalty`.
        """
        self._penalty.add_gradient(*self._weighing(), weight, form, normalize, self._whose(adapter))

    def _whose(self, adapter: str | None) -> str:
        return self.adapter if adapter is None else adapter

    def _weighing(self) -> tuple[Tensor | None, bool]:
        """The importance that weighs now, and whether it is frozen."""
        importance, frozen = self.importance, True
        if importance is None and self.warmup is None and self.steps > 0:
            importance, frozen = self._averages.corrected("fisher" if self.per_sample else "grad_sq"), False
        if importance is None:
            self._record.unweighed += 1
        else:
            self._record.weighed += 1
        return importance, frozen

    def state_dict(self) -> dict[str, Any]:
        """Everything that ``load_state_dict`` needs to go on with the same numbers: tensors and plain numbers."""
        return {
            "keys": list(self.keys),
            "steps": self.steps,
            "seed": self.seed,
            "probes": self.probes,
            "probe_kind": self.probe_kind,
            "every": self.every,
            "columns": self._sampler.state_dict() if isinstance(self._sampler, ColumnSampler) else None,
            **self._averages.state_dict(),
            "covariances": self._covariances.state_dict(),
            "importance": None if self.importance is None else self.importance.clone(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a saved ``state``; ``TypeError`` or ``ValueError`` names what differs, with this tracker unchanged.

        Later steps decay by this tracker's ``ema`` and ``every``; ``every="auto"`` keeps the choice that was saved. A
        tracker with a warmup that froze tracks again with a state from before; one that was closed refuses it.
        """
        if (reopened := reopened_by(self, state)) is not None:
            self._attach(reopened)
        self._averages.load_state_dict(state)
        self._covariances.load_state_dict(state["covariances"])
        self.seed = state["seed"]
        nothing = self._reduction.ranks is not None or bool(nothing_to_measure(self.estimator, self.device))
        self._sampling.take_up(state.get("every"), fixed=nothing)
        self._reduction.restart()
        self.discard()
        self._begin(state["steps"])
        if self._sampler is not None:
            if state["columns"] is not None:
                self._sampler.load_state_dict(state["columns"])
            self._sampler.restart(self.seed)
            self._sampler.draw(self.steps)
        self.importance = state["importance"]
        if self.importance is not None:
            self._freeze(self.importance.to(self.device))


def reopened_by(tracker: Tracker, state: dict[str, Any]) -> nn.Module | None:
    """The model that ``load_state_dict`` would track again, if any; refuses what it refuses."""
    checked_state(state, tracker.state_dict())
    lost = state["importance"] is None and tracker._record.closed and tracker.warmup is not None
    return checked_reopening(tracker._model(), tracker._record.over, tracker.layers, tracker.adapter) if lost else None
