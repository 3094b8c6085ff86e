"""track, Tracker, its state dict."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .._utils.distributed import unwrapped
from .._utils.errors import check_choice, suggestion, wrong_value
from ..importance.scores import Scores
from ..nn.active import chosen_adapter
from ..nn.linear import Linear, matrix_key
from ..nn.probe import LayerProbe, checked_mask, masked
from ..nn.probe_rows import ColumnSampler, CompiledSigns, column_rows, sample_signs, sign_rows
from ..ops.multi_tensor import output_variances
from .all_reduce import Reduction, Shared
from .checks import (
    ABSOLUTE_NEEDS,
    StepWatch,
    checked_decay,
    checked_kinds,
    checked_layers,
    checked_probe_kind,
    checked_probes,
    checked_state,
    checked_steps,
    inverse_scale,
    refuse_windows,
)
from .penalty import FisherPenalty
from .statistics import COVARIANCES, Averages, Covariances, exact_values


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

    .. math:: F \leftarrow \beta F + (1 - \beta) f,\quad \text{probe: } f = \lVert G_W P^\top \rVert_F^2 / k,\quad
              \text{exact: } f = \lVert G_W \rVert_F^2,\quad G_W = dy^\top x

    - ``statistics``: ``"grad_sq"`` or ``"fisher"`` (one of the two under ``probe``), ``"act_var"``; ``"grad_abs"`` with
      ``columns`` or ``exact``, which also takes the matrices ``"act_cov"``, ``"grad_cov"`` (see ``covariances``).
      Units: of the loss that was backpropagated, squared for grad_sq and fisher.
    - ``probes``: k, ``"auto"`` is 8 on CUDA and 4 elsewhere; P is redrawn at every step from ``(seed, step, layer)``.
    - ``probe_kind``: ``"rademacher"``, rows of ±1, or ``"columns"``: k columns j of x a matrix, drawn by their norms in
      past steps; ``f = Σ_i ‖G_{j_i}‖² / (k p_{j_i})``. A matrix's first step only shows its norms and is not counted.
    - ``ema``: β, bias-corrected per matrix; None takes the plain mean. ``warmup``: step at which importance is frozen
      for ``penalty`` and tracking stops. ``loss_reduction``: how ``fisher`` undoes the loss's mean over samples.
    - ``every``: sample each n-th step; ``"auto"`` does so on layers so small that probes would cost over 1 % of their
      step (``explain`` shows n). Averages are over the sampled steps, so estimates stay unbiased.
    - ``adapter``: whose layers, and whose factors ``penalty`` weighs; the active one (``set_adapter``) unless named.
    - ``exact`` keeps x and dy of every layer until ``step``; several backward passes count as one gradient.

    - ``process_group``: whose ranks' gradients are one. ``"auto"``: DDP's or ``fully_shard``'s, else nobody's; every
      rank calls ``step``. Under ``exact`` that takes an all-reduce of G_W [N, K] for each layer, not one for all.

    Padding tokens count in ``act_var`` outside of ``tracker.mask(attention_mask)``. Raises ``ValueError`` naming the
    argument.
    """
    return Tracker(
        model, estimator, probes, ema, warmup, statistics, seed, loss_reduction, every, adapter, process_group,
        probe_kind,
    )  # fmt: skip


class Tracker:
    """See :func:`track`."""

    def __init__(
        self, model, estimator, probes, ema, warmup, statistics, seed, loss_reduction, every, adapter, process_group,
        probe_kind="rademacher",
    ):  # fmt: skip
        self._reduction, model = Reduction(model, process_group), unwrapped(model)
        self.adapter = chosen_adapter(model, adapter)
        self.layers = checked_layers(model, self.adapter)
        self.estimator = check_choice("estimator", estimator, ("probe", "exact"))
        self.loss_reduction = check_choice("loss_reduction", loss_reduction, ("mean", "sum"))
        self.probe_kind = checked_probe_kind(probe_kind, estimator)
        kinds = checked_kinds(statistics, estimator, probe_kind)
        self.kinds = tuple(kind for kind in kinds if kind not in COVARIANCES)
        self._covariances = Covariances([kind for kind in kinds if kind in COVARIANCES])
        self.per_sample = "fisher" in self.kinds
        self.device = next(iter(self.layers.values())).weight.device
        self.probes = checked_probes(probes, self.device)
        checked_steps(warmup, every, seed)
        if self.per_sample:
            refuse_windows(model, self.layers)
        self.ema, self.warmup, self.seed = checked_decay(ema), warmup, seed
        self.every = (1 if estimator == "exact" or self.device.type != "cpu" else None) if every == "auto" else every
        self.steps, self.micro, self.importance = 0, 0, None
        self.matrices = [(path, name) for path, layer in self.layers.items() for name in layer.slices]
        self.keys = [matrix_key(path, name) for path, name in self.matrices]
        self._averages = Averages(self.kinds, len(self.keys), self.ema, self.device)
        self._skipped = torch.zeros((), dtype=torch.int64, device=self.device)
        self._samples: dict[int, int] = {}
        self._regulariser = FisherPenalty(self.layers, self.matrices)
        self._signs: tuple[tuple[int, int, int], Tensor] | None = None
        self._watch = StepWatch(self.layers)
        self._learning = getattr(model, "fastlora_learning", None)
        self._attach(model)

    def _attach(self, model: nn.Module) -> None:
        kinds = frozenset((*self.kinds, *self._covariances.kinds))
        groups: dict[int, list[Linear]] = {}
        for layer in self.layers.values():
            layer.probes[self.adapter] = LayerProbe(layer, kinds, self.estimator, self)
            groups.setdefault(id(layer.group or layer), []).append(layer)
        members = list(groups.values())
        self._rows, self._compiled = None, None
        if self.estimator == "probe" and kinds - {"act_var"}:
            self._rows = (column_rows if self.probe_kind == "columns" else sign_rows)(self, members)
            self._rows.draw(0)
            self._compiled = CompiledSigns(self._rows.seed, self.probes) if self.per_sample else None
        self._reduction.attach(self)
        self._hook = model.register_forward_pre_hook(self._on_forward)

    def _on_forward(self, module: nn.Module, args: Any) -> None:
        if torch.compiler.is_compiling():
            # Python numbers that change would be compiled in: what counts here are tensors.
            if self._compiled is not None and torch.is_grad_enabled():
                self._compiled.forward(*self._reduction.place())
        elif torch.is_grad_enabled():
            self.micro += 1
            self._reduction.search(self, module)
            self._watch.forward()

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop tracking; scores and importance stay readable."""
        self._hook.remove()
        for layer in self.layers.values():
            if self._owns(layer):
                del layer.probes[self.adapter]

    @contextlib.contextmanager
    def mask(self, mask: Tensor) -> Iterator[Tracker]:
        """Inside, ``act_var`` of this thread's forwards is over the tokens where ``mask`` is 1, as without padding.

        ``mask`` is [S, T] (a tokenizer's ``attention_mask``) or [M], booleans or 0 and 1; without one every token
        counts. Backward may run after the context has closed, under checkpointing too. The weights' statistics are not
        touched: padding has a gradient there or has none. Raises ``ValueError`` for another kind of mask, and in a
        layer that sees other tokens.
        """
        with masked(self.layers, checked_mask(mask)):
            yield self

    def signs_for(self, x: Tensor, own: int | None = None) -> Tensor:
        """±1 per (sample, probe) of the current micro-batch; a sample is an entry of x's dimension 0.

        ``own`` of them are the tracked adapter's, all without it.
        """
        samples = x.shape[0] if x.dim() > 1 else 1
        if torch.compiler.is_compiling():
            return self._compiled.take(samples, own)
        key = (self.steps, self.micro, samples)
        if self._signs is None or self._signs[0] != key:
            if self.micro in self._samples:
                seen = self._signs[0][2]
                raise RuntimeError(f"fisher: calls of one forward saw {seen} and {samples} samples in dimension 0")
            micro = self._reduction.micro(self.micro)
            self._signs = (key, sample_signs(self._rows.seed, self.steps, micro, samples, self.probes))
            self._samples[self.micro] = samples if own is None else own
        return self._signs[1]

    @torch.no_grad()
    def step(self, scaler: Any = None) -> None:
        """Fold the gradients since the last call into the averages: after backward, once per optimiser step.

        With a ``GradScaler`` pass it, before ``scaler.update()``. A step with a gradient that is not finite is left out
        and counted in ``skipped``. Nothing is read back to the host.
        """
        inverse = inverse_scale(scaler, self.device)
        self._watch.stepped()
        if self._learning is not None:
            self._learning.examine()
        if not self._live():
            return
        if not self._sampled():
            return self._advance()
        shared = self._reduction.run(self)
        values, seen = self._gather(shared)
        for kind in self.kinds if inverse is not None else ():
            if kind != "act_var":
                values[kind] = values[kind] * (inverse if kind == "grad_abs" else inverse * inverse)
        finite, taken = None if shared is None else shared.finite, {}
        if self._covariances.kinds:
            taken = {path: self._probe(layer).taken for path, layer in self.layers.items()}
            finite = self._covariances.finite(taken, self.device) if shared is None else finite
        if self.kinds:
            finite = self._averages.add(values, seen, finite, self._drawn())
            self._learn(seen, finite)
        if taken:
            self._add_covariances(taken, shared, finite, inverse)
        self._skipped += ~finite
        self._advance()

    def _drawn(self) -> Tensor | None:
        """The matrices whose columns were drawn by norms that had been seen; None where all count."""
        return self._rows.known if isinstance(self._rows, ColumnSampler) else None

    def _learn(self, seen: dict[str, Tensor], finite: Tensor) -> None:
        """Let ``columns`` see this step's norms."""
        if not isinstance(self._rows, ColumnSampler):
            return
        probes = [(self._probe(self.layers[path]), name) for path, name in self.matrices]
        looked = [probe.norms[name].grad if probe.live and probe.looking else None for probe, name in probes]
        if any(norms is not None for norms in looked):
            kind = next(kind for kind in self.kinds if kind != "act_var")
            flags = torch.tensor([norms is not None for norms in looked]).to(self.device, non_blocking=True)
            self._rows.learn(looked, seen[kind] & finite & flags)

    def discard(self) -> None:
        """Forget the gradients since the last ``step``: those of a step that failed or was given up."""
        for layer in filter(self._owns, self.layers.values()):
            self._probe(layer).advance(self.steps)
        self.micro, self._signs = 0, None
        self._samples.clear()

    def _live(self) -> bool:
        return any(self._owns(layer) for layer in self.layers.values())

    def _sampled(self) -> bool:
        """Whether some layer takes this step's statistics: the others would pay for nothing."""
        return any(self._probe(layer).live for layer in self.layers.values())

    def _probe(self, layer: Linear) -> LayerProbe:
        return layer.probes[self.adapter]

    def _owns(self, layer: Linear) -> bool:
        probe = layer.probes.get(self.adapter)
        return probe is not None and probe.owner is self

    def _add_covariances(self, taken: dict, shared: Shared | None, finite: Tensor, inverse: Tensor | None) -> None:
        inverse = torch.ones((), dtype=torch.float64, device=self.device) if inverse is None else inverse
        if shared is not None:
            self._reduction.add_covariances(self, taken, finite, inverse)
        else:
            self._covariances.add(taken, finite, inverse, {path: layer.backend for path, layer in self.layers.items()})

    def _advance(self) -> None:
        self.steps += 1
        self.discard()
        if self._compiled is not None:
            self._compiled.advance(self.steps)
        if self._rows is not None and self._sampled():
            self._rows.draw(self.steps)
        if self.warmup is not None and self.steps == self.warmup:
            self.importance = self._averages.corrected("fisher" if self.per_sample else "grad_sq")
            self.close()

    def _gather(self, shared: Shared | None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """This step's value of every statistic and matrix, and whether there is one."""
        columns: dict[str, tuple[Tensor, Tensor]] = {}
        if "act_var" in self.kinds:
            columns["act_var"] = self._variances()
        weight_kinds = [kind for kind in self.kinds if kind != "act_var"]
        if weight_kinds and self.estimator == "probe":
            columns |= self._probe_values(shared, weight_kinds)
        elif weight_kinds:
            exact = shared and shared.exact
            if exact is None:
                exact = [exact_values(self, self.layers[path], name, weight_kinds) for path, name in self.matrices]
            for kind in weight_kinds:
                found = [values.get(kind) for values in exact]
                live = [v.to(self.device, torch.float64) for v in found if v is not None]
                there = [v is not None for v in found]
                columns[kind] = self._averages.placed(torch.stack(live) if live else None, there)
        values = {kind: value for kind, (value, _) in columns.items()}
        if shared is not None:
            return shared.finish(self, values), dict(shared.present)
        return values, {kind: seen for kind, (_, seen) in columns.items()}

    def _variances(self) -> tuple[Tensor, Tensor]:
        sums = [self._probe(layer).V.grad for layer in self.layers.values()]
        sizes = [list(layer.slices.values()) for layer in self.layers.values()]
        live = [pair for pair in zip(sums, sizes, strict=True) if pair[0] is not None]
        found = output_variances(*zip(*live, strict=True)).to(self.device) if live else None
        return self._averages.placed(found, [s is not None for s, runs in zip(sums, sizes, strict=True) for _ in runs])

    def _probe_values(self, shared: Shared | None, kinds: Sequence[str]) -> dict[str, tuple[Tensor, Tensor]]:
        grads = [self._probe(self.layers[path]).Z[name].grad for path, name in self.matrices]
        factor = 1.0
        if self.per_sample and shared is None:
            factor = self._sample_factor(self._sample_count())
        there = [grad is not None for grad in grads]
        found = self._rows.values(grads, kinds, factor) if any(there) else {}
        return {kind: self._averages.placed(found.get(kind), there) for kind in kinds}

    def _sample_count(self) -> int | Tensor:
        seen = sum(self._samples.values())
        compiled = self._compiled is not None and self._compiled.used
        return seen + self._compiled.samples if compiled else seen

    def _sample_factor(self, samples: int | Tensor) -> float | Tensor:
        # Backpropagated gradients of a mean loss are 1/n of the samples' own: n Σ||G_i||² is their mean square.
        if not isinstance(samples, Tensor):
            return float(samples) if self.loss_reduction == "mean" else 1.0 / max(samples, 1)
        return samples.double() if self.loss_reduction == "mean" else 1.0 / samples.double().clamp(min=1)

    @property
    def skipped(self) -> int:
        """Steps that were left out because a gradient was not finite (reads back from the device)."""
        return int(self._skipped)

    def scores(self, kind: str = "grad_sq", reduce: str = "sum") -> Scores:
        """The averages by matrix key. ``reduce="mean"`` divides grad_sq and fisher by N·K; grad_abs is always a mean.

        Raises ``ValueError`` for a statistic that is not tracked, ``RuntimeError`` while a matrix has none.
        """
        check_choice("reduce", reduce, ("sum", "mean"))
        if kind not in self.kinds:
            hint = f"; {ABSOLUTE_NEEDS}" if kind == "grad_abs" and self.probe_kind != "columns" else ""
            raise wrong_value("kind", f"what is tracked, {self.kinds}", kind, hint or suggestion(kind, self.kinds))
        counts = self._averages.counts[kind].tolist()
        missing = [key for key, count in zip(self.keys, counts, strict=True) if count == 0]
        if missing:
            shown = ", ".join(missing[:3]) + (" ..." if len(missing) > 3 else "")
            raise RuntimeError(f"no {kind} yet for {shown}: run backward and tracker.step()")
        values = self._averages.corrected(kind).tolist()
        shapes = [(self.layers[path].slices[name], self.layers[path].in_features) for path, name in self.matrices]
        if kind == "grad_abs" or (reduce == "mean" and kind != "act_var"):
            values = [v / (n * k) for v, (n, k) in zip(values, shapes, strict=True)]
        costs = {key: n + k for key, (n, k) in zip(self.keys, shapes, strict=True)}
        return Scores(dict(zip(self.keys, values, strict=True)), kind, costs=costs)

    def covariances(self, kind: str) -> dict[str, Tensor]:
        """``"act_cov"``: x^T x / M [K, K], ``"grad_cov"``: dy^T dy / M [N, N], by module path; M tokens over all steps.

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
        r"""FW-LoRA's regulariser, differentiable in A and B; add it to the loss once per optimiser step.

        .. math:: \lambda \sum_m (1 - I_m) \lVert \Delta W_m \rVert_F^2,\qquad I_m = F_m / \textstyle\sum F

        Zero before ``warmup`` steps, when importance is frozen; without a warmup the current averages weigh.
        ``form="decay"`` is the paper's shortcut, weight decay of A and B with the coefficient λ (1 - I_m).
        ``normalize="relative"`` takes ``I_m / max I``, ``"uniform"`` the mean of the weights everywhere (a control).
        ``adapter``: whose factors, the tracked one's unless said otherwise.
        """
        return self._regulariser.value(*self._weighing(), weight, form, normalize, self._whose(adapter))

    def apply_penalty(
        self, weight: float = 1e-4, *, form: str = "delta", normalize: str = "sum", adapter: str | None = None
    ) -> None:
        r"""Add the gradient of :meth:`penalty`, worked out by hand, to ``.grad`` of A and B; no graph is built.

        .. math:: dA = 2\lambda (1 - I) s^2 (B^\top B) A,\qquad dB = 2\lambda (1 - I) s^2 B (A A^\top)

        Call it after backward (and after ``scaler.unscale_``), before clipping and the optimiser's step.
        """
        self._regulariser.add_gradient(*self._weighing(), weight, form, normalize, self._whose(adapter))

    def _whose(self, adapter: str | None) -> str:
        return self.adapter if adapter is None else adapter

    def _weighing(self) -> tuple[Tensor | None, bool]:
        """The importance that weighs now, and whether it is frozen."""
        if self.importance is None and self.warmup is None and self.steps > 0:
            return self._averages.corrected("fisher" if self.per_sample else "grad_sq"), False
        return self.importance, True

    def state_dict(self) -> dict[str, Any]:
        """Everything that ``load_state_dict`` needs to go on with the same numbers."""
        return saved_state(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a saved state; ``ValueError`` names what differs, with this tracker unchanged."""
        load_state(self, state)


def saved_state(tracker: Any) -> dict[str, Any]:
    """Everything that ``load`` needs, in tensors and plain numbers."""
    return {
        "keys": list(tracker.keys),
        "steps": tracker.steps,
        "seed": tracker.seed,
        "probes": tracker.probes,
        "probe_kind": tracker.probe_kind,
        "columns": tracker._rows.state_dict() if tracker.probe_kind == "columns" and tracker._rows else None,
        "values": {k: v.clone() for k, v in tracker._averages.values.items()},
        "counts": {k: v.clone() for k, v in tracker._averages.counts.items()},
        "skipped": tracker._skipped.clone(),
        "covariances": tracker._covariances.state_dict(),
        "importance": None if tracker.importance is None else tracker.importance.clone(),
    }


def load_state(tracker: Any, state: dict[str, Any]) -> None:
    """Take up a saved state; ``ValueError`` names what differs, with the tracker unchanged."""
    checked_state(state, saved_state(tracker))
    for kind, value in tracker._averages.values.items():
        value.copy_(state["values"][kind])
    for kind, count in tracker._averages.counts.items():
        count.copy_(state["counts"][kind])
    tracker._skipped.copy_(state["skipped"])
    tracker._covariances.load_state_dict(state["covariances"])
    tracker.steps, tracker.seed = state["steps"], state["seed"]
    tracker._reduction.restart()
    tracker.discard()
    tracker.importance = None if state["importance"] is None else state["importance"].to(tracker.device)
    if tracker._rows is not None:
        if state["columns"] is not None:
            tracker._rows.load_state_dict(state["columns"])
        tracker._rows.restart(tracker.seed)
        tracker._rows.draw(tracker.steps)
    if tracker._compiled is not None:
        tracker._compiled.advance(tracker.steps)
    if tracker.importance is not None:
        tracker.close()
