"""The record of a run: one JSON line for each finished job, so that a run that was cut off goes on where it was."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.evidence.experiment import JSON


class Records:
    """Results by experiment, revision and setting, in the file `path` and in memory (None: in memory alone)."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._lines: dict[str, dict[str, Any]] = {}
        if path is not None and path.exists():
            self._read(path)

    def get(self, experiment: str, revision: int, setting: Mapping[str, JSON]) -> Mapping[str, JSON] | None:
        """The result of the job of this setting, or None where it has not finished under this revision."""
        line = self._lines.get(_key(experiment, revision, setting))
        return None if line is None else line["result"]

    def add(
        self,
        experiment: str,
        revision: int,
        setting: Mapping[str, JSON],
        result: Mapping[str, JSON],
        seconds: float,
    ) -> None:
        """Appends and flushes; a result for a setting that has one takes its place."""
        text = json.dumps(
            {
                "experiment": experiment,
                "revision": revision,
                "setting": dict(setting),
                "result": dict(result),
                "seconds": round(seconds, 3),
            }
        )
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a", encoding="utf-8") as file:
                file.write(text + "\n")
        # What was read back from a file is what is kept: a tuple is a list, whether or not the run was cut off.
        self._keep(json.loads(text))

    def of(self, experiment: str, revision: int) -> list[tuple[Mapping[str, JSON], Mapping[str, JSON]]]:
        """(setting, result) of every finished job, in the order in which they finished first."""
        return [
            (line["setting"], line["result"])
            for line in self._lines.values()
            if line["experiment"] == experiment and line["revision"] == revision
        ]

    def seconds(self, experiment: str, revision: int) -> float:
        """What its finished jobs took together."""
        return sum(
            float(line["seconds"])
            for line in self._lines.values()
            if line["experiment"] == experiment and line["revision"] == revision
        )

    def _read(self, path: Path) -> None:
        text = path.read_bytes()
        whole = text.rfind(b"\n") + 1
        for number, line in enumerate(text[:whole].decode("utf-8").splitlines(), start=1):
            try:
                self._keep(json.loads(line))
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path}:{number} is no record of a job; remove the line or the file") from error
        if whole < len(text):  # the run was cut off within a line; the job is run again
            with path.open("r+b") as file:
                file.truncate(whole)

    def _keep(self, line: dict[str, Any]) -> None:
        self._lines[_key(line["experiment"], line["revision"], line["setting"])] = line


def _key(experiment: str, revision: int, setting: Mapping[str, JSON]) -> str:
    return json.dumps([experiment, revision, dict(setting)], sort_keys=True)
