"""The source tree to build from, and what builds it: made once, for one worker."""

from __future__ import annotations

import importlib.util
import shutil
import sys
import zipfile
from pathlib import Path

import pytest
from wheels import RELEASED, ROOT, SMALL_MODULE, Result, environment, keep_rules, run, wheel_of


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    return tmp_path_factory.mktemp("packaging")


@pytest.fixture(scope="session")
def tree(base):
    """A copy of what a clean clone holds."""
    left_out = (
        ".git",
        ".venv",
        "build",
        "dist",
        "*.egg-info",
        "__pycache__",
        ".*_cache",
        ".hypothesis",
        "*.so",
    )
    ignore = shutil.ignore_patterns(*left_out, "_build_info.json")
    return shutil.copytree(ROOT, base / "source-tree", ignore=ignore)


@pytest.fixture(scope="session")
def toolchain(base, tree):
    """The Python of an environment with the build requirements and nothing else, torch least of all."""
    run([sys.executable, "-m", "venv", base / "toolchain"])
    python = next(path for path in base.glob("toolchain/*/python*") if path.name in ("python", "python.exe"))
    build = pytest.importorskip("build", reason="the build frontend is in the extra 'test'")
    requirements = sorted(build.ProjectBuilder(tree).build_system_requires)
    installed = run([python, "-m", "pip", "install", *requirements])
    assert installed.returncode == 0, installed.stdout
    return python


@pytest.fixture(scope="session")
def unpacked(base, tree, toolchain):
    """The source distribution of the tree, unpacked."""
    sdist = "from setuptools import build_meta; print(build_meta.build_sdist('dist'))"
    done = run([toolchain, "-c", sdist], cwd=tree, env=environment())
    assert done.returncode == 0, done.stdout
    (archive,) = tree.glob("dist/*.tar.gz")
    shutil.unpack_archive(archive, base / "sdist")
    (directory,) = (base / "sdist").iterdir()
    return directory


@pytest.fixture(scope="session")
def built(toolchain, unpacked):
    """The wheel of the source distribution, with two rules, built in isolation; its build directory stays."""
    keep_rules(unpacked, "Sgd", "External")
    result = wheel_of(unpacked, [toolchain, "-m", "pip", "wheel", "-v", "--no-deps", ".", "--wheel-dir"])
    assert result.returncode == 0, result.output
    return result


@pytest.fixture(params=["two rules", "every rule"])
def objects(request):
    """The object files of _cpu: those of `built`, and where this tree was built in place its own, with every rule."""
    if request.param == "two rules":
        request.getfixturevalue("built")
        return list(request.getfixturevalue("unpacked").glob("build/cmake-*/**/*.cpp.o"))
    found = list(ROOT.glob(f"build/cmake-*-{sys.implementation.cache_tag}/**/*.cpp.o"))
    if not found:
        pytest.skip("this tree was not built in place")
    return found


@pytest.fixture(scope="session")
def build_wheel(toolchain):
    """Builds the wheel of a source tree under the given environment variables, without isolation: by the call that pip
    makes in a process of its own, since pip itself would take longer than most of these builds."""
    hook = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"

    def build_wheel(source: Path, **changes: str) -> Result:
        return wheel_of(source, [toolchain, "-c", hook], **changes)

    return build_wheel


@pytest.fixture(scope="session")
def built_with_cuda(base, tree, build_wheel):
    """A wheel with _cuda alone in it, for one architecture and two rules."""
    source = shutil.copytree(tree, base / "with-cuda", ignore=shutil.ignore_patterns("dist", "*.egg-info"))
    keep_rules(source, "Sgd", "External")
    changes = {"LOOKAHEAD_FUSED_CUDA": "1", "LOOKAHEAD_FUSED_CPU": "0", "TORCH_CUDA_ARCH_LIST": "8.0+PTX"}
    result = build_wheel(source, **changes)
    assert result.returncode == 0, result.output
    return result


@pytest.fixture(scope="session")
def release():
    """csrc/release_wheel.py, which is no part of the package."""
    for needed in ("ziglang", "auditwheel", "elftools"):
        pytest.importorskip(needed, reason=f"{needed} is in the extra 'release'")
    spec = importlib.util.spec_from_file_location("release_wheel", ROOT / "csrc/release_wheel.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def released(base, tree, release):
    """The release wheel of the running Python with two rules, and what its making printed."""
    source = shutil.copytree(tree, base / "release", ignore=shutil.ignore_patterns("dist", "*.egg-info"))
    keep_rules(source, "Adam", "External")
    command = [sys.executable, source / "csrc/release_wheel.py", "--dist", base / "release-dist", sys.executable]
    cuda = "1" if "_cuda" in RELEASED else "0"
    done = run(command, env=environment(LOOKAHEAD_FUSED_CUDA=cuda, TORCH_CUDA_ARCH_LIST="8.0"))
    assert done.returncode == 0, done.stdout
    (wheel,) = (base / "release-dist").glob("*.whl")
    return wheel, done.stdout


@pytest.fixture
def installed(released, tmp_path):
    """A directory with the package of the release wheel in it."""
    with zipfile.ZipFile(released[0]) as archive:
        archive.extractall(tmp_path / "installed")
    return tmp_path / "installed"


@pytest.fixture
def copy(tree, tmp_path):
    """A tree to break or to build, whose _cpu compiles in a moment: what it does is no matter here."""
    copy = shutil.copytree(tree, tmp_path / "tree", ignore=shutil.ignore_patterns("dist", "*.egg-info"))
    for directory in ("cpu", "python", "torch"):
        shutil.rmtree(copy / "csrc" / directory)
        (copy / "csrc" / directory).mkdir()
    (copy / "csrc/python/cpu_module.cpp").write_text(SMALL_MODULE)
    for name in ("nothing", "walk_nothing"):
        (copy / f"csrc/cpu/{name}.cpp").touch()
    return copy


@pytest.fixture
def no_compiler(tmp_path):
    """A PATH without any program."""
    (tmp_path / "empty").mkdir()
    return {"PATH": str(tmp_path / "empty")}
