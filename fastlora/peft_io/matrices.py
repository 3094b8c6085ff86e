"""One matrix of an adapter's files: its factors by slice, checked against the module that is to take them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .._utils.distributed import is_sharded
from .._utils.errors import listed
from ..model.modules import features, is_linear
from ..nn.adapter import WHOLE, Slices
from ..nn.experts import ExpertStack
from ..nn.plain import CLASSES, CONVOLUTIONS, kernel_shapes
from .experts import experts_unstacked
from .folder import CONFIG, SIDE, TENSORS, AdapterFolder, Slice
from .names import BESIDE, BESIDE_KEY, LORA_KEY, PREFIX, StoredNames, factor_key

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def factor_pairs(folder: AdapterFolder) -> dict[str, tuple[Tensor, Tensor]]:
    """(A, B) by module name, both there and both matrices."""
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in folder.tensors.items():
        match = LORA_KEY.fullmatch(key)
        if match:
            found.setdefault(match["path"], {})[match["factor"]] = tensor
        elif ".lora_" in key and not BESIDE_KEY.fullmatch(key):
            raise ValueError(f"{folder.where(TENSORS)}: {key!r} is no LoRA factor of a linear layer; not implemented")
    for path, pair in found.items():
        for factor in "AB":
            key = f"{PREFIX}{path}.lora_{factor}.weight"
            if factor not in pair:
                raise ValueError(f"{folder.where(TENSORS)}: missing key {key!r}")
            if pair[factor].ndim < 2 or pair[factor].dtype not in FLOATS:
                got = f"{pair[factor].dtype} {tuple(pair[factor].shape)}"
                raise ValueError(f"{folder.where(TENSORS)}: {key!r}: expected a floating matrix, got {got}")
    if not found:
        raise ValueError(f"{folder.where(TENSORS)}: has no keys like {PREFIX}<module>.lora_A.weight")
    return {path: (pair["A"], pair["B"]) for path, pair in found.items()}


def refuse_keys(where: str, what: str, expected: set[str], got: set[str], of: str) -> None:
    if expected - got:
        raise ValueError(f"{where}: missing: {of}{listed(sorted(expected - got))}, which {what} has")
    if got - expected:
        raise ValueError(f"{where}: unexpected: {of}{listed(sorted(got - expected))}, which {what} does not have")


def _refuse_shape(where: str, key: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{where}: {key!r} has shape {tuple(tensor.shape)}, expected {shape}")


def refuse_tensor(where: str, key: str, tensor: Tensor, target: Tensor) -> None:
    """``target`` is the model's own tensor, which is to take the values."""
    _refuse_shape(where, key, tensor, tuple(target.shape))
    if tensor.dtype != target.dtype and not (tensor.dtype in FLOATS and target.dtype in FLOATS):
        raise ValueError(f"{where}: {key!r} is {tensor.dtype}, expected {target.dtype}")
    _refuse_sharded_on_meta(key.removeprefix(PREFIX), target)


def _refuse_sharded_on_meta(name: str, target: Tensor) -> None:
    if target.is_meta and is_sharded(target):
        raise ValueError(f"model: {name!r} is sharded on the meta device and cannot be loaded into")


@dataclass(frozen=True)
class Matrix:
    """One module's factors in the file: (A, B) and scale by slice, ``None`` where the rank is 0."""

    rows: Slices
    factors: dict[str, tuple[Tensor, Tensor] | None]
    scale: dict[str, float]
    beside: dict[str, Tensor]  # bias, magnitude

    @property
    def ranks(self) -> dict[str, int]:
        return {name: 0 if pair is None else pair[0].shape[0] for name, pair in self.factors.items()}


def matrix_in_file(
    folder: AdapterFolder,
    known: StoredNames,
    path: str,
    stored: str,
    module: nn.Module,
    pair: tuple[Tensor, Tensor],
    held: Slices | None,
) -> Matrix:
    where, (A, B), adapted = folder.where(TENSORS), pair, known.module(stored)
    rank, s = folder.fields.rank(adapted), folder.fields.scale(adapted)
    if not is_linear(module) and not isinstance(module, (ExpertStack, *CLASSES)):
        raise ValueError(f"{where}: adapts {path!r}, a {type(module).__name__}, which is not implemented")
    _refuse_sharded_on_meta(path, module.weight)
    K, N = features(module)
    shapes = ((rank, K), (N, rank))
    if isinstance(module, ExpertStack):
        experts, flip = module.matrices(), module.taken_for_untransposed
        inner, outer = (K, N // len(experts))[:: -1 if flip else 1]
        shapes = ((rank * len(experts), inner), (outer, rank * len(experts)))
    elif isinstance(module, CONVOLUTIONS):
        shapes = kernel_shapes(module, rank)
    for factor, tensor, shape in zip("AB", pair, shapes, strict=True):
        key = factor_key(stored, factor, module)
        if key not in folder.tensors:
            raise ValueError(f"{where}: missing key {key!r}")
        _refuse_shape(where, key, tensor, shape)
    A, B = (t.flatten(1) for t in pair)
    if folder.fields.use_dora and not is_linear(module):
        raise ValueError(
            f"{folder.where(CONFIG)}: use_dora: True is implemented for nn.Linear and Conv1D, and {path!r} is a "
            f"{type(module).__name__}"
        )
    beside = _beside(folder, stored, N)
    slices = folder.side.split.get(path, ()) if folder.side is not None else ()
    for scale in (s, *(s * x.scale_ratio for x in slices)):
        if not abs(scale) <= torch.finfo(torch.float32).max:
            raise ValueError(f"{folder.path}: the scale of {path!r} is {scale}, which is no float32")
    if isinstance(module, ExpertStack):
        where = f"{folder.where(SIDE)}: {path!r}"
        factors, ratios = experts_unstacked(A, B, Slices(dict.fromkeys(experts, outer)), slices, where)
        factors = {n: pair and (pair[1].t(), pair[0].t()) for n, pair in factors.items()} if flip else factors
        return Matrix(experts, factors, {name: s * ratio for name, ratio in ratios.items()}, {})
    if not slices:
        return _in_slices(held or Slices({WHOLE: N}), A, B, s, beside)
    rows, ranks = sum(x.rows for x in slices), sum(x.rank for x in slices)
    padded = len(known.keys_of(adapted)) > 1 and ranks <= rank
    if rows != N or not (ranks == rank or padded):
        raise ValueError(
            f"{folder.where(SIDE)}: splits {path!r} into {rows} rows and ranks of sum {ranks}, expected {N} and {rank}"
        )
    if len({x.blocks for x in slices}) > 1:
        raise ValueError(f"{folder.where(SIDE)}: splits {path!r} into slices of different numbers of blocks")
    layout = Slices({x.name: x.rows for x in slices}, slices[0].blocks)
    factors = _blocks(slices, layout, A, B)
    if factors is None:
        raise ValueError(
            f"{where}: {path!r} is split in {SIDE}, and its lora_B is not block-diagonal; "
            f"remove {SIDE} to load it as one matrix"
        )
    if held is not None and held != layout:
        return _in_slices(held, A[:ranks], B[:, :ranks], s, beside)
    return Matrix(layout, factors, {x.name: s * x.scale_ratio for x in slices}, beside)


def _in_slices(held: Slices, A: Tensor, B: Tensor, s: float, beside: dict[str, Tensor]) -> Matrix:
    """One update of the whole matrix, slice by slice: ``(B A)[rows] = B[rows] A``, each slice with all of A."""
    factors = {name: (A, B[held.rows(name)]) if len(A) else None for name in held}
    return Matrix(held, factors, dict.fromkeys(held, s), beside)


def _beside(folder: AdapterFolder, stored: str, N: int) -> dict[str, Tensor]:
    """What the file has beside B of one module: as its fields say, vectors [N]."""
    wanted = {"B.bias": folder.fields.lora_bias, "magnitude_vector": folder.fields.use_dora}
    where, prefix = folder.where(TENSORS), f"{PREFIX}{stored}.lora_"
    got = {name for name in wanted if prefix + name in folder.tensors}
    refuse_keys(where, CONFIG, {prefix + n for n, w in wanted.items() if w}, {prefix + n for n in got}, "")
    for name in got:
        _refuse_shape(where, prefix + name, folder.tensors[prefix + name], (N,))
        if folder.tensors[prefix + name].dtype not in FLOATS:
            raise ValueError(f"{where}: {prefix + name!r}: expected a floating vector")
    return {BESIDE[name]: folder.tensors[prefix + name] for name in got}


def _blocks(
    slices: Iterable[Slice], layout: Slices, A: Tensor, B: Tensor
) -> dict[str, tuple[Tensor, Tensor] | None] | None:
    """A and B of each slice, or None where B has anything off its diagonal blocks."""
    factors: dict[str, tuple[Tensor, Tensor] | None] = {}
    outside, column = B != 0, 0
    for x in slices:
        rows, columns = layout.rows(x.name), slice(column, column + x.rank)
        outside[rows, columns] = False
        b = B[rows, columns]
        if x.scale_ratio not in (0.0, 1.0):
            b = (b.double() / x.scale_ratio).to(b.dtype)
        factors[x.name] = (A[columns], b) if x.rank else None
        column = columns.stop
    return None if bool(outside.any()) else factors
