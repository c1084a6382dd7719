"""The compiled modules: imported once, when first asked for, and with the reason where there is none."""

from __future__ import annotations

import functools
import importlib
import json
from importlib import resources
from types import ModuleType
from typing import Any


def module(name: str) -> ModuleType | None:
    """A compiled module of this package, or None; `reason` tells why."""
    return _load(name)[0]


def reason(name: str) -> str:
    """Why a compiled module does not serve here; empty where it does."""
    return _load(name)[1]


@functools.cache
def _load(name: str) -> tuple[ModuleType | None, str]:
    try:
        return importlib.import_module(f"lookahead_fused.{name}"), ""
    except ImportError as error:
        recorded = info()["modules"].get(name, {}).get("reason", "")
        return None, recorded or f"lookahead_fused.{name} could not be imported: {error}"


def version() -> str:
    """The version that was built; "unknown" where the package runs from a tree that nothing was built in."""
    return str(info().get("version", "unknown"))


def info() -> dict[str, Any]:
    """What the build recorded of itself: version and, for each module, whether it was built, by what, or why not."""
    try:
        recorded: dict[str, Any] = json.loads(
            resources.files("lookahead_fused").joinpath("_build_info.json").read_text(encoding="utf-8")
        )
    except FileNotFoundError:
        return {"modules": {}}
    return recorded
