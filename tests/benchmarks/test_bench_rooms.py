"""The rooms of bench: each imports only from those below it, and none the tests; torch loads no sooner than it must."""

from __future__ import annotations

import ast
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import bench
from bench.harness import processes

BENCH = Path(bench.__file__).parent
FILES = sorted(BENCH.rglob("*.py"))
TESTS = {path.stem for path in Path(__file__).parents[1].rglob("*")}


def rooms() -> list[str]:
    """From the bottom up, as the package's docstring lists them."""
    listed = re.search(r"from the bottom up: ([^.]+)\.", bench.__doc__ or "")
    assert listed is not None
    return listed[1].replace(",", " ").split()


def imports(path: Path) -> set[str]:
    """What a file imports anywhere in it: the full names of modules, and of what it takes from them."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import, which this test does not follow"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(BENCH).as_posix())
def test_arrows_run_downwards_and_never_to_the_tests(path: Path) -> None:
    order = rooms()
    inside = path.relative_to(BENCH).parts[:-1]
    below = order[: order.index(inside[0]) + 1] if inside else []
    names = [name.split(".") for name in imports(path)]
    assert {name[1] for name in names if name[0] == "bench"} <= set(below)
    assert {name[0] for name in names} & TESTS == set()


def test_every_folder_is_a_room_with_its_sentence() -> None:
    folders = {path.name for path in BENCH.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders == set(rooms())
    for name in folders:
        assert importlib.import_module(f"bench.{name}").__doc__


def test_what_comes_before_torch_does_without_it() -> None:
    """`make wheel` has none, and the demo asks how threads are to wait before torch's threads are there."""
    code = "import sys, bench.gpu.cuda_code, bench.gpu.stages, bench.harness.cores; sys.exit('torch' in sys.modules)"
    environment = {**os.environ, **processes.search_path()}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr or "torch was imported"


def test_a_further_python_runs_the_package_that_this_one_does(tmp_path: Path) -> None:
    """Not that of the folder it is started in: under a wheel that may be the source tree."""
    (tmp_path / "lookahead_fused.py").touch()
    import lookahead_fused

    code = "import lookahead_fused; print(lookahead_fused.__file__)"
    environment = {**os.environ, **processes.search_path()}
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert Path(done.stdout.strip()) == Path(lookahead_fused.__file__), done.stderr
