"""The demo's short form end to end, and the arithmetic behind what it says."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
import torch

pytest.importorskip("timm")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("rich")

from fastlora.cli import __main__ as cli
from fastlora.demo import MissingExtra, Settings, cost, recipe, require, verdict
from fastlora.demo.lanes import ADAPTERS, METHODS

PICTURES = ("rank_map", "importance", "accuracy", "reliability", "overhead")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Folder and exit code of one short demo."""
    out = tmp_path_factory.mktemp("demo")
    return out, cli.main(["demo", "--fast", "--threads", "1", "--out", str(out)])


@pytest.fixture(scope="module")
def results(finished):
    return json.loads((finished[0] / "results.json").read_text())


def test_a_sound_build_passes(finished, results):
    assert results["failed"] == []
    assert finished[1] == 0


def test_every_artefact_is_there(finished):
    out = finished[0]
    for name in PICTURES:
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "index.html").stat().st_size > 100_000
    assert {path.name for path in (out / "adapter").iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}


def test_page_needs_nothing_else(finished):
    page = (finished[0] / "index.html").read_text()
    sources = re.findall(r'(?:src|href|url)\s*[=(]\s*["\']?([^"\'\s>)]{1,40})', page)
    assert len(sources) == len(PICTURES)
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert "<script" not in page and "<link" not in page
    for label, _ in METHODS.values():
        assert label in page


def test_results_hold_what_the_table_shows(results):
    assert results["schema"] == 1
    assert list(results["methods"]) == list(METHODS)
    for name, method in results["methods"].items():
        (run,) = method["runs"]
        assert 0.0 <= run["ece_before"] <= 1.0 and 0.0 <= run["ece_after"] <= 1.0
        assert run["seconds_per_step"] > 0 and len(run["per_class"]) == recipe.CLASSES
        assert run["curve"][-1][1] == pytest.approx(run["accuracy"], abs=1e-6)
        assert [seconds for seconds, _ in run["curve"]] == sorted(seconds for seconds, _ in run["curve"])
        assert method["summary"]["accuracy"] == {"mean": run["accuracy"], "deviation": None}
        assert (method["parameters"]["adapters"] > 0) == (name in ADAPTERS)
        assert method["parameters"]["head"] == results["settings"]["width"] * 5 + 5
    assert [case["variants"]["plain"]["ratio"] for case in results["cost"]] == [1.0]


def test_ranks_spend_the_budget_of_uniform_ranks(results):
    settings = results["settings"]
    (ranks,) = results["ranks"]
    assert len(ranks) == 3 * settings["depth"]
    assert sum(ranks.values()) == settings["rank"] * len(ranks)
    assert all(1 <= rank <= settings["max_rank"] for rank in ranks.values())
    assert len(set(ranks.values())) > 1
    counts = {results["methods"][name]["parameters"]["adapters"] for name in ADAPTERS}
    assert counts == {2 * settings["width"] * sum(ranks.values())}


def test_importance_covers_the_adapted_matrices(results):
    for scores in results["importance"].values():
        assert list(scores) == list(results["ranks"][0])
    assert sum(results["importance"]["grad_sq"].values()) == pytest.approx(1.0)


def test_saved_adapter_gives_the_same_logits(results):
    assert results["adapter"]["reload_max_difference"] <= 1e-4


def test_a_claim_that_fails_makes_the_exit_status_1(finished, results, capsys, monkeypatch, tmp_path):
    from fastlora import demo

    settings = Settings(seeds=(0,), min_gain=0.9)
    judged = {**results, "claims": verdict.claims(results, settings)}
    judged["failed"] = [c["claim"] for c in judged["claims"] if not c["holds"]]
    assert len(judged["failed"]) == len(ADAPTERS)
    monkeypatch.setattr(demo, "run", lambda given, out, progress: judged)
    assert cli.main(["demo", "--fast", "--out", str(tmp_path), "--min-gain", "90"]) == 1
    assert "beats head only by at least 90.0 points" in " ".join(capsys.readouterr().out.split())


def test_threshold_of_the_command_line_reaches_the_claims(monkeypatch, tmp_path):
    from fastlora import demo

    class Stop(Exception):
        pass

    def seen(settings, out, progress):
        assert settings.min_gain == pytest.approx(0.9) and settings.seeds == (0,)
        raise Stop

    monkeypatch.setattr(demo, "run", seen)
    with pytest.raises(Stop):
        cli.main(["demo", "--fast", "--out", str(tmp_path), "--min-gain", "90"])


def test_a_weak_base_is_a_failed_claim(results):
    weak = {**results, "base": {"accuracy": [0.99, 0.969]}}
    found = verdict.claims(weak, Settings())
    assert [c["holds"] for c in found][0] is False and all(c["holds"] for c in found[1:])


def test_an_output_folder_that_cannot_be_written(tmp_path, capsys):
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert cli.main(["demo", "--fast", "--out", str(blocked)]) == 2
    assert "cannot write" in capsys.readouterr().err


def test_missing_packages_are_named(monkeypatch):
    def absent(name):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(recipe.importlib, "import_module", absent)
    with pytest.raises(MissingExtra, match=r"needs scikit-learn: pip install 'fastlora-kernels\[demo\]'"):
        require("sklearn")


@pytest.mark.parametrize("arguments", [["demo", "--seeds", "0"], ["demo", "--threads", "two"], [], ["unknown"]])
def test_bad_arguments(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2
    assert "usage: fastlora" in capsys.readouterr().err


def test_importing_fastlora_imports_nothing_of_the_demo():
    extras = "{'timm', 'sklearn', 'matplotlib', 'rich', 'torchvision'}"
    code = f"import sys, fastlora; assert not {extras} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_splits_are_disjoint_and_the_same_for_a_seed():
    first, again, other = (recipe.load_digits(seed, Settings()) for seed in (3, 3, 4))
    assert torch.equal(first.test.x, again.test.x) and not torch.equal(first.test.x, other.test.x)
    assert sum(len(part.y) for part in first) == 1797
    assert len(first.train.y) == 5 * Settings().shots


def test_a_difference_is_called_only_beyond_both_noises():
    base = torch.zeros(400)
    better = torch.zeros(400)
    better[:40] = 1  # 10 points on each seed, no spread over seeds, 1.5 points over images
    steady = verdict.difference([better, better, better], [base, base, base])
    assert steady["called"] and steady["mean"] == pytest.approx(0.1)
    lucky = better.clone()
    lucky[:] = 0
    lucky[:120] = 1  # 0, 0 and 30 points: the same mean, one lucky seed
    assert not verdict.difference([base, base, lucky], [base, base, base])["called"]
    few = torch.zeros(20)
    few[0] = 1  # 5 points on every seed, but a single image
    assert not verdict.difference([few] * 3, [torch.zeros(20)] * 3)["called"]
    assert not verdict.difference([better], [base])["called"]


@pytest.mark.parametrize(
    "low, high, sign",
    [(0.1, 0.2, 1), (-0.2, -0.1, -1), (-0.1, 0.2, 0), (0.0, 0.2, 0), (-0.1, 0.0, 0), (None, None, None)],
)
def test_a_difference_is_judged_by_both_ends_of_its_interval(low, high, sign):
    assert verdict.judged(low, high) == sign


def seconds_of(**shares):
    """Rounds in which each variant takes a share more than the plain step, and all rounds are differently fast."""
    rounds = 12
    plain = [1.0 + 0.3 * (i % 4) for i in range(rounds)]
    spread = [0.01 * (i - (rounds - 1) / 2) for i in range(rounds)]
    return {
        name: [p * (1 + share + wide * s) for p, s in zip(plain, spread, strict=True)]
        for name, (share, wide) in {"plain": (0.0, 0.0), **shares}.items()
    }


def said_of(**shares):
    seconds = seconds_of(**{"exact": (0.3, 0.0), **shares})
    case = {
        "title": "a model", "width": 48, "rows": 544, "differences": cost.cost_differences(seconds),
        "variants": {name: cost._ratios(mine, seconds["plain"]) for name, mine in seconds.items()},
    }  # fmt: skip
    return verdict.cost_sentences({"cost": [case]})


def test_a_cost_beside_a_quiet_control_is_not_called_noise():
    """Quartiles from just above 0 to far above, and a control around 0: the ranges overlap, the pairs do not."""
    probes, usual = said_of(control=(0.0, 0.4), probe=(0.12, 1.0), requires_grad=(0.12, 1.0))
    assert probes == (
        "Statistics by probes, a model (width 48, 544 rows): +12.0% of a step, +12.0% (95 % interval +9.9% to +14.1%) "
        "over the control: more than the control."
    )
    assert usual == (
        "The usual way, requires_grad on W, a model (width 48, 544 rows): +12.0% of a step, +0.0% (95 % interval +0.0% "
        "to +0.0%) over the probes: which of the two is cheaper is not resolved."
    )


def test_not_resolved_is_said_where_the_interval_holds_zero_and_the_cheaper_way_in_words():
    probes, usual = said_of(control=(0.0, 0.0), probe=(0.02, 2.0), requires_grad=(-0.05, 2.0))
    assert "+2.0% (95 % interval -5.0% to +9.0%) over the control: not resolved from the control." in probes
    assert "-7.0% (95 % interval -7.0% to -7.0%) over the probes: the usual way is cheaper at this width" in usual
    probes, usual = said_of(control=(0.05, 0.0), probe=(0.0, 0.0), requires_grad=(0.2, 0.5))
    assert "over the control: less than the control." in probes and "the usual way costs more." in usual


def test_too_few_rounds_are_not_judged(results):
    seconds = {name: values[:5] for name, values in seconds_of(**dict.fromkeys(cost.VARIANTS, (0.0, 1.0))).items()}
    assert all(d["low"] is None for d in cost.cost_differences(seconds))
    case = {**results["cost"][0], "differences": cost.cost_differences(seconds)}
    assert all("too few rounds to judge" in sentence for sentence in verdict.cost_sentences({"cost": [case]}))


def test_accuracies_and_temperatures_are_said_with_their_intervals():
    entries = [
        {"first": "lora", "second": "head", "mean": 0.11, "low": 0.08, "high": 0.14},
        {"first": "fc", "second": "lora", "mean": 0.003, "low": -0.018, "high": 0.024},
        {"first": "fw", "second": "lora", "mean": 0.003, "low": None, "high": None},
    ]
    assert verdict.accuracy_sentences({"differences": entries}) == [
        "LoRA, uniform rank against head only: +11.0 points (interval +8.0 to +14.0), beyond noise.",
        "FC-LoRA against LoRA, uniform rank: +0.3 points (interval -1.8 to +2.4), not resolved.",
        "FW-LoRA against LoRA, uniform rank: +0.3 points, one seed, not judged.",
    ]
    runs = {"a": (-0.010, -0.011, -0.012), "b": (0.01, -0.02, 0.005), "c": (0.02, 0.021, 0.022)}
    methods = {
        name: {"label": name, "runs": [{"ece_before": 0.1, "ece_after": 0.1 + change} for change in changes]}
        for name, changes in runs.items()
    }
    (said,) = verdict.calibration_sentences({"methods": methods})
    assert said == (
        "The temperature lowers ECE of a (-0.011, interval -0.013 to -0.009); raises ECE of c (+0.021, interval +0.019 "
        "to +0.023); has no resolved effect on ECE of b (-0.002, interval -0.042 to +0.038) (paired t over seeds, "
        "95 %)."
    )
