"""How users reach what is public: from `lookahead_fused`, and the backends both as a function and as a package."""

from __future__ import annotations

import copy
import importlib
import inspect
import io
import os
import pickle
import pickletools
import pydoc
from pathlib import Path
from typing import Any

import pytest
import torch

import lookahead_fused
from lookahead_fused import backends
from lookahead_fused.backends import BACKENDS

CLASSES = [value for name in lookahead_fused.__all__ if isinstance(value := getattr(lookahead_fused, name), type)]


WRAPPERS = (lookahead_fused.EMA, lookahead_fused.GPA, lookahead_fused.Lookahead, lookahead_fused.ScheduleFree)


def optimizer_of(cls: type) -> torch.optim.Optimizer:
    params = [torch.nn.Parameter(torch.ones(3))]
    made: torch.optim.Optimizer = cls(torch.optim.SGD(params) if cls in WRAPPERS else params)
    return made


def test_the_suite_runs_the_package_that_it_is_told_to() -> None:
    expected = os.environ.get("LOOKAHEAD_FUSED_EXPECTED_IN")
    if expected is None:
        pytest.skip("LOOKAHEAD_FUSED_EXPECTED_IN, set by make test and make test-versions, does not name a directory")
    where, tree = Path(lookahead_fused.__file__).resolve(), Path(__file__).resolve().parents[1]
    assert where.is_relative_to(Path(expected).resolve())
    # An installed wheel lies in site-packages, also where the environment itself lies in the source tree.
    assert ("site-packages" in where.parts) == (Path(expected).resolve() != tree)


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_a_class_names_the_module_that_users_import_it_from(cls: type) -> None:
    assert cls.__module__ == "lookahead_fused"
    assert getattr(importlib.import_module(cls.__module__), cls.__qualname__) is cls
    assert f"class {cls.__name__} in module lookahead_fused" in pydoc.plain(pydoc.render_doc(cls))


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_a_pickle_names_no_private_module(cls: type) -> None:
    """A class that moves within the package must not make a pickle unreadable."""
    value: Any = cls(True, "") if cls is lookahead_fused.BackendStatus else optimizer_of(cls)
    stored = pickle.dumps(value, protocol=2)  # in which a class is stored as "module name" in one piece
    named = [argument for code, argument, _ in pickletools.genops(stored) if code.name == "GLOBAL"]
    assert f"lookahead_fused {cls.__name__}" in named
    assert [name for name in named if name.startswith("lookahead_fused._optimizers")] == []
    assert type(pickle.loads(stored)) is cls
    assert type(copy.deepcopy(value)) is cls
    torch.save(value, buffer := io.BytesIO())
    buffer.seek(0)
    assert type(torch.load(buffer, weights_only=False)) is cls


def test_backends_is_a_function_and_a_package() -> None:
    assert lookahead_fused.backends is backends is importlib.import_module("lookahead_fused.backends")
    assert list(lookahead_fused.backends()) == ["cuda", "triton", "cpu", "reference"]
    assert lookahead_fused.backends().keys() == lookahead_fused.backends.backends().keys()
    assert lookahead_fused.backends.BACKENDS is BACKENDS
    assert inspect.signature(lookahead_fused.backends) == inspect.signature(lookahead_fused.backends.backends)
    assert "Which backends there are" in pydoc.plain(pydoc.render_doc(lookahead_fused.backends))
    with pytest.raises(TypeError, match="argument"):
        lookahead_fused.backends("cpu")  # type: ignore[call-arg]


def test_a_backend_is_imported_under_a_name() -> None:
    import lookahead_fused.backends.cpu as cpu

    assert cpu.NAME == "cpu"
    assert importlib.import_module("lookahead_fused.backends.cpu") is cpu is BACKENDS["cpu"]
