"""What a tracked layer carries: zero leaves, the tap of the exact estimator, the token mask."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .._utils.errors import check_instance, wrong_value
from .._utils.torch_compat import capturing
from ..ops.layout import moved, on_host
from ..ops.probe_ops import measured, with_moments
from ..ops.reference import accumulate_dtype
from .adapter import Slices
from .probe_rows import SampleSigns


def refuse_capture(device_type: str) -> None:
    """A replay knows neither of the optimizer step nor of ``.grad`` of leaves: its statistics would be of one step."""
    if capturing(device_type):
        raise RuntimeError(
            "track: expected no capture of a CUDA graph, got one, whose replays would repeat one step's probes; run "
            "steps with a tracker eagerly or under torch.compile, and call tracker.close() before a capture"
        )


class Contribution(NamedTuple):
    """One backward through one call of a layer, kept by the exact estimator until ``step``."""

    micro: int
    x: Tensor
    dy: Tensor
    keep: Tensor | None = None  # tokens that count in covariances, a boolean for each row of x; None: all
    part: str | None = None  # the slice whose rows these are, where slices do not share x
    samples: tuple[Tensor, int] | None = None  # then: of each row, and how many there are


class _Tap(torch.autograd.Function):
    """Identity whose backward keeps (x, dy): recorded if and only if backward ran."""

    @staticmethod
    def forward(
        ctx,
        y: Tensor,
        x: Tensor,
        sink: list,
        micro: int,
        select: tuple[Tensor, bool] | None,
        keep: Tensor | None,
        leaf: Tensor | None,
    ) -> Tensor:
        ctx.sink, ctx.micro, ctx.select = sink, micro, select
        ctx.save_for_backward(x, keep)
        # Not a view of y, which an owner could not add its bias to in place.
        ctx.mark_dirty(y)
        return y

    @staticmethod
    def backward(ctx, dy: Tensor):
        x, keep = ctx.saved_tensors
        if ctx.select is None or len(ctx.select[0]):  # an adapter that is absent from a batch contributes nothing
            rows = [selected(tensor.detach(), ctx.select) for tensor in (x, dy)]
            kept = None if keep is None else selected(keep.unsqueeze(-1), ctx.select).squeeze(-1)
            ctx.sink.append(Contribution(ctx.micro, *rows, kept))
        return dy, None, None, None, None, None, None


def tap(
    y: Tensor, x: Tensor, sink: Any, micro: int, select: tuple[Tensor, bool] | None = None, keep: Tensor | None = None
) -> Tensor:
    """``y``, whose backward appends a ``Contribution`` to ``sink``."""
    if torch.compiler.is_compiling():
        raise RuntimeError("track: estimator='exact' runs in eager mode only; use estimator='probe' under compile")
    # Where nothing of the call is trained there would be no backward.
    leaf = None if y.requires_grad else y.new_zeros((), requires_grad=True)
    return _Tap.apply(y, x, sink, micro, select, keep, leaf)


def selected(tensor: Tensor, select: tuple[Tensor, bool] | None) -> Tensor:
    """The entries of a tensor that are an adapter's: all, those of dimension 0, or rows."""
    if select is None:
        return tensor
    index, flat = select
    return (tensor.reshape(-1, tensor.shape[-1]) if flat else tensor).index_select(0, index)


class AdaptedLayer(Protocol):
    """What a probe reads of the layer it is for."""

    slices: Slices
    in_features: int
    out_features: int
    parts: int
    weight: Tensor
    backend: str


class TrackedStep:
    """What the layers of one tracker share: which statistics are taken, and the optimizer step that runs.

    It knows no layer: a layer holds its probe, the probe holds this, and nothing of it leads back to the layer.
    """

    def __init__(self, kinds: frozenset[str], estimator: str, probes: int, probe_kind: str):
        self.estimator, self.probes, self.probe_kind = estimator, probes, probe_kind
        self.of_weights = bool(kinds - {"act_var"})  # whether a statistic takes more than the moments of the output
        self.variances, self.per_sample = "act_var" in kinds, "fisher" in kinds
        self.covariances = bool({"act_cov", "grad_cov"} & kinds)
        self.taps = probe_kind == "columns" or (estimator == "exact" and self.of_weights)  # without a mask
        self.redraws = probe_kind == "columns" or self.per_sample  # for each forward, beside each step
        self.index, self.micro = 0, 0  # the optimizer step, and the forwards in it so far
        self.sampled, self.refreshes_norms = True, True
        self.compiled = False  # whether compiled code runs through the layers
        self.samples = 0  # of the forward that runs, by dimension 0 of the model's first tensor
        self.signs: SampleSigns | None = None  # with probes for ``fisher``

    def begin(self, index: int, sampled: bool, refreshes_norms: bool) -> None:
        """Get ready for an optimizer step."""
        self.index, self.micro = index, 0
        self.sampled, self.refreshes_norms = sampled, refreshes_norms
        if self.signs is not None:
            self.signs.advance(index)

    def signs_for(self, x: Tensor, own: int | None = None) -> Tensor:
        """±1 per (sample, probe) of the current micro-batch; a sample is an entry of x's dimension 0.

        ``own`` of them are the tracked adapter's, all without it.
        """
        return self.signs.take(x.shape[0] if x.dim() > 1 else 1, own, self.index, self.micro, x.device)


class LayerProbe:
    """The statistics side of one adapted layer; the layer asks it for operands and hands it its output."""

    def __init__(self, layer: AdaptedLayer, step: TrackedStep):
        self.slices, self.width, self.backend, self.step = layer.slices, layer.out_features, layer.backend, step
        self.exact = step.estimator == "exact" and step.of_weights
        self.P: Tensor | None = None
        self.columns: Tensor | None = None  # [n, k] columns of x to measure each slice on, in place of P
        self.Z: dict[str, Tensor] = {}
        self.norms: dict[str, Tensor] = {}
        self.V: Tensor | None = None
        self.taken: list[Contribution] = []
        acc, device = accumulate_dtype(layer.weight.dtype), layer.weight.device
        if step.estimator == "probe" and step.of_weights:
            self.Z = {
                name: torch.zeros(rows, step.probes, dtype=acc, device=device, requires_grad=True)
                for name, rows in layer.slices.items()
            }
            if step.probe_kind == "columns":
                self.norms = {
                    name: torch.zeros(layer.in_features, dtype=acc, device=device, requires_grad=True)
                    for name in layer.slices
                }
        if step.variances:
            moments = (2, layer.out_features + layer.parts)
            self.V = torch.zeros(moments, dtype=torch.float64, device=device, requires_grad=True)
        self._leaves = [*self.Z.values(), *self.norms.values(), *([] if self.V is None else [self.V])]

    @property
    def live(self) -> bool:
        """Whether the optimizer step that runs is sampled."""
        return self.step.sampled

    def steady(self, route: Any) -> bool:
        """Whether a call takes the same operands as any other that is steady: P is redrawn in place."""
        step = self.step
        return step.sampled and not step.redraws and route.mask is None and torch.is_grad_enabled()

    def follow(self, weight: Tensor) -> None:
        """Have the leaves be in the dtype that a product with the layer's weight is summed in, which may have changed.

        Raises ``ValueError`` where the weight has moved to another device: what is drawn and summed stays where it is.
        """
        dtype = accumulate_dtype(weight.dtype)
        for leaf in self._leaves:
            if leaf.device != weight.device and torch.is_grad_enabled():
                raise ValueError(
                    f"model: expected on {leaf.device}, where it was when tracking began, got it on {weight.device}; "
                    "track it after moving it"
                )
            if leaf is not self.V and leaf.dtype != dtype:
                grad, leaf.grad = leaf.grad, None
                with torch.inference_mode(False):
                    leaf.data = leaf.data.to(dtype)
                    leaf.grad = None if grad is None else grad.to(dtype)

    def entered(self, x: Tensor) -> None:
        """Take note of a forward on ``x`` that builds a graph."""
        if torch.compiler.is_compiling():
            self.step.compiled = True
        else:
            refuse_capture(x.device.type)

    def operands(
        self, probes: Sequence[LayerProbe], x: Tensor, route: Any, samples: int | None = None
    ) -> dict[str, Any]:
        """Extra operands of the operator for layers that run together on ``x``, ``samples`` of it their adapter's.

        Columns of x in a batch of several adapters, and rows of y under a mask, are left to ``tap``.
        """
        step = self.step
        if not torch.is_grad_enabled():
            return {}
        self.entered(x)
        if not step.sampled:
            return {}
        found: dict[str, Any] = {}
        if self.Z and (self.columns is None or route.batch is None):
            P = self.P if self.columns is None else torch.cat([LayerProbe.index(probe) for probe in probes])
            found["P"] = P
            found["Z"] = [z for probe in probes for z in probe.Z.values()]
            if step.per_sample:
                found["sign"] = step.signs_for(x, samples)
        if self.V is not None and route.mask is None:
            found["V"] = [probe.V for probe in probes]
        return found

    def tap(self, x: Tensor, y: Tensor, route: Any, name: str) -> Tensor:
        """The output as the layer returns it; ``route`` says which of its rows are the adapter's and count."""
        if not self.live or not torch.is_grad_enabled():
            return y
        place = None if route.batch is None else (route.batch, name)
        if self.V is not None and route.mask is not None and (place is None or name in tracked_adapters(route.batch)):
            y = with_moments(y, self.V, token_mask_rows(x, route, name), self.backend)
        if self.columns is not None:
            return LayerProbe._measure(self, x, y, place) if self.step.refreshes_norms or place else y
        if not self.exact:
            return y
        select = None if place is None else place[0].select(place[1], x)
        if select is not None and select[1] and self.step.per_sample:
            raise RuntimeError("track: 'fisher' needs samples: give use_adapters() one id a sample, not one a token")
        keep = token_mask(x, route) if self.step.covariances else None
        return tap(y, x, self.taken, self.step.micro, select, keep)

    def index(self) -> Tensor:
        """Columns of x [n, k] for its slices: a part of a layer has some of them."""
        mine = [i for i, name in enumerate(self.slices) if name in self.Z]
        return self.columns if len(mine) == len(self.columns) else self.columns[mine]

    def _measure(self, x: Tensor, y: Tensor, place: tuple[Any, str] | None) -> Tensor:
        """``y``, whose backward gives what the operator does not: norms of columns, and Q of one adapter of several."""
        if place is not None and place[1] not in tracked_adapters(place[0]):
            return y
        rows, own = x.detach().reshape(-1, x.shape[-1]), None
        if place is not None:
            own = (place[0].rows(x).ids == place[0].names.index(place[1])).unsqueeze(1)
        picked, Z = None, []
        if place is not None:
            index = LayerProbe.index(self)
            picked, Z = torch.where(own, rows.index_select(1, index.reshape(-1)), 0).to(y.dtype), list(self.Z.values())
            if self.step.per_sample:
                sign = self.step.signs_for(x, place[0].samples(place[1])).to(picked.dtype).repeat(1, len(index))
                picked = (picked.view(sign.shape[0], -1, sign.shape[1]) * sign.unsqueeze(1)).flatten(0, 1)
        sizes, norms = [z.shape[0] for z in self.Z.values()], []
        if self.step.refreshes_norms:
            norms, rows = [self.norms[name] for name in self.Z], rows if own is None else torch.where(own, rows, 0)
        return measured(y, sizes, self.backend, picked, Z, rows if norms else None, norms, self.slices.blocks)

    def clear(self) -> None:
        """Forget what was taken since the last optimizer step."""
        self.taken.clear()
        for leaf in self._leaves:
            leaf.grad = None


def tracked_adapters(batch: Any) -> Sequence[str]:
    """The adapters of a batch that have statistics."""
    # Data-parallel ranks name all adapters, so that they agree on gradients; one that is absent has no statistics.
    on_host = batch.ids.device.type == "cpu" and not torch.compiler.is_compiling()
    return batch.present() if on_host else batch.names


def group_operands(
    probes: Mapping[str, Sequence[LayerProbe]], layers: Sequence[Any], route: Any, x: Tensor
) -> dict[str, Any]:
    """Extra operands of the grouped operator: lists over the batch's adapters, empty where one is not tracked."""
    found, batch = {}, route.batch
    for name, mine in probes.items():
        if name not in tracked_adapters(batch):
            continue
        samples = batch.samples(name) if mine[0].step.per_sample else None
        found[name] = mine[0].operands(mine, x, route, samples)
    Z, P, sign, V = [], [], [], []
    acc = accumulate_dtype(x.dtype)
    rows_dtype = next((own["P"].dtype for own in found.values() if "P" in own), torch.float32)
    for name in batch.names:
        own = found.get(name, {})
        widths = [rows for layer in layers for rows in layer.slices.values()]
        Z += own.get("Z", [x.new_zeros((rows, 0), dtype=acc) for rows in widths])
        P.append(own.get("P", x.new_zeros((0, x.shape[-1]), dtype=rows_dtype)))
        sign.append(own.get("sign", x.new_zeros((0, 0), dtype=torch.float32)))
        V += own.get("V", [x.new_zeros((2, layer.out_features + 1), dtype=torch.float64) for layer in layers])
    if not any("V" in own for own in found.values()):
        V = []
    if not any("Z" in own for own in found.values()):
        Z, P, sign = [], [], []
    return {"Z": Z, "V": V, "P": P, "sign": sign}


def token_mask(x: Tensor, route: Any) -> Tensor | None:
    """Which tokens of ``x`` [*, K] count: the route's mask as booleans [*], None without one.

    Raises ``ValueError`` where the mask is not one of x's tokens.
    """
    keep, tokens = route.mask, x.shape[:-1]
    if keep is None:
        return None
    if keep.shape not in (tokens, (tokens.numel(),)):
        seen = tuple(tokens)
        raise ValueError(f"mask: expected the tokens {seen} that a layer sees, got {tuple(keep.shape)}")
    return moved(keep.reshape(tokens), x.device)


def token_mask_rows(x: Tensor, route: Any, name: str) -> Tensor | None:
    """Which rows of ``x`` [*, K] count and are an adapter's: booleans [M], or None for all."""
    keep = token_mask(x, route)
    keep = None if keep is None else keep.reshape(-1)
    if route.batch is None:
        return keep
    own = route.batch.rows(x).ids == route.batch.names.index(name)
    return own if keep is None else own & keep


@contextlib.contextmanager
def masked(layers: Mapping[str, Any], mask: Tensor) -> Iterator[None]:
    """Inside, the ways of this thread through the layers have the mask."""
    found = [layer.router for layer in layers.values() if hasattr(layer, "router")]  # none once unloaded
    routers = list({id(router): router for router in found}.values())
    opened = [(router, router.open(router.current().masked(mask), chosen=False)) for router in routers]
    try:
        yield
    finally:
        for router, route in opened:
            router.close(route)


def checked_mask(mask: object) -> Tensor:
    """A mask as booleans; ``ValueError`` for what is none."""
    kinds = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
    accepted = "a tensor of booleans or integers [S, T] or [M], 1 a token that counts"
    if check_instance("mask", mask, Tensor, accepted).dtype not in kinds or mask.dim() not in (1, 2):
        raise wrong_value("mask", accepted, mask)
    if on_host(mask.device) and bool(((mask != 0) & (mask != 1)).any()):
        raise ValueError(f"mask: expected 0 and 1 only, got {sorted(set(mask.flatten().tolist()) - {0, 1})[:4]}")
    return mask.bool()
