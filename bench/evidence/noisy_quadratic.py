"""The noisy quadratic model of the Lookahead paper (arXiv 1907.08610, section 3.1): exact, and as the package runs it.

The loss is a (θ − c)² / 2 with c drawn anew for each gradient, so that a gradient is a θ and noise. cycles.py has the
exact variance of the steady state, noisy_fronts.py what follows from it, and stepping.py measures lookahead_fused's
optimizers: by its answer to single kicks, to rounding, and by sampling, to a standard error that is reported.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from bench.evidence import noisy_fronts as fronts
from bench.evidence import svg
from bench.evidence.cycles import Method, cycle, lookahead_contraction, lookahead_variance, radius, steady_variance
from bench.evidence.experiment import JSON, Job, Scale
from bench.evidence.figures import Figure, Picture, exact
from bench.evidence.records import Records
from bench.evidence.stepping import impulse_variance, measured_radius, sample

BETA = 0.9
LR = 1.0
# Exact ones go without limit; what is sampled stays away from 1, where a run takes long to forget its start.
SLOWEST = 0.9925


@dataclass(frozen=True)
class Family:
    """Settings of an arm, and the curvatures (times a learning rate of 1) at which it is sampled."""

    settings: tuple[Method, ...]
    curvatures: tuple[float, ...]


_GRID = tuple(Method(k=k, alpha=alpha) for k in (5, 10) for alpha in (0.2, 0.5, 0.8))
_OVER = tuple(Method(momentum=BETA, k=5, alpha=alpha) for alpha in (0.5, 0.8))
FAMILIES: dict[str, Family] = {
    "sgd": Family((Method(),), (0.03, 0.1, 0.5, 1.5)),
    "momentum": Family((Method(momentum=0.5), Method(momentum=BETA)), (0.03, 0.3, 1.5)),
    "lookahead": Family(_GRID, (0.02, 0.1, 0.5, 1.5)),
    "lookahead-momentum": Family(_OVER, (0.03, 0.3, 1.2)),
    "lookahead-pullback": Family(tuple(replace(one, pullback="pullback") for one in _OVER), (0.03, 0.3, 1.2)),
    "lookahead-reset": Family(tuple(replace(one, pullback="reset") for one in _OVER), (0.03, 0.3, 1.2)),
    "outer-momentum": Family(
        (
            Method(k=5, alpha=0.5, outer_momentum=0.5),
            Method(k=30, alpha=0.7, outer_momentum=0.5),
            Method(k=10, alpha=0.7, outer_momentum=0.9),
            Method(k=5, alpha=0.5, outer_momentum=0.5, outer_nesterov=False),
            Method(momentum=BETA, k=5, alpha=0.5, outer_momentum=0.5, pullback="pullback"),
        ),
        (0.03, 0.3, 1.0),
    ),
    "ema": Family((Method(decay=0.9), Method(decay=0.98), Method(momentum=BETA, decay=0.9)), (0.03, 0.3, 1.5)),
    "workers": Family(
        (
            Method(k=5, alpha=0.5, workers=4),
            Method(k=5, alpha=0.5, workers=16),
            Method(momentum=BETA, k=5, alpha=0.7, outer_momentum=0.5, workers=4),
        ),
        (0.1, 0.5, 1.0),
    ),
}
# Where the package's answer to kicks is followed until nothing is left of it.
KICKED = {
    Scale.SMOKE: (0.3, 0.7, 1.3),
    Scale.QUICK: (0.03, 0.1, 0.3, 0.7, 1.0, 1.3, 1.7),
    Scale.FULL: (0.003, 0.01, 0.03, 0.1, 0.3, 0.7, 1.0, 1.3, 1.7),
}
# From one learning rate of a front to the next.
FACTORS = {Scale.SMOKE: 2.0, Scale.QUICK: 2**0.5, Scale.FULL: 2**0.25}
# Relative standard error of a sampled variance, and how many replicas are run at once.
ERRORS = {Scale.SMOKE: 0.002, Scale.QUICK: 0.0015, Scale.FULL: 0.0007}
REPLICAS = 20_000


def _tuned(plain: tuple[Method, ...], scale: Scale) -> tuple[Method, ...]:
    """Lookahead over each of some plain methods."""
    ks, alphas = ((5,), (0.5,)) if scale is Scale.SMOKE else ((5, 10, 20), (0.2, 0.5, 0.8))
    return tuple(replace(one, k=k, alpha=alpha) for one in plain for k in ks for alpha in alphas)


def _arms(scale: Scale) -> dict[str, tuple[Method, ...]]:
    """What is drawn; each over the same learning rates, and each with the settings that it is tuned over."""
    betas = (0.5, 0.8, 0.9, 0.95) if scale is Scale.FULL else (0.5, 0.9) if scale is Scale.QUICK else (BETA,)
    heavy = tuple(Method(momentum=beta) for beta in betas)
    decays = (0.99,) if scale is Scale.SMOKE else (0.9, 0.97, 0.99, 0.997)
    return {
        "sgd": (Method(),),
        "momentum": heavy,
        "lookahead": _tuned((Method(),), scale),
        "lookahead-momentum": _tuned(heavy, scale),
        "outer-momentum": tuple(replace(one, outer_momentum=0.5) for one in _tuned((Method(),), scale)),
        "ema": tuple(Method(decay=decay) for decay in decays),
    }


# Pairs whose tuned losses are compared.
PAIRS = (
    ("lookahead", "sgd"),
    ("lookahead-momentum", "momentum"),
    ("outer-momentum", "sgd"),
    ("ema", "sgd"),
    ("lookahead", "ema"),
)


class NoisyQuadratic:
    """The experiment; see the module."""

    name = "noisy-quadratic"
    revision = 3

    def names(self) -> tuple[str, ...]:
        """Every figure that it can make."""
        singles = ("closed-form", "kicks", "contraction", "mean")
        ratios = ("equal-lr.sgd", "equal-lr.momentum", "equal-speed.sgd", "equal-speed.momentum", "equal-speed.tuned")
        return (
            f"{self.name}.worst-relative-error",
            f"{self.name}.worst-standard-error",
            *(f"{self.name}.{family}.worst-relative-error" for family in FAMILIES),
            *(f"{self.name}.{word}.worst-relative-error" for word in singles),
            f"{self.name}.lookahead-over-small-lr-variance",
            f"{self.name}.lookahead-over-small-lr-variance.*",
            *(f"{self.name}.variance-ratio.{word}" for word in ratios),
            f"{self.name}.workers.variance-times-workers",
            *(f"{self.name}.tuned-after-{h}.{arm}-{base}" for arm, base in PAIRS for h in fronts.HORIZONS),
            *(f"{self.name}.front.{arm}-{base}" for arm, base in PAIRS),
        )

    def jobs(self, scale: Scale, records: Records) -> Iterator[Job]:
        """The exact ones first."""
        yield Job({"part": "comparisons"}, fronts.comparisons, 0.6)
        for arm, settings in _arms(scale).items():
            for method in settings:
                factor = FACTORS[scale]
                setting: dict[str, JSON] = {"part": "front", "arm": arm, "method": asdict(method), "factor": factor}
                yield Job(setting, lambda m=method, f=factor: fronts.front(m, f), 0.1)  # type: ignore[misc]
        for family, of in FAMILIES.items():
            for method in of.settings[:1] if scale is Scale.SMOKE else of.settings:
                curvatures = [a for a in KICKED[scale] if _slowest(method, a) < 0.9995]
                setting = {"part": "kicks", "family": family, "method": asdict(method), "curvatures": list(curvatures)}
                yield Job(setting, lambda m=method, a=curvatures: kicked(m, a), 0.05)  # type: ignore[misc]
        for family, of in FAMILIES.items():
            chosen = [(method, a) for method in of.settings for a in of.curvatures if _slowest(method, a) < SLOWEST]
            for method, a in [(of.settings[0], of.curvatures[1])] if scale is Scale.SMOKE else chosen:
                error = ERRORS[scale]
                setting = {"part": "sampled", "family": family, "method": asdict(method), "curvature": a}
                setting["error"] = error
                cost = _cost(method, a, error)
                yield Job(setting, lambda m=method, a=a, e=error: sampled(m, a, e), cost)  # type: ignore[misc]

    def figures(self, records: Records) -> list[Figure]:
        """Of every part that is recorded."""
        found = records.of(self.name, self.revision)
        return [
            *_of_comparisons([result for setting, result in found if setting["part"] == "comparisons"]),
            *_of_kicks([(setting, result) for setting, result in found if setting["part"] == "kicks"]),
            *_of_samples([(setting, result) for setting, result in found if setting["part"] == "sampled"]),
            *_of_fronts(_fronts(found)),
        ]

    def pictures(self, records: Records) -> list[Picture]:
        """The paper's: loss after 1000 gradients against the steady state's."""
        found = _fronts(records.of(self.name, self.revision))
        return [_picture(found)] if found else []


EXPERIMENT = NoisyQuadratic()


def kicked(method: Method, curvatures: Sequence[float]) -> dict[str, JSON]:
    """Exact variances and the package's, from kicks; contractions of a cycle likewise, but not of workers, who have
    none of their own."""
    a = np.array(curvatures)
    result: dict[str, JSON] = {
        "curvatures": a.tolist(),
        "exact": [steady_variance(method, one, LR) for one in a],
        "measured": impulse_variance(method, a, LR).tolist(),
    }
    if method.workers == 1:
        result["radius"] = radius(cycle(method, a, LR)[0]).tolist()
        result["measured_radius"] = measured_radius(method, a, LR).tolist()
    return result


def sampled(method: Method, curvature: float, error: float) -> dict[str, JSON]:
    """The exact variance, and the package's under noise."""
    variance = steady_variance(method, curvature, LR)
    seed = zlib.crc32(json.dumps([asdict(method), curvature]).encode())
    return {
        "exact": variance,
        **asdict(sample(method, curvature, LR, variance=variance, error=error, replicas=REPLICAS, seed=seed)),
    }


def _cost(method: Method, curvature: float, error: float) -> float:
    """Seconds to sample a cell: of each of its gradients for all replicas, and of what it takes to forget its start."""
    kept = _slowest(method, curvature)
    cycles = 2 / error**2 / REPLICAS * (1 + kept**2) / (1 - kept**2) + 8 / -math.log(kept)
    return 2e-4 * method.k * method.workers * cycles


def _slowest(method: Method, curvature: float) -> float:
    return float(radius(cycle(method, curvature, LR)[0]))


Result = Mapping[str, Any]
Found = list[tuple[Mapping[str, Any], Mapping[str, Any]]]


def _of_comparisons(results: list[Result]) -> Iterator[Figure]:
    """The ratios, for each the one that is furthest from 1 over the curvatures that its note names."""
    for result in results:
        name, a = EXPERIMENT.name, list(result["curvatures"])
        small = [place for place, one in enumerate(a) if one <= 0.1]
        for k in (5, 10, 20):
            for alpha in (0.2, 0.5, 0.8):
                worst = _furthest([result[f"small_lr_k{k}_alpha{alpha}"][place] for place in small])
                note = f"V of Lookahead at γ over V of SGD at αγ, k {k}, α {alpha}: furthest from 1 for γA ≤ .1"
                label = f"{name}.lookahead-over-small-lr-variance"
                yield exact(f"{label}.k{k}-alpha{alpha}", worst, unit="ratio", better=0, note=note)
                if (k, alpha) == (5, 0.5):
                    yield exact(label, worst, unit="ratio", better=0, note=note)
        at = a.index(0.1)
        for word in ("sgd", "momentum"):
            note = f"Lookahead (k 5, α .5) over its inner {word} at the same γ, γA = .1"
            yield _ratio(f"{name}.variance-ratio.equal-lr.{word}", result[f"equal_lr_{word}"][at], note)
            ratios = result[f"equal_speed_{word}"]
            if ratios:
                note = (
                    f"Lookahead (k 5, α .5) over {word} of the same contraction a gradient, geometric mean over "
                    f"{len(ratios)} of {len(a)} γA, from {min(ratios):.3f} to {max(ratios):.3f}"
                )
                yield _ratio(f"{name}.variance-ratio.equal-speed.{word}", _mean(ratios), note)
        ratios = result["equal_speed_tuned"]
        note = "both with the best γ and β for a contraction of " + ", ".join(f"{r:g}" for r in result["tuned_rates"])
        yield _ratio(f"{name}.variance-ratio.equal-speed.tuned", _mean(ratios), note)
        note = "M V_M / V_1 furthest from 1"
        yield exact(
            f"{name}.workers.variance-times-workers", _furthest(result["workers"]), unit="ratio", better=0, note=note
        )


def _of_kicks(found: Found) -> Iterator[Figure]:
    """How far the package is from the exact values, and the paper's formulas from the Lyapunov equation."""
    if not found:
        return
    name = EXPERIMENT.name
    errors = [_error(r["measured"], r["exact"]) for _, r in found]
    radii = [_error(r["measured_radius"], r["radius"]) for _, r in found if "radius" in r]
    cells = sum(len(r["exact"]) for _, r in found)
    yield _worst(f"{name}.kicks.worst-relative-error", max(errors), f"steady-state variance, {cells} cells")
    yield _worst(f"{name}.contraction.worst-relative-error", max(radii), "spectral radius of the package's cycle")
    closed = []
    for setting, result in found:
        method = Method(**setting["method"])
        if method.momentum or method.outer_momentum or method.decay or method.workers > 1:
            continue
        for a, variance, contraction in zip(result["curvatures"], result["exact"], result["radius"], strict=True):
            closed.append(abs(lookahead_variance(a, LR, method.k, method.alpha) / variance - 1))
            closed.append(abs(abs(lookahead_contraction(a, LR, method.k, method.alpha)) - contraction))
    note = "Proposition 2's variance and contraction against the Lyapunov equation"
    yield _worst(f"{name}.closed-form.worst-relative-error", max(closed), note)


def _of_samples(found: Found) -> Iterator[Figure]:
    """How far the sampled variances are from the exact ones, with the worst cell's own interval."""
    name = EXPERIMENT.name
    # A cell that was run at several scales counts as it was run best.
    finest: dict[str, tuple[Mapping[str, Any], Result]] = {}
    for setting, result in found:
        key = json.dumps([setting["method"], setting["curvature"]])
        if key not in finest or setting["error"] < finest[key][0]["error"]:
            finest[key] = (setting, result)
    cells = list(finest.values())
    for family in ["", *FAMILIES]:
        of = [result for setting, result in cells if family in ("", setting["family"])]
        if not of:
            continue
        worst = max(of, key=lambda r: abs(r["variance"] / r["exact"] - 1))
        error = abs(worst["variance"] / worst["exact"] - 1)
        half = 1.96 * worst["standard_error"] / worst["exact"]
        label = f"{name}.{family}.worst-relative-error" if family else f"{name}.worst-relative-error"
        note = f"steady-state variance, sampled, {len(of)} cells; the interval is the worst cell's own"
        # Whether that error is more than chance, with as many cells to choose the worst from.
        p = 1 - (1 - math.erfc(error / half * 1.96 / math.sqrt(2))) ** len(of)
        yield Figure(label, error, max(0.0, error - half), error + half, p, worst["replicas"], "ratio", -1, note)
    if cells:
        errors = [result["standard_error"] / result["exact"] for _, result in cells]
        yield _worst(f"{name}.worst-standard-error", max(errors), "relative, of a sampled variance")
        means = [result["mean_error"] for _, result in cells]
        yield _worst(f"{name}.mean.worst-relative-error", max(means), "path of the mean, as a part of its start")


def _of_fronts(found: dict[str, fronts.Front]) -> Iterator[Figure]:
    """Tuned losses after each horizon, and along the front."""
    name = EXPERIMENT.name
    for arm, base in PAIRS:
        if arm not in found or base not in found:
            continue
        for horizon in fronts.HORIZONS:
            ratio = found[arm].best(horizon)[0] / found[base].best(horizon)[0]
            note = (
                f"loss after {horizon} gradients at a constant learning rate, 100 curvatures 1/i; each at its best, "
                f"{_best_lr(found[arm], horizon)} and {_best_lr(found[base], horizon)}"
            )
            yield _ratio(f"{name}.tuned-after-{horizon}.{arm}-{base}", ratio, note)
        note = "loss after 1000 gradients at equal steady-state loss, geometric mean"
        yield _ratio(f"{name}.front.{arm}-{base}", fronts.ratio_along(found[arm], found[base], 1000), note)


def _fronts(found: Found) -> dict[str, fronts.Front]:
    by_arm: dict[str, list[Result]] = {}
    for setting, result in found:
        if setting["part"] == "front":
            by_arm.setdefault(setting["arm"], []).append(result)
    return {arm: fronts.read_front(results) for arm, results in by_arm.items()}


def _picture(found: dict[str, fronts.Front]) -> Picture:
    figure, axes = svg.axes()
    horizon = 1000
    grid = np.geomspace(2e-3, 2.0, 200)
    for arm, one in found.items():
        losses = one.at(grid, horizon)
        axes.plot(grid, np.where(np.isfinite(losses), losses, np.nan), label=arm)
    axes.set(xscale="log", yscale="log", xlabel="steady-state loss", ylabel=f"loss after {horizon} gradients")
    axes.legend()
    title = "Noisy quadratic model: what is reached after 1000 gradients, for each steady-state loss"
    return Picture("noisy-quadratic-front", title, svg.text(figure))


def _best_lr(front: fronts.Front, horizon: int) -> str:
    _, best = front.best(horizon)
    edge = best >= fronts.HIGHEST_LR or best < 2 * fronts.LOWEST_LR
    return f"{best:.3g}" + (" (at the edge of those tried)" if edge else "")


def _ratio(name: str, value: float, note: str) -> Figure:
    return exact(name, value, unit="ratio", better=-1, note=note)


def _worst(name: str, value: float, note: str) -> Figure:
    return exact(name, value, unit="ratio", better=-1, note=note)


def _error(measured: list[float], exact_values: list[float]) -> float:
    return max(abs(m / e - 1) if e else abs(m) for m, e in zip(measured, exact_values, strict=True))


def _furthest(ratios: list[float]) -> float:
    return max(ratios, key=lambda x: abs(math.log(x)))


def _mean(ratios: list[float]) -> float:
    return math.exp(sum(math.log(x) for x in ratios) / len(ratios))
