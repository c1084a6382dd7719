"""What the losses along runs tell: of the right runs, and nothing that is not there."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import pytest

from bench.evidence.curves import fluctuation, picture, steps_ratio
from bench.evidence.training import Trained


def test_steps_are_those_to_where_the_worse_of_two_ends() -> None:
    steps = [3, 13, 23, 33, 43, 53]
    base = [6.0, 5.0, 4.0, 3.0, 2.0, 1.0]  # ends at 2, reached at step 43
    fast = [4.0, 2.0, 1.0, 1.0, 1.0, 1.0]  # reaches 2 at step 13
    assert steps_ratio(fast, base, steps) == pytest.approx(13 / 43)
    assert steps_ratio(base, fast, steps) == pytest.approx(43 / 13)
    noisy = [5.0, 1.5, 4.0, 2.0, 3.0, 2.5]  # is below its end at once, by chance
    assert steps_ratio(noisy, noisy, steps) == 1.0
    broken = [6.0, 7.0, math.inf, math.inf, math.inf, math.inf]
    assert steps_ratio(broken, base, steps) == 53 / 3
    assert steps_ratio(base, broken, steps) == pytest.approx(3 / 53)
    assert steps_ratio(broken, broken, steps) == 1.0


def test_fluctuation_is_what_a_trend_leaves() -> None:
    falling = [10.0 - 0.1 * i for i in range(40)]
    assert fluctuation(falling) == pytest.approx(0, abs=1e-20)
    wave = [0.3 if i % 2 else -0.3 for i in range(40)]
    both = [a + b for a, b in zip(falling, wave, strict=True)]
    assert fluctuation(both) == pytest.approx(fluctuation(wave), rel=1e-6)
    assert fluctuation(wave) == pytest.approx(0.09 * 10 / 8, rel=0.05)
    assert fluctuation([*falling[:-1], math.inf]) == math.inf


def trained(*curves: Sequence[float]) -> Trained:
    steps = [10 * i + 3 for i in range(len(curves[0]))]
    return Trained("made up", steps, [list(curve) for curve in curves], [], {}, {"loss": [c[-1] for c in curves]})


def test_each_arm_has_its_line_and_the_same_runs_the_same_picture() -> None:
    base = trained([4.0, 3.0, 2.0, 1.5, 1.0], [4.0, 3.1, 2.2, 1.7, 1.2], [4.0, 3.2, 2.5, 2.0, 1.9])
    other = trained([4.0, 2.0, 1.0, 0.9, 0.8], [4.0, 2.1, 1.1, 1.0, 0.9], [4.0, 2.2, 1.3, 1.2, 1.1])
    runs = {"base": base, "lookahead": other}
    drawn = picture("task.constant.curves", "a task", runs)
    assert (drawn.name, drawn.title) == ("task.constant.curves", "a task")
    assert all(f">{label}<" in drawn.svg for label in ("base", "lookahead", "step"))
    assert picture("task.constant.curves", "a task", runs) == drawn
    assert picture("task.constant.curves", "a task", {"base": other, "lookahead": base}).svg != drawn.svg


def test_what_diverged_is_a_gap() -> None:
    sound = [4.0, 3.0, 2.0, 1.5, 1.0]
    runs = {"base": trained(sound, sound, sound), "lookahead": trained(*[[4.0, 3.0, math.inf, math.inf, math.inf]] * 3)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drawn = picture("a", "a", runs)
    assert "inf" not in drawn.svg.lower().replace("info", "")
    assert "nan" not in drawn.svg
