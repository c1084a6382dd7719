"""The errors of 8-bit codes on the moments of real training runs, beside bf16's and those of published codes.

    python -m bench.codes [--quick] [--json FILE]

Trains the demo's GPT and convolutional network with AdamW in fp32 (beta2 = 0.999), and tells of their moments how far
elements lie below their block's largest, what writing them once in each code does to them, and what is left of them
when they lie in the code from the first step on. Before that, of blocks whose gradients differ by orders of magnitude,
what their steps are. Five minutes on two cores. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.codes import errors
from bench.codes.codecs import Bf16, Distance, Floating, Table, dynamic, eight_bit_float, linear, logarithmic
from bench.codes.errors import Pair
from bench.codes.moments import Trained, train
from bench.codes.tables import shown, shown_uneven
from bench.demo.tasks import tasks
from lookahead_fused.bench.conditions import conditions, describe

STEPS = {"gpt": 200, "digits": 400}
BLOCKS = (64, 128, 256, 512, 2048)
_FIRST, _SECOND = Floating(20, True), Floating(20, False)
PAIRS = (
    Pair("m 3 bits, v 3", _FIRST, _SECOND, 128),
    Pair("m 2 bits, v 3", Floating(21, True), _SECOND, 128),
    Pair("m 3 bits, v 4", _FIRST, Floating(19, False), 128),
    Pair("distance", Distance(True), Distance(False), 128),
    Pair("distance, nearest", Distance(True, False), Distance(False, False), 128),
    Pair("distance, even draws", Distance(True), Distance(False), 128, even=True),
    Pair(
        "logarithmic",
        Table(logarithmic(True, 6), unbiased=True),
        Table(logarithmic(False, 9), unbiased=True, keeps=True),
        128,
    ),
    Pair("linear", Table(linear(True)), Table(linear(False)), 128),
    Pair("dynamic, published", Table(dynamic(True)), Table(dynamic(False)), 2048),
    Pair("dynamic, small blocks", Table(dynamic(True)), Table(dynamic(False)), 256),
    Pair("dynamic, unbiased", Table(dynamic(True), True), Table(dynamic(False), True, True), 128),
    Pair("E4M3", Table(eight_bit_float(4, 3, 1, True)), Table(eight_bit_float(4, 3, 1, False)), 128),
    Pair("E5M2", Table(eight_bit_float(5, 2, 4, True)), Table(eight_bit_float(5, 2, 4, False)), 128),
    Pair("bf16", Bf16(), Bf16(), 128),
    Pair("bf16, nearest", Bf16(False), Bf16(False), 128),
)
LAST = 20
# Those whose block is varied.
VARIED = ("m 3 bits, v 3", "m 3 bits, v 4", "distance", "dynamic, published")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures and prints; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tenth of the training, to see that it runs")
    parser.add_argument("--json", metavar="FILE", type=Path, help="also write the figures there")
    options = parser.parse_args(arguments)
    where = conditions()
    print(describe(where))
    unevenly = {pair.name: errors.uneven(pair) for pair in PAIRS}
    print(f"\n{shown_uneven(unevenly)}", flush=True)
    found = {}
    for task in tasks(quick=False):
        steps = STEPS[task.key] // (10 if options.quick else 1)
        trained = train(task, steps, (steps // 8, steps))
        found[task.key] = measured(trained, 200 if options.quick else 2000)
        loss = sum(trained.losses[-LAST:]) / LAST
        print(
            f"\n{shown(task.title, found[task.key])}\nTraining loss, mean of the last {LAST} steps: {loss:.3f}",
            flush=True,
        )
    if options.json:
        blocks = {code: [asdict(one) for one in of_code] for code, of_code in unevenly.items()}
        whole = {"conditions": asdict(where), "uneven": blocks, "tasks": found}
        options.json.write_text(json.dumps(whole, indent=1) + "\n")
    return 0


def measured(trained: Trained, fading: int) -> dict[str, list[dict[str, Any]]]:
    """All figures of a run, as JSON has them.

    Args:
        fading: steps without gradients, after which the mean of v is taken.
    """
    last = trained.moments[-1]
    spreads = [
        {"moment": name, "block": block} | asdict(errors.within(tensors, block))
        for name, tensors in (("v", last.second), ("m", last.first))
        for block in BLOCKS
    ]
    once = [
        {"code": pair.name, "block": pair.block, "step": moments.step}
        | asdict(errors.one_shot(pair, moments, pair.block))
        for moments in trained.moments
        for pair in PAIRS
        if not pair.even  # the same at first
    ]
    blocks = [
        {"code": pair.name, "block": block, "step": last.step} | asdict(errors.one_shot(pair, last, block))
        for pair in PAIRS
        if pair.name in VARIED
        for block in BLOCKS
    ]
    kept = []
    for pair in PAIRS:
        of_run, second = errors.kept(pair, trained.gradients)
        kept.append(
            {"code": pair.name, "block": pair.block}
            | asdict(of_run)
            | {name: errors.faded(pair, second, fading, alone=name == "alone") for name in ("together", "alone")}
        )
    return {"within": spreads, "once": once, "blocks": blocks, "kept": kept}


if __name__ == "__main__":
    sys.exit(main())
