"""The experiment's plan: its page, what can be found with it, and splits that cannot overlap."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks.experiment import data, plan, splits
from benchmarks.harness import result_files

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "experiment"


def some(count, start=0):
    return data.Sentences([f"Sentence number {i}" for i in range(start, start + count)], [i % 2 for i in range(count)])


SHARES = splits.Shares(tuning=0.1, evaluation=0.3, fewest=200)


def test_splits_cover_the_file_and_share_nothing():
    found = splits.make(some(1000), some(20, 990), SHARES)
    parts = [found.train, found.tuning, found.evaluation]
    assert found.left_out == 10 and sorted(t for p in parts for t in p.texts) == sorted(some(990).texts)
    assert [len(p.texts) for p in parts] == pytest.approx([594, 99, 297], abs=50)
    label = dict(zip(*some(1000), strict=True))
    assert all(label[text] == y for p in parts for text, y in zip(*p, strict=True))


def test_copies_of_a_sentence_and_other_rows_move_nothing():
    given = some(1000)
    first = splits.make(given, some(0), SHARES)
    shouted = data.Sentences([f"  {t.upper().replace(' ', '   ')} " for t in given.texts], given.labels)
    more = data.Sentences(*(a + b for a, b in zip(shouted, some(3000), strict=True)))
    again = splits.make(more, some(0), SHARES)
    for part in ("train", "tuning", "evaluation"):
        keys = [{splits.digest(t) for t in getattr(found, part).texts} for found in (first, again)]
        assert keys[0] < keys[1]
        assert len(getattr(again, part).texts) == len(keys[0]) + len(keys[1])  # both copies of each are in this part


def test_the_hash_is_the_same_everywhere():
    assert splits.digest("A  b\n") == splits.digest("a b") == splits.digest(" a B ")
    assert splits.digest("a b").startswith("c8687a08aa5d6ed2")  # sha256 of b"a b"
    one, other = data.Sentences(["a", "b"], [0, 1]), data.Sentences(["b", "a"], [1, 0])
    assert splits.fingerprint(one) == splits.fingerprint(other) != splits.fingerprint(one._replace(labels=[1, 0]))


def test_an_overlap_is_refused():
    parts = {"train": some(5), "tuning": some(5, 5), "evaluation": some(5, 10)}
    splits.refuse_overlap(parts)
    parts["evaluation"].texts[2] = "sentence  NUMBER 7"
    with pytest.raises(ValueError, match="evaluation: expected no sentence of tuning, got 'sentence  NUMBER 7'"):
        splits.refuse_overlap(parts)


@pytest.mark.parametrize("shares", [(0.0, 0.3), (0.1, -0.1), (0.5, 0.5), (0.1, float("nan"))])
def test_shares_that_leave_a_part_empty(shares):
    with pytest.raises(ValueError, match="shares: expected parts above 0 with a sum below 1"):
        splits.make(some(10), some(0), splits.Shares(*shares, fewest=0))


def test_too_few_to_evaluate_on():
    with pytest.raises(ValueError, match="evaluation: expected at least 20000 sentences, got"):
        splits.make(some(1000), some(0), splits.SHARES["sst2"])


def test_cola_from_its_files(tmp_path, capsys):
    folder = tmp_path / "cola"
    folder.mkdir()
    header = "source\tlabel\tmark\tsentence"
    (folder / "in_domain_train.tsv").write_text(
        f"{header}\ngj04\t1\t\tThe sailors rode.\nks08\t0\t*\tThey rode us not.\n"
    )
    with pytest.raises(ValueError, match="--data-dir: expected in_domain_dev.tsv"):
        data.find(tmp_path, "cola")
    dev = folder / "in_domain_dev.tsv"
    dev.write_text(f"{header}\nbc01\t0\t*\tUs rode.\n")
    train, held = data.find(tmp_path, "cola")
    assert train == (["The sailors rode.", "They rode us not."], [1, 0]) and held == (["Us rode."], [0])
    dev.write_text(f"{header}\nbc01\t*\t0\tUs rode.\n")
    with pytest.raises(
        ValueError, match="in_domain_dev.tsv:2: expected source, label, mark, sentence with a label 0 or 1"
    ):
        data.find(tmp_path, "cola")
    assert splits.main(["--data-dir", str(tmp_path)]) == 2
    assert "--data-dir: expected train.tsv" in capsys.readouterr().err


def test_the_page_is_what_the_plan_says():
    assert plan.PAGE.read_text(encoding="utf-8") == plan.page()


def test_the_plan_holds_together():
    names = [setting.name for setting in plan.SETTINGS]
    used = {name for c in plan.COMPARISONS for name in (c.setting, c.against)}
    assert len(plan.HYPOTHESES) == 7 and len(set(names)) == len(names) and set(names) == used
    pairs = [(c.setting, c.against) for c in plan.COMPARISONS]
    assert len(set(pairs)) == len(pairs) and all(a != b for a, b in pairs)
    assert {c.expected for c in plan.COMPARISONS} == {"higher", "lower", "equal"}
    assert len(set(plan.SEEDS)) >= 8 and len(plan.TUNING_SEEDS) == 2 and not set(plan.SEEDS) & set(plan.TUNING_SEEDS)
    assert all(len(s.rates) == 3 and len(s.penalties) in (1, 3) for s in plan.SETTINGS)
    assert all(plan.HELD_OUT[name] >= shares.fewest for name, shares in splits.SHARES.items())
    assert plan.HELD_OUT["sst2"] >= 20_000
    assert sorted(plan.ORDER) == sorted(hypothesis.name for hypothesis in plan.HYPOTHESES)
    assert [len(comparisons) for comparisons in plan.in_order("cola")] == [1] * 6
    assert {setting.rates for setting in plan.settings_of("cola")} == {plan.COLA_RATES, plan.FULL_RATES}
    assert sorted(c for part in plan.in_order("sst2") for c in part) == sorted(plan.COMPARISONS)
    assert all(count % plan.BATCH == 0 for count in plan.TRAINED.values())


def test_other_splits_than_the_planned_ones_are_refused(monkeypatch):
    found = splits.make(some(1000), some(20, 2000), SHARES)
    parts = ("tuning", "evaluation", "dev")
    monkeypatch.setitem(plan.FINGERPRINTS, "cola", {p: splits.fingerprint(getattr(found, p)) for p in parts})
    plan.check("cola", found)
    found.evaluation.labels[0] ^= 1
    with pytest.raises(ValueError, match="--data-dir: expected cola with the evaluation split"):
        plan.check("cola", found)


@pytest.fixture(scope="module")
def power():
    pytest.importorskip("scipy")
    from benchmarks.experiment import power

    return power


@pytest.mark.parametrize("seeds, sentences", [(3, 100), (8, 20_000)])
def test_one_test_is_the_closed_form(power, seeds, sentences):
    spread = power.Spread(seed=0.004**2, sentence=0.0, rest=0.2**2)
    draws, deviation = power.draw(spread, seeds, sentences, 1), (0.004**2 + 0.2**2 / sentences) ** 0.5
    limit = power.critical(draws)
    for effect in (0.0, 0.5 * deviation, deviation, 2 * deviation):
        exact = power.closed_form(effect, deviation, seeds)
        # four standard errors of a share of DRAWS
        assert power.power(effect, draws, limit) == pytest.approx(exact, abs=4 * 0.5 / power.DRAWS**0.5)
    assert power.closed_form(0.0, deviation, seeds) == pytest.approx(power.ALPHA)
    assert power.closed_form(power.smallest(draws), deviation, seeds) == pytest.approx(power.POWER, abs=0.025)


def test_holm_lies_between_bonferroni_and_one_test_less(power):
    spread = power.Spread(0.0, 0.0, 0.04)
    draws = power.draw(spread, 8, 400, 7)
    found = power.power(0.012, draws, power.critical(draws))
    low, high = (power.closed_form(0.012, 0.01, 8, tests) for tests in (7, 6))
    assert low - 0.02 < found < high + 0.02 and high < power.closed_form(0.012, 0.01, 8) - 0.2


def test_the_limit_is_holms(power):
    from scipy.stats import t

    from benchmarks.experiment.analysis import holm

    chance = np.random.default_rng(0)
    means = chance.standard_normal((300, 5)) + [2.0, 3.0, 4.0, 0.0, 2.0]
    draws = power.Draws(means, np.ones((300, 5)), seeds=12)
    limit = power.critical(draws)
    assert len(set(limit.round(6))) >= 4  # steps of Holm that occur
    for row, least in zip(means, limit, strict=True):
        p = dict(enumerate(2 * t.sf(np.abs(row), 11)))
        assert (holm(p)[0] <= power.ALPHA) == (abs(row[0]) >= least)


def test_squares_are_those_of_the_labels(power):
    chance = np.random.default_rng(1)
    labels, digits = chance.integers(0, 2, 50), chance.integers(0, 2, (2, 4, 50))
    right = (digits == labels).astype(float)
    mine, base = (
        {s: {"predictions": "".join(map(str, digits[m, s])), "accuracy": right[m, s].mean()} for s in range(4)}
        for m in range(2)
    )
    d = right[0] - right[1]
    by_seed, by_sentence = d.mean(1, keepdims=True) - d.mean(), d.mean(0, keepdims=True) - d.mean()
    rest = d - d.mean() - by_seed - by_sentence
    expected = (50 * (by_seed**2).sum() / 3, 4 * (by_sentence**2).sum() / 49, (rest**2).sum() / (3 * 49), 4, 50)
    assert power.squares(mine, base) == pytest.approx(expected)


def test_variances_from_squares(power):
    from scipy.stats import chi2

    one = power.Squares(seed=10.0, sentence=6.0, rest=2.0, seeds=5, sentences=4)
    assert power.pooled([one]) == pytest.approx((2.0, 0.8, 2.0))
    assert power.pooled([one._replace(seed=1.0)]).seed == 0.0
    assert power.pooled([one, one], 0.9).seed == pytest.approx((10.0 * 8 / chi2.ppf(0.1, 8) - 2.0) / 4)


def test_matthews_is_a_correlation(power):
    labels, predicted = [1] * 7 + [0] * 5, [1] * 6 + [0] + [0] * 3 + [1] * 2
    assert power.matthews(6, 1, 3, 2) == pytest.approx(np.corrcoef(labels, predicted)[0, 1])
    accuracy = power.Spread(0.01**2, 0.01, 0.03)
    found, fewer = (power.matthews_spread(accuracy, n) for n in (10_000, 1_000))
    assert found.sentence / found.rest == pytest.approx(1 / 3)
    assert fewer.rest == pytest.approx(found.rest, rel=0.05)  # a variance on one sentence, however many are drawn


def test_equivalence_where_the_margin_is_wide_or_narrow(power):
    draws = power.draw(power.Spread(0.0, 0.0, 0.04), 8, 400, 1)  # standard error 0.0035
    assert power.equivalence(draws, 0.05) > 0.999 and power.equivalence(draws, 0.001) < 0.01


def test_sentences_that_are_drawn_make_a_test_err(power):
    spread = power.Spread(0.0, 0.01, 0.04)
    rates = []
    for shared in (False, True):
        draws = power.draw(spread, 8, 400, 1, shared=shared)
        rates.append(power.power(0.0, draws, power.critical(draws)))
    assert rates[0] == pytest.approx(0.05, abs=0.015) and rates[1] > 0.2


def test_the_committed_table_is_what_the_command_makes(power, tmp_path):
    assert power.main(["--out", str(tmp_path)]) == 0
    made, kept = (result_files.read(folder / "power.json") for folder in (tmp_path, RESULTS))
    assert made.keys() == kept.keys() and len(made["rows"]) == len(kept["rows"]) > 0
    # Another numpy may draw otherwise: three standard errors of a deviation from 20,000 draws, of a share of 4,000.
    error = {"abs": 2e-3} if made["numpy"] == kept["numpy"] else {"rel": 0.015, "abs": 0.024}
    for one, other in zip(made["rows"], kept["rows"], strict=True):
        assert one.keys() == other.keys()
        for name, value in other.items():
            assert one[name] == (value if isinstance(value, str) else pytest.approx(value, **error)), other
    at = {(r["data"], r["spread"], r["sentences"], r["seeds"]): r for r in kept["rows"]}
    planned = [at["sst2", "upper", plan.HELD_OUT["sst2"], seeds]["primary"] for seeds in (8, 6, 5, 4)]
    pilot = at["sst2", "measured", plan.DEV["sst2"], 5]["one"]
    page = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    assert f"finds an effect of {pilot:.1f} points with power 80 %" in page
    (upper,) = (s for s in kept["spreads"] if (s["data"], s["spread"]) == ("sst2", "upper"))
    assert plan.SPREAD == pytest.approx(
        (upper["seed"] ** 2 + upper["rest"] ** 2 / plan.HELD_OUT["sst2"]) ** 0.5, abs=0.005
    )
    assert plan.FOUND == "{:.2f} points with 8 seeds, {:.2f} with 6, {:.2f} with 5, {:.2f} with 4".format(*planned)
    assert (RESULTS / "power.md").read_text(encoding="utf-8") == power.markdown(kept)


def test_runs_that_are_not_there(power, tmp_path, capsys):
    assert power.main(["--runs", str(tmp_path / "none"), "--out", str(tmp_path)]) == 2
    assert "--runs: expected two seeds of lora, full, fc, fim, eva" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
