"""``summary``: adapters by matrix and parameter counts. ``explain``: the backend of each layer, and why."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor, nn

from .._utils.distributed import refuse_partitioned, unwrapped
from .._utils.reporting import Tabular
from ..nn.adapter import WHOLE
from ..nn.experts import ExpertProjection
from ..nn.frozen import FrozenLinear
from ..nn.linear import Linear, adapted_layers, matrix_key
from ..nn.plain import Plain
from ..nn.quantized import compute_dtype, foreign_base, update_backend
from ..ops.backends import choose
from ..ops.backends.planned import launch_remarks
from ..ops.matmul import AUTO, ENGINES, UNPACKED
from ..tracking.penalty import FisherPenalty
from ..tracking.record import records
from .modules import role_targets
from .trainable import ROLES_OF_PARAMETERS, chosen_or_policy, parameter_roles


@dataclass(frozen=True)
class Row:
    """One adapted matrix: ``params = r (N + K)``, of a convolution in groups ``r (N / groups + K)``."""

    key: str
    in_features: int
    out_features: int
    rank: int
    scale: float
    params: int
    groups: int = 1


@dataclass(frozen=True)
class Summary(Tabular):
    """Adapted matrices and parameter counts; ``print`` gives plain text, ``rich.print`` a table with lines."""

    _numbers = range(1, 6)

    rows: tuple[Row, ...]
    adapter_params: int
    head_params: int
    other_trainable: int
    total_params: int
    norm_params: int = 0  # of other_trainable
    bias_params: int = 0  # of other_trainable
    modules_by_role: Mapping[str, int] = field(default_factory=dict)  # adapted modules: attention, mlp, other

    @property
    def costs(self) -> dict[str, int]:
        """Parameters that one rank of each matrix costs, N + K."""
        return {row.key: row.in_features + row.out_features // row.groups for row in self.rows}

    def _parts(self) -> tuple[tuple[str, ...], list[tuple], list[str]]:
        head = ("matrix", "in", "out", "rank", "scale", "params")
        rows = [(r.key, r.in_features, r.out_features, r.rank, f"{r.scale:g}", f"{r.params:,}") for r in self.rows]
        share = self.adapter_params / max(self.total_params, 1)
        roles = ", ".join(f"{role} {count}" for role, count in self.modules_by_role.items() if count)
        trained = (
            f"adapters {self.adapter_params:,} ({share:.2%} of {self.total_params:,}), "
            f"head {self.head_params:,}, other trainable {self.other_trainable:,}"
        )
        return head, rows, [f"adapted modules: {roles or 'none'}", trained]


def summary(model: nn.Module, adapter: str | None = None) -> Summary:
    """Count what is trained: the adapter (the active one unless named), the head, and the rest.

    Raises ``TypeError`` for what is no model, ``ValueError`` for an adapter that is not there, without adapters or a
    policy, and under ZeRO-3.

    >>> model = nn.Sequential(fastlora.nn.Linear(8, 8, r=2))
    >>> found = fastlora.summary(model)
    >>> found.adapter_params, found.rows[0].rank
    (32, 2)
    """
    model = unwrapped(model)
    refuse_partitioned(model)
    layers, adapter = adapted_layers(model), chosen_or_policy(model, adapter)
    rows, adapted, beside = [], [], 0
    for path, layer in layers.items():
        if adapter not in layer.adapter_specs:
            continue
        beside += sum(t.numel() for t in layer.lora_B[adapter].beside().values())
        ranks, scales = layer.ranks(adapter), layer.adapter_specs[adapter].scale
        if any(ranks.values()):
            adapted.append(path)
        for name, n in layer.slices.items():
            params = ranks[name] * (n // layer.groups + layer.in_features)
            sizes = (layer.in_features, n, ranks[name])
            rows.append(Row(matrix_key(path, name), *sizes, scales[name], params, layer.groups))
    roles, counts, total = parameter_roles(model, adapter), dict.fromkeys(ROLES_OF_PARAMETERS, 0), 0
    # Two weights of 4 bits lie in one byte.
    packed = {id(m.weight): m.in_features * m.out_features for m in model.modules() if foreign_base(m) is not None}
    for parameter in model.parameters():
        total += packed.get(id(parameter), parameter.numel())
        if parameter.requires_grad:
            counts[roles[id(parameter)]] += parameter.numel()
    other = counts["norm"] + counts["bias"] + counts["other"]
    return Summary(
        tuple(rows),
        sum(r.params for r in rows) + beside,
        counts["head"],
        other,
        total,
        counts["norm"],
        counts["bias"],
        _modules_by_role(model, adapted),
    )


def _modules_by_role(model: nn.Module, paths: list[str]) -> dict[str, int]:
    counts = {role: len(set(role_targets(model, role)).intersection(paths)) for role in ("attention", "mlp")}
    return {**counts, "other": len(paths) - sum(counts.values())}


class ExplainedLayer(NamedTuple):
    """How one layer runs."""

    path: str
    backend: str
    engine: str
    remarks: str


@dataclass(frozen=True)
class Explanation(Tabular):
    """How each layer runs and why not faster; prints as ``Summary`` does."""

    rows: tuple[ExplainedLayer, ...]
    packed_bytes: int
    penalty: dict[str, tuple[str, str]]  # by adapter: "native" (one call) or "formula", and why not native
    statistics: tuple[str, ...]  # of each adapter's last tracker: which steps are sampled, their cost, what is idle

    def _parts(self) -> tuple[tuple[str, ...], tuple[ExplainedLayer, ...], list[str]]:
        lines = [f"packed copies of frozen weights: {self.packed_bytes / 2**20:.1f} MiB"]
        lines += [f"penalty of {name}: {how}{why and f' ({why})'}" for name, (how, why) in self.penalty.items()]
        return ("layer", "backend", "matmul engine", "why not a faster one"), self.rows, [*lines, *self.statistics]


def _engine(weight: Tensor, engine: str) -> str:
    """The engine that was measured to be fastest for this weight, by direction, or how it will be found."""
    if weight.device.type != "cpu":
        return "the device's own"
    measured = sorted({f"{kind.partition(',')[0]}: {choice.name}" for kind, choice in ENGINES.choices(weight).items()})
    packed = ENGINES.packed_bytes(weight)
    text = ", ".join(measured) or (f"{engine}, not measured yet" if engine in (AUTO, UNPACKED) else engine)
    return text + (f" (packed {packed / 2**20:.2f} MiB)" if packed else "")


def explain(model: nn.Module) -> Explanation:
    """Backend and matmul engine of each layer, for inputs of its weight's dtype, and why others are passed over.

    Raises ``TypeError`` for what is no model, ``ValueError`` under ZeRO-3.

    >>> model = nn.Sequential(fastlora.nn.Linear(8, 8, r=2))
    >>> fastlora.explain(model).rows[0][0]
    '0'
    """
    model = unwrapped(model)
    refuse_partitioned(model)
    rows, packed = [], 0
    for path, layer in model.named_modules():
        if isinstance(layer, ExpertProjection):
            path, why = f"{path.rpartition('.')[0]}.{layer.leaf}", f"{layer.parts} experts; the model's own products"
            rows.append(ExplainedLayer(path, update_backend(layer), "the device's own", why))
        if isinstance(layer, Plain):
            backend = "torch"
            if layer.measured:
                backend = choose(update_backend(layer), layer.weight.device, layer.weight.dtype)[0].name
            rows.append(ExplainedLayer(path, backend, "the device's own", f"an adapted {layer.original.__name__}"))
        if not isinstance(layer, (Linear, FrozenLinear)):
            continue
        packed += ENGINES.packed_bytes(layer.weight)
        engine = _engine(layer.weight, layer.engine)
        if isinstance(layer, FrozenLinear):
            rows.append(ExplainedLayer(path, "frozen", engine, ""))
            continue
        foreign = foreign_base(layer)
        dtype = layer.weight.dtype if foreign is None else compute_dtype(layer)
        wanted = layer.backend if foreign is None else update_backend(layer)
        backend, passed = choose(wanted, layer.weight.device, dtype)
        together = "" if layer.group is None else f"with {len(layer.group.layers) - 1} siblings; "
        if foreign is not None:
            engine, together = f"{foreign}'s own", "a quantized base runs alone; "
        kind = "split q/k/v; " if set(layer.slices) != {WHOLE} else ""
        reasons = [f"{name}: {reason}" for name, reason in passed.items()]
        why = "; ".join([*reasons, *launch_remarks(backend)])
        rows.append(ExplainedLayer(path, backend.name, engine, (kind + together + why).rstrip("; ")))
    statistics = tuple(map(str, records(adapted_layers(model).values())))
    return Explanation(tuple(rows), packed, _penalties(model), statistics)


def _penalties(model: nn.Module) -> dict[str, tuple[str, str]]:
    layers = {path: layer for path, layer in adapted_layers(model).items() if layer.measured}
    regulariser = FisherPenalty(layers, [(path, name) for path, layer in layers.items() for name in layer.slices])
    names = dict.fromkeys(name for layer in layers.values() for name in layer.adapter_names)
    return {name: regulariser.backend(name) for name in names}
