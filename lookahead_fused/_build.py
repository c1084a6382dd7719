"""The compiled modules: imported once, when first asked for, and with the reason where there is none."""

from __future__ import annotations

import functools
import importlib
import json
import re
from importlib import machinery, resources
from types import ModuleType
from typing import Any

RECORD = "_build_info.json"
# What to do about files of two installs in one directory.
REINSTALL = "uninstall lookahead_fused, remove what is left of its directory, and install it again"


def module(name: str) -> ModuleType | None:
    """A compiled module of this package, or None; `reason` tells why."""
    return _load(name)[0]


def reason(name: str) -> str:
    """Why a compiled module does not serve here; empty where it does."""
    return _load(name)[1]


@functools.cache
def _load(name: str) -> tuple[ModuleType | None, str]:
    recorded = info()["modules"].get(name, {})
    try:
        loaded = importlib.import_module(f"lookahead_fused.{name}")
    except Exception as error:  # what a library raises while it is loaded is not always an ImportError
        told = f"lookahead_fused.{name} could not be imported: {type(error).__name__}: {error}"
        # Its kernels, where they are a library: the loader finds that of its own build or none.
        if f"liblookahead_fused{name}-" in str(error):
            told = f"{told}; {REINSTALL}"
        return None, str(recorded.get("reason") or _built_for_others(name) or told)
    # A module may be left of an earlier install, for another Python: with its library it is whole, but the rest of the
    # package is not its own.
    build, expected = getattr(loaded, "build", None), recorded.get("build")
    if recorded and build != expected:
        return None, f"lookahead_fused.{name} is of build {build}, and {RECORD} tells of {expected}; {REINSTALL}"
    return loaded, ""


def _built_for_others(name: str) -> str:
    """That a module is there for other Pythons and not for this one; else empty."""
    files = {file.name for file in resources.files("lookahead_fused").iterdir() if file.name.startswith(f"{name}.")}
    if not files or files & {name + suffix for suffix in machinery.EXTENSION_SUFFIXES}:
        return ""
    others = ", ".join(map("".join, sorted(map(_python_of, files))))
    this = "".join(_python_of(name + machinery.EXTENSION_SUFFIXES[0]))
    return f"this installation has {name} for CPython {others}, and this is {this}"


def _python_of(file: str) -> tuple[str, str, str]:
    """Of "_cpu.cpython-313t-x86_64-linux-gnu.so" ("3.", "13", "t"); in this order from 3.10 on."""
    found = re.search(r"cpython-(\d)(\d\d)([a-z]*)", file)
    return (f"{found[1]}.", found[2], found[3]) if found else (file, "", "")


def version() -> str:
    """The version that was built; "unknown" where the package runs from a tree that nothing was built in."""
    return str(info().get("version", "unknown"))


def info() -> dict[str, Any]:
    """What the build recorded of itself: version and, for each module, whether it was built, by what, or why not.

    A record that cannot be read must not end the import: it then has no modules, and "fault" says what is wrong.
    """
    record = resources.files("lookahead_fused").joinpath(RECORD)
    try:
        recorded: dict[str, Any] = json.loads(record.read_text(encoding="utf-8"))
        if not all(isinstance(facts, dict) for facts in recorded["modules"].values()):
            raise TypeError("the record of a module is not a dict")
    except FileNotFoundError:
        return {"modules": {}}
    except Exception as error:  # not UTF-8, not JSON, not a dict, without modules, not readable
        return {"modules": {}, "fault": f"{RECORD} cannot be read: {type(error).__name__}: {error}"}
    return recorded
