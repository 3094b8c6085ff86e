"""``initialize_corda``, ``initialize_lora_ga``: factors that start from the weight or its gradient, as data has it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .._utils.distributed import refuse_parallel
from .._utils.errors import check_choice, check_integer, check_number, listed, wrong_value
from .._utils.types import ModelT
from ..nn.active import chosen_adapter
from ..nn.initialise import take_out
from ..nn.layer_view import Conv1D
from ..nn.linear import Linear, QKVLinear, adapted_layers, matrix_key
from ..ops.matmul import UNPACKED
from ..tracking.calibrate import backward_passes, preserve_model_state
from .eva import covariances_of
from .modules import users_of_parameters

DIRECTIONS = ("ArBr", "A2rBr", "ArB2r", "random")
SCALES = ("stable", "weight_svd", "gd_scale", "unit")


class _Slice(NamedTuple):
    """One matrix of an adapter: its layer, its slice and rank, and what it becomes."""

    path: str
    layer: Linear
    part: str
    rank: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.layer.slices[self.part], self.layer.in_features

    def weight(self) -> Tensor:
        """W of the slice [N, K], in fp32 or more."""
        W = self.layer.as_matrix(self.layer.weight.detach())[self.layer.slices.rows(self.part)]
        return W.to(torch.promote_types(W.dtype, torch.float32))


@torch.no_grad()
def initialize_corda(
    model: ModelT, covariances: Mapping[str, Tensor], *, method: str = "ipm", adapter: str | None = None
) -> ModelT:
    r"""CorDA: A and B become the part of W that the inputs see most, or least, and W the rest; returns the model.

    .. math:: W C = U S V^\top,\quad s B A = U_r S_r V_r^\top C^{-1},\quad W \leftarrow W - s B A

    with the root of S on either side, and C = x^T x / M + d I, where d is 1 % of the mean of its diagonal, or doubled
    until C can be inverted. ``covariances``: x^T x / M [K, K] by module path, as ``tracker.covariances("act_cov")`` of
    an exact tracker gives them. ``method``: ``"ipm"`` takes the leading r, ``"kpm"`` the last. PEFT divides the inputs
    of each batch by their largest value: B A is the same, the root of the factor moves between A and B.

    Outputs stay. The frozen weight is changed, so that ``save`` writes A and B with the part that was taken out of W
    beside them, of twice the rank: the file is plain LoRA over the weight as it was. A model that is trained on from
    a checkpoint is initialized again first, from the same data.

    ``adapter``: the active one unless named. Raises ``TypeError`` or ``ValueError`` naming the argument, with the model
    as it was, for a layer without a matrix or with one that will not do, layers that are no linear or share their
    weight, trained ones, and ranks above min(N, K).
    Source: Yang et al., "CorDA: Context-Oriented Decomposition Adaptation" (NeurIPS 2024).

    >>> model = nn.Sequential(fastlora.nn.Linear(8, 8, r=2))
    >>> before = model[0].weight.clone()
    >>> model = fastlora.initialize_corda(model, {"0": torch.eye(8)})
    >>> torch.allclose(model[0].weight + model[0].delta(), before, atol=1e-6)
    True
    """
    check_choice("method", method, ("ipm", "kpm"))
    adapter, slices = _slices(model, adapter, "initialize_corda")
    given, starts = covariances_of(covariances, {each.path: each.layer for each in slices}), []
    for each in slices:
        U, S, V = _corda(each, given[each.path])
        chosen = slice(0, each.rank) if method == "ipm" else slice(len(S) - each.rank, len(S))
        root = (S[chosen] / each.layer.adapter_specs[adapter].scale[each.part]).sqrt()
        starts.append((V[:, chosen].t() * root[:, None], U[:, chosen] * root))
    _begin(slices, starts, adapter)
    return model


def _corda(each: _Slice, C: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    W = each.weight()
    C, eye, damp = C.to(W), torch.eye(len(C), device=W.device).to(W), 0.01
    while True:
        fixed = C + eye * (C.diagonal().mean() * damp)
        inverse, info = torch.linalg.inv_ex(fixed)
        if not info and torch.dist(fixed @ inverse, eye) < 0.05:
            break
        damp *= 2
        if damp > 1e6:
            raise wrong_value(f"covariances[{each.path!r}]", "a matrix that damping makes invertible", C)
    U, S, Vh = torch.linalg.svd(W @ fixed, full_matrices=False)
    return U, S, (Vh @ inverse).t()


def initialize_lora_ga(
    model: ModelT,
    batches: Iterable[Any],
    loss_fn: Callable[[nn.Module, Any], Tensor],
    *,
    steps: int | None = 8,
    passes: int = 3,
    direction: str = "ArB2r",
    scale: str = "stable",
    stable_gamma: float = 16,
    adapter: str | None = None,
) -> ModelT:
    r"""LoRA-GA: A and B become singular vectors of the weight's gradient, and W the rest; returns the model.

    .. math:: G = \frac{1}{n} \sum_i \nabla_W \ell_i = U S V^\top,\quad A = V_{:r}^\top,\quad
              B = U_{r:2r} S_{r:2r} \cdot \text{scale},\quad W \leftarrow W - s B A

    G [N, K] is never formed. Its leading 2r directions come from block power iteration through the adapters, with up
    to 4r columns: with B = 0 the gradient of B is s G A^T, with A = 0 that of A is s B^T G, and outputs stay in both.

    - ``steps`` items of ``batches`` (None: all) are kept, and ``loss_fn(model, batch)`` is differentiated for each,
      ``2 * passes`` times, with the same random numbers.
    - ``direction``: components of A and B, ``"ArB2r"`` as above, ``"A2rBr"`` the other way, ``"ArBr"`` in turns,
      ``"random"`` the same for both. ``scale``: ``"stable"`` is N^(1/4) / sqrt(stable_gamma), ``"weight_svd"`` the
      first singular value of W over that of B, ``"gd_scale"`` 1/s for A and B, ``"unit"`` 1.

    ``adapter``: the active one unless named.

    Outputs stay; for files and checkpoints see ``initialize_corda``. Raises ``TypeError`` or ``ValueError`` naming the
    argument, with the model as it was, for what ``calibrate`` refuses of batches and losses, matrices that no gradient
    reaches, ranks above half of min(N, K), and layers that ``initialize_corda`` refuses.
    On one model it did worse than the default start on CoLA, -8.94 ± 4.66 hundredths of Matthews correlation; on SST-2
    no difference could be told (``docs/experiment.md``).
    Source: Wang et al., "LoRA-GA: Low-Rank Adaptation with Gradient Approximation" (NeurIPS 2024).

    >>> model, x = nn.Sequential(fastlora.nn.Linear(8, 8, r=2)), torch.randn(4, 8)
    >>> before = model(x)
    >>> model = fastlora.initialize_lora_ga(model, [x], lambda model, x: model(x).square().mean(), steps=1)
    >>> torch.allclose(model(x), before, atol=1e-5)
    True
    """
    check_integer("passes", passes, 1)
    check_choice("direction", direction, DIRECTIONS)
    check_choice("scale", scale, SCALES)
    if check_number("stable_gamma", stable_gamma) <= 0:
        raise wrong_value("stable_gamma", "a positive number", stable_gamma)
    adapter, slices = _slices(model, adapter, "initialize_lora_ga", halves=2)
    kept = None
    with preserve_model_state(model, adapter), _probing(slices, adapter):
        seed = int(torch.randint(2**31, ()))

        def sweep() -> None:
            nonlocal kept
            torch.manual_seed(seed)
            kept = backward_passes(model, kept or batches, loss_fn, None if kept else steps)

        bases = _power_iteration(slices, adapter, passes, sweep, lambda: len(kept))
    with torch.no_grad():
        starts = [
            _lora_ga(each, *basis, adapter, direction, scale, stable_gamma)
            for each, basis in zip(slices, bases, strict=True)
        ]
        _begin(slices, starts, adapter)
    return model


@contextlib.contextmanager
def _probing(slices: list[_Slice], adapter: str) -> Iterator[None]:
    """Factors may be replaced inside; s = 1, no dropout, no packed copies of weights to be changed. All is put back."""
    layers = {id(each.layer): each.layer for each in slices}.values()
    specs = [(layer, layer.adapter_specs[adapter], layer.engine) for layer in layers]
    factors = [(f, f._parameters.copy()) for layer in layers for f in (layer.lora_A[adapter], layer.lora_B[adapter])]
    try:
        for layer, spec, _ in specs:
            layer.adapter_specs[adapter], layer.engine = replace(spec, dropout=0.0), UNPACKED
            layer.rescale(adapter, dict.fromkeys(spec.scale, 1.0))
        yield
    finally:
        for module, parameters in factors:
            module._parameters.update(parameters)
        for layer, spec, engine in specs:
            layer.adapter_specs[adapter], layer.engine = spec, engine
            layer.rescale(adapter, spec.scale)


def _power_iteration(
    slices: list[_Slice], adapter: str, passes: int, sweep: Callable[[], None], count: Callable[[], int]
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(U, S, V) of the leading directions of each gradient, of the mean over batches."""
    rights, found = [], []
    for each in slices:
        width = min(4 * each.rank, *each.shape)
        W = each.layer.weight
        start = torch.randn(each.shape[1], width, dtype=torch.promote_types(W.dtype, torch.float32))
        rights.append(torch.linalg.qr(start.to(W.device)).Q)
    for _ in range(passes):
        images = _gradients(slices, adapter, [V.t() for V in rights], "A", sweep)
        lefts = [torch.linalg.qr(image).Q for image in images]
        found = _gradients(slices, adapter, lefts, "B", sweep)
        rights = [torch.linalg.qr(rows.t()).Q for rows in found]
    out = []
    for U, rows in zip(lefts, found, strict=True):
        small, S, Vh = torch.linalg.svd(rows / count(), full_matrices=False)
        out.append((U @ small, S, Vh.t()))
    return out


def _gradients(
    slices: list[_Slice], adapter: str, values: list[Tensor], side: str, sweep: Callable[[], None]
) -> list[Tensor]:
    """Gradients of the other factor where one side has ``values`` and the other is zero: G A^T, or B^T G."""
    probes = []
    for each, value in zip(slices, values, strict=True):
        N, K = each.shape
        width = value.shape[0] if side == "A" else value.shape[1]
        zero = value.new_zeros((N, width) if side == "A" else (width, K))
        A, B = (value, zero) if side == "A" else (zero, value)
        for factors, tensor in ((each.layer.lora_A[adapter], A), (each.layer.lora_B[adapter], B)):
            setattr(factors, each.part, nn.Parameter(tensor.to(each.layer.adapter_specs[adapter].dtype).contiguous()))
        probes.append(getattr((each.layer.lora_B if side == "A" else each.layer.lora_A)[adapter], each.part))
    sweep()
    missing = [matrix_key(each.path, each.part) for each, p in zip(slices, probes, strict=True) if p.grad is None]
    if missing:
        raise ValueError(f"loss_fn: no gradient reaches {listed(missing)}")
    return [p.grad.to(value.dtype) for p, value in zip(probes, values, strict=True)]


def _lora_ga(
    each: _Slice, U: Tensor, S: Tensor, V: Tensor, adapter: str, direction: str, scale: str, gamma: float
) -> tuple[Tensor, Tensor]:
    r, s = each.rank, each.layer.adapter_specs[adapter].scale[each.part]
    every = torch.arange(2 * r, device="cpu")
    of_a, of_b = {
        "ArBr": (every[1::2], every[0::2]),
        "A2rBr": (every[r:], every[:r]),
        "ArB2r": (every[:r], every[r:]),
    }.get(direction) or (torch.randperm(2 * r)[:r],) * 2
    A, B, lengths = V[:, of_a].t(), U[:, of_b] * S[of_b], S[of_b]
    if scale == "stable":
        B = B * (each.shape[0] ** 0.25 / gamma**0.5)
    elif scale == "weight_svd" and lengths[0] > 0:
        B = B * (torch.linalg.matrix_norm(each.weight(), 2) / lengths[0])
    elif scale == "gd_scale":
        A, B = A / s, B / s
    return A, B


def _slices(model: nn.Module, adapter: str | None, verb: str, halves: int = 1) -> tuple[str, list[_Slice]]:
    """Every matrix that is to start elsewhere, or ``ValueError`` for one that cannot."""
    refuse_parallel(model, verb)
    adapter, users, found = chosen_adapter(model, adapter), users_of_parameters(model), []
    for path, layer in adapted_layers(model).items():
        if adapter not in layer.ranked:
            continue
        if type(layer) not in (Linear, QKVLinear, Conv1D):
            raise ValueError(f"model: {path!r} is {type(layer).__name__}, and {verb} takes parts of plain linears")
        if layer.merged:
            raise ValueError(f"model: {path!r} is merged; call fastlora.unmerge first")
        if len(layer.adapter_specs) > 1:
            raise ValueError(f"model: {path!r} has another adapter on the same weight")
        if len(users[id(layer.weight)]) > 1:
            raise ValueError(f"model: {path!r} shares its weight with another module, which {verb} would change")
        if layer.weight.is_meta:
            raise ValueError(f"model: the weight of {path!r} is on the meta device")
        for side in (layer.lora_A, layer.lora_B):
            side[adapter].own(adapter)
        if layer.lora_A[adapter].starts() or any(
            b is not None and bool(b.any()) for b in layer.lora_B[adapter].tensors().values()
        ):
            raise ValueError(f"model: {path!r} has been trained or initialized (B is not zero)")
        for part, rank in layer.ranks(adapter).items():
            most = min(layer.slices[part], layer.in_features) // halves
            if rank > most:
                raise ValueError(f"model: {matrix_key(path, part)!r} has rank {rank}, and {verb} takes up to {most}")
            if rank and layer.adapter_specs[adapter].scale[part] <= 0:
                raise ValueError(f"model: {matrix_key(path, part)!r} has s = 0 or below; {verb} divides by it")
            found += [_Slice(path, layer, part, rank)] if rank else []
    return adapter, found


def _begin(slices: list[_Slice], starts: list[tuple[Tensor, Tensor]], adapter: str) -> None:
    """Put A and B in place, keep a copy, and take s B A out of W."""
    for each, factors in zip(slices, starts, strict=True):
        if not all(bool(f.isfinite().all()) for f in factors):
            raise ValueError(f"model: {each.path!r} gives factors that are not finite")
    with torch.inference_mode(False):  # what is kept is no inference tensor, wherever it is made
        staged = [
            (f, each.part, value.to(f.own(adapter)[each.part].dtype).clone(memory_format=torch.contiguous_format))
            for each, factors in zip(slices, starts, strict=True)
            for f, value in zip((each.layer.lora_A[adapter], each.layer.lora_B[adapter]), factors, strict=True)
        ]
    for factors, part, value in staged:
        factors.start(part, value)
    for layer in {id(each.layer): each.layer for each in slices}.values():
        W, spec = layer.as_matrix(layer.weight), layer.adapter_specs[adapter]
        take_out(W, layer.slices, spec, layer.lora_A[adapter], layer.lora_B[adapter])
