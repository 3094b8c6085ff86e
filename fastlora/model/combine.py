"""``add_weighted_adapter``: a further adapter out of those that are there, under PEFT's names for the ways to do it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .._utils.distributed import refuse_parallel
from .._utils.errors import check_choice, check_instance, check_integer, check_number, wrong_value
from .._utils.types import ModelT
from ..config import LoraConfig
from ..nn.active import config_of, configs_in, refuse_merged
from ..nn.adapter import AdapterSpec, Factors
from ..nn.linear import Adapted, adapted_layers, matrix_key
from ..nn.token_rows import token_rows
from .adapters import add_name, routers_of
from .inject import check_adapter_name

_OF_FACTORS = ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")
COMBINATIONS = ("svd", "cat", *_OF_FACTORS, *(f"{kind}_svd" for kind in _OF_FACTORS[1:]))


@torch.inference_mode(False)  # what is made here is no inference tensor, wherever it is made
@torch.no_grad()
def add_weighted_adapter(
    model: ModelT,
    adapters: Sequence[str],
    weights: Sequence[float],
    *,
    adapter_name: str,
    combination_type: str = "svd",
    svd_rank: int | None = None,
    density: float | None = None,
    majority_sign_method: str = "total",
) -> ModelT:
    r"""Add an adapter that is a combination of others; as in PEFT it has ``s = 1`` and is frozen. Returns the model.

    .. math:: B A \approx \textstyle\sum_g w_g s_g B_g A_g

    - ``"svd"``: the nearest of rank ``svd_rank``, by default the largest there is; ``"cat"``: exact, with the sum of
      the ranks; ``"linear"``: ``A = Σ ±√|w s| A_g`` and B likewise, which is rough, for equal ranks.
    - ``"ties"``, ``"dare_linear"``, ``"dare_ties"``, ``"magnitude_prune"``, of A and of B, and with ``_svd`` behind it
      of the updates: a share ``density`` of the entries stays, the largest or (``dare``) random ones divided by it;
      ``ties`` takes the mean of those that have the sign of most, by ``majority_sign_method`` ``"total"`` or
      ``"frequency"``.

    ``modules_to_save``, which the adapters of a model share, are those of the combination, too, as they are.

    Raises ``TypeError`` or ``ValueError`` naming the argument, with the model as it was, for ranks that differ where
    they may not, and adapters with ``use_dora`` or ``lora_bias``, which do not add up.
    Source: Yadav et al., "TIES-Merging" (NeurIPS 2023); Yu et al., "Language Models are Super Mario" (DARE, ICML 2024).

    >>> model = nn.Sequential(fastlora.nn.Linear(8, 8, r=2))
    >>> model = fastlora.add_adapter(model, "b", fastlora.LoraConfig(r=2, target_modules=["0"]))
    >>> given = {"adapters": ["default", "b"], "weights": [0.5, 0.5], "combination_type": "cat"}
    >>> model = fastlora.add_weighted_adapter(model, adapter_name="both", **given)
    >>> model[0].ranks("both")
    {'weight': 4}
    """
    refuse_parallel(model, "add_weighted_adapter")
    routers = routers_of(model)
    refuse_merged(adapted_layers(model))
    shares = _checked(routers[0].names, adapters, weights, adapter_name, combination_type, density)
    check_choice("majority_sign_method", majority_sign_method, ("total", "frequency"))
    if svd_rank is not None:
        check_integer("svd_rank", svd_rank, 1)
    with_rows = [name for name in shares if token_rows(model, name)]
    if with_rows:
        raise ValueError(f"adapters: {with_rows[0]!r} has trainable_token_indices, whose rows do not add up")
    kind = "linear" if len(shares) == 1 else combination_type
    made: dict[str, tuple[Adapted, dict[str, tuple[Tensor, Tensor] | None]]] = {}
    for path, layer in adapted_layers(model).items():
        here = [name for name in shares if name in layer.adapter_specs]
        if here:
            mix = _Mix(path, layer, {name: shares[name] for name in here}, kind, svd_rank, density)
            made[path] = layer, {name: mix(name, majority_sign_method) for name in layer.slices}
    config = _config(model, adapters[0], made)
    for layer, pairs in made.values():
        A, B = (Factors({n: None if pair is None else pair[i] for n, pair in pairs.items()}) for i in (0, 1))
        dtype = layer.adapter_specs[next(n for n in shares if n in layer.adapter_specs)].dtype
        layer.install(adapter_name, AdapterSpec(dict.fromkeys(pairs, 1.0), config.lora_dropout, True, dtype), A, B)
        for factors in (A, B):
            factors.requires_grad_(False).train(layer.training)
    add_name(routers, adapter_name)
    for configs in configs_in(model):
        saved = dict.fromkeys(name for each in configs.values() for name in each.modules_to_save or ())
        configs[adapter_name] = replace(config, modules_to_save=list(saved) or None)
    return model


def _checked(known: Sequence[str], adapters: Any, weights: Any, name: Any, kind: Any, density: Any) -> dict[str, float]:
    check_instance("adapters", adapters, (list, tuple), "a list of names of adapters")
    check_instance("weights", weights, (list, tuple), "a list of numbers")
    for adapter in adapters:
        check_choice("adapters", adapter, known)
    if not adapters or len(set(adapters)) != len(adapters):
        raise wrong_value("adapters", "one or more names, each once", adapters)
    if len(weights) != len(adapters):
        raise wrong_value("weights", f"one for each of {len(adapters)} adapters", weights)
    if check_adapter_name(name, "adapter_name") in known:
        raise wrong_value("adapter_name", f"one that is none of {list(known)}", name)
    check_choice("combination_type", kind, COMBINATIONS)
    if kind not in ("svd", "cat", "linear"):
        check_number("density", density, above=0)
        if density > 1:
            raise wrong_value("density", "a share in (0, 1]", density)
    return {a: check_number(f"weights[{i}]", w) for i, (a, w) in enumerate(zip(adapters, weights, strict=True))}


class _Mix:
    """The combination of a layer's adapters, slice by slice."""

    def __init__(
        self, path: str, layer: Adapted, shares: Mapping[str, float], kind: str, rank: int | None, density: float | None
    ):
        self.path, self.layer, self.shares = path, layer, shares
        self.kind, self.rank, self.density = kind, rank, density
        for name in shares:
            if layer.lora_B[name].beside():
                raise ValueError(f"adapters: {name!r} has use_dora or lora_bias in {path!r}, which do not add up")
        if layer.groups > 1 and kind not in _OF_FACTORS:
            raise wrong_value("combination_type", f"for {path!r}, a convolution in groups, one of {_OF_FACTORS}", kind)

    def __call__(self, name: str, majority: str) -> tuple[Tensor, Tensor] | None:
        live = [n for n in self.shares if self.layer.ranks(n)[name]]
        if not live:
            return None
        A, B = ([side[n]()[name] for n in live] for side in (self.layer.lora_A, self.layer.lora_B))
        w = [self.shares[n] * self.layer.adapter_specs[n].scale[name] for n in live]
        if self.kind == "cat":
            return torch.cat([a * v for a, v in zip(A, w, strict=True)]), torch.cat(B, dim=1)
        if self.kind in _OF_FACTORS:
            if len({len(a) for a in A}) > 1:
                ranks = {n: len(a) for n, a in zip(live, A, strict=True)}
                key = matrix_key(self.path, name)
                raise ValueError(
                    f"combination_type: {self.kind!r} takes equal ranks, and {key!r} has {ranks}; use 'svd'"
                )
            roots = [math.sqrt(abs(v)) for v in w]
            signed = [math.copysign(root, v) for root, v in zip(roots, w, strict=True)]
            return self._mixed(A, signed, self.kind, majority), self._mixed(B, roots, self.kind, majority)
        acc = torch.promote_types(A[0].dtype, torch.float32)
        scales = [self.layer.adapter_specs[n].scale[name] for n in live]
        deltas = [s * (b.to(acc) @ a.to(acc)) for a, b, s in zip(A, B, scales, strict=True)]
        kind = "linear" if self.kind == "svd" else self.kind.removesuffix("_svd")
        merged = self._mixed(deltas, [self.shares[n] for n in live], kind, majority)
        rank = min(self.rank or max(map(len, A)), *merged.shape)
        U, S, V = torch.linalg.svd(merged, full_matrices=False)
        return V[:rank].to(A[0].dtype).contiguous(), (U[:, :rank] * S[:rank]).to(A[0].dtype).contiguous()

    def _mixed(self, tensors: Sequence[Tensor], weights: Sequence[float], kind: str, majority: str) -> Tensor:
        if kind != "linear":
            tensors = [_pruned(t, self.density, kind.startswith("dare")) for t in tensors]
        stack = torch.stack(list(tensors))
        weighted = stack * torch.tensor(weights, dtype=stack.dtype, device=stack.device).view(-1, 1, 1)
        if "ties" not in kind:
            return weighted.sum(0)
        votes = (stack if majority == "total" else stack.sign()).sum(0)
        chosen = stack.sign() == torch.where(votes >= 0, 1, -1)
        return (weighted * chosen).sum(0) / chosen.sum(0).clamp(min=1)


def _pruned(tensor: Tensor, density: float, at_random: bool) -> Tensor:
    if density == 1:
        return tensor
    if at_random:
        return tensor * torch.bernoulli(torch.full_like(tensor, density)) / density
    kept = torch.zeros(tensor.numel(), dtype=tensor.dtype, device=tensor.device)
    kept[tensor.abs().reshape(-1).topk(int(density * tensor.numel()))[1]] = 1
    return tensor * kept.view_as(tensor)


def _config(model: nn.Module, first: str, made: Mapping[str, tuple[Any, Mapping[str, Any]]]) -> LoraConfig:
    """A config of these ranks whose every scale is 1."""
    ranks = {
        matrix_key(p, n): 0 if pair is None else len(pair[0]) for p, (_, ps) in made.items() for n, pair in ps.items()
    }
    r = max(ranks.values())
    if r == 0:
        raise ValueError("adapters: expected one with a matrix of a rank above 0")
    known = config_of(model, first) or LoraConfig()
    other = {key: rank for key, rank in ranks.items() if rank != r}
    return replace(
        known,
        r=r, lora_alpha=r, scale="per_rank", use_rslora=False, target_modules=list(made), exclude_modules=None,
        rank_pattern=other, alpha_pattern={k: v for k, v in other.items() if v}, layers_to_transform=None,
        layers_pattern=None, bias="none", init_lora_weights=True,
    )  # fmt: skip
