"""A rule and a policy stand in few places: their header, their Triton and their reference form, what Python is told of
them, and one entry in the one list of each. Whatever else is needed of them is composed from these."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LIST = "csrc/rules/all.h"
FORMS = {"lookahead_fused/backends/triton_rules.py", "lookahead_fused/backends/reference.py"}


def listed() -> list[str]:
    found = re.search(r"using Rules = List<([^>]+)>;", (ROOT / LIST).read_text(encoding="utf-8"))
    assert found is not None
    return re.findall(r"\w+", found[1])


def code(path: Path) -> str:
    """A file without its comments, which may tell of anything."""
    return re.sub(r"(//|#(?!include)).*" if path.suffix != ".py" else r"#.*", "", path.read_text(encoding="utf-8"))


def files(folder: str, name: str) -> set[str]:
    """The files of a folder whose code has this in it."""
    paths = [path for path in (ROOT / folder).rglob("*") if path.is_file() and path.suffix not in (".so", ".pyc")]
    return {path.relative_to(ROOT).as_posix() for path in paths if re.search(name, code(path))}


# External is the exception that it says it is: a rule of no optimizer, which passes ask for by its name.
@pytest.mark.parametrize("rule", [rule for rule in listed() if rule != "External"])
def test_places_of_a_rule(rule: str) -> None:
    (header,) = files("csrc", rf"\bstruct {rule} \{{")
    text = (ROOT / header).read_text(encoding="utf-8")
    (name,) = re.findall(r'const char\* name = "(\w+)";', text)
    assert header == f"csrc/rules/{name}.h"
    assert listed().count(rule) == 1
    assert len(re.findall(rf'\b{rule}\b|"{name}\.h"', code(ROOT / LIST))) == 2  # its entry, and its header's
    assert files("csrc", rf'\b{rule}\b|"{name}(\.h)?"') == {header, LIST}
    told = files("lookahead_fused", rf"""["']{name}["']""")
    # What is measured is named by its rule, too.
    told = {path for path in told if not path.startswith("lookahead_fused/bench/")}
    assert told > FORMS
    (description,) = told - FORMS
    assert "/backends/" not in description


def test_places_of_policies() -> None:
    """Several may share a header, and what a table has to tell of one."""
    folder, entry = ROOT / "csrc/slow", re.search(r"using Policies = List<([^>]+)>;", code(ROOT / "csrc/slow/all.h"))
    assert entry is not None
    names = {}
    for path in folder.glob("*.h"):
        text = code(path)
        names |= dict(re.findall(r"struct (\w+) \{\s*static constexpr const char\* name = \"(\w+)\";", text))
    assert sorted(names) == sorted(re.findall(r"\w+", entry[1]))
    forms = {"lookahead_fused/backends/triton_policies.py", "lookahead_fused/backends/reference.py"}
    for name in names.values():
        assert files("lookahead_fused", rf"""["']{name}["']""") == forms | {"lookahead_fused/_policies.py"}
