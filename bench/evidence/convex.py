"""What the generalisation analysis of Lookahead (arXiv 2509.15776) is about: gap, stability and batches, where convex.

Lookahead-SGD stands beside SGD at its learning rate η and, as the control, beside SGD at αη and SGD for α times as many
gradients: where these agree with Lookahead, what it does is to train less. The batch speed-up is how many gradients
fewer a larger batch needs to the same excess, with the learning rate tuned at each batch size, over the ratio of the
batch sizes: 1 is linear.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from bench.evidence import svg
from bench.evidence.convex_problems import PROBLEMS
from bench.evidence.convex_runs import Race, generalisation, race
from bench.evidence.experiment import JSON, Job, Scale
from bench.evidence.figures import Figure, Picture
from bench.evidence.records import Records
from bench.evidence.statistics import paired, ratio

# In parts of 1 / smoothness; the first is the one whose figures have no learning rate in their names.
LEARNING_RATES = (0.5, 0.25, 1.0)
EXAMPLES = {"least-squares": 100, "logistic": 200}
STEPS, BATCH = 200, 8
REPLICAS = {Scale.SMOKE: 24, Scale.QUICK: 200, Scale.FULL: 500}
TARGETS = {"least-squares": 0.01, "logistic": 0.005}
# Of SGD's learning rates at batch size 1; a batch of B takes B times as much while the speed-up is linear.
CENTRES = {"least-squares": 1 / 32, "logistic": 1 / 4}
BATCHES = (1, 2, 4, 8, 16, 32)
# The figure without a batch size in its name is of this one over 1.
LARGE = 8
MOST = 20_000
ARMS = ("sgd", "small-lr", "short")
MEASURES = {
    "gap": "test risk minus training risk",
    "risk": "test risk",
    "train-risk": "training risk",
    "stability": "distance of the weights of twins that differ in one example",
    "loss-stability": "loss on the replaced example, trained without it minus with it",
}
SAID = {
    "sgd": "SGD at the same learning rate",
    "small-lr": "SGD at α times the learning rate",
    "short": "SGD for α times as many gradients",
}
Result = Mapping[str, Any]


def _race(problem: str, batch: int, scale: Scale) -> Race:
    """Learning rates in a window around what the batch size asks for, the same ones for both arms.

    The best one lies just below the one whose steady state misses the target: the coarser the grid, the more a race is
    won by whose grid happens to have a learning rate there.
    """
    factor = 2**0.5 if scale is Scale.SMOKE else 2**0.25
    lowest, highest = CENTRES[problem] * batch / 4, CENTRES[problem] * batch * 8
    lrs = [lowest]
    while lrs[-1] < highest * 0.99:
        lrs.append(lrs[-1] * factor)
    tuning, blocks, block = {Scale.SMOKE: (8, 6, 8), Scale.QUICK: (64, 16, 8), Scale.FULL: (128, 20, 32)}[scale]
    return Race(TARGETS[problem], lrs, tuning, blocks, block, MOST)


class Convex:
    """The experiment; see the module."""

    name = "convex"
    revision = 2

    def names(self) -> tuple[str, ...]:
        """Every figure that it can make."""
        compared = [f"{measure}.lookahead-{arm}" for measure in (*MEASURES, "stability-ratio") for arm in ARMS]
        raced = ["batch-speedup.lookahead", "batch-speedup.sgd"]
        return tuple(
            name
            for problem in PROBLEMS
            for word in (*compared, *raced)
            for name in (f"{self.name}.{problem}.{word}", f"{self.name}.{problem}.{word}.*")
        ) + tuple(f"{self.name}.{problem}.iterations.lookahead-sgd.*" for problem in PROBLEMS)

    def jobs(self, scale: Scale, records: Records) -> Iterator[Job]:
        """Generalisation at each learning rate, then a race at each batch size."""
        smoke = scale is Scale.SMOKE
        for problem in PROBLEMS:
            for lr in LEARNING_RATES[:1] if smoke else LEARNING_RATES:
                setting: dict[str, JSON] = {"part": "generalisation", "problem": problem, "lr": lr}
                setting["replicas"] = REPLICAS[scale]
                yield Job(setting, lambda s=setting: _generalisation(s), REPLICAS[scale] / 100)  # type: ignore[misc]
        for problem in PROBLEMS:
            for batch in (1, LARGE) if smoke else BATCHES:
                how = _race(problem, batch, scale)
                setting = {"part": "race", "problem": problem, "batch": batch}
                setting["replicas"] = how.tuning + how.blocks * how.block
                cost = (1.5 if smoke else 10 if scale is Scale.QUICK else 40) / batch**0.7
                yield Job(setting, lambda p=problem, h=how, b=batch: _raced(p, h, b), cost)  # type: ignore[misc]

    def figures(self, records: Records) -> list[Figure]:
        """Of every part that is recorded, each as it was run with the most replicas."""
        found = _largest(records.of(self.name, self.revision))
        return [*_of_generalisation(found), *_of_races(found)]

    def pictures(self, records: Records) -> list[Picture]:
        """Gradients to the target over the batch size."""
        found = _races(_largest(records.of(self.name, self.revision)))
        return [_picture(problem, races) for problem, races in found.items() if len(races) > 1]


EXPERIMENT = Convex()


def _generalisation(setting: Mapping[str, Any]) -> dict[str, JSON]:
    problem = setting["problem"]
    found = generalisation(
        PROBLEMS[problem](),
        setting["lr"],
        replicas=setting["replicas"],
        examples=EXAMPLES[problem],
        steps=STEPS,
        batch=BATCH,
        seed=1,
    )
    return {name: list(values) for name, values in found.items()}


def _raced(problem: str, how: Race, batch: int) -> dict[str, JSON]:
    return {name: list(values) for name, values in race(PROBLEMS[problem](), how, batch=batch, seed=batch).items()}


Found = Sequence[tuple[Mapping[str, Any], Result]]


def _largest(found: Found) -> Found:
    kept = {}
    for setting, result in sorted(found, key=lambda one: one[0]["replicas"]):
        kept[repr({name: value for name, value in setting.items() if name != "replicas"})] = (setting, result)
    return list(kept.values())


def _of_generalisation(found: Found) -> Iterator[Figure]:
    for setting, result in found:
        if setting["part"] != "generalisation":
            continue
        lr = setting["lr"]
        suffix = "" if lr == LEARNING_RATES[0] else f".lr-{lr:g}"
        for arm in ARMS:
            for measure, said in MEASURES.items():
                own, base = _values(result, "lookahead", measure), _values(result, arm, measure)
                mean = sum(base) / len(base)
                yield paired(
                    f"convex.{setting['problem']}.{measure}.lookahead-{arm}{suffix}",
                    own,
                    base,
                    unit="distance"
                    if measure == "stability"
                    else "nats"
                    if setting["problem"] == "logistic"
                    else "loss",
                    better=-1,
                    note=f"{said}; of {SAID[arm]} {mean:.4g}",
                )
            own, base = (_means(_values(result, each, "stability")) for each in ("lookahead", arm))
            label = f"convex.{setting['problem']}.stability-ratio.lookahead-{arm}{suffix}"
            note = f"{MEASURES['stability']}, over that of {SAID[arm]}; means of {len(own)} groups of replicas"
            yield ratio(label, own, base, better=-1, note=note)


def _means(values: Sequence[float]) -> list[float]:
    """Means of groups: a single pair of twins is at a distance of 0 if no batch has had the example that differs."""
    size = max(4, len(values) // 20)
    return [sum(values[first : first + size]) / size for first in range(0, len(values) - size + 1, size)]


def _values(result: Result, arm: str, measure: str) -> list[float]:
    if measure == "gap":
        return [t - s for t, s in zip(result[f"{arm}.test"], result[f"{arm}.train"], strict=True)]
    words = {"risk": "test", "train-risk": "train", "stability": "distance", "loss-stability": "loss-distance"}
    return list(result[f"{arm}.{words[measure]}"])


def _races(found: Found) -> dict[str, dict[int, Result]]:
    """By problem and batch size, of those whose blocks are as many as those of the batch size 1."""
    races: dict[str, dict[int, Result]] = {}
    for setting, result in found:
        if setting["part"] == "race":
            races.setdefault(setting["problem"], {})[setting["batch"]] = result
    return {
        problem: {batch: r for batch, r in sorted(of.items()) if len(r["sgd"]) == len(of[1]["sgd"])}
        for problem, of in races.items()
        if 1 in of
    }


def _of_races(found: Found) -> Iterator[Figure]:
    for problem, races in _races(found).items():
        for batch, result in races.items():
            lrs = ", ".join(f"{arm} {result[f'{arm}.lr'][0]:.3g}{_edge(result, arm)}" for arm in ("lookahead", "sgd"))
            note = f"gradients to an excess of {TARGETS[problem]:g} at batch size {batch}; best learning rates: {lrs}"
            label = f"convex.{problem}.iterations.lookahead-sgd.batch-{batch}"
            yield ratio(label, result["lookahead"], result["sgd"], better=-1, note=note)
            if batch == 1:
                continue
            for arm in ("lookahead", "sgd"):
                few = [batch * one for one in result[arm]]
                note = (
                    f"gradients at batch size 1 over {batch} times those at {batch}, 1 is linear; best learning rates "
                    f"{races[1][f'{arm}.lr'][0]:.3g}{_edge(races[1], arm)} and "
                    f"{result[f'{arm}.lr'][0]:.3g}{_edge(result, arm)}"
                )
                label = f"convex.{problem}.batch-speedup.{arm}"
                yield ratio(f"{label}.batch-{batch}", races[1][arm], few, better=1, note=note)
                if batch == LARGE:
                    yield ratio(label, races[1][arm], few, better=1, note=note)


def _edge(result: Result, arm: str) -> str:
    """What is to be said of a race's result."""
    edge = " (at the edge of those tried)" if result[f"{arm}.edge"][0] else ""
    late = int(result[f"{arm}.late"][0])
    return edge + (f" ({late} blocks never came there)" if late else "")


def _picture(problem: str, races: Mapping[int, Result]) -> Picture:
    figure, axes = svg.axes()
    batches = list(races)
    for arm, mark in (("lookahead", "o-"), ("sgd", "s-")):
        axes.plot(batches, [sum(races[b][arm]) / len(races[b][arm]) for b in batches], mark, label=arm)
    first = sum(races[1]["sgd"]) / len(races[1]["sgd"])
    axes.plot(batches, [first / b for b in batches], "k:", label="linear speed-up")
    axes.set(xscale="log", yscale="log", xlabel="batch size", ylabel="gradients, at the best learning rate")
    axes.set_xticks(batches, [str(b) for b in batches])
    axes.legend()
    title = f"Gradients to an excess of {TARGETS[problem]:g}: {problem}"
    return Picture(f"convex-{problem}", title, svg.text(figure))
