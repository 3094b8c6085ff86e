"""What the experiment's report says of given numbers, and the committed page."""

from __future__ import annotations

import json
import math
import re

import pytest
from support.experiment_help import all_rows, made

from benchmarks.experiment import jobs, plan, report, runs, splits
from benchmarks.experiment.analysis import analyse, equivalence, holm, interval, paired
from benchmarks.experiment.data import Sentences
from benchmarks.experiment.report import markdown, write_report
from benchmarks.experiment.train import Job

pytest.importorskip("scipy")  # of the extra "experiment": every test here takes intervals


def test_a_rate_beyond_the_edge_is_run_where_it_is_better_in_tuning_and_changes_no_test():
    rows, beyond = all_rows(), plan.BEYOND["sst2"]
    assert not any(beyond.get(row["setting"]) == row["rate"] for row in rows if row["phase"] == "final")
    found = analyse(rows)["data"]["sst2"]
    assert (
        found["beyond"]["eva"]["found"] is None and found["beyond"]["eva"]["tuned"] < found["beyond"]["eva"]["chosen"]
    )
    better = [{**row, "tuning": 0.9} if beyond.get(row["setting"]) == row["rate"] else row for row in rows]
    todo = [job for job in jobs.jobs("sst2", better) if runs.key(job._asdict()) not in set(map(runs.key, rows))]
    assert todo == [Job("sst2", "final", *item, 0.0, seed) for item in beyond.items() for seed in plan.SEEDS]
    further = analyse(better + [made(job, {"eva": 0.01, "pissa": 0.02}) for job in todo])["data"]["sst2"]
    gains = {name: round(100 * row["found"]["mean"]) for name, row in further["beyond"].items()}
    assert gains == {"adalora": 0, "pissa": 2, "eva": 1}
    assert {k: v for k, v in further.items() if k != "beyond"} == {k: v for k, v in found.items() if k != "beyond"}


def test_intervals_and_tests_against_known_values():
    # t(0.975, 4) = 2.776445; the standard deviation of 1..5 is sqrt(2.5).
    found = interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert found["mean"] == 3.0 and found["half_width"] == pytest.approx(2.776445 * math.sqrt(2.5 / 5), rel=1e-6)
    assert interval([1.0])["half_width"] is None
    # One degree of freedom: p = 1 - 2 atan(t) / pi.
    test = paired([2.0, 4.0], [1.0, 1.0])
    assert test["mean"] == 2.0 and test["p"] == pytest.approx(1 - 2 * math.atan(2.0) / math.pi)
    assert paired([1.0, 2.0], [1.0, 2.0])["p"] is None
    # Two one-sided tests of a mean 2 with error 1 within 3: t = 1, one-sided 1/2 - atan(1) / pi = 1/4.
    assert equivalence([2.0, 4.0], [1.0, 1.0], 3.0) == pytest.approx(0.25)
    assert equivalence([1.0, 1.0], [2.0, 4.0], 3.0) == pytest.approx(0.25)
    assert equivalence([2.0, 4.0], [1.0, 1.0], 1.0) == pytest.approx(0.75)
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": None}) == {"a": 0.03, "b": 0.06, "c": 0.06, "d": None}
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": None}, 4) == {"a": 0.04, "b": 0.09, "c": 0.09, "d": None}


def test_the_page_claims_what_the_tests_show(tmp_path):
    pytest.importorskip("matplotlib")
    gain = {"qkv": -0.05, "mlp": 0.03, "lower": -0.04}
    wanted = ("all-2", "qkv", "mlp", "lower", "upper")
    rows = all_rows(gain, seeds=6, wanted=wanted)
    rows.append({**made(Job("sst2", "tuning", "all-1", 1e-3, 0.0, 100)), "diverged": True})
    write_report(rows, tmp_path, tmp_path / "page.md")
    text = (tmp_path / "page.md").read_text()
    assert "- `qkv` (uniform rank 6 over query, key and value: as many parameters) minus `all-2`: -4.9" in text
    assert "lower, as expected" in text and "higher, against what was expected" in text and "equivalent" in text
    assert "SST-2, how many: `norm-1` against `all-1`" in text and "- CoLA: nothing of it." in text
    assert "`all-1` at 0.001, seed 100 (tuning)" in text
    assert 'adapt all linears (`target_modules="all-linear"`) rather than query' in text
    assert "- As many parameters on the first three blocks alone do worse than on all linears." in text
    assert "Differences vary from seed to seed" in text and "times those of" not in text
    wild = [{**row, "score": row["score"] + 0.02 * math.sin(row["seed"]) * (row["setting"] == "qkv")}
            for row in rows if row["phase"] == "final"]  # fmt: skip
    wild += [row for row in rows if row["phase"] == "tuning"]
    assert "times those of" in (told := markdown(analyse(wild))) and "on seed" not in told
    wild[0] = {**wild[0], "score": wild[0]["score"] - 0.05}
    assert f"- `all-2` on seed {wild[0]['seed']}: {100 * wild[0]['score']:.2f}, median" in markdown(analyse(wild))
    assert "no score of importance has been shown to do better" in text
    assert (tmp_path / "sst2_effects.png").stat().st_size > 5000
    shown = re.findall(r"!\[.+\]\(\./(.+)\)", text)
    assert set(shown) == {path.name for path in tmp_path.glob("*.png")} >= {"sst2_accuracy.png", "sst2_effects.png"}
    found = {row["setting"]: row for row in analyse(rows)["data"]["sst2"]["comparisons"] if row["against"] == "all-2"}
    assert found["qkv"]["found"]["p_holm"] == pytest.approx(7 * found["qkv"]["found"]["p"])  # not run ones count
    assert found["mlp"]["found"]["p_holm"] == pytest.approx(30 * found["mlp"]["found"]["p"], rel=0.1)
    told = markdown(analyse(all_rows({"norm": 0.02, "head": -0.1}, wanted=("all-2", "norm", "fim", "random", "head"))))
    assert "query, key and value do" not in told and "rather than" not in told
    assert "- Ranks by `norm` did better than uniform ones." in told and "do better.\n" not in told
    assert "- Ranks by `fim` did as well as uniform ones." in told
    assert "- Sharing ranks out at random did as well as sharing them out evenly: " in told
    eva = [{**row, "rate": 1e-3} if row["setting"] == "eva" and row["phase"] == "final" else row
           for row in all_rows({"eva": -0.01}, wanted=("all-2", "eva"))]  # fmt: skip
    for row in eva:
        row |= {"tuning": 0.9} if row["setting"] == "eva" and row["rate"] == 1e-3 else {}
    edge = (
        r"with `eva` at the lowest rate tried\. Beyond the planned rates, at 0.0005, tuning gives \d+\.\d+ after 90.00"
    )
    assert re.search(rf"- EVA at uniform ranks did worse .+: -.+, {edge}\.\n", markdown(analyse(eva)))
    eva += [made(Job("sst2", "final", "eva", 5e-4, 0.0, seed), {"eva": 0.01}) for seed in plan.SEEDS]
    further = r"Beyond .+, and the difference is \+\d\.\d+ ± \d\.\d+ over 8 seeds\.\n"
    assert re.search(rf"{edge}, and the difference is \+.+ over 8 seeds\.\n", text := markdown(analyse(eva)))
    assert re.search(rf"- `eva` \(.+\) minus `all-2`: -.+ over 8 seeds\. {further}", text)
    assert "- Training the head alone did worse than LoRA of rank 2 on all linears: -" in told and "Rank 8" not in told
    few = analyse(all_rows(gain, seeds=3, wanted=wanted))
    assert {row["verdict"] for row in few["data"]["sst2"]["comparisons"]} == {"not run"}
    assert "On SST-2, in points of accuracy:\n\n- Nothing yet: too few runs.\n" in markdown(few)


def test_every_comparison_has_its_advice_and_every_data_set_its_part():
    rows = all_rows({"norm": 0.02, "lower": -0.02, "full": 0.03})
    told = markdown(analyse(rows))
    assert "- CoLA: nothing of it." in told and "On CoLA" not in told
    cola = all_rows({"full": 0.1, "lora-ga": -0.1}, data="cola")
    cola.append(made(Job("cola", "tuning", "all-2", plan.RATES[-1], 0.0, 110)))  # of no rate that counts
    told = markdown(analyse(rows + cola))
    follows, sst2, cola = told.partition("## What follows")[2].partition("## Not run")[0].split("\n## ")
    first, second = follows.split("On CoLA, in hundredths of Matthews correlation:")
    assert "Could not be told" not in follows and "has been shown to do better" not in follows
    said = {"qkv": report.PLACES["as well as"], **report.PARTS, **{name: f"`{name}`" for name in report.SCORES}}
    for comparison in plan.COMPARISONS:
        pair = comparison.setting, comparison.against
        what, other = report.OTHERS.get(pair, (said.get(comparison.setting), ""))
        on = [any(what in line and f" {other}" in line for line in part.splitlines()) for part in (first, second)]
        assert on == [True, comparison in plan.PRIMARY and comparison.against != "penalty-uniform"], comparison
    assert "the first three blocks alone do worse than on all linears" in first
    assert "the MLPs alone or on the last three blocks alone do as well as on all linears" in first
    assert "by `norm` did better than" in first and "by `norm` did as well as" in second
    assert "- LoRA-GA did worse than the default initialisation: -" in second
    assert "over\nall 8 seeds." in sst2 and "What `power.md` takes for CoLA is assumed" in cola
    assert "442 of 442 planned runs" in sst2 and "112 of 112 planned runs" in cola
    assert "Nothing: every run that was planned is made." not in told  # nothing is left out one at a time here
    for row in rows:
        row |= {"without": {"": 1.0, "a": 1.1, "b": 1.2}} if row["setting"] == "all-2" else {}
        row |= {"scores": {"a": 1.0, "b": 2.0}} if row["setting"] == "norm" else {}
    assert "Nothing: every run that was planned is made." in markdown(analyse(rows + all_rows(data="cola")))


def test_scores_are_ranked_by_what_adapters_bring(tmp_path):
    pytest.importorskip("matplotlib")
    gains = {"": 0.30, "a": 0.31, "b": 0.35, "c": 0.32, "d": 0.29}
    scores = {"norm": {"a": 2.0, "b": 9.0, "c": 3.0, "d": 1.0}, "fim": {"a": 3.0, "b": 1.0, "c": 2.0, "d": 4.0}}
    rows = all_rows(wanted=("all-2", *scores))
    for row in rows:
        if row["phase"] == "final" and row["setting"] in scores:
            row["scores"] = scores[row["setting"]]
        if row["phase"] == "final" and row["setting"] == "all-2" and row["seed"] in plan.WITHOUT_SEEDS:
            row["without"] = gains
    again = [{**row, "setting": "norm-1"} for row in rows if row["setting"] == "norm" and "scores" in row]
    tuned = [{**row, "setting": "norm-1"} for row in rows if row["setting"] == "norm" and row["phase"] == "tuning"]
    found = analyse(rows + again + tuned)["data"]["sst2"]["agreement"]  # the same scores are named once
    assert found == {name: {"mean": pytest.approx(rho), "half_width": pytest.approx(0.0), "n": 4}
                     for name, rho in (("norm", 1.0), ("fim", -1.0))}  # fmt: skip
    write_report(rows, tmp_path, tmp_path / "page.md")
    text = (tmp_path / "page.md").read_text()
    assert "| `norm` | ranks by gradient norm per parameter at the start | 4 | +1.00 ± 0.00 |" in text
    assert "Leaving out one matrix's adapter at a time" not in text
    assert (tmp_path / "sst2_agreement.png").stat().st_size > 5000


def test_predictions_that_differ_and_the_edges_that_choices_are_at():
    rows = all_rows(wanted=("all-2", "penalty-relative", "penalty-uniform", "dora"))
    for row in rows:
        alike = {"all-2": [0, 1, 1, 0], "dora": [0, 1, 1, 1]}.get(row["setting"])
        row |= {"predictions": runs.packed(alike)} if alike and row["phase"] == "final" else {}
    found = analyse(rows)
    tests = {(row["setting"], row["against"]): row["found"] for row in found["data"]["sst2"]["comparisons"]}
    assert tests["dora", "all-2"]["changed"] == 0.25
    assert tests["penalty-relative", "penalty-uniform"]["changed"] is None
    text = markdown(found)
    assert re.search(r"- DoRA did as well as .+, where 25\.0 % of predictions differ\.\n", text)
    both = "with `penalty-relative` and `penalty-uniform` at the lowest lambda tried"
    assert re.search(rf"- A penalty weighed by importance did as well as a uniform one: [^,]+, {both}\.\n", text)
    assert "Holm: over 7 primary comparisons, or over all 30 for the others." in text
    assert "Holm: over 6 primary comparisons." in markdown(analyse(all_rows(data="cola")))


def test_sentences_that_share_words_with_what_is_trained_on():
    def of(*texts):
        return Sentences(list(texts), [0] * len(texts))

    trained = of("a very good film indeed", "Not Good", "so so")
    part = of(
        "A very good", "it is a very good film indeed , really", "very good", "not good at all", "film a good very"
    )
    assert splits.nested(part, trained) == 0.4
    assert splits.nested(part, trained, words=2) == 0.8


def test_a_run_of_another_rate_is_no_run_of_the_choice():
    rows = all_rows(wanted=("all-2", "qkv"))
    other = [{**row, "rate": 1e-2, "score": 0.0} for row in rows if row["phase"] == "final"]
    assert analyse(rows + other)["data"]["sst2"]["settings"] == analyse(rows)["data"]["sst2"]["settings"]


def test_the_committed_page_is_what_the_runs_say():
    from benchmarks.experiment.__main__ import DEFAULT_OUT, PAGE
    from benchmarks.harness import result_files

    page = PAGE.read_text(encoding="utf-8")
    assert page == markdown(result_files.read(DEFAULT_OUT / "results.json"))
    assert page == markdown(json.loads(json.dumps(analyse(runs.read(DEFAULT_OUT / runs.NAME)))))
