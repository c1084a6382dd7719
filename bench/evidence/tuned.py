"""The settings that a full run found, kept in tuned.json for runs that only confirm.

    python -m bench.evidence.tuned RECORD

takes them from the record of a full run (build/evidence/full/record.jsonl) and rewrites the entries of the tasks that
it finished; the others stay. A learning rate at the edge of what was tried is not kept.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TypeAlias

from bench.evidence.training import SCHEDULES, Point, Schedule

FILE = Path(__file__).with_name("tuned.json")

# By task, schedule and arm.
Settings: TypeAlias = Mapping[tuple[str, Schedule, str], Point]


def read(path: Path = FILE) -> Settings:
    """What is kept; nothing where there is no file."""
    if not path.exists():
        return {}
    entries = json.loads(path.read_text(encoding="utf-8"))
    return {
        (task, schedule, arm): Point(**point)
        for task, schedules in entries.items()
        for schedule in SCHEDULES
        for arm, point in schedules.get(schedule, {}).items()
    }


def write(settings: Settings, path: Path = FILE) -> None:
    """Keeps these, a line each."""
    tasks: dict[str, dict[str, list[str]]] = {}
    for (task, schedule, arm), point in settings.items():
        line = f'   "{arm}": {json.dumps(_plain(point))}'
        tasks.setdefault(task, {}).setdefault(schedule, []).append(line)
    parts = []
    for task, schedules in tasks.items():
        arms = [f'  "{schedule}": {{\n' + ",\n".join(lines) + "\n  }" for schedule, lines in schedules.items()]
        parts.append(f' "{task}": {{\n' + ",\n".join(arms) + "\n }")
    path.write_text("{\n" + ",\n".join(parts) + "\n}\n", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    """Reads a record, rewrites the file; returns the exit status."""
    # Not above: protocol.py reads the file when it is imported.
    from bench.evidence.experiment import Scale
    from bench.evidence.protocol import EXPERIMENTS
    from bench.evidence.records import Records

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("record", type=Path, help="record.jsonl of a run at the full scale")
    parser.add_argument("--to", type=Path, default=FILE, help="%(default)s")
    options = parser.parse_args(arguments)
    if not options.record.exists():
        parser.error(f"{options.record} is not there")
    records = Records(options.record)
    settings = dict(read(options.to))
    for experiment in EXPERIMENTS:
        plan = experiment.plan(Scale.FULL)
        assert plan is not None
        for schedule in plan.schedules:
            for arm in experiment.arms(plan):
                ended = experiment.found(plan, schedule, arm, records)
                if ended is None:
                    continue
                settings.pop((experiment.name, schedule, arm.name), None)
                if ended.bracketed:
                    settings[experiment.name, schedule, arm.name] = ended.point
                print(
                    f"{experiment.name} {schedule} {arm.name}: {_plain(ended.point)} after {ended.trainings} trainings"
                    + ("" if ended.bracketed else ", at an edge: not kept")
                )
    write(settings, options.to)
    return 0


def _plain(point: Point) -> dict[str, float]:
    return {name: value for name, value in asdict(point).items() if value is not None}


if __name__ == "__main__":
    sys.exit(main())
