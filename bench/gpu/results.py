"""What a room of the first minutes writes: a line as soon as it is known, and JSON that is whole at any moment."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any


class Results:
    """Records of one room, printed and written as they come: the machine may be gone before the room is done.

    Args:
        path: the JSON, a list of records with a head; None writes none.
        budget: seconds after which nothing further is to be begun.
        head: what is told of the whole.
    """

    def __init__(self, path: Path | None = None, budget: float = float("inf"), **head: Any) -> None:
        self.path, self.head = path, head
        self.records: list[dict[str, Any]] = []
        self.left_out: list[str] = []
        self._end = time.perf_counter() + budget

    def has_time_for(self, name: str) -> bool:
        """Whether there is time left; of what there is none for, the name is kept."""
        if time.perf_counter() < self._end:
            return True
        self.left_out.append(name)
        return False

    def add(self, line: str, **record: Any) -> None:
        """Prints a line, and keeps what a program wants to know of it."""
        print(line, flush=True)
        self.records.append(record)
        self.write()

    def close(self, line: str) -> None:
        """Prints how it ended, and what there was no time for."""
        print(line, flush=True)
        if self.left_out:
            print(f"no time was left for {len(self.left_out)}: {', '.join(self.left_out)}", flush=True)
        self.head["summary"] = line
        self.write()

    def write(self) -> None:
        if self.path is None:
            return
        content = {**self.head, "records": self.records, "left_out": self.left_out}
        beside = self.path.with_suffix(".writing")
        beside.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        os.replace(beside, self.path)
