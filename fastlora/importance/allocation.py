"""From scores to ranks: bounded Webster apportionment of a rank or parameter budget."""

from __future__ import annotations

import heapq
import logging
import math
from collections.abc import Mapping, Sequence
from decimal import Context, Decimal
from fractions import Fraction

from .._utils.errors import check_choice, check_integer, check_number, wrong_value
from .scores import Scores, finite_floats, minmax, positive_costs, same_keys

logger = logging.getLogger(__name__)

# Decimal's exp and power give the same digits on every machine, libm's may differ in the last bit.
_DECIMAL = Context(prec=40, traps=[])
_DEFAULTS = {"step": 1, "unit": "ranks", "per": "rank", "shares": "auto", "tau": 1.0, "power": 1.0}


def allocate(
    scores: Mapping[str, float],
    budget: int,
    *,
    r_min: int | Mapping[str, int] = 1,
    r_max: int | Mapping[str, int] = 16,
    step: int = 1,
    unit: str = "ranks",
    costs: Mapping[str, int] | None = None,
    per: str = "rank",
    rule: str = "webster",
    shares: str = "auto",
    tau: float = 1.0,
    power: float = 1.0,
) -> dict[str, int]:
    """Share ``budget`` among matrices: from the floors, one step at a time to the largest w_i / (2 r_i + step).

    Ties go to the smaller rank, then to the earlier key; comparisons are exact (rational). The result is integer
    water-filling, clip(round(t w), r_min, r_max), and spends min(budget, sum of r_max) exactly with ``step=1``.

    - ``scores``: key -> importance. Weights w follow from ``shares``: ``"raw"`` the scores, ``"softmax"``
      softmax(score / tau), ``"shift"`` score - min; ``"auto"`` is softmax for signed scores (composites) and raw for
      norms. Then w ** power.
    - ``budget``: total rank, or with ``unit="params"`` total parameters, where a rank of matrix i costs
      c_i = N_i + K_i (``costs``, else ``scores.costs``); steps that cannot be paid are skipped.
    - ``r_min``, ``r_max``: bounds, one integer for all or a mapping with one integer per key.
    - ``per``: ``"param"`` divides the priority by c_i (importance per parameter).
    - ``rule``: ``"webster"``, or ``"fc_original"``: FC-LoRA as published, which overspends.

    Returns {key: rank} in the order of ``scores``; rank 0 means no adapter. Raises TypeError for wrong types and
    ValueError for empty, non-finite or (under raw) negative scores, r_min > r_max, missing costs and a budget below
    the floors (the message says what would be possible). Source: bounded Webster (Sainte-Lague) divisor method.

    >>> fastlora.allocate({"q": 3.0, "v": 1.0}, budget=8)
    {'q': 6, 'v': 2}
    """
    check_choice("unit", unit, ("ranks", "params"))
    check_choice("per", per, ("rank", "param"))
    check_choice("rule", rule, ("webster", "fc_original"))
    check_choice("shares", shares, ("auto", "raw", "softmax", "shift"))
    values = finite_floats(scores, "scores")
    if not values:
        raise ValueError("scores: expected at least one, got none")
    budget, step = check_integer("budget", budget, 0), check_integer("step", step, 1)
    tau, power = (float(check_number(name, value, above=0)) for name, value in (("tau", tau), ("power", power)))
    floors, caps = _bounds(r_min, r_max, values)
    if rule == "fc_original":
        given = {"step": step, "unit": unit, "per": per, "shares": shares, "tau": tau, "power": power}
        _refuse_options(given)
        already_minmax = isinstance(scores, Scores) and scores.kind == "composite_minmax"
        return _fc_original(values if already_minmax else minmax(values), budget, floors, caps)
    unit_costs = _unit_costs(scores, costs, values) if unit == "params" or per == "param" else None
    prices = unit_costs if unit == "params" else [1] * len(values)
    divisors = unit_costs if per == "param" else [1] * len(values)
    _check_affordable(budget, floors, prices, unit)
    weights, root = _raised(_weights(scores, values, shares, tau), power)
    ranks = _webster(weights, root, budget, floors, caps, step, prices, divisors)
    return dict(zip(values, ranks, strict=True))


class _Claim:
    """A matrix asking for its next step, ordered exactly by weight / divisor, then smaller rank, then position."""

    __slots__ = ("divisor", "position", "rank", "weight")

    def __init__(self, weight: int, divisor: int, rank: int, position: int) -> None:
        self.weight, self.divisor, self.rank, self.position = weight, divisor, rank, position

    def __lt__(self, other: _Claim) -> bool:
        mine, theirs = self.weight * other.divisor, other.weight * self.divisor
        if mine != theirs:
            return mine > theirs
        return (self.rank, self.position) < (other.rank, other.position)


def _webster(
    weights: Sequence[Fraction],
    root: int,
    budget: int,
    floors: Sequence[int],
    caps: Sequence[int],
    step: int,
    prices: Sequence[int],
    divisors: Sequence[int],
) -> list[int]:
    """Greedy of ``allocate`` on a heap; a weight stands for its ``root``-th root, so divisors are raised to it."""
    denominator = math.lcm(*(weight.denominator for weight in weights))
    numerators = [weight.numerator * (denominator // weight.denominator) for weight in weights]
    ranks = list(floors)
    left = budget - sum(floor * price for floor, price in zip(floors, prices, strict=True))

    def entry(position: int) -> tuple[float, _Claim]:
        divisor = ((2 * ranks[position] + step) * divisors[position]) ** root
        claim = _Claim(numerators[position], divisor, ranks[position], position)
        # Correctly rounded, hence monotone: unequal floats order as the rationals do, equal ones fall through.
        return -(claim.weight / (denominator * divisor)), claim

    heap = [entry(position) for position in range(len(ranks))]
    heapq.heapify(heap)
    while heap:
        position = heap[0][1].position
        price = step * prices[position]
        if price > left or ranks[position] + step > caps[position]:
            heapq.heappop(heap)
            continue
        ranks[position] += step
        left -= price
        heapq.heapreplace(heap, entry(position))
    return ranks


def _fc_original(
    values: Mapping[str, float], budget: int, floors: Sequence[int], caps: Sequence[int]
) -> dict[str, int]:
    """FC-LoRA as published: by falling score, r = min(max(r_min, int(score * R)), r_max, remaining).

    Once the budget is spent the rest still get r_min, so that the total may exceed the budget (129 for 100 ranks on
    36 matrices whose top six scores reach the cap); kept for comparison with published counts.
    """
    keys = list(values)
    ranks = list(floors)
    left = budget
    for position in sorted(range(len(keys)), key=lambda index: -values[keys[index]]):
        if left > 0:
            wanted = max(floors[position], int(values[keys[position]] * budget))
            ranks[position] = min(wanted, caps[position], left)
            left -= ranks[position]
    if sum(ranks) > budget:
        logger.info("rule 'fc_original' spends %d ranks of a budget of %d", sum(ranks), budget)
    return dict(zip(keys, ranks, strict=True))


def _weights(scores: Mapping[str, float], values: Mapping[str, float], shares: str, tau: float) -> list[Fraction]:
    if shares == "auto":
        shares = _automatic_shares(scores, values)
    if shares == "softmax":
        largest = max(values.values())
        # The normalizing sum is common to all and would only add rounding.
        return [Fraction(float(_DECIMAL.exp(Decimal((value - largest) / tau)))) for value in values.values()]
    if shares == "shift":
        smallest = Fraction(min(values.values()))
        return [Fraction(value) - smallest for value in values.values()]
    for key, value in values.items():
        if value < 0:
            raise wrong_value(f"scores[{key!r}]", "a number >= 0, as shares='raw' needs", value)
    return [Fraction(value) for value in values.values()]


def _automatic_shares(scores: Mapping[str, float], values: Mapping[str, float]) -> str:
    if isinstance(scores, Scores) and scores.signed is not None:
        return "softmax" if scores.signed else "raw"
    for key, value in values.items():
        if value < 0:
            accepted = "a number >= 0 under shares='auto' without a kind"
            more = "; pass shares='softmax' (softmax(score / tau)) or shares='shift' (score - min) for negative ones"
            raise wrong_value(f"scores[{key!r}]", accepted, value, more)
    return "raw"


def _raised(weights: Sequence[Fraction], power: float) -> tuple[list[Fraction], int]:
    """(v, q) with v ** (1 / q) proportional to w ** power: q = 1 and float64 unless power is in quarters."""
    largest = max(weights)
    if largest == 0:
        return list(weights), 1
    # Scaling to at most 1 by a power of two makes the result independent of such a factor and free of overflow.
    shift = largest.numerator.bit_length() - largest.denominator.bit_length() + 1
    unit = Fraction(2) ** shift
    scaled = [weight / unit for weight in weights]
    exponent = Fraction(power)
    if exponent.denominator <= 4 and exponent.numerator <= 16:
        return [weight**exponent.numerator for weight in scaled], exponent.denominator
    exact = Decimal(power)
    return [Fraction(float(_DECIMAL.power(Decimal(float(weight)), exact))) for weight in scaled], 1


def _bounds(
    r_min: int | Mapping[str, int], r_max: int | Mapping[str, int], values: Mapping[str, float]
) -> tuple[list[int], list[int]]:
    floors, caps = _per_key("r_min", r_min, values), _per_key("r_max", r_max, values)
    for key, floor, cap in zip(values, floors, caps, strict=True):
        if floor > cap:
            raise wrong_value("r_min", f"at most r_max = {cap} for {key!r}", floor)
    return floors, caps


def _per_key(name: str, bound: int | Mapping[str, int], values: Mapping[str, float]) -> list[int]:
    if not isinstance(bound, Mapping):
        return [check_integer(name, bound, 0)] * len(values)
    same_keys(values, bound, "scores", name)
    return [check_integer(f"{name}[{key!r}]", bound[key], 0) for key in values]


def _unit_costs(scores: Mapping[str, float], costs: Mapping[str, int] | None, values: Mapping[str, float]) -> list[int]:
    if costs is None:
        costs = scores.costs if isinstance(scores, Scores) else None
    if costs is None:
        raise ValueError(
            "costs: expected {key: N + K}, the parameters of a rank, for unit='params' or per='param', or scores that "
            "came from a model; got None"
        )
    return list(positive_costs(costs, values).values())


def _check_affordable(budget: int, floors: Sequence[int], prices: Sequence[int], unit: str) -> None:
    needed = sum(floor * price for floor, price in zip(floors, prices, strict=True))
    if needed <= budget:
        return
    what = "ranks" if unit == "ranks" else "parameters"
    highest = budget // sum(prices)
    raise ValueError(
        f"budget: expected at least the {needed} {what} that r_min takes on {len(floors)} matrices, got {budget}; or "
        f"pass r_min <= {highest} for all of them"
    )


def _refuse_options(given: Mapping[str, object]) -> None:
    changed = [f"{name}={value!r}" for name, value in given.items() if value != _DEFAULTS[name]]
    if changed:
        raise ValueError(f"rule: expected 'webster' with {', '.join(changed)}, got 'fc_original'")
