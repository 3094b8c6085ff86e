"""The experiment's runner on a tiny model: every method, resuming, and what the report says of given numbers."""

from __future__ import annotations

import json
import math
from concurrent.futures import ThreadPoolExecutor

import pytest
from support.recipe_help import WORDS, text_model

from benchmarks.experiment import data, runs
from benchmarks.experiment.__main__ import main
from benchmarks.experiment.analysis import analyse, holm, interval, paired
from benchmarks.experiment.methods import METHODS
from benchmarks.experiment.report import markdown
from benchmarks.experiment.settings import Settings
from benchmarks.experiment.train import run, sized


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    pytest.importorskip("peft")
    return str(text_model(tmp_path_factory.mktemp("bert"), "Bert"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    base = tmp_path_factory.mktemp("sst2")
    for split, count in (("train", 200), ("dev", 20)):
        rows = [f"the {WORDS[i % 4]} {WORDS[4 + i % 2]}\t{1 - i % 2}" for i in range(count)]
        (base / f"{split}.tsv").write_text("\n".join(["sentence\tlabel", *rows]) + "\n")
    return base


@pytest.mark.parametrize("method", METHODS)
def test_every_method(method, model_path, folder):
    settings = sized(Settings(batch=8, rank=2, max_rank=4, calibration_steps=2, agreement_batches=2), 48)
    found = run(method, 3, settings, model_path, *data.find(folder))
    assert 0 <= found["accuracy"] <= 1 and len(found["predictions"]) == 20
    assert len(found["losses"]) == 6 and all(map(math.isfinite, found["losses"]))
    json.dumps(found)
    uniform, head = 2 * 3 * 2 * 64, 2 * 33
    assert found["parameters"]["head"] == head
    if method in ("full", "head"):
        assert found["parameters"]["adapters"] == 0 and not found["ranks"]
        assert (found["parameters"]["other"] > 0) == (method == "full")
        return
    assert found["parameters"]["other"] == 0 and len(found["ranks"]) == 6
    assert all(name.endswith(("query", "key", "value")) for name in found["ranks"])
    if method == "adalora":
        assert found["parameters"]["adapters"] == 6 * 3 * (64 + 1) and sum(found["ranks"].values()) == 12
    else:
        assert found["parameters"]["adapters"] == uniform and sum(found["ranks"].values()) == 12
    assert ("scores" in found) == (method in ("fc", "fim", "fw-sum", "fw-relative", "fw-uniform"))
    assert ("agreement_after" in found) == (method == "lora")


def lines_of(path):
    return path.read_text().splitlines(keepends=True)


def test_a_run_is_made_once_and_settings_are_not_mixed(model_path, folder, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    pytest.importorskip("scipy")
    common = ["--data-dir", str(folder), "--model-path", model_path, "--out", str(tmp_path), "--methods", "lora", "fc"]
    assert main([*common, "--seeds", "0", "1", "--sentences", "64"]) == 0
    file = tmp_path / runs.NAME
    made = {(r["method"], r["seed"]): line for r, line in zip(runs.read(file), lines_of(file), strict=True)}
    assert set(made) == {(method, seed) for method in ("lora", "fc") for seed in (0, 1)}
    gone = made.pop(("fc", 1))
    file.write_text("".join(line for line in lines_of(file) if line != gone))
    assert main([*common, "--seeds", "0", "1", "--sentences", "64"]) == 0
    again = lines_of(file)
    # Those that were there stand as they were, the missing one was trained anew: its times are others.
    assert again[:-1] == list(made.values()) and again[-1] != gone
    assert (runs.read(file)[-1]["method"], runs.read(file)[-1]["seed"]) == ("fc", 1)
    for name in ("results.json", "README.md", "accuracy.png", "agreement.png"):
        assert (tmp_path / name).stat().st_size > 0
    assert "FC-LoRA" in capsys.readouterr().out
    assert main([*common, "--seeds", "0", "--sentences", "96"]) == 2
    assert "was made with other settings" in capsys.readouterr().err
    assert main(["--report-only", "--out", str(tmp_path / "none")]) == 2


def test_the_same_seed_gives_the_same_run(model_path, folder):
    settings = sized(Settings(batch=8, rank=2, calibration_steps=2), 32)
    first, second = (run("fim", 0, settings, model_path, *data.find(folder)) for _ in range(2))
    assert first["losses"] == second["losses"] and first["predictions"] == second["predictions"]


def test_a_penalty_of_nothing_is_plain_lora(model_path, folder):
    settings = sized(Settings(batch=8, rank=2, penalty=0.0, agreement_batches=2), 48)
    plain, weighted = (run(m, 0, settings, model_path, *data.find(folder)) for m in ("lora", "fw-sum"))
    assert plain["losses"] == weighted["losses"]


@pytest.mark.parametrize(
    "text, reason",
    [("a\tb\n", "expected the header"), ("sentence\tlabel\nfine\t2\n", ":2: expected"), ("", "expected the header")],
)
def test_files_that_are_something_else(text, reason, tmp_path):
    (tmp_path / "train.tsv").write_text(text)
    with pytest.raises(ValueError, match=reason):
        data.read(tmp_path / "train.tsv")


def test_more_sentences_than_there_are(folder):
    train, _ = data.find(folder)
    with pytest.raises(ValueError, match="expected 1 to 200, got 201"):
        data.draw(train, 201, 0)
    with pytest.raises(ValueError, match="--sentences: expected at least 64, got 63"):
        sized(Settings(), 63)


def test_batches_of_similar_length_lose_no_sentence():
    given = data.Sentences([f"{i} " + "word " * (i * 7 % 13) for i in range(70)], [i % 2 for i in range(70)])
    grouped = data.by_length(given, 8, seed=3)
    assert sorted(zip(*grouped, strict=True)) == sorted(zip(*given, strict=True))
    spread = [{len(text.split()) for text in grouped.texts[i : i + 8]} for i in range(0, 64, 8)]
    assert all(max(lengths) - min(lengths) <= 2 for lengths in spread)
    assert grouped == data.by_length(given, 8, seed=3) != data.by_length(given, 8, seed=4)


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
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": None}) == {"a": 0.03, "b": 0.06, "c": 0.06, "d": None}


def result(method, seed, accuracy):
    ranks = {"bert.encoder.layer.0.attention.self.query": 8} if method != "head" else {}
    counts = {"adapters": 8 * 768 * bool(ranks), "head": 770, "other": 0}
    fixed = dict(ece=0.1, step_cpu_seconds=1.0, setup_cpu_seconds=0.0, parameters=counts, ranks=ranks)
    settings = {"sentences": 8000, "batch": 32, "rank": 8}
    return dict(method=method, seed=seed, accuracy=accuracy, settings=settings, environment={"cpu": "x"}, **fixed)


def test_the_reading_claims_what_the_tests_show():
    pytest.importorskip("scipy")
    noise = [0.0, 0.004, -0.003, 0.002, -0.001]
    found = {"lora": {s: result("lora", s, 0.8 + noise[s]) for s in range(5)}}
    found["head"] = {s: result("head", s, 0.7 + noise[-s]) for s in range(5)}
    found["fc"] = {s: result("fc", s, 0.8 + noise[-1 - s]) for s in range(5)}
    text = markdown(analyse(found), [])
    assert "head only: -10.00" in text and "**worse**" in text
    assert "FC-LoRA: +0.00" in text and "no difference from uniform LoRA shown" in text and "**better**" not in text


def test_a_run_is_a_whole_line_or_not_there(tmp_path):
    path = tmp_path / "new" / runs.NAME
    one = result("lora", 0, 0.8)
    with pytest.raises(TypeError):
        runs.add(path, {**one, "bad": object()})
    assert not path.exists() and runs.read(path) == []
    runs.add(path, one)
    runs.add(path, result("fc", 1, 0.7))
    runs.add(path, result("fc", 0, 0.6))
    with pytest.raises(TypeError):
        runs.add(path, {**one, "bad": object()})
    assert [p.name for p in path.parent.iterdir()] == [runs.NAME]
    assert [(r["method"], r["seed"]) for r in map(json.loads, lines_of(path))] == [("lora", 0), ("fc", 1), ("fc", 0)]
    found = runs.by_method(runs.read(path), ["fc", "lora", "head"])
    assert {name: list(seeds) for name, seeds in found.items()} == {"fc": [0, 1], "lora": [0]}
    runs.add(path, result("fc", 1, 0.9))  # made again: in place of the old one
    assert len(lines_of(path)) == 3 and runs.by_method(runs.read(path), ["fc"])["fc"][1]["accuracy"] == 0.9


def test_runs_of_processes_side_by_side_are_all_kept(tmp_path):
    path = tmp_path / runs.NAME
    with ThreadPoolExecutor(8) as pool:  # a lock on an open file holds between threads as between processes
        list(pool.map(lambda seed: runs.add(path, result("lora", seed, 0.5)), range(40)))
    assert sorted(r["seed"] for r in runs.read(path)) == list(range(40))


def test_runs_of_different_settings_are_not_read_together(tmp_path):
    path = tmp_path / runs.NAME
    other = {**result("fc", 1, 0.7), "settings": {"sentences": 1}}
    path.write_text("".join(json.dumps(each) + "\n" for each in (result("lora", 0, 0.8), other)))
    with pytest.raises(ValueError, match="fc seed 1 and lora seed 0 were made with different settings"):
        runs.read(path)
