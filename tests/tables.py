"""How many tables and rows compiled parts make: nothing is to be made anew in a step that needs nothing new."""

from __future__ import annotations

from typing import Any

import pytest

from lookahead_fused._parts import CompiledPart


class Tables:
    """Counts since it was made: `made` tables, `rows` that were added to any."""

    def __init__(self) -> None:
        self.made = self.rows = 0


def count_tables(monkeypatch: pytest.MonkeyPatch) -> Tables:
    """Counts what every compiled part makes from now on, whichever module keeps its table."""
    tables = Tables()
    make, add = CompiledPart.__init__, CompiledPart.add

    def made(part: CompiledPart, *about: Any) -> None:
        tables.made += 1
        make(part, *about)

    def added(part: CompiledPart, *about: Any) -> None:
        tables.rows += 1
        add(part, *about)

    monkeypatch.setattr(CompiledPart, "__init__", made)
    monkeypatch.setattr(CompiledPart, "add", added)
    return tables
