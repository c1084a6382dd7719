"""What a warp's lanes do together in the stand-in for CUDA, and the codes of a block that they hold."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from bench import cuda_on_host

SOURCES = ("blocks", "cuda_on_host", "traffic")


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if cuda_on_host.missing():
        pytest.skip(cuda_on_host.missing())
    made = tmp_path_factory.mktemp("warps") / "warps"
    here = cuda_on_host.HERE
    sources = [Path(__file__).with_name("warps.cpp"), *(here / f"{name}.cpp" for name in SOURCES)]
    command = [*cuda_on_host.CXX, "-std=c++17", "-O1", "-ffp-contract=off", "-U_FORTIFY_SOURCE", "-Wno-unknown-pragmas"]
    command += ["-DLOOKAHEAD_FUSED_CUDA_ON_HOST", f"-I{cuda_on_host.ROOT / 'csrc'}", f"-I{here}"]
    done = subprocess.run([*command, *map(str, sources), "-o", str(made)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return made


@pytest.mark.parametrize(
    ("case", "number"),
    [
        *(("meet", order) for order in (0, 1, 2)),
        *(("part", order) for order in (0, 1)),
        *(("signed", moment) for moment in (0, 1, 2)),
        *(("squares", moment) for moment in (0, 1, 2)),
        ("decoding", 0),
    ],
)
def test_lanes_do_together(program: Path, case: str, number: int) -> None:
    done = subprocess.run([str(program), case, str(number)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
