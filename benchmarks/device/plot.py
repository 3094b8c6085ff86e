"""``python -m device.plot device_h200.json``: forward and backward of every variant, a panel a case."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from harness import result_files


def draw(result: dict[str, Any], target: Path) -> None:
    """Bars of the medians of the pass "both", with p10 to p90; the frozen layers as a line. CUDA graphs if timed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [r for r in result["rows"] if r["pass"] == "both"]
    mode = "graph" if any(r["mode"] == "graph" for r in rows) else "eager"
    rows = [r for r in rows if r["mode"] == mode]
    cases = list(dict.fromkeys(r["case"] for r in rows))
    lines = max(1, (len(cases) + 2) // 3)
    figure, panels = pyplot.subplots(lines, 3, figsize=(12.6, 3.6 * lines), squeeze=False)
    for panel in panels.flat[len(cases) :]:
        panel.axis("off")
    for panel, case in zip(panels.flat, cases, strict=False):
        mine = [r for r in rows if r["case"] == case]
        names, height = [r["variant"] for r in mine], [r["median_ms"] for r in mine]
        low = [r["median_ms"] - r["p10_ms"] for r in mine]
        high = [r["p90_ms"] - r["median_ms"] for r in mine]
        shade = ["#1f6fb4" if name.startswith("fastlora") else "#b9bec4" for name in names]
        panel.barh(names, height, xerr=[low, high], color=shade, ecolor="#444444", capsize=2)
        panel.invert_yaxis()
        panel.set_title(case, fontsize=10)
        panel.set_xlabel(f"ms, forward + backward, {mode}")
        frozen = next((r["median_ms"] for r in mine if r["variant"] == "frozen"), None)
        if frozen is not None:
            panel.axvline(frozen, color="#444444", linewidth=0.8, linestyle="--")
        panel.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{result['device']}, bf16: shorter is better; dashed: the frozen layers", fontsize=11)
    figure.tight_layout()
    figure.savefig(target, dpi=130)
    pyplot.close(figure)


def main() -> None:
    """Draw a result file."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("json", type=Path)
    given = parser.parse_args()
    draw(result_files.read(given.json), given.json.with_suffix(".png"))


if __name__ == "__main__":
    main()
