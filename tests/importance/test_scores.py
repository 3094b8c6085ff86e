import copy
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastlora.importance.scores import Scores, minmax, zscore

PROPERTY = settings(max_examples=100, deadline=None)
VALUES = {"a": 3.0, "b": 1.0, "c": 2.0}


def named(values):
    return {f"layer.{index}": value for index, value in enumerate(values)}


def test_scores_are_a_mapping_that_knows_its_kind():
    scores = Scores(VALUES, kind="grad_sq", costs={"a": 10, "b": 20, "c": 30, "elsewhere": 5})
    assert dict(scores) == VALUES and scores == VALUES
    assert list(scores) == ["a", "b", "c"] and len(scores) == 3 and "a" in scores
    assert scores.kind == "grad_sq" and scores.signed is False
    assert dict(scores.costs) == {"a": 10, "b": 20, "c": 30}
    assert Scores(VALUES, kind="grad_sq").costs is None


@pytest.mark.parametrize(
    ("kind", "signed"),
    [
        ("grad_sq", False),
        ("fisher", False),
        ("grad_abs", False),
        ("act_var", False),
        ("lora_b_var", False),
        ("composite_minmax", False),
        ("composite", True),
        ("mine", None),
    ],
)
def test_signed_follows_from_the_kind(kind, signed):
    assert Scores(VALUES, kind=kind).signed is signed


def test_scores_are_immutable_and_do_not_follow_their_source():
    source = dict(VALUES)
    scores = Scores(source, kind="grad_sq", costs={"a": 1, "b": 1, "c": 1})
    source["a"] = 99.0
    assert scores["a"] == 3.0
    with pytest.raises(TypeError):
        scores["a"] = 1.0
    with pytest.raises(TypeError):
        scores.costs["a"] = 2
    for name in ("kind", "signed", "costs", "_values", "other"):
        with pytest.raises(AttributeError):
            setattr(scores, name, None)
    with pytest.raises(AttributeError):
        del scores._values


@pytest.mark.parametrize("clone", [copy.copy, copy.deepcopy, lambda scores: pickle.loads(pickle.dumps(scores))])
def test_copies_keep_everything(clone):
    scores = Scores({"a": -1.0, "b": 2.0}, kind="mine", signed=True, costs={"a": 5, "b": 6})
    twin = clone(scores)
    assert type(twin) is Scores and twin == scores and list(twin) == list(scores)
    assert (twin.kind, twin.signed, dict(twin.costs)) == ("mine", True, {"a": 5, "b": 6})


def test_repr_is_short():
    text = repr(Scores(named([1.0 / 3] * 36), kind="grad_sq"))
    assert text.startswith("Scores(grad_sq, {'layer.0': 0.3333, ") and "32 more" in text and len(text) < 160
    assert repr(Scores({"a": 1.0}, "fisher", costs={"a": 1})) == "Scores(fisher, {'a': 1}, with costs)"


def test_one_element_tensors_are_numbers():
    scores = Scores({"a": torch.tensor(0.5), "b": torch.tensor([2.0], dtype=torch.float64), "c": 1}, kind="fisher")
    assert dict(scores) == {"a": 0.5, "b": 2.0, "c": 1.0}
    assert all(type(value) is float for value in scores.values())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([1.0], "fisher"), TypeError, "values: expected a mapping"),
        (({1: 1.0}, "fisher"), TypeError, "string keys"),
        (({"a": "x"}, "fisher"), TypeError, r"values\['a'\]: expected a finite number"),
        (({"a": torch.ones(2)}, "fisher"), TypeError, r"values\['a'\]: expected a finite number"),
        (({"a": True}, "fisher"), TypeError, r"values\['a'\]: expected a finite number"),
        (({"a": math.nan}, "fisher"), ValueError, r"values\['a'\]: expected a finite number, got nan"),
        (({"a": 10**400}, "fisher"), ValueError, r"values\['a'\]: expected a finite number, got 1000"),
        (({"a": -1.0}, "fisher"), ValueError, r"values\['a'\]: expected a number >= 0 .*, got -1.0"),
        (({"a": 1.0}, ""), ValueError, "kind: expected a non-empty string"),
        (({"a": 1.0}, None), TypeError, "kind"),
        (({"a": 1.0}, "fisher", 1), TypeError, "signed"),
        (({"a": 1.0}, "fisher", None, {}), ValueError, "costs: expected one for every key, got none for 'a'"),
        (({"a": 1.0}, "fisher", None, {"a": 0}), ValueError, r"costs\['a'\]: expected an integer >= 1"),
        (({"a": 1.0}, "fisher", None, {"a": 1.5}), TypeError, r"costs\['a'\]: expected an integer >= 1"),
        (({"a": 1.0}, "fisher", None, [1]), TypeError, "costs: expected a mapping"),
    ],
)
def test_bad_scores(arguments, error, message):
    with pytest.raises(error, match=message):
        Scores(*arguments)


def test_rank_correlation_by_hand():
    scores = Scores(named((1, 2, 3, 4)), kind="fisher")
    assert scores.rank_correlation(named((10, 20, 30, 40))) == 1.0
    assert scores.rank_correlation(named((4, 3, 2, 1))) == -1.0
    # 1 - 6 sum d^2 / (n (n^2 - 1)) with d = (1, 1, 0, 0)
    assert scores.rank_correlation(named((2, 1, 3, 4))) == pytest.approx(0.8, abs=1e-15)
    assert math.isnan(scores.rank_correlation(named((5, 5, 5, 5))))
    assert scores.rank_correlation({"layer.3": 9.0, "layer.0": 1.0, "unknown": 5.0}) == 1.0
    with pytest.raises(ValueError, match="other: expected at least 2 keys .*, got 1"):
        scores.rank_correlation({"layer.0": 1.0})


@PROPERTY
@given(st.lists(st.tuples(st.integers(0, 5), st.floats(-10, 10)), min_size=2, max_size=20))
def test_rank_correlation_agrees_with_scipy(pairs):
    stats = pytest.importorskip("scipy.stats")
    first, second = ([float(pair[side]) for pair in pairs] for side in (0, 1))
    ours = Scores(named(first), kind="mine", signed=True).rank_correlation(named(second))
    if len(set(first)) == 1 or len(set(second)) == 1:
        assert math.isnan(ours)
    else:
        assert ours == pytest.approx(stats.spearmanr(first, second).statistic, abs=1e-12)


def test_zscore_uses_the_population_deviation():
    # mean 3, population variance 2
    z = zscore(named((1, 2, 3, 4, 5)))
    expected = [-math.sqrt(2), -math.sqrt(0.5), 0.0, math.sqrt(0.5), math.sqrt(2)]
    assert list(z.values()) == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize("rescale", [zscore, minmax])
def test_a_flat_spread_counts_as_zero(rescale):
    assert list(rescale(named((2.0, 2.0, 2.0))).values()) == [0.0] * 3
    assert list(rescale(named((0.0, 0.0))).values()) == [0.0] * 2
    assert list(rescale(named((7.0,))).values()) == [0.0]
    assert list(rescale(named((1.0, 1.0 + 1e-13))).values()) == [0.0] * 2
    assert list(rescale(named((1.0, 1.0 + 1e-11))).values()) != [0.0] * 2
    # Only the spread relative to the values counts.
    assert list(rescale(named((0.0, 1e-200))).values()) != [0.0] * 2


@pytest.mark.parametrize("rescale", [zscore, minmax])
def test_rescaling_refuses_bad_input(rescale):
    with pytest.raises(ValueError, match="values: expected at least one, got none"):
        rescale({})
    with pytest.raises(ValueError, match=r"values\['layer.1'\]: expected a finite number"):
        rescale(named((1.0, math.inf)))


@PROPERTY
@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=12), st.integers(-900, 900))
def test_zscore_has_mean_zero_and_deviation_one_at_any_scale(values, exponent):
    values = [value if abs(value) > 1e-6 else 0.0 for value in values]
    z = list(zscore(named(values)).values())
    assert z == list(zscore(named([math.ldexp(value, exponent) for value in values])).values())
    if any(z):
        assert math.fsum(z) / len(z) == pytest.approx(0.0, abs=1e-3)
        assert math.fsum(value * value for value in z) / len(z) == pytest.approx(1.0, rel=1e-3)


def test_minmax():
    assert list(minmax(named((4.0, 2.0, 3.0))).values()) == [1.0, 0.0, 0.5]


GRAD_SQ, GRAD_ABS, ACT_VAR = (named(v) for v in ((9, 4, 1, 1, 0.5), (3, 2, 1, 1, 0.7), (10, 40, 20, 20, 10)))


def test_composite_worked_example():
    scores = Scores.composite(GRAD_SQ, GRAD_ABS, ACT_VAR)
    assert [round(value, 3) for value in scores.values()] == [1.266, 0.642, -0.520, -0.520, -0.867]
    assert scores.kind == "composite" and scores.signed is True and scores.costs is None


def test_composite_weights_and_order():
    reordered = dict(reversed(list(GRAD_ABS.items())))
    assert Scores.composite(GRAD_SQ, reordered, ACT_VAR) == Scores.composite(GRAD_SQ, GRAD_ABS, ACT_VAR)
    assert list(Scores.composite(GRAD_SQ, reordered, ACT_VAR)) == list(GRAD_SQ)
    assert Scores.composite(GRAD_SQ, GRAD_ABS, ACT_VAR, weights=(0, 0, 1)) == zscore(ACT_VAR)


def test_composite_by_minmax():
    scores = Scores.composite(GRAD_SQ, GRAD_ABS, ACT_VAR, normalize="minmax")
    assert scores.kind == "composite_minmax" and scores.signed is False
    expected = 0.6 * 3.5 / 8.5 + 0.2 * 1.3 / 2.3 + 0.2
    assert scores["layer.1"] == pytest.approx(expected, abs=1e-15)
    assert min(scores.values()) == 0.0 and max(scores.values()) <= 1.0
    assert Scores.composite(GRAD_SQ, GRAD_ABS, ACT_VAR, weights=(1, -1, 0), normalize="minmax").signed is True


def test_composite_carries_costs():
    costs = dict.fromkeys(GRAD_SQ, 1536)
    scores = Scores.composite(GRAD_SQ, Scores(GRAD_ABS, "grad_abs", costs=costs), ACT_VAR)
    assert dict(scores.costs) == costs


def test_composite_bad_input():
    with pytest.raises(ValueError, match="grad_abs: expected the keys of grad_sq, got others: without 'layer.4'"):
        Scores.composite(GRAD_SQ, named((3, 2, 1, 1)), ACT_VAR)
    with pytest.raises(ValueError, match="act_var: expected the keys of grad_sq.* without .layer.0. and with .other."):
        Scores.composite(named((1, 2)), named((1, 2)), {"layer.1": 2.0, "other": 1.0})
    with pytest.raises(ValueError, match=r"act_var\['layer.0'\]: expected a finite number"):
        Scores.composite(named((1, 2)), named((1, 2)), named((math.nan, 1)))
    with pytest.raises(ValueError, match="weights: expected 3 numbers, for grad_sq"):
        Scores.composite(GRAD_SQ, GRAD_ABS, ACT_VAR, weights=(1.0, 2.0))
    with pytest.raises(ValueError, match=r"weights\[2\]: expected a finite number, got inf"):
        Scores.composite(GRAD_SQ, GRAD_ABS, ACT_VAR, weights=(1.0, 2.0, math.inf))
    with pytest.raises(ValueError, match="normalize: expected one of .'zscore', 'minmax'., got 'rank'"):
        Scores.composite(GRAD_SQ, GRAD_ABS, ACT_VAR, normalize="rank")
    with pytest.raises(ValueError, match="values: expected at least one, got none"):
        Scores.composite({}, {}, {})
