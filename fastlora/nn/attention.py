"""``MultiheadAttention`` and ``TransformerEncoderLayer``: torch's modules, calling the projections that they hold."""

from __future__ import annotations

import math
import weakref
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._utils.errors import check_choice, wrong_value
from ..config import LoraConfig
from .adapter import WHOLE, AdapterSpec, adapter_dtype_of, new_factors
from .layer_view import LayerView
from .linear import DEFAULT, Linear, QKVLinear, attach_state
from .routing import Router


class OwnersParameters:
    """A layer whose parameters are those of the module that holds it, under the module's names."""

    def belong_to(self, owner: nn.Module) -> None:
        """Weakly, and not as a submodule: it is the owner that holds this layer."""
        self.__dict__["owner_ref"] = weakref.ref(owner)

    @property
    def owner(self) -> Any:
        return self.__dict__["owner_ref"]()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "owner_ref": self.owner}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({**state, "owner_ref": weakref.ref(state["owner_ref"])})


class _InProjWeight(OwnersParameters):
    @property
    def weight(self) -> nn.Parameter:
        return self.owner.in_proj_weight

    @property
    def bias(self) -> nn.Parameter | None:
        return self.owner.in_proj_bias


class StackedProjection(_InProjWeight, nn.Linear):
    """The [q; k; v] projection of an ``nn.MultiheadAttention`` as a linear: weight [3E, E], bias [3E]."""

    def __init__(self, owner: nn.MultiheadAttention):
        nn.Module.__init__(self)
        self.belong_to(owner)
        self.in_features, self.out_features = owner.embed_dim, 3 * owner.embed_dim
        self.training = owner.training


class InProjection(_InProjWeight, QKVLinear):
    """An adapted ``StackedProjection``; its parameters stay the owner's."""


class MultiheadAttention(nn.MultiheadAttention):
    r"""``nn.MultiheadAttention`` with low-rank updates of its projections; drop-in, also in eval mode.

    .. math:: y = \mathrm{softmax}(q k^\top / \sqrt{d} + m)\, v\, W_o^\top + b_o,\qquad
              [q; k; v] = x\,(W_{in} + s B A)^\top + b_{in}

    ``in_proj`` and ``out_proj`` are ``fastlora.nn.Linear``; ``in_proj_weight`` [3E, E] keeps its name. ``split_qkv``
    gives q, k and v an adapter each, otherwise the stacked matrix has one. There is no fused path, which would read the
    weights past the adapters; nested tensors are refused. ``fields``, ``r``, ``lora_alpha`` and ``lora_dropout`` are
    those of ``LoraConfig``; the other arguments are torch's. Raises ``TypeError`` or ``ValueError`` naming the
    argument.

    >>> attention, x = fastlora.nn.MultiheadAttention(8, 2, r=2, batch_first=True), torch.ones(1, 3, 8)
    >>> attention(x, x, x)[0].shape
    torch.Size([1, 3, 8])
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        batch_first: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        r: int = 8,
        lora_alpha: float = 8,
        lora_dropout: float = 0.0,
        split_qkv: bool = True,
        **fields: Any,
    ):
        check_choice("split_qkv", split_qkv, (None, True, False))
        config = LoraConfig(r=r, lora_alpha=lora_alpha, lora_dropout=lora_dropout, **fields)
        if isinstance(embed_dim, int) and r > embed_dim:
            raise wrong_value("r", f"at most embed_dim = {embed_dim}", r)
        super().__init__(
            embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, None, None, batch_first, device, dtype
        )
        self.requires_grad_(False)
        stacked = StackedProjection(self)
        stacked.__class__, self.out_proj.__class__ = InProjection, Linear
        self.hold(stacked)
        router = Router(DEFAULT)
        for layer, names in ((self.in_proj, "qkv" if split_qkv else (WHOLE,)), (self.out_proj, (WHOLE,))):
            slices = dict.fromkeys(names, layer.out_features // len(names))
            ranks = dict.fromkeys(slices, r)
            attach_state(layer, slices, config, router, "out_proj" if layer is self.out_proj else "in_proj")
            spec = AdapterSpec(
                dict.fromkeys(slices, config.scaling(r)), lora_dropout, config.init_lora_weights,
                adapter_dtype_of(config, layer),
            )  # fmt: skip
            layer.install(DEFAULT, spec, *new_factors(slices, ranks, embed_dim, spec, layer.weight.device))

    def hold(self, layer: InProjection) -> None:
        """Take ``layer``, the adapted input projection, as a child, before the output projection: what ``inject`` does.

        >>> attention = fastlora.nn.MultiheadAttention(8, 2)
        >>> attention.hold(attention.in_proj)
        >>> [name for name, _ in attention.named_children()]
        ['in_proj', 'out_proj']
        """
        output = self._modules.pop("out_proj")
        self.in_proj, self.out_proj = layer, output

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        if query.is_nested or key.is_nested or value.is_nested:
            raise ValueError("query: nested tensors are not implemented for adapted attention; pad them")
        batched = _is_batched(query, key, value)
        if is_causal and attn_mask is None:
            raise ValueError("is_causal: is a hint about attn_mask, which is missing")
        if not batched and key_padding_mask is not None:
            key_padding_mask = key_padding_mask.unsqueeze(0)
        given = {id(t): self._samples_first(t, batched) for t in (query, key, value)}
        q, k, v = self._project(*[given[id(t)] for t in (query, key, value)])
        causal = is_causal and key_padding_mask is None and not need_weights
        shape = (*q.shape[:3], k.shape[2])
        mask = _merged_mask(None if causal else attn_mask, key_padding_mask, shape, query.dtype)
        k, v, mask = self._extended(k, v, mask)
        y, weights = self._attend(q, k, v, mask, causal, need_weights)
        y = self.out_proj(y.transpose(1, 2).flatten(2))
        if weights is not None and average_attn_weights:
            weights = weights.mean(dim=1)
        if not batched:
            return y.squeeze(0), None if weights is None else weights.squeeze(0)
        return y if self.batch_first else y.transpose(0, 1).contiguous(), weights

    def _samples_first(self, x: Tensor, batched: bool) -> Tensor:
        if not batched:
            return x.unsqueeze(0)
        return x if self.batch_first else x.transpose(0, 1)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """q [N, H, L, D], k and v [N, H, S, D]; inputs that are one tensor are read once."""
        if self.in_proj_weight is None:
            biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
            inputs = (query, key, value)
            return tuple(self._heads(F.linear(*given)) for given in zip(inputs, weights, biases, strict=True))
        if query is key and key is value:
            stacked = self._modules["in_proj"](query) if "in_proj" in self._modules else self._rows(query, 0, 3)
            stacked = stacked.unflatten(-1, (3, self.num_heads, self.head_dim))
            return stacked.permute(2, 0, 3, 1, 4).unbind(0)
        rows = query.shape[:-1].numel()
        weight_of_key = rows / max(key.shape[:-1].numel(), 1)
        q = self._heads(self._rows(query, 0, 1))
        if key is value:
            both = self._rows(key, 1, 3, weight_of_key).unflatten(-1, (2, self.num_heads, self.head_dim))
            return q, *both.permute(2, 0, 3, 1, 4).unbind(0)
        k, v = self._rows(key, 1, 2, weight_of_key), self._rows(value, 2, 3, weight_of_key)
        return q, self._heads(k), self._heads(v)

    def _rows(self, x: Tensor, first: int, last: int, count: float = 1.0) -> Tensor:
        """Output of blocks ``first`` to ``last`` of [q; k; v] alone."""
        rows = slice(first * self.embed_dim, last * self.embed_dim)
        weight, bias = self.in_proj_weight[rows], None if self.in_proj_bias is None else self.in_proj_bias[rows]
        layer = self._modules.get("in_proj")
        return F.linear(x, weight, bias) if layer is None else LayerView(layer, weight, bias, rows, count)(x)

    def _extended(self, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """k, v and mask with the learned position (``add_bias_kv``) and the zero one (``add_zero_attn``)."""
        for added, extra in ((self.bias_k is not None, (self.bias_k, self.bias_v)), (self.add_zero_attn, (None, None))):
            if not added:
                continue
            k, v = (
                F.pad(t, (0, 0, 0, 1))
                if b is None
                else torch.cat([t, self._heads(b).expand(len(t), -1, -1, -1)], dim=2)
                for t, b in zip((k, v), extra, strict=True)
            )
            mask = None if mask is None else F.pad(mask, (0, 1))
        return k, v, mask

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, need_weights: bool):
        p = self.dropout if self.training else 0.0
        if not need_weights:
            return F.scaled_dot_product_attention(q, k, v, mask, p, causal), None
        scores = (q * math.sqrt(1.0 / self.head_dim)) @ k.transpose(-2, -1)
        weights = F.dropout((scores if mask is None else scores + mask).softmax(dim=-1), p)
        return weights @ v, weights


def _is_batched(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether the inputs have samples [L, N, E], or are one [L, E]."""
    for name, given in (("query", query), ("key", key), ("value", value)):
        if query.dim() not in (2, 3) or given.dim() != query.dim():
            shape = "[L, E] or [L, N, E]" if name == "query" else f"{query.dim()} dimensions as query has"
            raise wrong_value(name, shape, given)
    return query.dim() == 3


def _added_mask(name: str, mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask as what is added to the scores: a boolean one is -inf where True."""
    if mask.is_floating_point():
        return mask
    if mask.dtype != torch.bool:
        raise wrong_value(name, "a boolean or floating mask", mask)
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -math.inf)


def _merged_mask(
    attn_mask: Tensor | None, key_padding_mask: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype
) -> Tensor | None:
    """Both masks as what is added to the scores of ``shape`` (N, H, L, S); boolean masks are -inf where True."""
    samples, heads, length, source = shape
    # Pairs and no dictionary: sizes that an exporter traces have no hash.
    accepted = {
        "attn_mask": [((length, source), (1, 1, length, source)), ((samples * heads, length, source), shape)],
        "key_padding_mask": [((samples, source), (samples, 1, 1, source))],
    }
    merged = None
    for name, mask in (("attn_mask", attn_mask), ("key_padding_mask", key_padding_mask)):
        if mask is None:
            continue
        view = next((view for given, view in accepted[name] if mask.shape == given), None)
        if view is None:
            shapes = " or ".join(str(given) for given, _ in accepted[name])
            raise wrong_value(name, f"shape {shapes}", mask)
        mask = _added_mask(name, mask, dtype).view(view)
        merged = mask if merged is None else merged + mask
    return merged


class TransformerEncoderLayer(nn.TransformerEncoderLayer):
    """``nn.TransformerEncoderLayer`` that always calls its children: its fused inference path reads their weights.

    Made by ``inject`` by a change of class. A nested tensor (``nn.TransformerEncoder`` makes one of a padding mask) is
    padded, run and nested again. Shapes ([S, T, E] with ``batch_first``), arguments and errors are torch's:
    ``RuntimeError`` where shapes do not fit.

    >>> layer = fastlora.nn.TransformerEncoderLayer(8, 2, batch_first=True)
    >>> layer(torch.ones(1, 3, 8)).shape
    torch.Size([1, 3, 8])
    """

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        if src.is_nested:
            lengths = [len(sample) for sample in src.unbind()]
            padded = src.to_padded_tensor(0.0)
            places = torch.arange(padded.shape[1], device=src.device)
            y = self.forward(padded, src_mask, places >= torch.tensor(lengths, device=src.device).unsqueeze(1))
            return torch.nested.as_nested_tensor([row[:n] for row, n in zip(y, lengths, strict=True)])
        masks = {"src_mask": src_mask, "src_key_padding_mask": src_key_padding_mask}
        mask, padding = (None if m is None else _added_mask(name, m, src.dtype) for name, m in masks.items())
        if self.norm_first:
            x = src + self._attended(self.norm1(src), mask, padding, is_causal)
            return x + self._fed_forward(self.norm2(x))
        x = self.norm1(src + self._attended(src, mask, padding, is_causal))
        return self.norm2(x + self._fed_forward(x))

    def _attended(self, x: Tensor, mask: Tensor | None, padding: Tensor | None, is_causal: bool) -> Tensor:
        y, _ = self.self_attn(x, x, x, padding, False, mask, is_causal=is_causal)
        return self.dropout1(y)

    def _fed_forward(self, x: Tensor) -> Tensor:
        return self.dropout2(self.linear2(self.dropout(self.activation(self.linear1(x)))))
