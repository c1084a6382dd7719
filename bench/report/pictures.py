"""The pictures of a report: ratios with their spread, shares of the ceiling, growth, memory."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")

import matplotlib.pyplot as plt
from matplotlib.figure import Figure as Picture
from matplotlib.ticker import FuncFormatter, NullFormatter

from lookahead_fused.bench.opponents import MASTERS, OURS, PLAIN, SYNC

# Colours that stay apart for colour-blind readers and in grey.
INK, PALE, RULE = "#1a1a1a", "#757575", "#e6e6e6"
NEAR = {SYNC: ("#20639b", "o"), PLAIN: ("#d1731e", "D"), MASTERS: ("#3a8f5c", "s"), f"{OURS}, fp32": ("#8e5aa8", "^")}
FAR = ("#b5b5b5", "o")

Info = dict[str, Any]


def comparisons(content: Info) -> list[Info]:
    """What a report holds of each comparison that was made."""
    return [b["extra_info"] for b in content["benchmarks"] if "short" in b["extra_info"]]


def times(ratio: float) -> str:
    """A ratio as people read it."""
    return f"{ratio:.2f}×" if ratio < 10 else f"{ratio:.1f}×"


def of_kind(info: Info, *kinds: str) -> list[Info]:
    return [figure for figure in info["figures"] if figure["kind"] in kinds]


def verdict(value: Info) -> str:
    """Faster, slower, or a tie: whether all of the middle half of the ratios lies on one side of 1."""
    return "faster" if value["q1"] > 1 else "slower" if value["q3"] < 1 else "tie"


def ratios(content: Info, *, all_opponents: bool = True, title: str = "") -> Picture:
    """How many times faster a step is than each opponent's: one line a comparison, a mark an opponent."""
    lines = [info for info in comparisons(content) if of_kind(info, "ratio")]
    height = 0.36 * len(lines) + 1.9
    picture, axes = plt.subplots(figsize=(10.5, height), dpi=110)
    picture.subplots_adjust(left=0.385, right=0.83, top=1 - 0.95 / height, bottom=1.0 / height)
    largest, smallest, used = 1.5, 0.9, {}
    for row, info in enumerate(lines):
        axes.axhline(row, color=RULE, linewidth=0.8, zorder=0)
        shown: dict[str, str] = {}
        for figure in of_kind(info, "ratio"):
            name, value = figure["of"], figure["value"]
            if name not in NEAR and not all_opponents:
                continue
            colour, mark = NEAR.get(name, FAR)
            used[name if name in NEAR else "another way to write it, or a package"] = (colour, mark)
            axes.plot([value["q1"], value["q3"]], [row, row], color=colour, linewidth=2.2, zorder=2, alpha=0.6)
            axes.plot([value["median"]], [row], mark, color=colour, markersize=6, zorder=4 if name in NEAR else 3)
            largest, smallest = max(largest, value["q3"]), min(smallest, value["q1"])
            if name in NEAR:
                shown[name] = times(value["median"])
        for column, name in ((0, SYNC), (1, PLAIN)):
            text = shown.get(name) or (shown.get(MASTERS, "") if column == 0 else "")
            colour = NEAR[name][0] if name in shown else NEAR[MASTERS][0]
            axes.annotate(text, (1, row), xycoords=("axes fraction", "data"), xytext=(10 + 62 * column, 0),
                          textcoords="offset points", va="center", size=9.5, color=colour)  # fmt: skip
    axes.set_xscale("log")
    axes.set_xlim(smallest / 1.06, largest * 1.12)
    ticks = [
        t
        for t in (0.5, 0.7, 0.8, 0.9, 1, 1.2, 1.5, 2, 3, 5, 10, 20, 50, 100, 200)
        if smallest / 1.06 <= t <= largest * 1.12
    ]
    if largest > 10:
        ticks = [t for t in ticks if t not in (0.7, 0.9, 1.2)]
    axes.set_xticks(ticks)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}×"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(axis="x", which="both", length=0, labelcolor=PALE)
    axes.set_yticks(range(len(lines)), [info["short"] for info in lines], color=INK, size=9.5)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(lines) - 0.4, -0.6)
    axes.axvline(1, color=INK, linewidth=1.1, zorder=1)
    axes.annotate("slower ", (1, -0.6), ha="right", va="bottom", size=8.5, color=PALE, annotation_clip=False)
    axes.annotate(" faster", (1, -0.6), ha="left", va="bottom", size=8.5, color=PALE, annotation_clip=False)
    for column, label in ((0, "+ sync"), (1, "plain")):
        axes.annotate(label, (1, -0.6), xycoords=("axes fraction", "data"), xytext=(10 + 62 * column, 0),
                      textcoords="offset points", va="bottom", size=8.5, color=PALE, annotation_clip=False)  # fmt: skip
    for spine in axes.spines.values():
        spine.set_visible(False)
    # The near ones first, in their order.
    used = {name: used[name] for name in (*NEAR, *used) if name in used}
    marks = [plt.Line2D([], [], color=c, marker=m, linestyle="", label=name) for name, (c, m) in used.items()]
    picture.legend(handles=marks, loc="upper left", bbox_to_anchor=(0.005, 1 - 0.36 / height), ncols=3, frameon=False,
                   fontsize=8.5, handletextpad=0.2, columnspacing=1.2)  # fmt: skip
    picture.text(0.012, 1 - 0.28 / height, title or "Times faster than each opponent, syncs included",
                 size=12.5, weight="bold", color=INK)  # fmt: skip
    picture.text(0.012, 0.10 / height, footnote(content), size=7.8, color=PALE, linespacing=1.45)
    return picture


def shares(content: Info) -> Picture | None:
    """How much of the bandwidth ceiling of the same run each large comparison reaches."""
    bars = [(info["short"], figure["value"]) for info in comparisons(content) for figure in of_kind(info, "share")]
    if not bars:
        return None
    height = 0.34 * len(bars) + 1.2
    picture, axes = plt.subplots(figsize=(10.5, height), dpi=110)
    picture.subplots_adjust(left=0.385, right=0.90, top=1 - 0.6 / height, bottom=0.45 / height)
    for row, (_, value) in enumerate(bars):
        axes.barh(row, value["median"], height=0.6, color="#7fa8d1", zorder=2)
        axes.plot([value["q1"], value["q3"]], [row, row], color=INK, linewidth=1.3, zorder=3)
        axes.annotate(f"{value['median']:.1f} %", (1, row), xycoords=("axes fraction", "data"), xytext=(8, 0),
                      textcoords="offset points", va="center", size=9.5, color=INK)  # fmt: skip
    axes.axvline(100, color=INK, linewidth=1, zorder=4)
    axes.set_xlim(0, max(105, 1.03 * max(value["q3"] for _, value in bars)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g} %"))
    axes.set_yticks(range(len(bars)), [name for name, _ in bars], size=9.5)
    axes.set_ylim(len(bars) - 0.4, -0.6)
    return _finish(picture, axes, "Share of the bandwidth ceiling: a loop or copy that moves the same bytes", height)


def growths(content: Info) -> Picture | None:
    """Seconds a step over parameters and over tensors, both logarithmic."""
    curves = [b["extra_info"]["curve"] for b in content["benchmarks"] if "curve" in b["extra_info"]]
    if not curves:
        return None
    picture, all_axes = plt.subplots(1, len(curves), figsize=(10.5, 4.2), dpi=110, squeeze=False)
    picture.subplots_adjust(left=0.08, right=0.98, top=0.84, bottom=0.14, wspace=0.25)
    for axes, curve in zip(all_axes[0], curves, strict=True):
        for who, values in curve["seconds"].items():
            colour, mark = (INK, "o") if who == OURS else NEAR[who]
            axes.loglog(curve["sizes"], [1e3 * s for s in values], marker=mark, color=colour, label=who, markersize=5)
        axes.set_xlabel(curve["of"])
        axes.set_ylabel("ms a step")
        axes.grid(color=RULE)
        axes.legend(frameon=False, fontsize=9)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    picture.text(0.012, 0.93, "Cost of a step as the model grows", size=12.5, weight="bold", color=INK)
    return picture


def memories(content: Info) -> Picture | None:
    """State and peak growth in a step, in bytes a parameter."""
    infos = [
        b["extra_info"] for b in content["benchmarks"] if any(f["kind"] == "state" for f in b["extra_info"]["figures"])
    ]
    if not infos:
        return None
    figures = infos[0]["figures"]
    state = {f["of"]: f["value"]["median"] for f in figures if f["kind"] == "state"}
    peak = {f["of"]: f["value"]["median"] for f in figures if f["kind"] == "memory"}
    height = 0.34 * len(state) + 1.5
    picture, axes = plt.subplots(figsize=(10.5, height), dpi=110)
    picture.subplots_adjust(left=0.40, right=0.92, top=1 - 0.95 / height, bottom=0.75 / height)
    for row, name in enumerate(state):
        axes.barh(row, state[name], height=0.6, color="#7fa8d1", zorder=2, label="state" if row == 0 else None)
        axes.barh(row, peak[name], left=state[name], height=0.6, color="#d1731e", zorder=2,
                  label="more at the peak of a step" if row == 0 else None)  # fmt: skip
        text = f"{state[name]:.1f} + {peak[name]:.1f}"
        axes.annotate(
            text, (state[name] + peak[name], row), xytext=(6, 0), textcoords="offset points", va="center", size=9
        )
    axes.set_yticks(range(len(state)), list(state), size=9.5)
    axes.set_ylim(len(state) - 0.4, -0.6)
    axes.margins(x=0.12)
    axes.set_xlabel("bytes a parameter, beyond parameter and gradient", size=9, color=PALE)
    axes.legend(frameon=False, fontsize=9, loc="lower right", bbox_to_anchor=(1, 1), ncols=2)
    return _finish(picture, axes, "Memory: state, and what a step takes beyond it", height)


def _finish(picture: Picture, axes: Any, title: str, height: float) -> Picture:
    axes.tick_params(length=0)
    axes.tick_params(axis="x", labelcolor=PALE)
    axes.grid(axis="x", color=RULE, zorder=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    picture.text(0.012, 1 - 0.35 / height, title, size=12.5, weight="bold", color=INK)
    return picture


def footnote(content: Info) -> str:
    """With what the report was made, and how to read it."""
    where = content["conditions"]
    shares = [b["extra_info"]["others"] for b in content["benchmarks"] if b["extra_info"].get("others") is not None]
    others = f"; other processes had up to {max(shares):.0%} of the cores" if shares else ""
    return (
        f"{where['gpu'] or where['machine']}, {where['cores']} cores, {where['threads']} threads, "
        f"torch {where['torch']}; {where['utc'][:10]}{others}\n"
        "fp32, k = 5 and one group where nothing else is said. Mark: median of the ratios of interleaved rounds; "
        "line: their quartiles.\n1×: equally fast. The scale is logarithmic."
    )


def draw_all(content: Info) -> list[Picture]:
    """Every picture that the report has something for."""
    drawn: Sequence[Picture | None] = (ratios(content), shares(content), growths(content), memories(content))
    return [picture for picture in drawn if picture is not None]


def embedded(picture: Picture) -> str:
    """A picture as an HTML element that needs no file beside it."""
    buffer = io.BytesIO()
    picture.savefig(buffer, format="png")
    plt.close(picture)
    return f'<img alt="" src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'


def save(picture: Picture, target: Path) -> None:
    picture.savefig(target)
    plt.close(picture)
