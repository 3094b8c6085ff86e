"""What the benchmarks say: pairing by round, the correctness gate, verdicts, and a report that says all of it."""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[2]))

from benchmarks import bench_experts, bench_growth, bench_merge, bench_statistics, expert_ranks  # noqa: E402
from benchmarks.harness import estimators, gate, peers, recorded, result_files, shapes  # noqa: E402
from benchmarks.harness.interleave import Interleaved, median_interval, rows  # noqa: E402
from benchmarks.harness.plot import plot  # noqa: E402
from benchmarks.reports import builds, report  # noqa: E402
from fastlora.tracking.statistics import Tracked  # noqa: E402

needs_peft = pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is not installed")
TINY = {
    fused: shapes.Shape("tiny", "tiny", 2, 5, 24, (16, 8, 8) if not fused else (16, 16, 16), 3, fused)
    for fused in (True, False)
}


@dataclass
class Ticking:
    """A variant whose calls take a known time on a clock of its own."""

    name: str
    clock: Clock
    every: int = 1
    tracker: None = None
    calls: list[int] = field(default_factory=list)

    def forget(self) -> None:
        pass

    def call(self) -> None:
        self.clock.now += self.clock.cost[self.name] * (1 + self.clock.slow)
        self.calls.append(self.clock.turn)
        self.clock.turn += 1


@dataclass
class Clock:
    cost: dict[str, float]
    now: float = 0.0
    slow: float = 0.0
    turn: int = 0


def run_rounds(clock, variants, rounds):
    turns = Interleaved(variants, "fastlora", 2, clock=lambda: clock.now)
    for i in range(rounds):
        clock.slow = float(i)  # the machine gets slower: ratios within a round do not
        turns.before()
        turns.run()
        turns.after()
    return turns


def test_variants_take_turns_and_ratios_are_within_a_round():
    clock = Clock({"frozen": 2.0, "fastlora": 3.0, "peft": 4.0, "rare": 8.0})
    variants = [Ticking(name, clock, every=3 if name == "rare" else 1) for name in clock.cost]
    found = {row["variant"]: row for row in rows(run_rounds(clock, variants, 7).times)}
    assert {name: row["ratio_to_peft"]["median"] for name, row in found.items()} == {
        "frozen": 0.5, "fastlora": 0.75, "peft": 1.0, "rare": 2.0,
    }  # fmt: skip
    assert found["rare"]["ratio_to_frozen"]["median"] == 4.0
    assert found["rare"]["ms"]["rounds"] == 3 and found["peft"]["ms"]["rounds"] == 7
    assert found["peft"]["ratio_to_peft"]["p10"] == found["peft"]["ratio_to_peft"]["p90"] == 1.0
    # The second round runs backwards, without the rare one: peft, fastlora, frozen, two calls each.
    assert [variant.calls[2] for variant in variants[:3]] == [12, 10, 8]


@needs_peft
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fused", [True, False])
def test_every_variant_passes_the_gate(fused, dtype):
    built = peers.variants(shapes.Problem(TINY[fused], dtype))
    for variant in built:
        gate.check(variant)
        assert variant.saved_bytes() >= (0 if variant.name == "frozen" else variant.x.nbytes)
    names = [variant.name for variant in built]
    assert len(set(names)) == len(names) and set(names) <= set(peers.LABELS)
    assert ({"naive", "exact"} <= set(names)) == (dtype == torch.float32)
    assert {"function", "python"} <= set(names)


@needs_peft
@pytest.mark.parametrize("build", ["function", "naive", "hooks", "exact", "python"])
def test_the_gate_refuses_what_is_wrong(build, monkeypatch):
    problem = shapes.Problem(TINY[False], torch.float32)
    variant = {
        "function": peers.function,
        "naive": peers.naive,
        "hooks": peers.hooks,
        "exact": peers.exact,
        "python": lambda p: peers.ours(p, "python", backend="eager"),
    }[build](problem)
    gate.check(variant)
    if build == "naive":
        variant.parts[0] = variant.parts[1]
    elif build == "hooks":
        variant.problem.dy = variant.problem.dy * 1.01
        variant.problem.expected = (lambda whole: lambda _: whole)(variant.problem.expected(variant.projections))
        variant.dy = variant.problem.split(variant.problem.dy, dim=2)
        variant.problem.dy = variant.problem.dy * 1.01
    elif build == "exact":
        whole = Tracked.exact_values
        monkeypatch.setattr(
            Tracked, "exact_values", lambda *args: [{"grad_sq": 1.01 * v["grad_sq"]} for v in whole(*args)]
        )
    else:
        variant.projections[1].B.data.mul_(1.01)
        problem.expected = (lambda whole: lambda _: whole)(problem.expected(peers.frozen(problem).projections))
    with pytest.raises(AssertionError, match=f"{build}: relative errors above"):
        gate.check(variant)


def spread(middle, width=0.01, rounds=31):
    low, high = middle - width, middle + width
    return {"median": middle, "p10": low, "p25": low, "p75": high, "p90": high, "median_low": low, "median_high": high,
            "rounds": rounds}  # fmt: skip


def row(variant, peft, ours=1.0, frozen=1.0):
    ratios = {"ratio_to_peft": spread(peft), "ratio_to_fastlora": spread(ours), "ratio_to_frozen": spread(frozen)}
    return {"variant": variant, "ms": spread(10 * peft), **ratios}


def document():
    measured = [
        row("frozen", 0.78), row("peft", 1.0, 1.2, 1.28), row("naive", 1.45, 1.7, 1.9), row("fastlora", 0.80),
        row("python", 0.86, 1.07, 1.10), row("act_var_step", 0.81, 1.009), row("exact_step", 1.2, 1.5),
    ]  # fmt: skip
    layer = {"kind": "layer", "shape": "S1", "model": "DeiT-Base qkv", "rows_of_x": 1576, "width": 768, "rank": 8,
             "outputs": [768] * 3, "fused": True, "dtype": "fp32", "binding": True, "gate": "passed",
             "targets": [asdict(t) for t in shapes.targets("S1", "fp32")], "errors": {"fastlora": 7e-7},
             "saved_bytes": {"fastlora": 5 * 2**20}, "calls_per_round": 1, "rows": measured}  # fmt: skip
    memory = {"kind": "memory", "model": "large", "rows_of_x": 512, "width": 4096, "outputs": [4096], "rank": 16,
              "gradient": 2**26, "rows": [{"variant": "exact", "peak": 2**25, "saved": 2**23}]}  # fmt: skip
    environment = {"cpu": "a CPU", "cores": 2, "threads": 1, "clock": "CPU time", "warmup_rounds": 2, "python": "3.11",
                   "load_average": [0.0, 0.0, 0.0], "bf16_matmul": None, "native_isa": None, "torch_cpu": "AVX512",
                   "torch": "2", "peft": "0", "fastlora": "0", "source": "abc"}  # fmt: skip
    threads = {"kind": "threads", "shape": "S1", "threads": 2, "rows": measured[:2]}
    return {"environment": environment, "labels": peers.LABELS, "results": [layer, threads, memory]}


def test_verdicts_of_the_report():
    lines = report.markdown(json.loads(json.dumps(document()))).splitlines()
    verdicts = [line.split(" | ") for line in lines if line.startswith("| S1 fp32 |")][:5]
    assert [(cells[1], cells[2], cells[3], cells[5]) for cells in verdicts] == [
        ("fastlora", "time of PEFT", "0.42", "missed"),
        ("fastlora", "time of the frozen layers", "1.11", "met"),
        ('fastlora, backend="eager"', "time of PEFT", "0.60", "missed"),
        ('fastlora, backend="eager"', "time of the frozen layers", "1.58", "met"),
        ("fastlora + probes + act_var + tracker.step()", "time without statistics", "1.01", "met (within noise)"),
    ]
    assert "0.780" in verdicts[0][6]  # what the matmul alone takes of PEFT's time
    assert any(line.startswith("| fastlora + exact grad_sq, kept | 32.0 | 8.0 |") for line in lines)
    assert any("pure-Python backend was measured" in line for line in lines)


def test_while_a_gate_is_red_no_time_of_anything_is_shown(tmp_path):
    given = document()
    wrong = {**given["results"][0], "shape": "S2", "gate": "failed", "reason": "dB[0] is off"}
    given["results"].append(wrong)
    text = report.markdown(given)
    assert "dB[0] is off" in text and "gate is red" in text
    assert "|" not in text and "0.78" not in text and "%" not in text
    assert [path.suffix for path in report.write(given, tmp_path)] == [".json", ".md"]


def model_result(cost, width, control=1.0):
    rows = [row("model_probes", 1.0, cost), row("control", 1.0, control)]
    for each in rows:
        each["ratio_to_fastlora"] = spread(each["ratio_to_fastlora"]["median"], width)
    return {"kind": "model", "model": "deit", "rank": 8, "batch": {"x": [2]}, "rows": rows,
            "targets": [asdict(t) for t in shapes.MODEL_TARGETS]}  # fmt: skip


@pytest.mark.parametrize(
    "cost, width, verdict",
    [(1.006, 0.002, "met"), (1.03, 0.01, "missed"), (1.006, 0.01, "undecided"), (1.012, 0.01, "undecided")],
)
def test_the_verdict_on_the_cost_of_statistics(cost, width, verdict):
    given = {**document(), "results": [model_result(cost, width)]}
    lines = [line for line in report.markdown(given).splitlines() if line.startswith("**deit: statistics cost ")]
    assert len(lines) == 1 and f"% of a training step** (at most 1.0: {verdict};" in lines[0]
    assert f"{100 * (cost - 1):+.2f} [{100 * (cost - width - 1):+.2f}, {100 * (cost + width - 1):+.2f}]" in lines[0]


def test_bootstrap_intervals_of_medians():
    values = [1.0 + 0.01 * i for i in range(31)]
    low, high = median_interval(values)
    assert low < 1.15 < high and (low, high) == median_interval(values)
    assert 0.05 < high - low < 0.16  # the sample's standard error is 0.016: about +- 2 of the median's 0.02
    assert median_interval([2.0] * 5) == (2.0, 2.0)
    assert median_interval([1.0, 2.0])[0] == 1.0


def test_intervals_hold_the_median_as_often_as_they_say():
    generator = torch.Generator().manual_seed(0)
    hits = 0
    for seed in range(200):
        low, high = median_interval(torch.randn(31, generator=generator).tolist(), draws=400, seed=seed)
        hits += low <= 0.0 <= high
    assert 180 <= hits <= 199


def test_fitted_powers():
    sizes = [1, 2, 4, 8, 16]
    exact = bench_growth.fit(sizes, [3.0 * n**1.5 for n in sizes])
    assert exact["p"] == pytest.approx(1.5) and exact["c"] == pytest.approx(3.0)
    assert exact["high"] - exact["low"] < 1e-6
    noisy = bench_growth.fit(sizes, [3.0 * n**1.5 * (1.3 if n == 4 else 1.0) for n in sizes])
    assert noisy["low"] < 1.5 < noisy["high"]


def test_estimates_are_unbiased_and_their_error_falls_with_the_number_of_probes():
    generator = torch.Generator().manual_seed(0)
    x, dy = torch.randn(40, 24, generator=generator), torch.randn(40, 12, generator=generator)
    norms = torch.rand(24, generator=generator, dtype=torch.float64)
    calls = [recorded.Recorded(name, 0, x * (i + 1), dy, norms) for i, name in enumerate("abc")]
    for kind in estimators.KINDS:
        few, many = estimators.errors(calls, kind, 1), estimators.errors(calls, kind, 16)
        assert abs(few["bias"]) < 6 * few["single"] / (few["draws"] * 3) ** 0.5
        assert few["single"] > 2 * many["single"] > 0 and many["spearman"] == 1.0
    assert estimators.rounding(calls) < 1e-5


def test_every_kind_of_probe_is_timed():
    assert set(bench_statistics.TRACKED_BY) == set(estimators.KINDS)


def statistics_results():
    measured = [row("naive", 1.4, 1.5), row("fastlora", 0.8), row("rademacher_4", 0.8, 1.01)]
    rows = [*measured, row("exact_step", 1.3, 1.5)]
    costs = {"kind": "statistics", "shape": "R", "model": "a model", "rows_of_x": 9, "width": 8, "outputs": [8],
             "rank": 2, "gate": "passed", "errors": {"naive": 1e-7}, "saved_bytes": {"naive": 2**20},
             "rows": rows}  # fmt: skip
    errors = {"kind": "rademacher", "k": 4, "calls": 2, "draws": 3, "single": 0.2, "single_p10": 0.1, "single_p90": 0.3,
              "ema": 0.02, "bias": 0.001, "spearman": 0.999}  # fmt: skip
    estimates = {"kind": "estimates", "model": "a model", "source": "SST-2", "layers": 2, "steps": [0],
                 "rows": [errors], "rounding": 1e-7}  # fmt: skip
    fitted = bench_growth.fit([1, 2, 4], [1.0, 2.0, 4.1])
    growth = {"kind": "growth", "axis": "rows M", "case": "small", "sizes": [1, 2, 4], "ms": [spread(1.0)] * 3,
              "bytes": [1, 2, 4], "peaks": [2**20, 2**21, 2**22], "time": fitted, "kept": fitted, "peak": fitted,
              "expected": "1"}  # fmt: skip
    return [costs, estimates, growth]


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="matplotlib is not installed")
def test_statistics_and_growth_are_reported_and_drawn(tmp_path):
    given = {**document(), "results": statistics_results()}
    made = [path.name for path in report.write(given, tmp_path, "statistics")]
    assert made == ["statistics.json", "statistics.md", "statistics_pareto.png", "statistics_growth.png"]
    text = (tmp_path / "statistics.md").read_text()
    assert "| rademacher | 4 | 20.0 [10.0, 30.0] | 2.00 | +0.10 | 0.9990 |" in text
    assert "+40.0 [+39.0, +41.0]" in text  # the naive way is over PEFT
    assert "| rows M | 1 to 4 |" in text and "| 1.00 to 4.00 |" in text
    given["results"][0]["gate"] = "failed"
    given["results"][0]["reason"] = "grad_sq[0] is off"
    assert [path.name for path in report.write(given, tmp_path, "red")] == ["red.json", "red.md"]


def test_a_target_that_does_not_bind_is_marked():
    given = document()
    given["results"][0]["binding"] = False
    text = report.markdown(given)
    assert text.count("not binding here |") == 5


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="matplotlib is not installed")
def test_the_plot_is_drawn_from_what_binds(tmp_path):
    assert plot(document(), tmp_path / "layer.png") and (tmp_path / "layer.png").stat().st_size > 10_000
    assert not plot({**document(), "results": []}, tmp_path / "nothing.png")
    assert not (tmp_path / "nothing.png").exists()


def test_targets_name_measured_variants():
    for shape in shapes.SHAPES:
        for dtype in shapes.DTYPES:
            for target in shapes.targets(shape, dtype):
                assert target.variant in peers.LABELS and target.measure in report.MEASURES and target.limit > 0


def test_merges_are_checked_and_reported(monkeypatch):
    monkeypatch.setattr(bench_merge, "BLOCKS", 1)
    monkeypatch.setattr(bench_merge, "WIDTH", 64)
    variants = [
        bench_merge.Merge(name, dtype) for name, dtype in (("merge_fp32", torch.float32), ("fastlora", torch.bfloat16))
    ]
    with pytest.raises(AssertionError, match="fastlora"):
        variants[0].call()
        bench_merge.check(variants)  # the second has not merged
    for variant in variants:
        variant.forget()
        variant.call()
    bench_merge.check(variants)
    found = bench_merge.rows({"merge_fp32": {0: 2.0, 1: 4.0}, "fastlora": {0: 1.0, 1: 3.0}})
    assert found[1]["ratio_to_fp32"]["median"] == 0.625
    result = {"kind": "merge", "weights": 10, "matrices": 6, "rank": 2, "rows": found}
    assert "| fastlora, bf16 weights | 2000.0 [" in "\n".join(report._merges([result], peers.LABELS))


def test_experts_are_checked_and_reported(monkeypatch):
    for name, size in (("EXPERTS", 4), ("ACTIVE", 2), ("TOKENS", 8), ("WIDTH", 32), ("INNER", 16), ("RANK", 2)):
        monkeypatch.setattr(bench_experts, name, size)
    built = bench_experts.variants(bench_experts.frozen())
    for step in built:
        step.call()
    bench_experts.check(built)
    with torch.no_grad():
        next(p for n, p in built[1].model.named_parameters() if "lora_B" in n).mul_(2)
    built[1].call()
    with pytest.raises(AssertionError, match="fastlora"):
        bench_experts.check(built)
    found = bench_experts.rows({"frozen": {0: 2.0}, "fastlora": {0: 3.0}, "control_step": {0: 9.0}})
    assert [row["variant"] for row in found] == ["frozen", "fastlora"] and found[1]["ratio_to_frozen"]["median"] == 1.5
    result = {"kind": "experts", "model": "m", "layers": 2, "experts": 4, "active": 2, "tokens": 8, "rank": 2}
    assert "| fastlora | 3000.0 [" in "\n".join(report._experts([{**result, "rows": found}], peers.LABELS))


def test_ranks_of_experts(monkeypatch, tmp_path):
    sizes = dict(WIDTH=32, EXPERTS=4, LAYERS=1, LENGTH=16, BATCH=2, PRETRAIN=2, ADAPT=2, RANK=2, SEEDS=2)
    for name, size in sizes.items():
        monkeypatch.setattr(expert_ranks, name, size)
    for name in ("train.tsv", "dev.tsv"):
        (tmp_path / name).write_text("sentence\tlabel\n" + "some words of no use at all\t1\nothers\t0\n" * 20)
    document = expert_ranks.run(tmp_path)
    load = document["load"]
    assert len(load) == 8 and sum(load.values()) == pytest.approx(2)  # for each of a layer's two matrices
    for row in document["results"]:
        assert sum(row["ranks"].values()) == document["budget"] == 16 and len(row["loss"]) == 2
    assert "| grad_sq | " in expert_ranks.markdown(document)


def test_statistics_over_builds_are_reported(monkeypatch, tmp_path):
    monkeypatch.setattr(builds, "LAYERS", ("S4",))
    assert builds.main(["--out", str(tmp_path), "--builds", "2"]) == 0
    rows = result_files.read(tmp_path / "builds.json")["rows"]
    variants = ["fastlora", "control", "probes", "probes_step", "act_var", "act_var_step"]
    assert [(row["dtype"], row["variant"]) for row in rows] == [(d, v) for d in shapes.DTYPES for v in variants]
    assert all(row["low"] <= row["percent"] <= row["high"] for row in rows)
    assert "over 2 builds" in (tmp_path / "builds.md").read_text()


def test_a_row_is_a_line():
    row = {"variant": "fastlora", "ms": {"median": 1.0, "p10": 0.1}, "sizes": [1, [2, 3]]}
    result = {"kind": "layer", "rank": 8, "errors": {"peft": 1e-7}, "rows": [row, row], "limit": None}
    named = {"one": {"passed": 1}, "two": {"passed": 2, "failed": ["a"]}}
    given = {"title": "é", "environment": {}, "results": [result, result], "files": named, "nothing": []}
    assert result_files.dumps({"title": "t", "rank": 2, "results": [result], "files": named}) == "\n".join([
        "{", ' "title": "t",', ' "rank": 2,', ' "results": [', "  {",
        '   "kind": "layer", "rank": 8, "errors": {"peft": 1e-07},', '   "rows": [',
        f"    {json.dumps(row)},", f"    {json.dumps(row)}", "   ],", '   "limit": null', "  }", " ],",
        ' "files": {', '  "one": {"passed": 1},', '  "two": {"passed": 2, "failed": ["a"]}', " }", "}", "",
    ])  # fmt: skip
    for document in (given, [row, row], [], {}, [1, 2], "text", 1.5, [given, [given]], {"a": {"b": {"c": {}}}}):
        assert json.loads(result_files.dumps(document)) == document
    assert result_files.dumps([{1: (row, row)}]) == result_files.dumps([{"1": [row, row]}])  # as json has them


def test_a_document_that_is_no_json_leaves_the_file_as_it_was(tmp_path):
    path = tmp_path / "some.json"
    result_files.write(path, {"a": 0.1})
    with pytest.raises(TypeError):
        result_files.write(path, {"a": object()})
    assert result_files.read(path) == {"a": 0.1}


RESULTS = Path(result_files.__file__).parents[1] / "results"


@pytest.mark.parametrize("path", sorted(RESULTS.rglob("*.json")), ids=lambda p: p.relative_to(RESULTS).as_posix())
def test_committed_results_have_a_row_a_line(path):
    assert path.read_text() == result_files.dumps(result_files.read(path)), (
        f"python -m benchmarks.harness.result_files {path}"
    )


def test_the_gpu_model_is_of_the_shipped_tiles():
    from benchmarks import gpu_model

    rows = [gpu_model.row(case, gpu_model.resident_programs()) for case in gpu_model.cases()]
    stale = "run `python -m benchmarks.gpu_model --out benchmarks/results`"
    assert (gpu_model.RESULTS / "gpu_model.md").read_text() == gpu_model.markdown(rows), stale
    for one in rows:
        assert all(kernel["ideal_us"] <= kernel["estimate_us"] for kernel in one["kernels"])
        # Every part has one choice, and none is far from the least estimate.
        for part in ("forward", "backward"):
            some = [
                s for s in one["strategies"] if s["part"] == part and not s["strategy"].endswith(gpu_model.UNSHIPPED)
            ]
            (shipped,) = (s["estimate_us"] for s in some if s["shipped"])
            assert shipped <= 1.07 * min(s["estimate_us"] for s in some), (one["case"], part)
    # By hand: DeiT's fused qkv has 25216 rows, 768 columns, 2304 outputs.
    linear = next(k for k in rows[0]["kernels"] if k["name"] == "linear")
    assert abs(linear["gigaflops"] - 2 * 25216 * 768 * 2304 / 1e9) < 1e-6
    assert abs(linear["megabytes"] - 2 * (25216 * 768 + 2304 * 768 + 25216 * 2304) / 1e6) < 1e-6
