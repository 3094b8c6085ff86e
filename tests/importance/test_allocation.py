import logging
import math
import random
import time
from fractions import Fraction
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastlora.importance.allocation import allocate
from fastlora.importance.scores import Scores

PROPERTY = settings(max_examples=100, deadline=None)
COSTS = (1536, 1536, 3840, 3840)


def named(values):
    return {f"layer.{index}": value for index, value in enumerate(values)}


def ranks_of(values, *arguments, **options):
    budget, *bounds = arguments
    options |= dict(zip(("r_min", "r_max", "step"), bounds, strict=False))
    return list(allocate(named(values), budget, **options).values())


WORKED_EXAMPLES = [
    ((5, 3, 2), 10, 1, 16, 1, [5, 3, 2]),
    ((8, 1, 1), 16, 1, 8, 1, [8, 4, 4]),
    ((10, 1, 1, 0), 12, 1, 8, 1, [8, 2, 1, 1]),
    ((1, 1, 1), 10, 1, 16, 1, [4, 3, 3]),
    ((0, 0, 0), 7, 1, 16, 1, [3, 2, 2]),
    ((1, 0, 0), 20, 1, 16, 1, [16, 2, 2]),
    ((6, 6, 2), 10, 0, 99, 1, [4, 4, 2]),
    ((6, 6, 2), 11, 0, 99, 1, [5, 4, 2]),
    ((100, 1, 1, 1), 32, 8, 16, 1, [8, 8, 8, 8]),
    ((5, 3, 2, 1), 32, 4, 16, 4, [16, 8, 4, 4]),
]


@pytest.mark.parametrize(("weights", "budget", "low", "high", "step", "expected"), WORKED_EXAMPLES)
def test_worked_examples(weights, budget, low, high, step, expected):
    assert ranks_of(weights, budget, r_min=low, r_max=high, step=step) == expected


@pytest.mark.parametrize(
    ("per", "expected", "spent"), [("rank", [16, 10, 8, 4], 86016), ("param", [16, 16, 6, 3], 83712)]
)
def test_worked_example_with_a_parameter_budget(per, expected, spent):
    ranks = ranks_of((4, 2, 2, 1), 86016, unit="params", costs=named(COSTS), per=per)
    assert ranks == expected
    assert sum(rank * cost for rank, cost in zip(ranks, COSTS, strict=True)) == spent


@pytest.mark.parametrize(
    ("shares", "expected"), [("auto", [15, 8, 3, 2, 2]), ("softmax", [15, 8, 3, 2, 2]), ("shift", [15, 10, 2, 2, 1])]
)
def test_worked_example_of_the_composite(shares, expected):
    scores = Scores.composite(named((9, 4, 1, 1, 0.5)), named((3, 2, 1, 1, 0.7)), named((10, 40, 20, 20, 10)))
    assert list(allocate(scores, 30, r_min=1, r_max=16, shares=shares).values()) == expected


def naive_webster(weights, budget, lows, highs, step=1, prices=None, divisors=None):
    """The definition, one scan per step."""
    count = len(weights)
    prices, divisors = prices or [1] * count, divisors or [1] * count
    ranks = list(lows)
    left = budget - sum(rank * price for rank, price in zip(ranks, prices, strict=True))
    while True:
        open_positions = [i for i in range(count) if ranks[i] + step <= highs[i] and step * prices[i] <= left]
        if not open_positions:
            return ranks
        claims = {i: Fraction(weights[i]) / ((2 * ranks[i] + step) * divisors[i]) for i in open_positions}
        best = min(claims, key=lambda i: (-claims[i], ranks[i], i))
        ranks[best] += step
        left -= step * prices[best]


small_or_wild = st.one_of(
    st.integers(0, 6).map(float),
    st.floats(0, 1e6, allow_subnormal=False),
    st.sampled_from([0.0, 5e-324, 1e-300, 0.1, 0.3, 1e300]),
)


@st.composite
def problems(draw):
    weights = draw(st.lists(small_or_wild, min_size=1, max_size=12))
    low = draw(st.integers(0, 4))
    high = draw(st.integers(low, low + 12))
    budget = draw(st.integers(low * len(weights), high * len(weights) + 5))
    return weights, budget, low, high


@st.composite
def priced_problems(draw):
    weights, _, low, high = draw(problems())
    costs = draw(st.lists(st.integers(1, 50), min_size=len(weights), max_size=len(weights)))
    budget = draw(st.integers(low * sum(costs), high * sum(costs) + 10))
    options = {"unit": "params", "costs": named(costs), "per": draw(st.sampled_from(["rank", "param"]))}
    return weights, budget, low, high, costs, options


@PROPERTY
@given(problems())
def test_the_budget_is_spent_and_bounds_hold(problem):
    weights, budget, low, high = problem
    ranks = ranks_of(weights, budget, low, high)
    assert sum(ranks) == min(budget, high * len(weights))
    assert all(low <= rank <= high for rank in ranks)
    assert all(type(rank) is int for rank in ranks)
    assert ranks == naive_webster(weights, budget, [low] * len(weights), [high] * len(weights))


@PROPERTY
@given(problems(), st.integers(2, 5))
def test_with_step_the_rest_is_smaller_than_one_step(problem, step):
    weights, budget, low, high = problem
    ranks = ranks_of(weights, budget, low, high, step=step)
    reachable = low + (high - low) // step * step
    assert all(low <= rank <= reachable and (rank - low) % step == 0 for rank in ranks)
    assert 0 <= min(budget, reachable * len(weights)) - sum(ranks) < step


@PROPERTY
@given(priced_problems(), st.integers(1, 3))
def test_a_parameter_budget_leaves_less_than_the_cheapest_step(problem, step):
    weights, budget, low, high, costs, options = problem
    ranks = ranks_of(weights, budget, low, high, step=step, **options)
    left = budget - sum(rank * cost for rank, cost in zip(ranks, costs, strict=True))
    growable = [step * cost for rank, cost in zip(ranks, costs, strict=True) if rank + step <= high]
    assert left >= 0 and all(left < price for price in growable)
    lows, highs, divisors = [low] * len(costs), [high] * len(costs), costs if options["per"] == "param" else None
    assert ranks == naive_webster(weights, budget, lows, highs, step, costs, divisors)


@PROPERTY
@given(problems())
def test_a_larger_weight_never_gets_less(problem):
    weights, budget, low, high = problem
    ranks = ranks_of(weights, budget, low, high)
    for weight, rank in zip(weights, ranks, strict=True):
        assert all(rank >= other for less, other in zip(weights, ranks, strict=True) if weight > less)


@PROPERTY
@given(problems(), st.integers(1, 40), st.sampled_from(["rank", "param"]))
def test_a_larger_weight_never_gets_less_at_equal_costs(problem, cost, per):
    weights, budget, low, high = problem
    options = {"unit": "params", "costs": named([cost] * len(weights)), "per": per}
    assert ranks_of(weights, budget * cost + cost - 1, low, high, **options) == ranks_of(weights, budget, low, high)


@PROPERTY
@given(problems())
def test_one_more_rank_changes_exactly_one_entry_by_one(problem):
    weights, budget, low, high = problem
    budget = min(budget, high * len(weights) - 1)
    if budget < low * len(weights):
        return
    before, after = ranks_of(weights, budget, low, high), ranks_of(weights, budget + 1, low, high)
    changes = [new - old for old, new in zip(before, after, strict=True)]
    assert sorted(changes) == [0] * (len(weights) - 1) + [1]


@PROPERTY
@given(st.one_of(problems(), priced_problems()), st.data())
def test_raising_a_weight_never_lowers_its_rank(problem, data):
    weights, budget, low, high, *priced = problem
    options = priced[1] if priced else {}
    position = data.draw(st.integers(0, len(weights) - 1))
    raised = list(weights)
    raised[position] = max(weights[position], data.draw(small_or_wild))
    before, after = ranks_of(weights, budget, low, high, **options), ranks_of(raised, budget, low, high, **options)
    assert after[position] >= before[position]


@PROPERTY
@given(
    st.lists(st.floats(1e-30, 1e30), min_size=1, max_size=10),
    st.integers(0, 60),
    st.integers(-300, 300),
    st.sampled_from([0.3, 0.5, 1.0, 2.0]),
)
def test_scaling_by_a_power_of_two_changes_nothing(weights, extra, exponent, power):
    scaled = [math.ldexp(weight, exponent) for weight in weights]
    budget = len(weights) + extra
    assert ranks_of(scaled, budget, power=power) == ranks_of(weights, budget, power=power)


@PROPERTY
@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=4),
    st.lists(st.tuples(st.integers(0, 2), st.integers(0, 4)), min_size=4, max_size=4),
    st.integers(0, 20),
)
def test_brute_force_optimum(weights, bounds, extra):
    """Webster minimises sum r^2 / w among all ranks within bounds that spend the budget."""
    lows = [low for low, _ in bounds[: len(weights)]]
    highs = [low + width for low, width in bounds[: len(weights)]]
    budget = min(sum(lows) + extra, sum(highs))

    def objective(ranks):
        return sum(Fraction(rank * rank, weight) for rank, weight in zip(ranks, weights, strict=True))

    spans = [range(low, high + 1) for low, high in zip(lows, highs, strict=True)]
    best = min(objective(ranks) for ranks in product(*spans) if sum(ranks) == budget)
    ranks = ranks_of(weights, budget, named(lows), named(highs))
    assert sum(ranks) == budget
    assert objective(ranks) == best


@PROPERTY
@given(st.lists(st.integers(1, 50), min_size=1, max_size=8), st.integers(0, 6), st.integers(0, 80))
def test_integer_water_filling(weights, low, extra):
    """Some level t gives r_i = clip(round(t w_i), low, 16), where a half may round either way."""
    budget = min(low * len(weights) + extra, 16 * len(weights))
    ranks = ranks_of(weights, budget, low, 16)
    claims = list(zip(weights, ranks, strict=True))
    at_least = max((Fraction(2 * rank - 1, 2 * weight) for weight, rank in claims if rank > low), default=Fraction(0))
    at_most = min((Fraction(2 * rank + 1, 2 * weight) for weight, rank in claims if rank < 16), default=at_least)
    assert at_least <= at_most


def test_ties_are_exact_where_floats_would_break_them():
    close = math.nextafter(1.0, 2.0)
    assert ranks_of((1.0, close), 1, 0, 9) == [0, 1]
    assert ranks_of((3.0, close), 2, 0, 9) == [1, 1]
    assert ranks_of((math.nextafter(3.0, 4.0), 1.0), 2, 0, 9) == [2, 0]
    # Two quotients that round to one float: as a tie the smaller rank would win.
    larger = math.nextafter(math.nextafter(3.0, 4.0), 4.0)
    assert larger / 3 == close and Fraction(larger) / 3 > Fraction(close)
    assert ranks_of((larger, close), 2, 0, 9) == [2, 0]


def test_power_of_one_half_is_exact():
    # sqrt(27) / 3 = sqrt(3): a tie, which goes to the smaller rank.
    assert ranks_of((27.0, 3.0), 3, 0, 9, power=0.5) == [2, 1]
    assert ranks_of((27.0, 3.0), 2, 0, 9, power=0.5) == [1, 1]
    assert ranks_of((25.0, 9.0, 4.0), 10, power=0.5) == ranks_of((5.0, 3.0, 2.0), 10)
    assert ranks_of((5.0, 3.0, 2.0), 38, power=2.0) == ranks_of((25.0, 9.0, 4.0), 38)
    assert ranks_of((1.0, 3.0, 2.0), 20, power=0.3) == ranks_of([v**0.3 for v in (1.0, 3.0, 2.0)], 20)


def test_tau_sharpens_the_softmax():
    scores = Scores(named((1.0, 0.0, -1.0)), kind="composite")
    assert list(allocate(scores, 30, tau=100.0).values()) == [10, 10, 10]
    assert list(allocate(scores, 30, tau=0.01, r_max=28).values()) == [28, 1, 1]
    assert list(allocate(scores, 9, tau=1e-300).values()) == [7, 1, 1]


def test_auto_shares_follow_the_kind():
    values = named((4.0, 2.0, 1.0))
    raw, softmax = allocate(values, 21, shares="raw"), allocate(values, 21, shares="softmax")
    assert raw != softmax
    assert allocate(values, 21) == raw
    assert allocate(Scores(values, kind="grad_sq"), 21) == raw
    assert allocate(Scores(values, kind="composite"), 21) == softmax
    assert allocate(Scores(values, kind="composite_minmax"), 21) == raw
    assert allocate(Scores(values, kind="mine"), 21) == raw
    assert allocate(Scores(values, kind="mine", signed=True), 21) == softmax


def test_extreme_scores_do_not_overflow():
    assert ranks_of((1e308, -1e308, 0.0), 12, shares="shift") == [7, 1, 4]
    assert ranks_of((1e308, -1e308, 0.0), 12, shares="softmax") == [10, 1, 1]
    assert ranks_of((1e308, 5e-324), 20, r_max=30) == [19, 1]
    assert ranks_of((1e308, 1e-308), 20, r_max=30, power=2.0) == [19, 1]


def test_bounds_per_key():
    scores = named((5.0, 3.0, 2.0))
    caps = named((2, 16, 16))
    assert list(allocate(scores, 10, r_max=caps).values()) == [2, 5, 3]
    assert list(allocate(scores, 11, r_min=named((1, 1, 6))).values()) == [3, 2, 6]
    assert list(allocate(scores, 1000, r_max=caps).values()) == [2, 16, 16]
    assert list(allocate({"z": 1.0, "a": 2.0}, 12, r_max={"a": 4, "z": 5}).items()) == [("z", 5), ("a", 4)]


def test_costs_come_with_the_scores_and_the_argument_wins():
    values = named((4, 2, 2, 1))
    scores = Scores(values, kind="grad_sq", costs=named(COSTS))
    assert list(allocate(scores, 86016, unit="params").values()) == [16, 10, 8, 4]
    cheap = allocate(scores, 86016, unit="params", costs=named((1, 1, 1, 1)))
    assert list(cheap.values()) == [16] * 4


@pytest.mark.parametrize("power", [0.3, 0.5, 1.0])
def test_large_problems_are_fast(power):
    generator = random.Random(0)
    scores = named([generator.lognormvariate(0, 3) for _ in range(500)])
    start = time.process_time()
    ranks = allocate(scores, 8000, r_max=128, power=power)
    assert time.process_time() - start < 1.0
    assert sum(ranks.values()) == 8000


# FC-LoRA as published: 36 matrices of 768 + 768 whose top scores saturate the cap of 16.
PUBLISHED_SCORES = [20.0, 18.0, 17.0, 16.0, 15.0, 14.0, 13.0] + [3.0 - 0.1 * index for index in range(29)]


@pytest.mark.parametrize(
    ("budget", "at_cap", "rest_of_budget", "total", "parameters"), [(100, 6, 4, 129, 198_144), (50, 3, 2, 82, 125_952)]
)
def test_fc_original_reproduces_the_stated_counts(budget, at_cap, rest_of_budget, total, parameters, caplog):
    shuffled = list(PUBLISHED_SCORES)
    random.Random(0).shuffle(shuffled)
    with caplog.at_level(logging.INFO, logger="fastlora.importance.allocation"):
        ranks = ranks_of(shuffled, budget, rule="fc_original")
    by_score = [rank for _, rank in sorted(zip(shuffled, ranks, strict=True), reverse=True)]
    assert by_score == [16] * at_cap + [rest_of_budget] + [1] * (35 - at_cap)
    assert sum(ranks) == total
    assert sum(ranks) * (768 + 768) == parameters
    assert str(total) in caplog.text
    assert sum(ranks_of(shuffled, budget)) == budget


def test_fc_original_by_hand():
    # min-max: 1, .5, .25, 0 of R = 20.
    assert ranks_of((8.0, 4.0, 2.0, 0.0), 20, rule="fc_original") == [16, 4, 1, 1]
    assert ranks_of((0.0, 2.0, 4.0, 8.0), 40, rule="fc_original") == [1, 8, 16, 16]
    # A flat score says nothing: the floor for all.
    assert ranks_of((3.0, 3.0, 3.0), 10, r_min=2, rule="fc_original") == [2, 2, 2]
    # What is left may be less than the floor; spent, the rest still get it.
    assert ranks_of((9.0, 5.0, 0.0), 9, r_min=2, r_max=8, rule="fc_original") == [8, 1, 2]


def test_fc_original_takes_minmax_composites_as_they_are():
    scores = Scores(named((0.5, 0.25, 0.0)), kind="composite_minmax")
    assert list(allocate(scores, 20, rule="fc_original").values()) == [10, 5, 1]
    assert list(allocate(dict(scores), 20, rule="fc_original").values()) == [16, 4, 1]


GOOD, MIXED = named((1.0, 2.0)), named((1.0, -1.0))
FOREIGN = {"step": 2, "unit": "params", "per": "param", "shares": "raw", "tau": 2.0, "power": 0.5}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"budget": 5, "r_min": 4}, "budget: expected at least the 8 ranks .*, got 5; or pass r_min <= 2"),
        ({"budget": 1}, "budget: expected at least the 2 ranks .*, got 1; or pass r_min <= 0"),
        (
            {"budget": 100, "unit": "params", "costs": named((30, 80))},
            "budget: expected at least the 110 parameters .*, got 100; or pass r_min <= 0",
        ),
        ({"budget": -1}, "budget: expected an integer >= 0"),
        ({"r_min": -1}, "r_min: expected an integer >= 0"),
        ({"r_min": 5, "r_max": 4}, "r_min: expected at most r_max = 4 for 'layer.0', got 5"),
        ({"r_max": named((4, 0))}, "r_min: expected at most r_max = 0 for 'layer.1', got 1"),
        ({"r_max": {"layer.0": 4}}, "r_max: expected the keys of scores, got others: without 'layer.1'"),
        ({"r_min": named((1, 1, 1))}, "r_min: expected the keys of scores, got others: with 'layer.2'"),
        ({"scores": {}}, "scores: expected at least one, got none"),
        ({"scores": Scores({}, kind="grad_sq")}, "scores: expected at least one, got none"),
        ({"scores": named((1.0, math.nan))}, r"scores\['layer.1'\]: expected a finite number, got nan"),
        ({"scores": named((math.inf, 1.0))}, r"scores\['layer.0'\]: expected a finite number, got inf"),
        (
            {"scores": named((1.0, -math.inf)), "shares": "shift"},
            r"scores\['layer.1'\]: expected a finite number, got -inf",
        ),
        (
            {"scores": MIXED},
            r"scores\['layer.1'\]: expected a number >= 0 under shares='auto'.*, got -1.0; pass .*softmax.*shift",
        ),
        (
            {"scores": Scores(MIXED, kind="mine")},
            r"scores\['layer.1'\]: expected a number >= 0 under shares='auto'.*, got -1.0; pass .*softmax.*shift",
        ),
        (
            {"scores": MIXED, "shares": "raw"},
            r"scores\['layer.1'\]: expected a number >= 0, as shares='raw' needs, got -1.0",
        ),
        ({"step": 0}, "step: expected an integer >= 1"),
        ({"tau": 0.0}, "tau: expected a finite number > 0"),
        ({"power": math.nan}, "power: expected a finite number > 0"),
        ({"unit": "rank"}, r"unit: expected one of \('ranks', 'params'\), got 'rank'"),
        ({"per": "params"}, "per: expected one of"),
        ({"rule": "hamilton"}, r"rule: expected one of \('webster', 'fc_original'\)"),
        ({"shares": "log"}, r"shares: expected one of \('auto', 'raw', 'softmax', 'shift'\)"),
        ({"unit": "params"}, "costs: expected .*, the parameters of a rank"),
        ({"per": "param"}, "costs: expected .*, the parameters of a rank"),
        ({"unit": "params", "costs": {"layer.0": 3}}, "costs: expected one for every key, got none for 'layer.1'"),
        ({"unit": "params", "costs": named((3, 0))}, r"costs\['layer.1'\]: expected an integer >= 1"),
        *(
            ({"rule": "fc_original", name: value}, f"rule: expected 'webster' with {name}=.*, got 'fc_original'")
            for name, value in FOREIGN.items()
        ),
    ],
)
def test_values_that_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        allocate(**{"scores": GOOD, "budget": 10, **arguments})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scores": [1.0, 2.0]}, "scores: expected a mapping"),
        ({"scores": {1: 1.0}}, "scores: expected string keys"),
        ({"scores": {"a": "1"}}, r"scores\['a'\]: expected a finite number"),
        ({"scores": {"a": True}}, r"scores\['a'\]: expected a finite number"),
        ({"budget": 10.0}, "budget: expected an integer >= 0, got 10.0"),
        ({"budget": True}, "budget: expected an integer >= 0"),
        ({"r_min": 1.0}, "r_min: expected an integer >= 0"),
        ({"r_max": True}, "r_max: expected an integer >= 0"),
        ({"r_max": named((4, 2.5))}, r"r_max\['layer.1'\]: expected an integer >= 0"),
        ({"step": 1.0}, "step: expected an integer >= 1"),
        ({"tau": "1"}, "tau: expected a finite number > 0"),
        ({"unit": "params", "costs": named((3, 1.0))}, "costs.*: expected an integer >= 1"),
    ],
)
def test_types_that_are_refused(arguments, message):
    with pytest.raises(TypeError, match=message):
        allocate(**{"scores": GOOD, "budget": 10, **arguments})
