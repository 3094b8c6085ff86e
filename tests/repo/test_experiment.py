"""The experiment's runner on a tiny model: every setting, resuming, and the file of runs."""

from __future__ import annotations

import json
import math
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from support.experiment_help import made
from support.recipe_help import WORDS, text_model

from benchmarks.experiment import data, jobs, plan, runs, splits
from benchmarks.experiment.__main__ import main
from benchmarks.experiment.analysis import verdict
from benchmarks.experiment.methods import PREPARE, Task
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


def test_a_setting_runs_once_it_is_tuned_and_as_it_was_chosen():
    todo = list(jobs.jobs("sst2", []))
    assert {job.phase for job in todo} == {"tuning"} and len(todo) == len(set(todo)) == 216
    assert {(job.setting, job.rate) for job in todo[210:]} == set(plan.BEYOND["sst2"].items())
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
