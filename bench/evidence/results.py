"""The figures of a run as one small JSON file: what is kept in the repository, and what pages are made from."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import lookahead_fused
from bench.evidence.claims import pattern
from bench.evidence.experiment import Experiment, Scale
from bench.evidence.figures import Figure, Picture
from bench.evidence.records import Records
from lookahead_fused.bench.conditions import conditions as here

FORMAT = 1
# Beside torch and Python, which conditions() names.
PACKAGES = ("numpy", "scipy", "scikit-learn", "scikit-image", "gymnasium")


@dataclass(frozen=True)
class Results:
    """The figures of a run.

    conditions  machine, versions, date, scale
    seconds     what the jobs of each experiment took together
    figures     in the order of the experiments
    """

    conditions: Mapping[str, Any]
    seconds: Mapping[str, float]
    figures: Sequence[Figure]


def collect(experiments: Sequence[Experiment], scale: Scale, records: Records) -> tuple[Results, list[Picture]]:
    """What is recorded of the experiments; raises ValueError for a figure that its experiment does not declare."""
    figures: list[Figure] = []
    pictures: list[Picture] = []
    seconds = {}
    for experiment in experiments:
        made = experiment.figures(records)
        for figure in made:
            if not any(pattern(name).fullmatch(figure.name) for name in experiment.names()):
                raise ValueError(f"{experiment.name} made {figure.name}, and declares {experiment.names()}")
        figures += made
        pictures += experiment.pictures(records)
        seconds[experiment.name] = round(records.seconds(experiment.name, experiment.revision), 1)
    return Results(conditions(scale.value), seconds, figures), pictures


def save(results: Results, path: Path) -> None:
    """Numbers with eight digits; a bound of an interval that is not known is null."""
    head = {"format": FORMAT, "conditions": dict(results.conditions), "seconds": dict(results.seconds)}
    # A line a figure: what a new run changed is seen in a diff.
    lines = [json.dumps(_plain(figure), ensure_ascii=False, allow_nan=False) for figure in results.figures]
    text = json.dumps(head, indent=1, ensure_ascii=False, allow_nan=False).removesuffix("\n}")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + ',\n "figures": [\n  ' + ",\n  ".join(lines) + "\n ]\n}\n", encoding="utf-8")


def together(found: Sequence[Results]) -> Results:
    """Several runs as one: of the first the conditions, of the others the machine."""
    first, others = found[0], found[1:]
    told = dict(first.conditions)
    for other in others:
        told["machine"] = f"{told['machine']}; figures of {other.conditions['scale']}: {other.conditions['machine']}"
    seconds = {name: value for one in found for name, value in one.seconds.items()}
    return Results(told, seconds, [figure for one in found for figure in one.figures])


def load(path: Path) -> Results:
    """What `save` wrote; raises ValueError for any other file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']}, where {FORMAT} is read")
        figures = [_figure(entry) for entry in content["figures"]]
        return Results(content["conditions"], content["seconds"], figures)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} holds no figures of a run: {error}") from error


def conditions(scale: str) -> dict[str, Any]:
    """Machine, versions and date of this process now, and the scale."""
    where = asdict(here())
    del where["load_before"], where["huge_pages"]  # no times are compared here
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {**where, **versions, "lookahead_fused": lookahead_fused.__version__, "scale": scale}


def _plain(figure: Figure) -> dict[str, Any]:
    plain = asdict(figure)
    plain["value"], plain["p"] = _digits(figure.value), _digits(figure.p)
    plain["low"] = None if math.isinf(figure.low) else min(_digits(figure.low), plain["value"])
    plain["high"] = None if math.isinf(figure.high) else max(_digits(figure.high), plain["value"])
    return plain


def _digits(number: float) -> float:
    return float(f"{number:.8g}")


def _figure(entry: Mapping[str, Any]) -> Figure:
    low = -math.inf if entry["low"] is None else entry["low"]
    high = math.inf if entry["high"] is None else entry["high"]
    return Figure(**{**entry, "low": low, "high": high})
