"""Scores (a mapping that knows its kind), z-score, composite, breakdown by projection and depth."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch

from .._utils.errors import (
    check_choice,
    check_instance,
    check_integer,
    check_mapping,
    check_number,
    listed,
    wrong_value,
)
from .._utils.reporting import text_table

# True: values may be negative. A kind that is not listed is undecided and judged by its values.
SIGNED_KINDS: Mapping[str, bool] = MappingProxyType(
    {
        "grad_sq": False,
        "fisher": False,
        "grad_abs": False,
        "act_var": False,
        "lora_b_var": False,
        "composite": True,
        "composite_minmax": False,
    }
)
FLAT_SPREAD = 1e-12


class Scores(Mapping[str, float]):
    """Immutable mapping key -> importance of one matrix (``values``), with the ``kind`` of number it holds.

    ``costs`` (key -> N + K, the parameters one rank costs) makes parameter budgets possible in ``allocate``.
    ``signed`` says whether values may be negative: by default it follows from a known kind and is None for others.

    Raises ``TypeError`` for keys that are not strings and values that are not numbers; ``ValueError`` for NaN or
    infinite values, negative values of an unsigned kind, a key without cost, and costs that are not positive integers.

    >>> scores = fastlora.Scores({"0.q": 3.0, "0.v": 1.0}, "grad_sq", costs={"0.q": 16, "0.v": 16})
    >>> scores.kind, scores.signed, scores.costs["0.q"]
    ('grad_sq', False, 16)
    >>> scores.breakdown().by_depth
    {'0': 2.0}
    """

    __slots__ = ("_costs", "_kind", "_signed", "_values")

    def __init__(
        self,
        values: Mapping[str, float],
        kind: str,
        signed: bool | None = None,
        costs: Mapping[str, int] | None = None,
    ) -> None:
        if not check_instance("kind", kind, str, "a non-empty string such as 'grad_sq'"):
            raise wrong_value("kind", "a non-empty string such as 'grad_sq'", kind)
        if signed is not None:
            check_instance("signed", signed, bool, "True, False or None")
        numbers_by_key = finite_floats(values, "values")
        if signed is None:
            signed = SIGNED_KINDS.get(kind)
        if signed is False:
            _refuse_negative(numbers_by_key, kind)
        object.__setattr__(self, "_values", MappingProxyType(numbers_by_key))
        object.__setattr__(self, "_kind", kind)
        object.__setattr__(self, "_signed", signed)
        checked_costs = None if costs is None else MappingProxyType(positive_costs(costs, numbers_by_key))
        object.__setattr__(self, "_costs", checked_costs)

    @property
    def kind(self) -> str:
        """Name of the statistic, for instance ``"grad_sq"``."""
        return self._kind

    @property
    def signed(self) -> bool | None:
        """Whether values may be negative; None when the kind does not say."""
        return self._signed

    @property
    def costs(self) -> Mapping[str, int] | None:
        """Read-only key -> parameters per rank (N + K), or None when unknown."""
        return self._costs

    def __getitem__(self, key: str) -> float:
        return self._values[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"Scores are immutable: cannot set {name!r}")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"Scores are immutable: cannot delete {name!r}")

    def __reduce__(self) -> tuple:
        costs = None if self._costs is None else dict(self._costs)
        return Scores, (dict(self._values), self._kind, self._signed, costs)

    def __repr__(self) -> str:
        shown = [f"{key!r}: {value:.4g}" for key, value in list(self.items())[:4]]
        if len(self) > 4:
            shown.append(f"... {len(self) - 4} more")
        return f"Scores({self._kind}, {{{', '.join(shown)}}}{', with costs' if self._costs is not None else ''})"

    def rank_correlation(self, other: Mapping[str, float]) -> float:
        """Spearman's ``rho = cov(rank u, rank v) / (std rank u * std rank v)`` over the keys that ``other`` has too.

        Ties share a mean rank; NaN when one side is constant. Raises ``TypeError`` for what is no mapping of numbers,
        ``ValueError`` for numbers that are not finite and with fewer than two common keys.
        Source: Spearman, "The Proof and Measurement of Association between Two Things" (1904).

        >>> fastlora.Scores({"q": 3.0, "v": 1.0}, "grad_sq").rank_correlation({"q": 2.0, "v": 5.0})
        -1.0
        """
        theirs = finite_floats(other, "other")
        common = [key for key in self if key in theirs]
        if len(common) < 2:
            raise ValueError(f"other: expected at least 2 keys of these scores, got {len(common)}")
        first = _doubled_ranks([self[key] for key in common])
        second = _doubled_ranks([theirs[key] for key in common])
        first_spread = sum(rank * rank for rank in first)
        second_spread = sum(rank * rank for rank in second)
        if first_spread == 0 or second_spread == 0:
            return math.nan
        product = sum(left * right for left, right in zip(first, second, strict=True))
        return product / math.sqrt(first_spread * second_spread)

    def breakdown(self) -> Breakdown:
        """Means of scores by projection (``attn.qkv[q]``) and by block (``blocks.0``), in the order of the scores.

        A key's block is its path up to the first number (and on to ``blocks.<n>`` inside a stage), its projection
        the rest; a key without a number is a projection of the block "". Raises ``ValueError`` for no scores.
        """
        if not self:
            raise ValueError("scores: expected at least one, got none")
        cells: dict[tuple[str, str], float] = {}
        for key, value in self.items():
            found = _BLOCK.fullmatch(key)
            cells[found.groups() if found else ("", key)] = value
        return Breakdown(_means(cells, 1), _means(cells, 0), cells)

    @staticmethod
    def composite(
        grad_sq: Mapping[str, float],
        grad_abs: Mapping[str, float],
        act_var: Mapping[str, float],
        weights: Sequence[float] = (0.6, 0.2, 0.2),
        normalize: str = "zscore",
    ) -> Scores:
        """FC-LoRA's importance ``c = 0.6 z(grad_sq) + 0.2 z(grad_abs) + 0.2 z(act_var)``, z over all matrices.

        ``weights``: the three factors. ``z(v) = (v - mean v) / std v``, so that scores have no unit. Ranks by it did as
        well as uniform ones on one model: +0.12 ± 0.37 points of accuracy (``docs/experiment.md``).

        ``normalize="minmax"`` is the published variant (kind ``"composite_minmax"``, values in [0, 1] for weights that
        sum to 1). Keys keep the order of ``grad_sq``; costs are taken from the first argument that carries them.

        Raises ``TypeError`` for other things than mappings of numbers, ``ValueError`` when the keys of the three differ
        (the difference is named) or values are not finite. Source: FC-LoRA, see ``docs/methods.md``.

        >>> given = {"q": 3.0, "v": 1.0}
        >>> fastlora.Scores.composite(given, given, given)["q"]
        1.0
        """
        check_choice("normalize", normalize, ("zscore", "minmax"))
        parts = {"grad_sq": grad_sq, "grad_abs": grad_abs, "act_var": act_var}
        accepted = f"3 numbers, for {', '.join(parts)}"
        check_instance("weights", weights, Sequence, accepted)
        factors = [_finite_float(weight, f"weights[{index}]") for index, weight in enumerate(weights)]
        if len(factors) != len(parts):
            raise wrong_value("weights", accepted, weights)
        checked = {name: finite_floats(part, name) for name, part in parts.items()}
        for name in ("grad_abs", "act_var"):
            same_keys(checked["grad_sq"], checked[name], "grad_sq", name)
        rescale = zscore if normalize == "zscore" else minmax
        columns = [rescale(part) for part in checked.values()]
        weighted = list(zip(factors, columns, strict=True))
        totals = {key: math.fsum(factor * column[key] for factor, column in weighted) for key in checked["grad_sq"]}
        costs = next(
            (part.costs for part in parts.values() if isinstance(part, Scores) and part.costs is not None), None
        )
        if normalize == "zscore":
            return Scores(totals, kind="composite", costs=costs)
        # Negative weights are unusual but legal, so the values decide.
        signed = min(totals.values()) < 0
        return Scores(totals, kind="composite_minmax", signed=signed, costs=costs)


def zscore(values: Mapping[str, float]) -> dict[str, float]:
    """z_i = (v_i - mean v) / std v with the population deviation; all 0 when max v - min v <= 1e-12 * max|v|.

    Raises ValueError for an empty mapping and for NaN or infinite values.
    """
    scaled = _rescaled(values)
    if _is_flat(scaled):
        return dict.fromkeys(scaled, 0.0)
    mean = math.fsum(scaled.values()) / len(scaled)
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in scaled.values()) / len(scaled))
    return {key: (value - mean) / deviation for key, value in scaled.items()}


def minmax(values: Mapping[str, float]) -> dict[str, float]:
    """m_i = (v_i - min v) / (max v - min v), in [0, 1]; all 0 when max v - min v <= 1e-12 * max|v|.

    Raises ValueError for an empty mapping and for NaN or infinite values.
    """
    scaled = _rescaled(values)
    if _is_flat(scaled):
        return dict.fromkeys(scaled, 0.0)
    low, high = min(scaled.values()), max(scaled.values())
    return {key: (value - low) / (high - low) for key, value in scaled.items()}


def finite_floats(values: Mapping[str, float], name: str) -> dict[str, float]:
    """Copy of ``values`` as {str: float}; ``name`` is the argument that errors speak of.

    Raises TypeError for a non-mapping, keys that are not strings or values that are not real numbers (one-element
    tensors count as numbers); ValueError for NaN and infinity.
    """
    check_mapping(name, values, "keys to numbers")
    checked: dict[str, float] = {}
    for key, value in values.items():
        check_instance(name, key, str, "string keys")
        checked[key] = _finite_float(value, f"{name}[{key!r}]")
    return checked


def positive_costs(costs: Mapping[str, int], keys: Mapping[str, object]) -> dict[str, int]:
    """Costs (parameters per rank, N + K) of exactly ``keys``; further entries are ignored.

    Raises ValueError for missing keys or costs below 1, TypeError for costs that are not integers.
    """
    check_mapping("costs", costs, "keys to N + K")
    missing = [key for key in keys if key not in costs]
    if missing:
        raise ValueError(f"costs: expected one for every key, got none for {listed(map(repr, missing))}")
    return {key: check_integer(f"costs[{key!r}]", costs[key], 1) for key in keys}


def same_keys(first: Mapping[str, object], second: Mapping[str, object], first_name: str, second_name: str) -> None:
    """Raise ValueError that names the difference unless both mappings have the same keys."""
    missing = [key for key in first if key not in second]
    extra = [key for key in second if key not in first]
    problems = [f"without {listed(map(repr, missing))}"] if missing else []
    if extra:
        problems.append(f"with {listed(map(repr, extra))}")
    if problems:
        raise ValueError(f"{second_name}: expected the keys of {first_name}, got others: {' and '.join(problems)}")


def _finite_float(value: object, name: str) -> float:
    if isinstance(value, torch.Tensor) and value.numel() == 1 and value.dtype != torch.bool:
        value = value.item()
    return float(check_number(name, value))


def _refuse_negative(values: Mapping[str, float], kind: str) -> None:
    for key, value in values.items():
        if value < 0:
            raise wrong_value(f"values[{key!r}]", f"a number >= 0 of {kind!r} scores", value, ": pass signed=True")


def _rescaled(values: Mapping[str, float]) -> dict[str, float]:
    checked = finite_floats(values, "values")
    if not checked:
        raise ValueError("values: expected at least one, got none")
    # A power of two is exact and keeps squares of tiny or huge norms inside float64.
    exponent = math.frexp(max(map(abs, checked.values())))[1]
    return {key: math.ldexp(value, -exponent) for key, value in checked.items()}


def _is_flat(values: Mapping[str, float]) -> bool:
    numbers_seen = values.values()
    return max(numbers_seen) - min(numbers_seen) <= FLAT_SPREAD * max(map(abs, numbers_seen))


def _doubled_ranks(values: Sequence[float]) -> list[int]:
    """Twice the mean ranks, centered: integers, so that the correlation has no rounding in its sums."""
    order = sorted(range(len(values)), key=values.__getitem__)
    ranks = [0] * len(values)
    start = 0
    while start < len(order):
        stop = start
        while stop < len(order) and values[order[stop]] == values[order[start]]:
            stop += 1
        for position in order[start:stop]:
            ranks[position] = start + stop - len(values)
        start = stop
    return ranks


# A block's path ends at its number; stages hold blocks ("layers.0.blocks.1").
_BLOCK = re.compile(r"((?:.*?\.)?\d+(?:\.blocks\.\d+)?)\.(.+)")


@dataclass(frozen=True)
class Breakdown:
    """Mean score of each projection and of each block, and every score by (block, projection); prints as a table."""

    by_projection: Mapping[str, float]
    by_depth: Mapping[str, float]
    cells: Mapping[tuple[str, str], float]

    def __str__(self) -> str:
        head = ["block", *self.by_projection, "mean"]
        rows = []
        for block, mean in self.by_depth.items():
            values = [self.cells.get((block, projection)) for projection in self.by_projection]
            rows.append([block, *("" if v is None else f"{v:.3g}" for v in values), f"{mean:.3g}"])
        overall = math.fsum(self.cells.values()) / len(self.cells)
        rows.append(["mean", *(f"{v:.3g}" for v in self.by_projection.values()), f"{overall:.3g}"])
        return "\n".join(map(str.rstrip, text_table(head, rows).splitlines()))


def _means(cells: Mapping[tuple[str, str], float], position: int) -> dict[str, float]:
    grouped: dict[str, list[float]] = {}
    for cell, value in cells.items():
        grouped.setdefault(cell[position], []).append(value)
    return {name: math.fsum(values) / len(values) for name, values in grouped.items()}
