"""The experiment's runner on a tiny model: every setting, resuming, and what the report says of given numbers."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from support.recipe_help import WORDS, text_model

from benchmarks.experiment import data, jobs, plan, report, runs, splits
from benchmarks.experiment.__main__ import main
from benchmarks.experiment.analysis import analyse, equivalence, holm, interval, paired, verdict
from benchmarks.experiment.methods import PREPARE, Task
from benchmarks.experiment.report import markdown, write_report
from benchmarks.experiment.settings import Settings
from benchmarks.experiment.train import Job, load, run, score, without

SMALL = Settings(sentences=48, batch=8, calibration_steps=2)
RANDOM_LABELS = [1, 0, 0, 1, 1, 0, 1, 0, 0, 0]


def phrases(count, offset):
    return data.Sentences(
        [f"the {WORDS[i % 4]} {WORDS[4 + i % 2]} {'a ' * (i % 5 + offset)}".strip() for i in range(count)],
        [1 - i % 2 for i in range(count)],
    )


PARTS = splits.Splits(phrases(200, 0), phrases(20, 6), phrases(30, 12), phrases(10, 20), 0)


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    pytest.importorskip("peft")
    return str(text_model(tmp_path_factory.mktemp("bert"), "Bert"))


def test_every_setting_of_the_plan_can_be_prepared():
    assert list(PREPARE) == [setting.name for setting in plan.SETTINGS]


@pytest.mark.parametrize("setting", plan.SETTINGS, ids=lambda setting: setting.name)
def test_every_setting(setting, model_path):
    job = Job("sst2", "final", setting.name, 1e-3, setting.penalties[-1], plan.SEEDS[0])
    found = run(job, SMALL, model_path, PARTS)
    json.dumps(found, allow_nan=False)
    assert len(found["losses"]) == 6 and not found["diverged"]
    predicted = {name: runs.unpacked(found[name]) for name in ("predictions", "dev_predictions")}
    assert [len(digits) for digits in predicted.values()] == [30, 10]
    assert 0 <= found["score"] <= 1 and 0 <= found["dev"] <= 1 and 0 <= found["dev_changed"] <= 10
    assert ("without" in found) == (setting.name == plan.BASELINE)
    name, counts = setting.name, found["parameters"]
    assert counts["head"] == 2 * 33
    if name in ("full", "head"):
        assert counts["adapters"] == 0 and not found["ranks"] and (counts["other"] > 0) == (name == "full")
        return
    each = 4 * 64 + 2 * 96  # parameters of rank 1 over all linears of a block of width 32
    uniform = 2 * each * {"all-1": 1, "norm-1": 1, "all-8": 8, "norm-8": 8, "adalora": 3}.get(name, 2)
    lengths = {"dora": 2 * (5 * 32 + 64), "adalora": 12 * 3}.get(name, 0)
    least = uniform - (2 * 96 if name in BY_SCORE else 0)  # what is left may pay for no further rank
    if name == "qkv":
        uniform = least = 6 * 6 * 64  # three of six matrices as wide as here are not half of the parameters
    if name == "mlp":
        least -= 96
    assert least <= counts["adapters"] - lengths <= uniform and counts["other"] == 0
    assert ("scores" in found) == (name in BY_SCORE)


BY_SCORE = ("norm", "norm-1", "norm-8", "norm-total", "fisher", "fc", "fim", "variance", "random")


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """Layers as wide and as many as those of the experiment's model."""
    transformers = pytest.importorskip("transformers")
    sizes = dict(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536, vocab_size=8)
    return lambda: transformers.BertForSequenceClassification(transformers.BertConfig(**sizes))


@pytest.mark.parametrize(
    "name, parameters, matrices",
    [("all-2", 82_944, 36), ("qkv", 82_944, 18), ("mlp", 82_560, 12), ("lower", 82_944, 18), ("upper", 82_944, 18),
     ("random", 82_944, 36)],
)  # fmt: skip
def test_as_many_parameters_wherever_they_are(shapes, name, parameters, matrices):
    import fastlora

    prepared = PREPARE[name](shapes(), Task(SMALL, 0, 1e-3, 0.0, []))
    rows = fastlora.summary(prepared.model).rows
    assert len(rows) == matrices and all(row.scale == 2 for row in rows if row.rank)
    total = sum(row.params for row in rows)
    assert parameters - 1920 < total <= parameters if name == "random" else total == parameters
    blocks = {row.key.split("layer.")[1][0] for row in rows}
    assert blocks == {"lower": set("012"), "upper": set("345")}.get(name, set("012345"))


def test_random_ranks_are_others_for_another_seed(shapes):
    first, again, other = (
        PREPARE["random"](shapes(), Task(SMALL, seed, 1e-3, 0.0, [])).facts["scores"] for seed in (1, 1, 2)
    )
    assert first == again != other


def timeless(result):
    return {k: v for k, v in result.items() if "seconds" not in k and k != "peak_mib"}


def test_the_same_seed_gives_the_same_run(model_path):
    job = Job("sst2", "final", "norm-tracked", 1e-3, 0.0, 0)
    first, second = (run(job, SMALL, model_path, PARTS) for _ in range(2))
    assert timeless(first) == timeless(second)
    assert timeless(run(job._replace(seed=1), SMALL, model_path, PARTS))["losses"] != first["losses"]


def test_a_penalty_of_nothing_is_the_baseline(model_path):
    plain, weighted, heavy = (
        run(Job("sst2", "tuning", name, 1e-2, penalty, 0), SMALL, model_path, PARTS)
        for name, penalty in (("all-2", 0.0), ("penalty-sum", 0.0), ("penalty-sum", 10.0))
    )
    assert plain["losses"] == weighted["losses"] != heavy["losses"]
    assert plain["tuning"] == weighted["tuning"] and "score" not in plain


def test_a_run_that_diverges_is_a_row_with_its_losses(model_path):
    found = run(Job("sst2", "final", "full", 1e30, 0.0, 0), SMALL, model_path, PARTS)
    assert found["diverged"] and found["losses"][-1] is None and 1 < len(found["losses"]) < 6
    assert all(map(math.isfinite, found["losses"][:-1])) and 0 <= found["score"] <= 1
    json.dumps(found, allow_nan=False)


def test_what_is_left_without_one_adapter_is_the_base_there(model_path):
    import torch

    job = Job("sst2", "final", plan.BASELINE, 1e-2, 0.0, plan.WITHOUT_SEEDS[0])
    found = run(job, SMALL, model_path, PARTS)["without"]
    assert len(found) == 13 and len(set(found.values())) > 6  # two blocks of six matrices, and the whole model
    base, tokenizer = load(model_path, 0)
    trained, _ = load(model_path, 0)
    names = [name for name, module in base.named_modules() if isinstance(module, torch.nn.Linear)][:3]
    batches = list(data.batches(PARTS.evaluation, tokenizer, 8, 64, drop_last=False))
    with torch.no_grad():
        for name in names[:2]:
            trained.get_submodule(name).weight.mul_(3.0)
    kept = {name: p.clone() for name, p in trained.named_parameters()}
    found = without(trained, base, names, batches)
    assert all(torch.equal(kept[name], p) for name, p in trained.named_parameters())
    assert found[names[2]] == found[""] != found[names[0]]  # the third is as it was
    with torch.no_grad():
        trained.get_submodule(names[1]).weight.copy_(base.get_submodule(names[1]).weight)
        outputs = torch.cat([trained(**batch).logits for batch in batches])
    labels = torch.cat([batch["labels"] for batch in batches])
    assert found[names[1]] == pytest.approx(float(torch.nn.functional.cross_entropy(outputs, labels)), rel=1e-6)


def test_matthews_on_cola(model_path):
    import numpy as np

    truth = [0, 1] * 5
    assert score("cola", RANDOM_LABELS, truth) == pytest.approx(np.corrcoef(RANDOM_LABELS, truth)[0, 1])
    assert score("cola", [1] * 10, truth) == 0.0 and score("cola", truth, truth) == 1.0
    assert score("sst2", RANDOM_LABELS, truth) == 0.3
    found = run(Job("cola", "final", "all-2", 1e-3, 0.0, 0), SMALL, model_path, PARTS)
    assert -1 <= found["score"] <= 1 and len(runs.unpacked(found["predictions"])) == 30


def test_predictions_are_kept_whole():
    for digits in ([], [0], [0, 0, 1], RANDOM_LABELS):
        assert runs.unpacked(runs.packed(digits)) == digits


@pytest.mark.parametrize(
    "text, reason",
    [("a\tb\n", "expected the header"), ("sentence\tlabel\nfine\t2\n", ":2: expected"), ("", "expected the header")],
)
def test_files_that_are_something_else(text, reason, tmp_path):
    (tmp_path / "train.tsv").write_text(text)
    with pytest.raises(ValueError, match=reason):
        data.read(tmp_path / "train.tsv")


def test_sentences_are_drawn_as_often_as_each_other():
    texts = data.Sentences(list("abcdefg"), [0, 1, 0, 1, 0, 1, 0])
    once, more = data.draw(texts, 5, 0), data.draw(texts, 17, 0)
    assert len(set(once.texts)) == 5 and more.texts[:5] == once.texts
    counts = [more.texts.count(text) for text in "abcdefg"]
    assert sorted(counts) == [2, 2, 2, 2, 3, 3, 3] and more != data.draw(texts, 17, 1)
    assert [texts.labels["abcdefg".index(text)] for text in more.texts] == more.labels
    with pytest.raises(ValueError, match="expected a number >= 1, got 0"):
        data.draw(texts, 0, 0)


def test_other_splits_and_no_runs_are_refused(tmp_path, model_path, capsys):
    (tmp_path / "sst2").mkdir()
    rows = [f"{text} {i}\t{label}" for i, (text, label) in enumerate(zip(*phrases(70_000, 0), strict=True))]
    for split, part in (("train", rows), ("dev", ["the end\t1"])):
        (tmp_path / "sst2" / f"{split}.tsv").write_text("\n".join(["sentence\tlabel", *part]) + "\n")
    out = ["--out", str(tmp_path / "out"), "--model-path", model_path, "--processes", "1"]
    assert main(["--data-dir", str(tmp_path), "--data", "sst2", *out]) == 2
    assert "--data-dir: expected sst2 with the tuning split" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main(["--report-only", *out]) == 2
    assert "--out: no runs in" in capsys.readouterr().err


def test_batches_of_similar_length_lose_no_sentence():
    given = data.Sentences([f"{i} " + "word " * (i * 7 % 13) for i in range(70)], [i % 2 for i in range(70)])
    lengths = [len(text.split()) for text in given.texts]
    grouped = data.by_length(given, lengths, 8, seed=3)
    assert sorted(zip(*grouped, strict=True)) == sorted(zip(*given, strict=True))
    spread = [{len(text.split()) for text in grouped.texts[i : i + 8]} for i in range(0, 64, 8)]
    assert all(max(lengths) - min(lengths) <= 2 for lengths in spread)
    assert grouped == data.by_length(given, lengths, 8, seed=3) != data.by_length(given, lengths, 8, seed=4)


def made(job, gain=None):
    """A row as ``run`` makes it, of numbers that follow from the job alone."""
    noise = 0.002 * math.sin(1 + job.seed * 7 + sum(map(ord, job.setting)))
    value = 0.8 + (gain or {}).get(job.setting, 0.0) + noise
    final = dict(score=value, dev=value) if job.phase == "final" else {}
    if final and job.seed == plan.SEEDS[0]:
        final |= dict(dev_fp32=value, dev_changed=0)
    return {
        **job._asdict(), **final, "tuning": value - abs(job.rate - 2e-3), "diverged": False,
        "settings": {"sentences": 8}, "splits": plan.FINGERPRINTS[job.data], "environment": {"cpu": "x"},
        "ranks": {}, "parameters": {"adapters": 82_944, "head": 770, "other": 0}, "step_cpu_seconds": 0.2,
        "setup_cpu_seconds": 0.0, "cpu_seconds": 60.0, "peak_mib": 900.0,
    }  # fmt: skip


def all_rows(gain=None, seeds=8, wanted=None, data="sst2"):
    found = []
    for _ in range(2):  # what is tuned first opens the rest
        keys = set(map(runs.key, found))
        todo = [job for job in jobs.jobs(data, found) if runs.key(job._asdict()) not in keys]
        found += [
            made(job, gain) for job in todo
            if (wanted is None or job.setting in wanted) and job.seed not in plan.SEEDS[seeds:]
        ]  # fmt: skip
    return found


def test_a_setting_runs_once_it_is_tuned_and_as_it_was_chosen():
    todo = list(jobs.jobs("sst2", []))
    assert {job.phase for job in todo} == {"tuning"} and len(todo) == len(set(todo)) == 216
    assert {(job.setting, job.rate) for job in todo[210:]} == set(plan.BEYOND.items())
    assert [job.setting for job in todo[::6]][:5] == ["all-2", "qkv", "mlp", "lower", "upper"]
    tuned = [made(job) for job in todo]
    final = [job for job in jobs.jobs("sst2", tuned) if job.phase == "final"]
    assert len(final) == 29 * 8 == len(set(final))
    order = [(job.setting, job.seed) for job in final]
    pairs, others = [("all-2", "qkv"), ("mlp", "lower", "upper")], ("all-2", "qkv", "mlp", "lower", "upper")
    first = [(name, seed) for names in pairs for seed in plan.SEEDS[:5] for name in names]
    assert order[:40] == first + [(name, seed) for seed in plan.SEEDS[5:] for name in others]
    assert {job.rate for job in final if job.setting not in ("full",)} == {2e-3}
    assert jobs.chosen("sst2", plan.SETTINGS[0], tuned[1:]) is None
    full = next(setting for setting in plan.SETTINGS if setting.name == "full")
    assert jobs.chosen("sst2", full, tuned).edges == ("rate",)
    level = [{**row, "tuning": 0.5} for row in tuned]
    assert jobs.chosen("sst2", plan.SETTINGS[0], level).rate == 1e-3  # the lower one on a tie


def test_a_rate_beyond_the_edge_is_run_where_it_is_better_in_tuning_and_changes_no_test():
    pytest.importorskip("scipy")
    rows = all_rows()
    assert not any(plan.BEYOND.get(row["setting"]) == row["rate"] for row in rows if row["phase"] == "final")
    found = analyse(rows)["data"]["sst2"]
    assert (
        found["beyond"]["eva"]["found"] is None and found["beyond"]["eva"]["tuned"] < found["beyond"]["eva"]["chosen"]
    )
    better = [{**row, "tuning": 0.9} if plan.BEYOND.get(row["setting"]) == row["rate"] else row for row in rows]
    todo = [job for job in jobs.jobs("sst2", better) if runs.key(job._asdict()) not in set(map(runs.key, rows))]
    assert todo == [Job("sst2", "final", *item, 0.0, seed) for item in plan.BEYOND.items() for seed in plan.SEEDS]
    further = analyse(better + [made(job, {"eva": 0.01, "pissa": 0.02}) for job in todo])["data"]["sst2"]
    gains = {name: round(100 * row["found"]["mean"]) for name, row in further["beyond"].items()}
    assert gains == {"adalora": 0, "pissa": 2, "eva": 1}
    assert {k: v for k, v in further.items() if k != "beyond"} == {k: v for k, v in found.items() if k != "beyond"}


def test_a_run_that_is_killed_is_made_again_to_the_same_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "SEEDS", (1, 2))
    wanted, path, whole = ("all-2", "qkv"), tmp_path / "killed" / runs.NAME, tmp_path / "whole" / runs.NAME
    path.parent.mkdir()
    whole.parent.mkdir()
    jobs.work("sst2", whole, made, math.inf, wanted)

    def slow(job):
        time.sleep(0.02)
        return made(job)

    for count in (1, 8, 13):  # in tuning, in tuning, in the runs after it
        child = os.fork()
        if child == 0:
            jobs.work("sst2", path, slow, math.inf, wanted)
            os._exit(0)
        while len(runs.read(path)) < count:
            time.sleep(0.005)
        os.kill(child, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        assert count <= len(runs.read(path)) < 16
    jobs.work("sst2", path, made, math.inf, wanted)
    assert runs.read(path) == runs.read(whole) and len(runs.read(whole)) == 2 * 6 + 2 * 2


def test_two_processes_make_each_run_once(tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "SEEDS", (1, 2))
    path, log = tmp_path / runs.NAME, tmp_path / "log"

    def noted(job):
        with log.open("a") as file:
            file.write(f"{job}\n")
        time.sleep(0.01)
        return made(job)

    children = [os.fork() for _ in range(1)]
    jobs.work("sst2", path, noted, math.inf, ("all-2", "qkv"))
    if children == [0]:
        os._exit(0)
    assert os.waitpid(children[0], 0)[1] == 0
    lines = log.read_text().splitlines()
    assert len(lines) == len(set(lines)) == len(runs.read(path)) == 16


def test_no_run_is_begun_after_the_end(tmp_path):
    jobs.work("sst2", tmp_path / runs.NAME, made, time.time() - 1, ("all-2",))
    assert runs.read(tmp_path / runs.NAME) == []


def test_a_run_has_a_process_of_its_own():
    before = bytearray(64 << 20)
    found = jobs.apart(lambda: {"pid": os.getpid(), "sum": sum(bytearray(b"\1") * (32 << 20))})
    assert found["pid"] != os.getpid() and found["sum"] == 32 << 20 and len(before)
    assert found["cpu_seconds"] > 0 and found["peak_mib"] > 32
    with pytest.raises(RuntimeError, match="a run ended with status 1"):
        jobs.apart(lambda: {}["none"])


def test_intervals_and_tests_against_known_values():
    pytest.importorskip("scipy")
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


def test_what_is_said_of_a_comparison():
    found = {"mean": 0.01, "p": 0.001, "p_holm": 0.01, "equivalent_p": 0.9}
    assert verdict(found, "higher") == "higher, as expected"
    assert verdict(found, "lower") == verdict(found, "equal") == "higher, against what was expected"
    assert verdict({**found, "mean": -0.01}, "lower") == "lower, as expected"
    assert verdict({**found, "p_holm": 0.06}, "higher") == "could not be told"
    assert verdict({**found, "p_holm": 0.06, "equivalent_p": 0.04}, "higher") == "equivalent"
    same = {"mean": 0.0, "p": None, "p_holm": None, "equivalent_p": None}
    assert verdict(same, "equal") == "could not be told"  # nothing varies, so that nothing can be tested
    assert verdict(None, "equal") == "not run"


def test_the_page_claims_what_the_tests_show(tmp_path):
    pytest.importorskip("scipy")
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
    edge = r"at the edge of the rates that were planned; beyond it, at 0.0005, \d+\.\d+ in tuning \(90.00 at the edge\)"
    assert re.search(rf"- EVA at uniform ranks did worse .+: -.+, {edge}\.\n", markdown(analyse(eva)))
    eva += [made(Job("sst2", "final", "eva", 5e-4, 0.0, seed), {"eva": 0.01}) for seed in plan.SEEDS]
    assert re.search(rf"{edge} and a difference of \+.+ over 8 seeds\.\n", markdown(analyse(eva)))
    assert "- Training the head alone did worse than LoRA of rank 2 on all linears: -" in told and "Rank 8" not in told
    few = analyse(all_rows(gain, seeds=3, wanted=wanted))
    assert {row["verdict"] for row in few["data"]["sst2"]["comparisons"]} == {"not run"}
    assert "On SST-2, in points of accuracy:\n\n- Nothing yet: too few runs.\n" in markdown(few)


def test_every_comparison_has_its_advice_and_every_data_set_its_part():
    pytest.importorskip("scipy")
    rows = all_rows({"norm": 0.02, "lower": -0.02, "full": 0.03})
    told = markdown(analyse(rows))
    assert "- CoLA: nothing of it." in told and "On CoLA" not in told
    told = markdown(analyse(rows + all_rows({"full": 0.1, "lora-ga": -0.1}, data="cola")))
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
    pytest.importorskip("scipy")
    pytest.importorskip("matplotlib")
    gains = {"": 0.30, "a": 0.31, "b": 0.35, "c": 0.32, "d": 0.29}
    scores = {"norm": {"a": 2.0, "b": 9.0, "c": 3.0, "d": 1.0}, "fim": {"a": 3.0, "b": 1.0, "c": 2.0, "d": 4.0}}
    rows = all_rows(wanted=("all-2", *scores))
    for row in rows:
        if row["phase"] == "final" and row["setting"] in scores:
            row["scores"] = scores[row["setting"]]
        if row["phase"] == "final" and row["setting"] == "all-2" and row["seed"] in plan.WITHOUT_SEEDS:
            row["without"] = gains
    found = analyse(rows)["data"]["sst2"]["agreement"]
    assert found == {name: {"mean": pytest.approx(rho), "half_width": pytest.approx(0.0), "n": 4}
                     for name, rho in (("norm", 1.0), ("fim", -1.0))}  # fmt: skip
    write_report(rows, tmp_path, tmp_path / "page.md")
    text = (tmp_path / "page.md").read_text()
    assert "| `norm` | ranks by gradient norm per parameter at the start | 4 | +1.00 ± 0.00 |" in text
    assert "Leaving out one matrix's adapter at a time" not in text
    assert (tmp_path / "sst2_agreement.png").stat().st_size > 5000


def test_a_run_of_another_rate_is_no_run_of_the_choice():
    pytest.importorskip("scipy")
    rows = all_rows(wanted=("all-2", "qkv"))
    other = [{**row, "rate": 1e-2, "score": 0.0} for row in rows if row["phase"] == "final"]
    assert analyse(rows + other)["data"]["sst2"]["settings"] == analyse(rows)["data"]["sst2"]["settings"]


def test_the_committed_page_is_what_the_runs_say():
    pytest.importorskip("scipy")
    from benchmarks.experiment.__main__ import DEFAULT_OUT, PAGE
    from benchmarks.harness import result_files

    page = PAGE.read_text(encoding="utf-8")
    assert page == markdown(result_files.read(DEFAULT_OUT / "results.json"))
    assert page == markdown(json.loads(json.dumps(analyse(runs.read(DEFAULT_OUT / runs.NAME)))))


def test_the_first_runs_of_cola_learned_nothing():
    from benchmarks.experiment.__main__ import DEFAULT_OUT

    rows = runs.read(DEFAULT_OUT / "first_cola_runs.jsonl")
    assert len(rows) == 164 and {row["settings"]["sentences"] for row in rows} == {5600}
    assert {row["score" if row["phase"] == "final" else "tuning"] for row in rows} == {0.0}
    assert {len(set(runs.unpacked(row["predictions"]))) for row in rows if row["phase"] == "final"} == {1}


def lines_of(path):
    return path.read_text().splitlines(keepends=True)


def test_a_run_is_a_whole_line_or_not_there(tmp_path):
    path = tmp_path / "new" / runs.NAME
    one, two, three = (made(Job("sst2", "tuning", "qkv", 1e-3, 0.0, seed)) for seed in (100, 101, 102))
    for bad in (object(), math.nan):
        with pytest.raises((TypeError, ValueError)):
            runs.add(path, {**one, "bad": bad})
    assert not path.exists() and runs.read(path) == []
    for row in (one, two, three):
        runs.add(path, row)
    with pytest.raises(TypeError):
        runs.add(path, {**one, "bad": object()})
    assert [p.name for p in path.parent.iterdir()] == [runs.NAME]
    assert list(map(json.loads, lines_of(path))) == [one, two, three]
    runs.add(path, {**two, "tuning": 0.1})  # made again: in place of the old one
    assert len(lines_of(path)) == 3 and runs.read(path)[-1]["tuning"] == 0.1


def test_runs_of_processes_side_by_side_are_all_kept(tmp_path):
    path = tmp_path / runs.NAME
    with ThreadPoolExecutor(8) as pool:  # a lock on an open file holds between threads as between processes
        list(pool.map(lambda seed: runs.add(path, made(Job("sst2", "final", "qkv", 1e-3, 0.0, seed))), range(40)))
    assert sorted(r["seed"] for r in runs.read(path)) == list(range(40))


@pytest.mark.parametrize("field", ["settings", "splits"])
def test_runs_of_different_settings_or_splits_are_not_read_together(tmp_path, field):
    path = tmp_path / runs.NAME
    one, other = made(Job("sst2", "final", "qkv", 1e-3, 0.0, 1)), made(Job("sst2", "final", "mlp", 1e-3, 0.0, 2))
    cola = {**made(Job("cola", "final", "qkv", 1e-3, 0.0, 1)), "settings": {"sentences": 5}}
    path.write_text("".join(json.dumps(each) + "\n" for each in (one, cola)))
    assert len(runs.read(path)) == 2
    runs.check([one], "sst2", {"sentences": 8}, plan.FINGERPRINTS["sst2"], path)
    with pytest.raises(ValueError, match=f"was made with other {field}"):
        runs.check([{**one, field: {"sentences": 1}}], "sst2", {"sentences": 8}, plan.FINGERPRINTS["sst2"], path)
    path.write_text("".join(json.dumps(each) + "\n" for each in (one, {**other, field: {"sentences": 1}})))
    with pytest.raises(ValueError, match=f"mlp seed 2 and qkv seed 1 were made with different {field}"):
        runs.read(path)
