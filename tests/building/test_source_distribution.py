"""What a source distribution holds: what git tracks, and where there is no git, what lies in the tree."""

from __future__ import annotations

import re
import shutil
import tarfile

import pytest
from wheels import environment, run

# One worker builds, rather than each one again.
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("packaging")]

SCRATCH = ("csrc/cpu/scratch.cpp", "tests/scratch.py", "bench/scratch.txt", "lookahead_fused/scratch.py")


@pytest.fixture
def clone(copy):
    """A tree whose files git tracks, with some in it that it does not."""
    if shutil.which("git") is None:
        pytest.skip("makes a repository, and there is no git on PATH")
    for command in (["git", "init", "--quiet"], ["git", "add", "."]):
        done = run(command, cwd=copy)
        assert done.returncode == 0, done.stdout
    for name in SCRATCH:
        (copy / name).write_text("scratch\n")
    return copy


@pytest.fixture
def sdist(toolchain):
    """Makes the source distribution of a tree; returns its archive, or what was printed instead."""

    def sdist(source, **changes):
        shutil.rmtree(source / "dist", ignore_errors=True)
        build = "from setuptools import build_meta; build_meta.build_sdist('dist')"
        done = run([toolchain, "-c", build], cwd=source, env=environment(**changes))
        return next(source.glob("dist/*.tar.gz"), done.stdout)

    return sdist


LISTING = "lookahead_fused.egg-info/SOURCES.txt"


def contents(archive) -> dict[str, bytes]:
    with tarfile.open(archive) as files:
        members = [member for member in files.getmembers() if member.isfile()]
        return {member.name.partition("/")[2]: files.extractfile(member).read() for member in members}


def test_an_untracked_file_stays_out(clone, sdist):
    """One in csrc/ would be compiled wherever the distribution is built."""
    held = contents(sdist(clone))
    assert [name for name in held if "scratch" in name] == []
    assert b"scratch" not in held[LISTING]
    listed = run(["git", "ls-files"], cwd=clone).stdout.split()
    in_no_manifest = re.compile(r"\.gitignore|\.ci/.*")
    assert {name for name in listed if not in_no_manifest.fullmatch(name)} <= held.keys()
    assert "PKG-INFO" in held


def test_an_unpacked_one_makes_the_same_again(clone, sdist, no_compiler):
    """It is no clone: also where it lies, untracked, in the clone of something else, and where there is no git."""
    first = sdist(clone)
    held = contents(first)
    del held[LISTING]  # lists setup.cfg the second time, which setuptools writes into every distribution
    shutil.unpack_archive(first, clone / "unpacked")
    (inside,) = (clone / "unpacked").iterdir()
    for changes in ({}, no_compiler):
        again = contents(sdist(inside, **changes))
        del again[LISTING]
        assert again == held


def test_a_clone_without_git_is_refused(clone, sdist, no_compiler):
    printed = sdist(clone, **no_compiler)
    assert isinstance(printed, str)
    assert "git does not tell which files of" in printed
