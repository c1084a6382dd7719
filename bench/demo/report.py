"""What the demo shows for its result: tables in the terminal, one picture, and all figures as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from bench.demo.check import EARLY_STEPS, LOSS, WEIGHTS, departures
from bench.demo.results import LAST_STEPS, RunResult, Score
from bench.demo.runs import ALPHA, FUSED, PLAIN, UNFUSED, K
from bench.demo.train import TaskResult

# Colours that stay apart for colour-blind readers and in grey.
COLOURS = {FUSED: "#20639b", UNFUSED: "#f2a541", PLAIN: "#8a8a8a"}
INK = "#1a1a1a"
SMOOTHED = 10

NOTES = f"""\
Train loss: mean of the last {LAST_STEPS} steps. Slow: held out, with the slow weights. Accuracy: held out.
Step: optimizer.step() alone; the medians of steps without and of steps with a sync, weighted {K - 1} : 1.
Share: of a whole training step. State: all tensors kept between steps.
Growth: the most by which resident memory rises in {K} steps (VmHWM, reset by /proc/self/clear_refs, after
malloc_trim; in pages: some ten kB of noise).
Alloc.: what torch's allocator hands out in {K} steps, given back or not, to the byte."""


def print_tables(results: Sequence[TaskResult], conditions: str, console: Console) -> None:
    """The tables of all tasks, under the conditions of the run."""
    console.print()
    console.print(escape(conditions), highlight=False)
    for result in results:
        console.print()
        console.print(_table(result))
        compared = " and ".join(f"{result.speedup(name):.2f} times that of '{name}'" for name in (UNFUSED, PLAIN))
        console.print(f"speed of our optimizer.step(): {compared}", highlight=False)
        console.print(escape(verdict(result)), highlight=False)
    console.print()
    console.print(NOTES, style="dim", highlight=False)


def verdict(result: TaskResult) -> str:
    """One line: whether the fused and the unfused run coincide, and how closely."""
    deviations = result.deviations
    said = "DIFFER" if departures(deviations) else "coincide"
    return (
        f"fused and unfused {said}: loss within {max(deviations.loss):.1e} of at most {LOSS.whole:.0e}, "
        f"weights within {max(deviations.weights):.1e} of at most {WEIGHTS.whole:.0e}"
    )


def save_json(results: Sequence[TaskResult], conditions: dict[str, Any], target: Path) -> None:
    """Every figure of the run, the losses and times of single steps among them."""
    tasks = {
        result.task.key: {
            "title": result.task.title,
            "data": result.source,
            "parameters": result.parameters,
            "tensors": result.tensors,
            "steps": result.task.steps,
            "lr": result.task.lr,
            "weight_decay": result.task.weight_decay,
            "k": K,
            "alpha": ALPHA,
            "speedup": {name: result.speedup(name) for name in (UNFUSED, PLAIN)},
            "deviations": asdict(result.deviations),
            "departures": departures(result.deviations),
            "runs": {name: asdict(run) for name, run in result.runs.items()},
        }
        for result in results
    }
    content = {
        "conditions": conditions,
        "tolerances": {"early_steps": EARLY_STEPS, "loss": asdict(LOSS), "weights": asdict(WEIGHTS)},
        "tasks": tasks,
    }
    target.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def draw(results: Sequence[TaskResult], conditions: str, target: Path) -> None:
    """The picture: a row for each task, with loss curves, deviation of fused from unfused, optimizer time."""
    figure, rows = plt.subplots(
        len(results),
        3,
        figsize=(15, 4.3 * len(results) + 1.1),
        dpi=110,
        squeeze=False,
        gridspec_kw={"width_ratios": (1.5, 1.0, 0.9)},
        layout="constrained",
    )
    for result, (curves, deviation, times) in zip(results, rows, strict=True):
        _draw_curves(result, curves)
        _draw_deviation(result, deviation)
        _draw_times(result.runs, times)
        for axes in (curves, deviation, times):
            axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(
        f"Lookahead (k = {K}, α = {ALPHA}) over AdamW: fused in one pass, unfused, and none",
        fontsize=14,
        color=INK,
    )
    figure.supxlabel(conditions, fontsize=8.5, color="#555555")
    figure.savefig(target)
    plt.close(figure)


def _table(result: TaskResult) -> Table:
    classifies = result.task.classifies
    title = (
        f"{result.task.title}: {result.parameters / 1e6:.2f} M parameters in {result.tensors} tensors, "
        f"{result.task.steps} steps\n{result.source}"
    )
    table = Table(title=Text(title), title_justify="left", title_style="bold")
    table.add_column("", no_wrap=True)
    headings = ["train\nloss", "held out\nloss", "slow\nloss"]
    headings += ["accuracy\n%", "slow\n%"] if classifies else []
    headings += ["step\nms", "share\n%", "state\nMB", "growth\nMB", "alloc.\nMB"]
    for heading in headings:
        table.add_column(heading, justify="right")
    for name, run in result.runs.items():
        scores = [run.held_out, run.held_out_slow]
        cells = [
            f"{run.train_loss:.4f}",
            *("–" if score is None else f"{score.loss:.4f}" for score in scores),
        ]
        cells += [_percent(score) for score in scores] if classifies else []
        cells += [
            f"{run.step.median * 1e3:.3f}",
            f"{run.share * 100:.1f}",
            f"{run.state_bytes / 1e6:.2f}",
            "not seen" if run.growth is None else f"{run.growth / 1e6:.2f}",
            f"{run.allocated / 1e6:.3f}",
        ]
        table.add_row(name, *cells, style="bold" if name == FUSED else "")
    return table


def _percent(score: Score | None) -> str:
    return "–" if score is None else f"{score.accuracy * 100:.1f}"


def _draw_curves(result: TaskResult, axes: Axes) -> None:
    for name, style in ((PLAIN, _line(1.6)), (UNFUSED, _line(4.5)), (FUSED, _line(1.6))):
        run = result.runs[name]
        score = run.held_out if run.held_out_slow is None else run.held_out_slow
        which = "" if run.held_out_slow is None else ", slow weights"
        label = f"{name} (held out{which}: {score.loss:.3f})"
        smooth = _smooth(run.losses)
        steps = range(SMOOTHED, SMOOTHED + len(smooth))
        axes.plot(steps, smooth, color=COLOURS[name], label=label, **style)
    axes.set_title(f"{result.task.title}, {result.parameters / 1e6:.2f} M parameters", loc="left", fontsize=11)
    axes.set_ylabel(f"training loss, mean of {SMOOTHED} steps")
    axes.set_xlabel("step")
    axes.grid(color="#e6e6e6", linewidth=0.8)
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], labels[::-1], frameon=False, fontsize=9)


def _line(width: float) -> dict[str, Any]:
    return {"linewidth": width, "solid_capstyle": "round"}


def _smooth(losses: Sequence[float]) -> list[float]:
    return [sum(losses[end - SMOOTHED : end]) / SMOOTHED for end in range(SMOOTHED, len(losses) + 1)]


def _draw_deviation(result: TaskResult, axes: Axes) -> None:
    loss, weights = result.deviations.loss, result.deviations.weights
    steps = len(loss)
    loss_colour, weights_colour = COLOURS[FUSED], "#a23b72"
    # A logarithmic scale leaves out zeros: the steps at which both losses are the same number.
    axes.plot(range(1, steps + 1), loss, ".", markersize=4, color=loss_colour, label="training loss")
    places = range(K, K * len(weights) + 1, K)
    axes.plot(places, weights, color=weights_colour, label="weights, relative to their way")
    for tolerance, colour in ((LOSS, loss_colour), (WEIGHTS, weights_colour)):
        axes.plot(
            [1, EARLY_STEPS, EARLY_STEPS, max(steps, EARLY_STEPS)],
            [tolerance.early, tolerance.early, tolerance.whole, tolerance.whole],
            linestyle="--",
            linewidth=1.1,
            color=colour,
        )
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    # Room for the legend above the dashed lines.
    axes.set_ylim(min(low, 1e-8), max(high, 1e-2))
    said = "not the same" if departures(result.deviations) else "the same but for rounding"
    axes.set_title(f"fused against unfused: {said}", loc="left", fontsize=11)
    axes.set_ylabel("deviation (dashed: allowed)")
    axes.set_xlabel("step")
    axes.grid(color="#e6e6e6", linewidth=0.8)
    axes.legend(frameon=False, fontsize=9, loc="upper left")


def _draw_times(runs: dict[str, RunResult], axes: Axes) -> None:
    names = list(runs)
    times = [runs[name].step for name in names]
    medians = [time.median * 1e3 for time in times]
    below = [(time.median - time.q1) * 1e3 for time in times]
    above = [(time.q3 - time.median) * 1e3 for time in times]
    places = range(len(names))
    axes.bar(
        places,
        medians,
        yerr=[below, above],
        width=0.62,
        color=[COLOURS[name] for name in names],
        error_kw={"ecolor": INK, "elinewidth": 1.1, "capsize": 4},
    )
    top = max(time.q3 for time in times) * 1e3
    for place, time in zip(places, times, strict=True):
        text = f"{time.median * 1e3:.2f}"
        axes.text(place, time.q3 * 1e3 + 0.02 * top, text, ha="center", va="bottom", color=INK)
    axes.set_xticks(list(places), [name.replace(", ", ",\n") for name in names], fontsize=9)
    axes.set_ylim(0, 1.15 * top)
    axes.set_title("optimizer.step(), ms (median, quartiles)", loc="left", fontsize=11)
