"""Adapted convolutions and embeddings: plain torch, one adapter after another, without statistics."""

from __future__ import annotations

import functools
import inspect
import re
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._utils.torch_compat import unsafe_view
from ..ops.layout import moved
from .linear import Adapted
from .routing import Route


class _Watched(torch.autograd.Function):
    """The identity, as a node that Python can watch (``Router.awaits_backward``); no view, which nobody may change."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return unsafe_view(x, x.shape)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        ctx.spent = True
        return dy


class Plain(Adapted):
    """What an adapted convolution and an adapted embedding share; made by ``inject`` by a change of class.

    A [r, K] and B [N, r] as of a ``Linear``; the file has those of a convolution as kernels. The fused kernels
    do not run here, and statistics of the weight are not tracked.
    """

    original: type[nn.Module]
    groups = 1

    def forward(self, input: Tensor) -> Tensor:
        """The base's output plus ``s B A`` of what each sample's adapter is given."""
        y = self.original.forward(self, input)
        route = self.entered()
        if self.bypassed(route):
            return y
        if route.batch is None:
            out = (y + self.update(route.adapter, input)).to(y.dtype)
        else:
            out = self._mixed(y, input, route)
        if not torch.compiler.is_compiling() and out.grad_fn is not None:
            out = _Watched.apply(out)
            self.router.pending(route).add(out)
        return out

    def _mixed(self, y: Tensor, input: Tensor, route: Route) -> Tensor:
        drops = self.training and any(self.dropout_p(route))
        if route.batch.row_seeds is not None and drops:
            raise ValueError(f"row_seeds: expected None, or no dropout in a {self.original.__name__}, got both")
        ids, out = self.ids_of(y, route), y
        for place, name in enumerate(route.batch.names):
            if name in self.ranked:
                out = out + torch.where(ids == place, self.update(name, input), 0.0)
        return out.to(y.dtype)

    def factors(self, adapter: str) -> tuple[Tensor, Tensor, float]:
        """(A, B, s) of an adapter that has a rank here."""
        (found,) = self.pairs(adapter)
        return found

    def merged_weight(self, adapter: str | None = None) -> Tensor | None:
        """``W + s B A`` in the weight's dtype and layout, None where it is not finite."""
        delta = self.delta(adapter)
        merged = (self.weight.to(delta.dtype) + delta).to(self.weight.dtype)
        return merged if bool(merged.isfinite().all()) else None


class Convolution(Plain):
    r"""A convolution with a low-rank update, as in PEFT.

    .. math:: y = \mathrm{conv}(x, W) + b + s\, \mathrm{conv}_{1}(\mathrm{conv}(\mathrm{dropout}(x), A), B)

    A [r, C·k] is a convolution with W's kernel, stride, padding and dilation over all channels; B [N, r / groups] one
    with kernels of size 1 in as many groups as W has. With groups above 1 no weight of W's shape does the same, so that
    ``merge`` refuses it.
    """

    def update(self, adapter: str, x: Tensor) -> Tensor:
        """``s B A`` of x with dropout."""
        a, b, s = self.factors(adapter)
        if self.training:
            x = F.dropout(x, self.adapter_specs[adapter].dropout)
        if self.padding_mode != "zeros":
            x = F.pad(x, pads(self), mode=self.padding_mode)
        conv = (F.conv1d, F.conv2d, F.conv3d)[len(self.kernel_size) - 1]
        padding = self.padding if self.padding_mode == "zeros" else 0
        down, up = (t.view(shape) for t, shape in zip((a, b), kernel_shapes(self, len(a)), strict=True))
        h = conv(x.to(a.dtype), down, None, self.stride, padding, self.dilation)
        return conv(h, up, self.lora_B[adapter].beside().get("bias"), groups=self.groups) * s

    def ids_of(self, y: Tensor, route: Route) -> Tensor:
        """The id of each sample, in a shape that goes with y."""
        ids = moved(route.batch.ids, y.device)
        if ids.dim() != 1 or y.dim() != self.weight.dim() or ids.shape[0] != y.shape[0]:
            raise ValueError(f"ids: {tuple(ids.shape)} given, but a convolution takes one a sample ({y.shape[0]})")
        return ids.view(-1, *(1,) * (y.dim() - 1))

    def delta(self, adapter: str | None = None) -> Tensor:
        """``s B A`` in the weight's shape."""
        return super().delta(adapter).view_as(self.weight)


def pads(module: nn.Module) -> list[int]:
    """What ``F.pad`` takes of a convolution's padding: the last dimension first, before and after."""
    if module.padding == "valid":
        sides = [(0, 0)] * len(module.kernel_size)
    elif module.padding == "same":
        both = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        sides = [(n // 2, n - n // 2) for n in both]
    else:
        sides = [(n, n) for n in module.padding]
    return [n for side in reversed(sides) for n in side]


def kernel_shapes(module: nn.Module, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of a convolution's factors as kernels: [r, C, *k] and [N, r / groups, 1, ...]."""
    ones = (1,) * len(module.kernel_size)
    return (rank, module.in_channels, *module.kernel_size), (module.out_channels, rank // module.groups, *ones)


class Conv1d(Convolution, nn.Conv1d):
    __doc__ = Convolution.__doc__
    original = nn.Conv1d


class Conv2d(Convolution, nn.Conv2d):
    __doc__ = Convolution.__doc__
    original = nn.Conv2d


class Conv3d(Convolution, nn.Conv3d):
    __doc__ = Convolution.__doc__
    original = nn.Conv3d


class Embedding(Plain, nn.Embedding):
    r"""An embedding with a low-rank update, as in PEFT: A [r, V] is zero at first, B [D, r] normal.

    .. math:: y_i = W_{x_i} + s\, A^\top_{x_i} B^\top

    The update has no dropout, and ``padding_idx`` gets no gradient in A either.
    """

    original = nn.Embedding
    lookup = True

    def update(self, adapter: str, x: Tensor) -> Tensor:
        """``s A^T[x] B^T``."""
        a, b, s = self.factors(adapter)
        h = F.embedding(x, a.t(), self.padding_idx, scale_grad_by_freq=self.scale_grad_by_freq)
        return (h @ b.t()) * s

    def ids_of(self, y: Tensor, route: Route) -> Tensor:
        """The id of each token, in a shape that goes with y [*, D]."""
        return route.batch.rows(y).ids.view(*y.shape[:-1], 1)

    def delta(self, adapter: str | None = None) -> Tensor:
        """``s (B A)^T`` of the whole weight [V, D]."""
        return super().delta(adapter).t()


class ScaledEmbedding(Embedding):
    r"""An adapted embedding of a class that multiplies by c, its ``embed_scale``; there is one for each such class.

    .. math:: y_i = c\, (W_{x_i} + s\, A^\top_{x_i} B^\top)
    """

    def update(self, adapter: str, x: Tensor) -> Tensor:
        """``c s A^T[x] B^T``."""
        return times_scale(self, super().update(adapter, x))

    def __reduce__(self) -> tuple:
        return _unpickled, (self.original,), self.__getstate__()


@functools.cache
def _scaled_class(original: type[nn.Embedding]) -> type[ScaledEmbedding]:
    return type(
        original.__name__, (ScaledEmbedding, original), {"original": original, "__doc__": ScaledEmbedding.__doc__}
    )


def _unpickled(original: type[nn.Embedding]) -> ScaledEmbedding:
    kind = _scaled_class(original)
    return kind.__new__(kind)


# Of transformers' scaled embeddings; one that does more, as T5Gemma2's for one token, is another function.
_SCALED = re.compile(
    r"def forward\(self, (\w+)(: [\w.]+)?\)( -> [\w.]+)?:\s+"
    r"return super\(\)\.forward\(\1\) \* self\.embed_scale(\.to\(self\.weight\.dtype\))?"
)


@functools.cache
def _only_scales(kind: type[nn.Embedding]) -> bool:
    owner = next(each for each in kind.__mro__ if "forward" in vars(each))
    try:
        source = inspect.getsource(owner.forward)
    except (OSError, TypeError):  # no source, and nothing to know it by
        return False
    return super(owner, owner).forward is nn.Embedding.forward and _SCALED.fullmatch(source.strip()) is not None


def is_scaled(module: nn.Module) -> bool:
    """Whether a module is an embedding whose forward is ``nn.Embedding``'s times one number, its ``embed_scale``."""
    c = getattr(module, "embed_scale", None)
    one = c.numel() == 1 if isinstance(c, Tensor) else isinstance(c, (int, float))
    return one and isinstance(module, nn.Embedding) and _only_scales(type(module))


def times_scale(module: nn.Embedding, y: Tensor) -> Tensor:
    """What a scaled embedding makes of rows that are not in its weight, with its number in the weight's dtype."""
    c = module.embed_scale
    return y * (c.to(module.weight.dtype) if isinstance(c, Tensor) else c)


CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
CLASSES: dict[type[nn.Module], type[Plain]] = {kind.original: kind for kind in (Conv1d, Conv2d, Conv3d, Embedding)}


def plain_class(module: nn.Module) -> type[Plain] | None:
    """What a convolution or an embedding becomes when it is adapted; None for any other layer."""
    return _scaled_class(type(module)) if is_scaled(module) else CLASSES.get(type(module))
