"""Entries in other packages' registries, where the other package is missing, broken or too old."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest

from lookahead_fused.integrations.timm import register


def test_timm_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match=r"needs timm: pip install timm$") as raised:
        register()
    assert raised.value.name == "timm"


def test_timm_lacks_what_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Installing timm again would not help: its own error stands."""
    (tmp_path / "timm").mkdir()
    (tmp_path / "timm/__init__.py").write_text("import a_need_of_timm\n")
    monkeypatch.delitem(sys.modules, "timm", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="a_need_of_timm"):
        register()


@pytest.mark.parametrize("factory", [{}, {"OptimInfo": object}], ids=["none", "elsewhere"])
def test_timm_has_no_registry(factory: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    timm, optim = ModuleType("timm"), ModuleType("timm.optim")
    vars(timm).update(__version__="1.0.11", optim=optim)
    vars(optim).update(factory)
    monkeypatch.setitem(sys.modules, "timm", timm)
    monkeypatch.setitem(sys.modules, "timm.optim", optim)
    with pytest.raises(ImportError, match=r"timm 1\.0\.12 or newer.*timm 1\.0\.11 has none: pip install --upgrade"):
        register()
