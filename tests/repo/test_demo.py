"""The demo's short form end to end, and the arithmetic behind what it says."""

from __future__ import annotations

import importlib.util
import io
import json
import re
import subprocess
import sys
import xml.etree.ElementTree

import pytest
import torch

pytest.importorskip("timm")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("rich")
import rich.console  # noqa: E402

from fastlora.cli import __main__ as cli
from fastlora.demo import MissingExtra, Settings, cost, figures, recipe, require, rich_tables, verdict
from fastlora.demo.lanes import ADAPTERS, METHODS
from fastlora.demo.page import COLUMNS, table_rows

PICTURES = ["rank_map", "importance", "accuracy", "reliability", "overhead"]
if importlib.util.find_spec("peft") is not None:
    PICTURES.append("speed")


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
        svg = xml.etree.ElementTree.parse(out / f"{name}.svg").getroot()
        assert svg.tag == "{http://www.w3.org/2000/svg}svg" and svg.get("viewBox") and len(list(svg.iter())) > 50
    assert len(list(out.glob("*.svg"))) == len(PICTURES) and (out / "index.html").stat().st_size > 50_000
    assert {path.name for path in (out / "adapter").iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}


def test_page_needs_nothing_else(finished):
    page = (finished[0] / "index.html").read_text()
    sources = re.findall(r'(?:src|href|url)\s*[=(]\s*["\']?([^"\'\s>)]{1,40})', page)
    assert page.count("<figure><svg ") == len(PICTURES)
    assert all(source.startswith(("#", "data:image/png;base64,")) for source in sources)
    assert "<script" not in page and "<link" not in page and "<metadata" not in page
    for label, _ in METHODS.values():
        assert label in page


def test_pictures_and_page_have_a_dark_side(finished):
    """Text and axes are drawn in colours that the theme of the reader sets."""
    page = (finished[0] / "index.html").read_text()
    assert page.count("@media (prefers-color-scheme: dark)") == 1 + len(PICTURES)
    for name in PICTURES:
        svg = (finished[0] / f"{name}.svg").read_text()
        assert "@media (prefers-color-scheme: dark)" in svg and svg.count("var(--text)") > 5
        assert not re.search(r"fill: #(?:000000|1c1e21)", svg)
        assert "fill: #ffffff" not in re.sub(r"<text.*?</text>", "", svg.replace("\n", " ")).partition("patch_2")[0]


def test_the_table_fits_1200_pixels_and_scrolls_on_a_phone(finished, results):
    """In a font that is wider than most: the widest cell of a column, whose head may break between words."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import TextPath

    def width(text):
        return TextPath((0, 0), text, size=0.85 * 16, prop=FontProperties(family="DejaVu Sans")).get_extents().width

    rows = table_rows(results)
    words = [max(column.split(), key=len) for column in COLUMNS]
    columns = [max(width(line[i]) for line in (words, *rows)) + 1.2 * 0.85 * 16 for i in range(len(COLUMNS))]
    assert sum(columns) < 1200 - 2 * 16
    page = (finished[0] / "index.html").read_text()
    assert ".wide { overflow-x: auto; max-width: 100% }" in page and 'name="viewport"' in page
    assert len(re.findall("<table", page)) == len(re.findall('<div class="wide" tabindex="0"><table', page)) == 2
    assert "svg { max-width: 100%; height: auto }" in page


@pytest.mark.parametrize("width, tables", [(80, 2), (100, 2), (120, 2), (200, 1), (None, 1)])
def test_the_terminals_table_folds_its_columns(results, width, tables):
    shown = io.StringIO()
    console = rich.console.Console(file=shown, width=width or 10_000)
    found = rich_tables(results, width)
    for table in found:
        console.print(table)
    lines = shown.getvalue().splitlines()
    assert all(len(line) <= (width or 10_000) for line in lines) and "…" not in shown.getvalue()
    assert (len(found) > 1) == (tables > 1)
    for row in (COLUMNS, *table_rows(results)):
        own = [line for line in lines if row[0] in line]
        assert len(own) == len(found) and all(any(cell in line for line in own) for cell in row)


def test_without_a_terminal_nothing_is_cut(finished, results, monkeypatch, capsys, tmp_path):
    from fastlora import demo

    monkeypatch.setattr(demo, "run", lambda given, out, progress: results)
    assert cli.main(["demo", "--fast", "--out", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    for row in table_rows(results):
        assert any(all(cell in line for cell in row) for line in lines)
    assert any(results["rule"] in line for line in lines)


def test_one_set_of_bars(finished, monkeypatch, capsys):
    """What the library does inside a lane shows no bar of its own, in a terminal either."""
    from fastlora.demo import lanes

    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("fastlora._utils.reporting.PATIENCE", 0.0)
    settings = Settings(seeds=(0,)).fast()
    lanes.METHODS["fc"][1](recipe.build_vit(settings, 0), settings, 0, recipe.load_digits(0, settings).train)
    assert "calibrate" not in capsys.readouterr().err


def test_the_accuracy_zooms_to_where_curves_differ(results):
    low, high = figures._zoom(figures._curves(results))
    ends = [m["runs"][0]["curve"][-1][1] * 100 for n, m in results["methods"].items() if n != "head"]
    assert low < min(ends) and max(ends) <= high <= 100
    curves = {"head": ([0, 1], [20.0, 50.0], [0, 0]), "lora": ([0, 1, 2, 3], [10.0, 70, 90, 92], [0, 0, 1, 1])}
    assert figures._zoom(curves) == (88.5, 93.5)


@pytest.mark.skipif("speed" not in PICTURES, reason="PEFT is not installed")
def test_speed_is_compared_with_peft(results):
    (case,) = results["speed"]
    assert list(case["variants"]) == ["head", "fastlora", "peft"] and case["variants"]["peft"]["ratio"] == 1.0
    assert all(0 < v["ratio"] < 20 for v in case["variants"].values())


def test_without_peft_the_speed_is_left_out(results, tmp_path, monkeypatch):
    monkeypatch.setattr(cost, "compares_with_peft", lambda: False)
    assert cost.measure_speed(None, None, Settings()) == []
    assert "speed" not in figures.draw({**results, "speed": []}, tmp_path) and not (tmp_path / "speed.svg").exists()


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
