"""Figures in the README and the guides are those of the committed results, and what they name is there."""

from __future__ import annotations

import json
import operator
import re
from pathlib import Path

import pytest

import fastlora
from benchmarks.experiment.report import SCORES, points
from fastlora.demo.page import table_rows

ROOT = Path(fastlora.__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SHAPES = {
    "S1": ("DeiT-Base qkv, M = 1576", "DeiT-Base, 1,576 rows"),
    "S2": ("RoBERTa-Base q, k, v, M = 2048", "RoBERTa-Base, 2,048 rows"),
    "S3": ("grouped-query q, k, v, M = 512", "grouped-query, width 2,048, 512 rows"),
    "S4": ("tiny qkv, M = 64", "tiny, width 384, 64 rows"),
}


def text(name):
    """A page with its line breaks taken out, so that a sentence may be broken anywhere."""
    return re.sub(r"\s+", " ", (ROOT / name).read_text())


def results(name):
    return json.loads((RESULTS / name).read_text())


def rows_of(name, kind):
    """(result, rows by variant) of one kind."""
    found = [(r, {row["variant"]: row for row in r["rows"]}) for r in results(name)["results"] if r["kind"] == kind]
    assert found
    return found


def cell(ratio):
    return f"{ratio['median']:.2f} [{ratio['p10']:.2f}, {ratio['p90']:.2f}]"


def layer(shape, dtype):
    (rows,) = (rows for r, rows in rows_of("layer.json", "layer") if (r["shape"], r["dtype"]) == (shape, dtype))
    return rows


def span(values, digits=2):
    return f"{min(values):.{digits}f} to {max(values):.{digits}f}"


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_times_of_one_layer(shape, dtype):
    rows = layer(shape, dtype)
    peft = [cell(rows[name]["ratio_to_peft"]) for name in ("frozen", "handwritten", "fastlora", "probes")]
    over = cell(rows["fastlora"]["ratio_to_frozen"])
    line = f"| {shape} {dtype}: {SHAPES[shape][0]} | {peft[0]} | {peft[1]} | **{peft[2]}** | {peft[3]} | **{over}** |"
    assert line in (ROOT / "docs" / "speed.md").read_text()
    if dtype == "fp32":
        medians = [rows["fastlora"][f"ratio_to_{base}"]["median"] for base in ("peft", "frozen")]
        assert f"| {SHAPES[shape][1]} | {medians[0]:.2f} | {medians[1]:.2f} |" in (ROOT / "README.md").read_text()


def test_times_in_bf16():
    ours = [layer(shape, "bf16")["fastlora"] for shape in SHAPES]
    peft, frozen = ([row[f"ratio_to_{base}"]["median"] for row in ours] for base in ("peft", "frozen"))
    assert f"bf16: {span(peft)} of PEFT, {span(frozen)} of the frozen layers" in text("README.md")
    low, high = (round(100 * (ratio - 1)) for ratio in (min(frozen[:3]), max(frozen[:3])))
    assert f"adapters cost {low} to {high} % of the frozen layers on S1 to S3" in text("docs/speed.md")


def test_whole_steps_and_the_cost_of_statistics():
    models = {r["model"]: rows for r, rows in rows_of("layer.json", "model")}
    names = {"deit_tiny": "DeiT-Tiny", "deit_small": "DeiT-Small", "minilm": "MiniLM"}
    assert set(models) == set(names)
    whole = {name: rows["fastlora"]["ratio_to_peft"]["median"] for name, rows in models.items()}
    assert f"{span(whole.values())} of PEFT" in text("README.md")
    said = ", ".join(f"{name} {whole[name]:.2f}" for name in ("deit_tiny", "deit_small"))
    fast = ", ".join(f"{models[name]['model_accelerated']['ratio_to_peft']['median']:.2f}" for name in names)
    assert f"{said}, MiniLM {whole['minilm']:.2f}; with `accelerate_frozen` {fast}." in text("docs/speed.md")

    def percent(name, variant, key="median"):
        return f"{100 * (models[name][variant]['ratio_to_fastlora'][key] - 1):+.2f}"

    cost = ", ".join(f"{label} {percent(name, 'model_probes')} %" for name, label in names.items())
    assert cost in text("README.md")
    for name, label in (("deit_tiny", "deit_tiny"), ("deit_small", "deit_small"), ("minilm", "MiniLM")):
        low, middle, high = (percent(name, "model_probes", key) for key in ("median_low", "median", "median_high"))
        assert f"{label} {middle} % [{low}, {high}]" in text("docs/speed.md")
    first, second, third = (percent(name, "control") for name in names)
    for page in ("README.md", "docs/speed.md"):
        assert f"measured twice differs by {first}, {second} and {third} %" in text(page)


def test_statistics_of_one_layer():
    found = results("builds.json")

    def cost(dtype):
        own = [r["percent"] for r in found["rows"] if (r["dtype"], r["variant"]) == (dtype, "act_var_step")]
        return f"{min(own):+.1f} to {max(own):+.1f} % in {dtype}"

    said = f"cost {cost('fp32')} and {cost('bf16')}, medians over {found['builds']} builds"
    assert said in text("docs/speed.md")


def test_several_adapters():
    by_case = {}
    for r, rows in rows_of("layer.json", "adapters"):
        by_case.setdefault(r["case"], []).append(f"{rows['mixed']['ratio_to_one']['median']:.2f}")
    sample, token, zipf = (" to ".join(sorted(set(by_case[case]))) for case in ("sample", "token", "zipf32"))
    assert f"by sample {sample}, by token {token}; 32 adapters, unevenly used, {zipf}" in text("README.md")
    assert f"by sample {sample}, by token {token}, 32 by Zipf's law {zipf}." in text("docs/speed.md")
    parts = [rows["mixed"]["part_to_loop"]["median"] for _, rows in rows_of("adapters_one_engine.json", "adapters")]
    assert f"every matmul by `F.linear`: {span(parts)} (" in text("docs/speed.md")


def test_penalty_merge_and_floor():
    ((_, penalty),) = rows_of("layer.json", "penalty")
    share = penalty["penalty"]["percent"]["median"]
    assert f"takes {share:.2f} % of a RoBERTa-base step" in text("docs/speed.md")
    ((_, merges),) = rows_of("merge.json", "merge")
    assert f"{cell(merges['fastlora']['ratio_to_fp32'])} of the fp32 merge's time" in text("docs/speed.md")
    floor = results("floor.json")
    at = {(row["shape"], row["dtype"], row["engine"]): row for row in floor["rows"]}
    saved, share = [], []
    for shape in ("S1", "S2", "S3"):
        packed = at[shape, "fp32", "onednn_packed"]
        saved.append(100 * (1 - packed["ms"] / at[shape, "fp32", "linear"]["ms"]))
        share += [100 * at[shape, d, "onednn_packed"]["gflops"] / floor["peaks"][d] for d in ("fp32", "bf16")]
    assert f"takes {span(saved, 0)} % less time" in text("docs/speed.md")
    assert f"run at {span(share, 0)} % of what this core's multiply-adds can do" in text("docs/speed.md")


def test_dora_and_a_start_from_the_gradient():
    ((result, rows),) = rows_of("dora.json", "dora")
    ours, theirs = rows["dora"]["ratio_to_fastlora"], rows["peft_dora"]
    assert ours["median"] <= result["goal"]
    page = text("docs/speed.md")
    assert f"A step with `use_dora` takes {cell(ours)} of the step without, PEFT's" in page
    of_each = " and ".join(f"{theirs[f'ratio_to_{base}']['median']:.2f}" for base in ("fastlora", "peft_lora"))
    assert f"PEFT's {of_each} of ours and of its own without" in page
    ((_, peaks),) = rows_of("memory.json", "lora_ga")
    said = " where PEFT's adds ".join(f"{peaks[name]['peak'] / 2**20:.0f} MiB" for name in ("fastlora", "peft"))
    assert f"A LoRA-GA start of 12 matrices adds {said} at its peak" in page


def test_experts():
    ((_, rows),) = rows_of("experts.json", "experts")
    ours, theirs = (f"{rows[name]['ratio_to_frozen']['median']:.2f}" for name in ("fastlora", "experts_peft"))
    page = " ".join(text("docs/experts.md").split())
    assert f"costs {ours} of the frozen model's, where PEFT" in page and f"to its weight, takes {theirs} (" in page


def test_ranks_of_experts():
    document, page = results("expert_ranks.json"), " ".join(text("docs/experts.md").split())
    losses = {row["variant"]: row["loss"] for row in document["results"]}
    means = {name: document["before"] - sum(own) / len(own) for name, own in losses.items()}
    assert f"with a rank correlation of {document['spearman']['scores, loads']:.2f}" in page
    assert (
        f"The same {document['budget']} ranks spent by it lowered the loss by {means['grad_sq']:.4f}, a uniform" in page
    )
    assert f"a uniform rank by {means['uniform']:.4f}: more in each of three seeds" in page
    assert all(b < a for a, b in zip(losses["uniform"], losses["grad_sq"], strict=True)) and len(losses["grad_sq"]) == 3


def test_the_machine_of_the_times():
    machine = results("layer.json")["environment"]
    for page in ("README.md", "docs/speed.md"):
        assert f"{machine['cpu']} (Zen 5, {machine['native_isa']})" in text(page)
        assert f"torch {machine['torch']}" in text(page) and f"PEFT {machine['peft'][:4]}" in text(page)
        rounds = max(row["ms"]["rounds"] for _, rows in rows_of("layer.json", "layer") for row in rows.values())
        assert f"--fastlora-rounds={rounds}" in text(page)


def test_the_demo():
    found, page = results("demo/results.json"), (ROOT / "docs" / "demo.md").read_text()
    rows = [f"| {' | '.join(row)} |" for row in table_rows(found)]
    assert [line for line in page.splitlines() if line in rows] == rows
    assert all(f"- {sentence}\n" in page for sentence in found["findings"])
    assert f"{found['wall_seconds']:.0f} s" in page
    gains = {round(100 * d["mean"]) for d in found["differences"] if d["second"] == "head" and d["first"] != "full"}
    assert gains == {11} and "adapters gain 11 points" in page and "adapters gain 11 points" in text("README.md")
    others = [d["called"] for d in found["differences"] if "head" not in (d["first"], d["second"])]
    assert others and not any(others) and "lie within noise of each other" in text("README.md")


def test_what_was_done_on_purpose():
    page, soak = text("docs/robustness.md"), results("soak.json")
    assert f"{results('faults.json')['faults']} faults" in page
    assert f"{results('fuzz.json')['inputs']:,} damaged adapter folders" in page and not results("fuzz.json")["wrong"]
    assert f"{soak['steps']:,} steps" in page and f"{soak['adapters added and removed']} adapters" in page
    assert "resident memory goes from {} to {} MiB".format(*soak["resident MiB"]) in page
    assert len(soak["live tensors"]) == 1
    versions = results("versions.json")
    for name, environment in versions["environments"].items():
        python, torch = re.match(r"Python (3\.\d+)\.\d+, torch (2\.\d+)", name).groups()
        suite = environment["suite"]
        assert f"Python {python} with torch {torch} ({suite['passed']:,}" in page and not suite["failed"]
        assert re.search(rf"{suite['passed']:,}( tests)?, {suite['skipped']} skipped", page)
    pairs = versions["libraries"].values()
    assert len(pairs) == 2 and not any(pair["failed"] for pair in pairs)
    assert " and ".join(f"{pair['passed']:,}" for pair in pairs) + " operator tests" in page


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_bytes()) <= 9000


def anchors(path):
    return {re.sub(r"[^\w -]", "", line.lstrip("# ")).lower().replace(" ", "-")
            for line in path.read_text().splitlines() if line.startswith("#")}  # fmt: skip


@pytest.mark.parametrize("page", [*PAGES, RESULTS / "README.md"], ids=lambda path: path.relative_to(ROOT).as_posix())
def test_files_that_a_page_names_are_there(page):
    code = r"```.*?```"
    prose = re.sub(code, "", page.read_text(), flags=re.DOTALL)
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", prose) if not link.startswith("http")]
    for link in links:
        target, _, anchor = link.partition("#")
        path = page.parent / target if target else page
        assert path.exists(), link
        assert not anchor or anchor in anchors(path), link
    folders = "benchmarks|docs|tests|tools|examples"
    for path in re.findall(rf"`((?:{folders})/[\w./]+)`", prose):
        assert (ROOT / path).exists(), path
    modules = re.findall(r"python -m (benchmarks[\w.]*)", page.read_text())
    for name in modules:
        path = ROOT / name.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), name


def test_host_time_of_a_layer():
    rows = {(row["case"], row["variant"]): row for row in results("host.json")["rows"]}
    groups = [rows[case, "fastlora"] for case in ("roberta", "deit", "llama")]
    peft, frozen = (span([row[f"over_{base}"]["median"] for row in groups]) for base in ("peft", "frozen"))
    where = "host time without a GPU, on a stand-in whose kernels take no time"
    said = f"{where}: {peft} of PEFT's, {frozen} of the frozen layers'"
    assert said in text("README.md"), said
    one = rows["linear", "fastlora"]["over_peft"]["median"]
    assert f"of one adapted Linear {one:.2f} of PEFT's" in text("README.md"), one


# Settings of the experiment, and what each is compared with, by the public name whose docstring says how they did.
EXPERIMENT = {
    "Scores.composite": (("fc", "all-2"),),
    "calibrate": (("fc", "all-2"), ("fim", "all-2")),
    "Tracker.penalty": (("penalty-sum", "penalty-uniform"), ("penalty-sum", "all-2")),
    "set_ranks": (("norm-tracked", "norm"),),
    "initialize_eva": (("eva", "all-2"),),
    "initialize_lora_ga": (("lora-ga", "all-2"),),
    "LoraConfig": (("orthogonal", "all-2"), ("pissa", "all-2"), ("dora", "all-2")),
}


def comparisons(data="sst2"):
    found = results("experiment/results.json")["data"][data]["comparisons"]
    return {(row["setting"], row["against"]): row for row in found}


def test_what_the_guide_says_of_ranks_by_scores():
    names = {"norm": "gradient norm", "fc": '`"fc"`', "variance": "the variance of activations", "random": "random"}
    others = {"fim": '`"fim"`', "fisher": "the Fisher information"}
    verdicts = {name: comparisons()[name, "all-2"]["verdict"] for name in names | others}
    assert verdicts == dict.fromkeys(names, "equivalent") | dict.fromkeys(others, "could not be told")
    six = [comparisons()[name, "all-2"]["verdict"] for name in SCORES]
    assert (len(six), six.count("equivalent"), sum(verdict.startswith("higher") for verdict in six)) == (6, 4, 0)
    assert "Of six scores none made better ranks than uniform ones, four made as good ones" in text("docs/methods.md")
    moved = [comparisons()[name, "norm"]["verdict"] for name in ("norm-warmup", "norm-tracked")]
    penalties = [comparisons()[f"penalty-{name}", "all-2"]["verdict"] for name in ("sum", "relative", "uniform")]
    assert {*moved, *penalties} == {"equivalent"}
    penalty = "FW-LoRA's penalty as well as none, at the smallest of the weights tried, which tuned best;"
    assert f"did as well as those of the start, {penalty}" in text("docs/methods.md")
    tuning = results("experiment/results.json")["data"]["sst2"]["tuning"]
    for name in ("sum", "relative", "uniform"):
        tuned = tuning[f"penalty-{name}"]
        assert tuned["penalty"] == min(penalty for _, penalty, _ in tuned["tried"])
    assert "or after every tenth, did as well as those of the start." in text("docs/ranks.md")
    starts = [comparisons()[name, "all-2"]["verdict"].partition(",")[0] for name in ("pissa", "eva")]
    assert starts == ["lower"] * 2
    assert "PiSSA and EVA did worse than the default start." in text("docs/methods.md")
    cola = {setting: row["verdict"].partition(",")[0] for (setting, _), row in comparisons("cola").items()}
    told = {setting: verdict for setting, verdict in cola.items() if verdict != "could not be told"}
    assert (len(cola), told) == (6, {"full": "higher", "lora-ga": "lower"})
    said = "two of six differences could be told: full fine-tuning did better, and LoRA-GA worse than the default"
    assert said in text("docs/methods.md")
    norm, fc, variance, random = names.values()
    same = f"ranks by {norm}, by {fc} and by {variance} did as well as uniform ones (within half a point of accuracy), "
    same += f"and so did {random} ranks."
    assert f"{same} Of {' and '.join(others.values())} it could not be told." in text("docs/ranks.md")


@pytest.mark.parametrize("name", EXPERIMENT)
def test_docstrings_say_what_the_experiment_found(name):
    said, any_told = " ".join(operator.attrgetter(name)(fastlora).__doc__.split()), False
    for data, unit in (("sst2", "points"), ("cola", "hundredths")):
        rows = comparisons(data)
        there = [rows[pair] for pair in EXPERIMENT[name] if pair in rows]
        told = [row for row in there if row["verdict"] not in ("not run", "could not be told")]
        figures = [f"{points(row['found'], signed=True)} {unit}" for row in told]
        assert re.findall(rf"[+-]\d+\.\d+ ± \d+\.\d+ {unit}", said) == figures
        any_told |= bool(told)
    assert ("docs/experiment.md" in said) == any_told
