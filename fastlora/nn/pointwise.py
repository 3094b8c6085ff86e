"""Adapted convolutions that multiply every position by one matrix: linears over channels."""

from __future__ import annotations

from torch import Tensor, nn

from .plain import Convolution, Plain
from .quantized import add_update


class Pointwise(Convolution):
    r"""A convolution with kernels of size 1, one group and no padding, with a low-rank update.

    .. math:: y = \mathrm{conv}(x, W) + b + s\, B A\, \mathrm{dropout}(x)

    for each position. The base's product is its own; the update runs as that of a ``Linear`` on the channels, with
    slices of the output channels, statistics and rows of several adapters.
    """

    measured = True

    def forward(self, input: Tensor) -> Tensor:
        """The base's output plus the update of what each position's adapter is given."""
        y, route = self.original.forward(self, input), self.entered()
        if self.bypassed(route):
            return y
        channels = -1 - len(self.kernel_size)
        x = input[(..., *[slice(None, None, step) for step in self.stride])].movedim(channels, -1)
        return add_update(self, x, y.movedim(channels, -1), route).movedim(-1, channels)

    def as_matrix(self, weight: Tensor) -> Tensor:
        """A tensor in the layout of this layer's weight as [N, K]: a view."""
        return weight.view(self.out_features, self.in_features)

    def merged_weight(self, adapter: str | None = None) -> Tensor | None:
        """As of a ``Linear``."""
        return super(Plain, self).merged_weight(adapter)


class PointwiseConv1d(Pointwise, nn.Conv1d):
    __doc__ = Pointwise.__doc__
    original = nn.Conv1d


class PointwiseConv2d(Pointwise, nn.Conv2d):
    __doc__ = Pointwise.__doc__
    original = nn.Conv2d


class PointwiseConv3d(Pointwise, nn.Conv3d):
    __doc__ = Pointwise.__doc__
    original = nn.Conv3d


_POINTWISE = {kind.original: kind for kind in (PointwiseConv1d, PointwiseConv2d, PointwiseConv3d)}


def pointwise_class(module: nn.Module) -> type[Pointwise] | None:
    """What a convolution over channels alone becomes when it is adapted, or is; None for any other layer."""
    if isinstance(module, Pointwise):
        return type(module)
    kind = _POINTWISE.get(type(module))
    if kind is None or module.groups > 1 or set(module.kernel_size) != {1}:
        return None
    unpadded = module.padding in ("valid", "same") or not any(module.padding)
    return kind if unpadded else None
