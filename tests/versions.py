"""The suite with one wheel under releases of Python and of torch; `make test-versions` runs this.

A release is written PYTHON:TORCH, as in 3.10:2.6.0, or TORCH alone for the Python that runs this. Each has an
environment of its own in build/versions, which is removed when its tests are done, so that the disk has to hold one at
a time. A Python that this machine does not have is left out, which is told and is no failure.

    python tests/versions.py [--quick] [--wheel FILE] RELEASE ... [-- ARGUMENTS of pytest]

Without a wheel one is built for each Python. `--quick` runs a selection.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TESTS = ROOT / "tests"
PLACE = ROOT / "build" / "versions"
# What asks most of torch's and Python's releases, in a few minutes.
QUICK = (
    *("test_torch_insides.py", "test_public_names.py", "test_memory_lost.py", "test_gradients.py", "test_amp.py"),
    *("test_early_state.py", "test_torch_checkpoints.py", "test_schedulers.py", "test_slow_weights.py"),
    *("test_native.py", "test_dtensors.py", "test_distributed.py"),
)
PIP = ("-m", "pip", "--disable-pip-version-check")


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("releases", metavar="RELEASE", nargs="+")
    parser.add_argument("--wheel", type=Path, help="the wheel to test, of all the Pythons")
    parser.add_argument("--quick", action="store_true")
    own, pytest_arguments = split(arguments)
    options = parser.parse_args(own)
    if options.wheel is not None and not options.wheel.is_file():
        parser.error(f"argument --wheel: there is no file {options.wheel}")
    shutil.rmtree(PLACE, ignore_errors=True)
    wheels = {} if options.wheel is None else dict.fromkeys(map(python_of, options.releases), options.wheel.resolve())
    told = [tested(release, wheels, options.quick, pytest_arguments) for release in options.releases]
    print("\n== " + "\n== ".join(line for line, _ in told))
    return int(any(failed for _, failed in told))


def split(arguments: Sequence[str]) -> tuple[Sequence[str], Sequence[str]]:
    """This program's arguments, and pytest's, which come after "--"."""
    if "--" not in arguments:
        return arguments, ()
    at = arguments.index("--")
    return arguments[:at], arguments[at + 1 :]


def tested(release: str, wheels: dict[str, Path], quick: bool, pytest_arguments: Sequence[str]) -> tuple[str, bool]:
    """What is to be told of a release, and whether it failed."""
    python, torch = python_of(release), release.rpartition(":")[2]
    if not python:
        return f"{release}: left out, since python{release.partition(':')[0]} is not here", False
    environment = PLACE / release.replace(":", "-")
    print(f"== {release}: an environment", flush=True)
    begin = time.monotonic()
    try:
        if python not in wheels:
            wheels[python] = built(python)
        installing = time.monotonic()
        subprocess.run([python, "-m", "venv", environment], check=True)
        wanted = [f"torch=={torch}", f"{wheels[python]}[test]"]
        subprocess.run([environment / "bin" / "python", *PIP, "install", "--quiet", *wanted], check=True)
        testing = time.monotonic()
        print(f"== {release}: the tests of {wheels[python].name}", flush=True)
        status = run(environment, quick, pytest_arguments)
    except subprocess.CalledProcessError as error:
        return f"{release}: {error}", True
    finally:
        shutil.rmtree(environment, ignore_errors=True)
    outcome = f"failed with exit status {status}" if status else "passed"
    seconds = f"{installing - begin:.0f} s to build, {testing - installing:.0f} s to install"
    return f"{release}: {outcome} ({seconds}, {time.monotonic() - testing:.0f} s of tests)", status != 0


def python_of(release: str) -> str:
    """The Python that a release asks for; "" where this machine does not have it."""
    wanted = release.rpartition(":")[0]
    if not wanted:
        return sys.executable
    # pyenv puts commands for all its releases on PATH, and they do nothing without being told which.
    environment = {**os.environ, "PYENV_VERSION": wanted}
    asked = [f"python{wanted}", "-c", "import ensurepip, sys, venv; print(sys.executable)"]
    try:
        answer = subprocess.run(asked, env=environment, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ""
    return answer.stdout.strip() if answer.returncode == 0 else ""


def built(python: str) -> Path:
    where = PLACE / f"wheel-{len(list(PLACE.glob('wheel-*')))}"
    # In isolation the compilers' paths are new ones, and everything is compiled anew: minutes for this Python's own
    # environment, which has compiled it all.
    isolation = ["--no-build-isolation"] if python == sys.executable else []
    subprocess.run([python, *PIP, "wheel", "--quiet", "--no-deps", *isolation, "--wheel-dir", where, ROOT], check=True)
    (wheel,) = where.glob("*.whl")
    return wheel


def run(environment: Path, quick: bool, pytest_arguments: Sequence[str]) -> int:
    tests = ["-m", "not slow and not large", *(str(TESTS / name) for name in QUICK)] if quick else [str(TESTS)]
    place = ["--rootdir", str(ROOT), "-c", str(ROOT / "pyproject.toml"), "-p", "no:cacheprovider"]
    # The source tree must stay off sys.path: with this, and since the tests begin elsewhere (Python 3.10 does not know
    # the variable). The suite checks that it runs the package that it is told to expect.
    told = {"PYTHONSAFEPATH": "1", "LOOKAHEAD_FUSED_EXPECTED_IN": str(environment)}
    command = [environment / "bin" / "python", "-m", "pytest", *place, *pytest_arguments, *tests]
    return subprocess.run(command, cwd=environment, env={**os.environ, **told}, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
