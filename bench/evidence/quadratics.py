"""Quadratics without noise: how fast Lookahead over momentum is beside heavy ball, and where it diverges.

The loss has curvatures from 1/κ to 1. A method's rate is the spectral radius of its cycle's map to the power 1/k, the
largest over the curvatures, and its speed the rate's negative logarithm: speeds are compared with each side at its best
learning rate. Where heavy ball converges, Lookahead need not: with the momentum kept at a sync ("none", the package's
default) it turns against the slow weights' step back. cycles.py has the maps, and the package's are read off it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from bench.evidence import svg
from bench.evidence.cycles import Array, Method, Pullback, cycle, radius, rate
from bench.evidence.experiment import JSON, Job, Scale
from bench.evidence.figures import Figure, Picture, exact
from bench.evidence.records import Records
from bench.evidence.stepping import measured_radius

CONDITION = 100.0
TREATMENTS: tuple[Pullback, ...] = ("none", "pullback", "reset")
# What stands beside heavy ball at its own β; the first three are Lookahead as the package makes it by default.
BESIDE: dict[str, Method] = {
    **{mode: Method(k=5, alpha=0.5, pullback=mode) for mode in TREATMENTS},
    "outer-momentum": Method(k=5, alpha=0.5, outer_momentum=0.5),
}
BETAS = (0.8, 0.9, 0.95, 0.99)
# What β is tuned over. Heavy ball's best is ((√κ − 1) / (√κ + 1))², .669 for κ = 100; the others' lie above it, and
# have neighbours as near.
ALL_BETAS = (0.0, 0.3, 0.5, 0.6, 0.65, 0.669, 0.7, 0.725, 0.75, 0.775, 0.825, 0.85, 0.875, 0.925, 0.97, *BETAS)
# Cells in which Lookahead was found to diverge though heavy ball converges: β, lr.
LIMITS = ((0.99, 1.0), (0.9, 3.0))
# The package's map is read off at these.
STEPPED = ((0.5, 0.5), (0.8, 1.6), (0.9, 0.3), (0.9, 3.0), (0.95, 1.0), (0.99, 0.1), (0.99, 1.0))
SIZES = {Scale.SMOKE: (100, 36), Scale.QUICK: (150, 60), Scale.FULL: (300, 120)}


def _others(scale: Scale) -> tuple[Method, ...]:
    """Settings of k and α beyond the default ones."""
    if scale is Scale.SMOKE:
        return ()
    ks, alphas = (2, 5, 10, 20), (0.2, 0.5, 0.8)
    return tuple(Method(k=k, alpha=alpha) for k in ks for alpha in alphas)


class Quadratics:
    """The experiment; see the module."""

    name = "quadratics"
    revision = 1

    def names(self) -> tuple[str, ...]:
        """Every figure that it can make."""
        return (
            *(f"{self.name}.speed.beta-{beta:g}.{word}" for beta in BETAS for word in BESIDE),
            *(f"{self.name}.speed.beta-{beta:g}.{mode}.any-k-alpha" for beta in BETAS for mode in TREATMENTS),
            *(f"{self.name}.speed.any-beta.{word}" for word in BESIDE),
            *(f"{self.name}.speed.any-beta.{mode}.any-k-alpha" for mode in TREATMENTS),
            *(f"{self.name}.{word}.diverging-cells" for word in BESIDE),
            *(f"{self.name}.{mode}.diverging-cells.*" for mode in TREATMENTS),
            *(f"{self.name}.limit.{_cell(*one)}.{word}" for one in LIMITS for word in ("heavy-ball", *BESIDE)),
            *(f"{self.name}.package.{word}.worst-relative-error" for word in BESIDE),
            f"{self.name}.package.worst-relative-error",
        )

    def jobs(self, scale: Scale, records: Records) -> Iterator[Job]:
        """Speeds, regions, limits and the package's maps."""
        curvatures, lrs = SIZES[scale]
        size: dict[str, JSON] = {"curvatures": curvatures, "lrs": lrs}
        cost = 6e-6 * curvatures * lrs
        for beta in ALL_BETAS:
            setting: dict[str, JSON] = {"part": "heavy-ball", "beta": beta, **size}
            yield Job(setting, lambda b=beta: speed(Method(momentum=b), curvatures, lrs), cost / 5)  # type: ignore[misc]
            for word, method in self._beside(scale):
                own = replace(method, momentum=beta)
                setting = {"part": "speed", "word": word, "method": asdict(own), **size}
                yield Job(setting, lambda own=own: speed(own, curvatures, lrs), cost)  # type: ignore[misc]
        for word, method in self._beside(scale):
            if word in TREATMENTS or method == BESIDE[word]:
                setting = {"part": "region", "word": word, "method": asdict(method), **size}
                yield Job(setting, lambda method=method: region(method, curvatures, lrs), cost)  # type: ignore[misc]
        for beta, lr in LIMITS:
            setting = {"part": "limit", "beta": beta, "lr": lr}
            yield Job(setting, lambda beta=beta, lr=lr: limit(beta, lr), 0.1)  # type: ignore[misc]
        for word, method in BESIDE.items():
            setting = {"part": "package", "word": word}
            yield Job(setting, lambda method=method: stepped(method), 0.1)  # type: ignore[misc]

    def figures(self, records: Records) -> list[Figure]:
        """Of every part that is recorded."""
        found = records.of(self.name, self.revision)
        return [*_of_speeds(_finest(found)), *_of_regions(_finest(found)), *_of_limits(found), *_of_package(found)]

    def pictures(self, records: Records) -> list[Picture]:
        """Where each treatment of the momentum diverges though heavy ball converges."""
        regions = {
            setting["word"]: result
            for setting, result in _finest(records.of(self.name, self.revision))
            if setting["part"] == "region" and _is_default(setting)
        }
        return [_picture(word, result) for word, result in regions.items() if word in TREATMENTS]

    def _beside(self, scale: Scale) -> Iterator[tuple[str, Method]]:
        yield from BESIDE.items()
        for other in _others(scale):
            for mode in TREATMENTS:
                if (other.k, other.alpha) != (BESIDE[mode].k, BESIDE[mode].alpha):
                    yield mode, replace(other, pullback=mode)


EXPERIMENT = Quadratics()


def spectrum(curvatures: int) -> Array:
    """Curvatures from 1/κ to 1."""
    return np.geomspace(1 / CONDITION, 1, curvatures)


def worst_rate(method: Method, lrs: Array, curvatures: int) -> Array:
    """The rate [lrs] on the curvature that is slowest."""
    return np.asarray(rate(method, spectrum(curvatures)[None, :], lrs[:, None]).max(axis=1))


def speed(method: Method, curvatures: int, lrs: int) -> dict[str, JSON]:
    """The best learning rate, from a grid that is then made finer around the best; speed 0 where none converges."""
    low, high = 1e-3, 2 * (1 + method.momentum)
    grid = np.geomspace(low, high, lrs)
    for _ in range(4):
        rates = worst_rate(method, grid, curvatures)
        best = int(rates.argmin())
        result: dict[str, JSON] = {"lr": float(grid[best]), "speed": max(0.0, -math.log(rates[best]))}
        grid = np.geomspace(grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)], 12)
    return result


def region(method: Method, curvatures: int, lrs: int) -> dict[str, JSON]:
    """Rates over learning rates and momenta, of the method and of heavy ball: lists of lists [β][lr]."""
    betas = [*np.linspace(0, 0.95, lrs // 6), 0.97, 0.98, 0.99]
    grid = np.linspace(0, 4, lrs // 2 + 1)[1:]
    # A quarter of them are enough: cells lie further apart than the worst curvature moves.
    few = max(60, curvatures // 4)
    own = [worst_rate(replace(method, momentum=float(b)), grid, few).tolist() for b in betas]
    heavy = [worst_rate(Method(momentum=float(b)), grid, few).tolist() for b in betas]
    return {"betas": [float(b) for b in betas], "grid": grid.tolist(), "rates": own, "heavy_ball": heavy}


def limit(beta: float, lr: float) -> dict[str, JSON]:
    """Rates of heavy ball and what stands beside it in one cell, and the package's on the curvature that is worst."""
    curvatures = 4000
    result: dict[str, JSON] = {"heavy-ball": float(worst_rate(Method(momentum=beta), np.array([lr]), curvatures)[0])}
    for word, method in BESIDE.items():
        own = replace(method, momentum=beta)
        rates = rate(own, spectrum(curvatures), lr)
        worst = spectrum(curvatures)[[int(rates.argmax())]]
        result[word] = float(rates.max())
        result[f"{word}-curvature"] = float(worst[0])
        result[f"{word}-package"] = float(measured_radius(own, worst, lr)[0] ** (1 / own.k))
    return result


def stepped(method: Method) -> dict[str, JSON]:
    """Growth of a cycle, exact and read off the package, at every place of STEPPED and over the curvatures."""
    a = spectrum(40)
    exacts: list[JSON] = []
    measured: list[JSON] = []
    for beta, lr in STEPPED:
        own = replace(method, momentum=beta)
        exacts += radius(cycle(own, a, lr)[0]).tolist()
        measured += measured_radius(own, a, lr).tolist()
    return {"exact": exacts, "measured": measured}


Found = Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]


def _finest(found: Found) -> Found:
    """Of what was run at several scales the largest."""
    largest = max((s["curvatures"] for s, _ in found if "curvatures" in s), default=0)
    kept = {}
    for setting, result in sorted(found, key=lambda one: one[0].get("curvatures", largest)):
        key = repr({name: value for name, value in setting.items() if name not in ("curvatures", "lrs")})
        kept[key] = (setting, result)
    return list(kept.values())


def _is_default(setting: Mapping[str, Any]) -> bool:
    method = replace(Method(**setting["method"]), momentum=0.0)
    return method == BESIDE[setting["word"]]


def _of_speeds(found: Found) -> Iterator[Figure]:
    """Speeds over heavy ball's: at each β, and with β tuned on both sides."""
    heavy = {s["beta"]: r["speed"] for s, r in found if s["part"] == "heavy-ball"}
    speeds = [
        (s["word"], s["method"]["momentum"], _is_default(s), r["speed"], s["method"], r["lr"])
        for s, r in found
        if s["part"] == "speed"
    ]
    suffixes = ("", ".any-k-alpha") if any(not default for _, _, default, *_ in speeds) else ("",)
    for word in BESIDE:
        for suffix in suffixes:
            if suffix and word not in TREATMENTS:
                continue
            of = [one for one in speeds if one[0] == word and (suffix or one[2])]
            for beta in BETAS:
                here = [one for one in of if one[1] == beta]
                if here and beta in heavy:
                    yield _speed(f"beta-{beta:g}.{word}{suffix}", here, heavy[beta])
            if of and heavy:
                yield _speed(f"any-beta.{word}{suffix}", of, max(heavy.values()))


def _speed(label: str, candidates: list[Any], base: float) -> Figure:
    _, beta, _, best, method, lr = max(candidates, key=lambda one: one[3])
    note = (
        f"speed over heavy ball's, each at its best learning rate, κ = {CONDITION:g}; "
        f"here k {method['k']}, α {method['alpha']:g}, β {beta:g}, γ {lr:.3g}"
    )
    return exact(f"quadratics.speed.{label}", best / base, unit="ratio", better=1, note=note)


def _of_regions(found: Found) -> Iterator[Figure]:
    """The share of the cells in which heavy ball converges and Lookahead does not."""
    for setting, result in found:
        if setting["part"] != "region":
            continue
        own, heavy = np.array(result["rates"]), np.array(result["heavy_ball"])
        converging = heavy < 1
        diverging = int((converging & (own > 1)).sum())
        word, method = setting["word"], setting["method"]
        label = f"quadratics.{word}.diverging-cells"
        if not _is_default(setting):
            label += f".k{method['k']}-alpha{method['alpha']:g}"
        note = (
            f"{diverging} of {int(converging.sum())} cells of γ and β where heavy ball converges, κ = {CONDITION:g}, "
            f"k {method['k']}, α {method['alpha']:g}"
        )
        yield exact(label, diverging / int(converging.sum()), unit="share", better=-1, note=note)


def _of_limits(found: Found) -> Iterator[Figure]:
    """Rates in the cells of LIMITS."""
    for setting, result in found:
        if setting["part"] != "limit":
            continue
        cell = _cell(setting["beta"], setting["lr"])
        for word in ("heavy-ball", *BESIDE):
            note = "growth of a gradient on the worst curvature; above 1 it diverges"
            if word in BESIDE:
                note += (
                    f"; k 5, α .5, the package's {result[f'{word}-package']:.6f} at {result[f'{word}-curvature']:.4f}"
                )
            yield exact(f"quadratics.limit.{cell}.{word}", result[word], unit="per gradient", better=-1, note=note)


def _of_package(found: Found) -> Iterator[Figure]:
    """How far the package's growth is from the exact one."""
    errors: dict[str, float] = {}
    for setting, result in found:
        if setting["part"] == "package":
            pairs = zip(result["measured"], result["exact"], strict=True)
            errors[setting["word"]] = max(abs(m / e - 1) for m, e in pairs)
    note = f"growth of a cycle, {len(STEPPED)} settings on 40 curvatures"
    for word, error in errors.items():
        label = f"quadratics.package.{word}.worst-relative-error"
        yield exact(label, error, unit="ratio", better=-1, note=note)
    if errors:
        label = "quadratics.package.worst-relative-error"
        yield exact(label, max(errors.values()), unit="ratio", better=-1, note=note)


def _picture(word: str, result: Mapping[str, Any]) -> Picture:
    """Cells by who converges."""
    own, heavy = np.array(result["rates"]), np.array(result["heavy_ball"])
    # 0 nobody's business, 1 both converge, 2 Lookahead alone, 3 heavy ball alone.
    classes = np.where(heavy < 1, np.where(own > 1, 3, 1), np.where(own < 1, 2, 0))
    figure, axes = svg.axes()
    edges = (0, len(result["grid"]), 0, len(result["betas"]))
    from matplotlib.colors import ListedColormap

    colours = ListedColormap(["#eeeeee", "#9ecae1", "#31a354", "#de2d26"])
    axes.imshow(
        classes, origin="lower", aspect="auto", extent=edges, cmap=colours, vmin=0, vmax=3, interpolation="none"
    )
    for set_ticks, values, every in (
        (axes.set_xticks, result["grid"], max(1, len(result["grid"]) // 8)),
        (axes.set_yticks, result["betas"], max(1, len(result["betas"]) // 8)),
    ):
        places = list(range(every - 1, len(values), every))
        set_ticks([place + 0.5 for place in places], [f"{values[place]:.2f}" for place in places])
    axes.set(xlabel="learning rate × largest curvature", ylabel="momentum β")
    handles = [
        axes.scatter([], [], marker="s", color=colours(place), label=label)
        for place, label in enumerate(("neither converges", "both do", "Lookahead alone", "heavy ball alone"))
    ]
    axes.legend(handles=handles, loc="lower right", fontsize="small")
    title = f"Lookahead (k 5, α .5, momentum at a sync: {word}) and heavy ball on curvatures from 1/{CONDITION:g} to 1"
    return Picture(f"quadratics-{word}", title, svg.text(figure))


def _cell(beta: float, lr: float) -> str:
    return f"beta-{beta:g}-lr-{lr:g}"
