"""The picture of the CPU benchmarks: python bench/plot.py build/bench/cpu.json bench/cpu.png"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")

import matplotlib.pyplot as plt
from matplotlib.ticker import FuncFormatter, MultipleLocator

# Colours that stay apart for colour-blind readers and in grey.
BAR, EMPHASIS, INK, PALE = "#7fa8d1", "#20639b", "#1a1a1a", "#8a8a8a"

# Speed-ups beyond this do not set the scale.
CUT = 3.0

# What a reader of the picture knows, where the report names the benchmark.
CASES = {
    "gpt2-adamw": "GPT-2 small, AdamW",
    "gpt2-sgd": "GPT-2 small, SGD with momentum",
    "gpt2-bf16": "GPT-2 small, AdamW, bf16 parameters",
    "one-large": "one tensor of 64 Mi, AdamW",
    "many-small": "1000 tensors of 64, AdamW",
}


def speedups(content: dict[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
    """(case, opponent, figure) of every speed-up in a report that has a target."""
    found = []
    for name, benchmark in content["benchmarks"].items():
        for figure in benchmark["figures"]:
            if name in CASES and figure["unit"] == "x" and figure["target"] is not None:
                found.append((CASES[name], figure["label"].partition(" against ")[2], figure))
    return found


def draw(content: dict[str, Any], target: Path) -> None:
    """Write the picture of a report of cpu.py as a PNG.

    Raises:
        ValueError: if the report has no speed-up.
    """
    bars = speedups(content)
    if not bars:
        raise ValueError("the report has no speed-up to draw: none of " + ", ".join(CASES))
    height = 0.52 * len(bars) + 1.5
    figure, axes = plt.subplots(figsize=(9.6, height), dpi=110)
    figure.subplots_adjust(left=0.335, right=0.88, top=1 - 0.62 / height, bottom=0.92 / height)

    # A bar many times longer than the others would make stubs of them: it is cut, and says so.
    comparable = [value["value"]["q3"] for _, _, value in bars if value["value"]["median"] <= CUT]
    end = max(1.12 * max(comparable, default=CUT), 1.5)
    for row, (case, opponent, value) in enumerate(bars):
        median, q1, q3 = (value["value"][key] for key in ("median", "q1", "q3"))
        # Against no Lookahead at all is the claim that surprises: the darker bars.
        colour = EMPHASIS if "no Lookahead" in opponent else BAR
        axes.barh(row, min(median, end), height=0.62, color=colour, zorder=2)
        if median > end:
            for shift in (0, 0.022):
                x = end * (0.93 + shift)
                axes.plot([x, x + 0.012], [row + 0.4, row - 0.4], color="white", linewidth=3, zorder=3)
        else:
            axes.plot([q1, q3], [row, row], color=INK, linewidth=1.3, zorder=3, solid_capstyle="butt")
            for quartile in (q1, q3):
                axes.plot([quartile, quartile], [row - 0.13, row + 0.13], color=INK, linewidth=1.3, zorder=3)
        digits = 1 if median >= 10 else 2
        for text, y, style in (
            (f"{median:.{digits}f}×", 6, {"weight": "bold", "color": INK}),
            (f"{q1:.{digits}f} – {q3:.{digits}f}", -6, {"size": 8.5, "color": PALE}),
        ):
            axes.annotate(
                text, (1, row), xycoords=("axes fraction", "data"), xytext=(10, y),
                textcoords="offset points", va="center", **style,
            )  # fmt: skip
        for text, y, style in (
            (case, 6, {"color": INK}),
            (f"vs {opponent}", -6, {"color": PALE, "size": 8.5}),
        ):
            axes.annotate(text, (0, row), xytext=(-8, y), textcoords="offset points", ha="right", va="center", **style)

    axes.set_xlim(0, end)
    axes.xaxis.set_major_locator(MultipleLocator(0.25))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))
    axes.tick_params(axis="x", length=0, labelcolor=PALE)
    axes.set_yticks([])
    axes.set_ylim(len(bars) - 0.45, -0.55)
    axes.grid(axis="x", color="#e6e6e6", zorder=0)
    axes.axvline(1, color=INK, linewidth=1, zorder=4)
    for spine in axes.spines.values():
        spine.set_visible(False)

    figure.text(0.012, 1 - 0.33 / height, "Speed of a lookahead_fused step on a CPU, syncs (k = 5) included",
                size=12.5, weight="bold", color=INK)  # fmt: skip
    figure.text(0.012, 0.14 / height, conditions(content), size=8, color=PALE, linespacing=1.5)
    figure.savefig(target)
    plt.close(figure)


def conditions(content: dict[str, Any]) -> str:
    """Two lines: with what the report was made, and how to read the picture."""
    where = content["conditions"]
    shares = [benchmark["others"] for benchmark in content["benchmarks"].values()]
    others = "" if None in shares else f"; other processes had at most {max(shares):.0%} of the cores"
    return (
        f"{where['machine']}, {where['cores']} cores, {where['threads']} threads, torch {where['torch']}; "
        f"fp32 where nothing else is said; {where['utc'][:10]}{others}\n"
        "Times faster than the opponent (1×: equally fast). Bar and bold: median of the ratios of "
        "interleaved rounds; whisker and grey: their quartiles."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="draw the picture of a report of bench/cpu.py")
    parser.add_argument("report", type=Path, help="what `python bench/cpu.py --json FILE` wrote")
    parser.add_argument("picture", type=Path, help="the PNG to write")
    options = parser.parse_args()
    draw(json.loads(options.report.read_text()), options.picture)


if __name__ == "__main__":
    main()
