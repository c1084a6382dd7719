"""Every backend that this build knows, in turn; one that cannot serve here is skipped with its reason."""

from __future__ import annotations

import ctypes
import gc
from collections import Counter
from collections.abc import Iterator
from typing import Any
from unittest import mock

import hypothesis
import pytest
import torch
import triton_on_host
from helpers import BackendCase
from processes import needs_gloo
from stand_ins import STAND_INS, cuda_on_host

import lookahead_fused
from lookahead_fused.backends import BACKENDS

# How far one step may be from the exact bits. A backend that is not named here owes them, and so does Triton where
# its compiler is known to give them: test_triton_code.py reads what it makes for NVIDIA's.
ULPS_PER_STEP = {"triton": 0.0 if torch.version.cuda is not None else 1.0}

# These ask within a tolerance what test_bits asks of the same options to the bit: in the interpreter, one case does.
ASKED_TO_THE_BIT = ("test_fp64_is_the_textbook", "test_fp32_is_torch_with_a_manual_sync")

hypothesis.settings.register_profile(
    "bounded",
    max_examples=25,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.data_too_large],
)
hypothesis.settings.load_profile("bounded")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--backend",
        metavar="NAME",
        help="run the tests of every backend on this one alone; where it does not serve, each of them tells why",
    )
    parser.addoption("--interpret-all", action="store_true", help="every case of every test in Triton's interpreter")
    parser.addoption("--operations", metavar="N", type=int, default=120, help="random sequences of operations")
    parser.addoption("--operations-minutes", metavar="M", type=float, help="as many of them as M minutes a rule allow")
    parser.addoption("--operations-seed", metavar="SEED", type=int, default=0, help="the first sequence")
    parser.addoption("--operations-without", metavar="NAMES", default="", help="operations left out, by commas")
    parser.addoption("--kills", metavar="N", type=int, default=3, help="how often a training process is killed")


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(2)


def pytest_collection_finish() -> None:
    collect_garbage()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Tests of every backend are collected for those that serve; for another, one test tells that and why."""
    cases = backend_cases()
    if "any_backend" in metafunc.fixturenames:
        metafunc.parametrize("any_backend", cases, ids=case_id)
    if "backend" in metafunc.fixturenames:
        asked = metafunc.config.getoption("backend")
        chosen = [case for case in cases if (case.name == asked if asked else not refusal(case))]
        metafunc.parametrize("backend", chosen, indirect=True, ids=case_id, scope="session")


def case_id(case: BackendCase) -> str:
    return f"{case.name}-{case.device}"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Triton's interpreter takes a thousand times as long as a compiled backend, so it gets a selection of each test's
    cases: as many as it takes for every value of every parameter to be tried, with the values of the others in turn.

    Tests that run several processes come first: they take longest, and wait for each other, which at the end of a run
    would leave a worker idle."""
    items.sort(key=lambda item: needs_gloo.mark not in item.iter_markers())
    if config.getoption("--interpret-all"):
        return
    interpreted: dict[Any, list[Any]] = {}
    for item in items:
        params = item.callspec.params if hasattr(item, "callspec") else {}
        if getattr(params.get("backend"), "name", "") == triton_on_host.NAME:
            interpreted.setdefault(item.function, []).append(item)
    left_out = set()
    for function, cases in interpreted.items():
        chosen = covering([parameters(item) for item in cases])
        if function.__name__ in ASKED_TO_THE_BIT:
            chosen = {min(chosen)}
        left_out.update(item for i, item in enumerate(cases) if i not in chosen)
    items[:] = [item for item in items if item not in left_out]
    config.hook.pytest_deselected(items=list(left_out))


def parameters(item: Any) -> frozenset[tuple[str, str]]:
    """The values of a case by the names that they were given under, together where they were given together."""
    names = [mark.args[0] for mark in item.iter_markers("parametrize")]
    groups = [name.replace(",", " ").split() if isinstance(name, str) else name for name in names]
    return frozenset((repr(group), repr([item.callspec.params[name] for name in group])) for group in groups)


def covering(cases: list[frozenset[tuple[str, str]]]) -> set[int]:
    """Which of some cases to take so that each value of each parameter is in one; of equals the least alike."""
    used: Counter[tuple[str, str]] = Counter()
    chosen: set[int] = set()
    wanted = frozenset().union(*cases)
    while not chosen or wanted - used.keys():
        best = max(
            (i for i in range(len(cases)) if i not in chosen),
            key=lambda i: (len(cases[i] - used.keys()), -sum(used[value] for value in cases[i])),
        )
        chosen.add(best)
        used.update(cases[best])
    return chosen


def backend_cases() -> list[BackendCase]:
    accelerators = {"cuda", "triton"}
    cases = [
        BackendCase(name, "cuda" if name in accelerators else "cpu", ULPS_PER_STEP.get(name, 0.0))
        for name in lookahead_fused.backends()
    ]
    cases += [BackendCase(name, "cpu", 0.0) for name in STAND_INS]
    if torch.cuda.is_available():
        cases.append(BackendCase("reference", "cuda", 0.0))
    return cases


def refusal(case: BackendCase) -> str:
    """Why a backend cannot be tried here, or ""."""
    if case.name in STAND_INS:
        reason: str = STAND_INS[case.name].missing()
        return reason
    status = lookahead_fused.backends()[case.name]
    if not status.available:
        return status.reason
    return "no CUDA device" if case.device == "cuda" and not torch.cuda.is_available() else ""


@pytest.fixture(scope="session")
def backend(request: pytest.FixtureRequest) -> BackendCase:
    """A backend that serves here, and the device to try it on."""
    case: BackendCase = request.param
    if refusal(case):
        pytest.skip(f"backend {case.name}: {refusal(case)}")
    return case


@pytest.fixture
def reason_against(any_backend: BackendCase) -> str:
    """Why the tests of every backend leave this one out here, or ""."""
    return refusal(any_backend)


@pytest.fixture(autouse=True)
def stand_in(request: pytest.FixtureRequest) -> Iterator[None]:
    """A backend on the host is a backend in the tests that try it, and in no other."""
    name = request.getfixturevalue("backend").name if "backend" in request.fixturenames else ""
    with mock.patch.dict(BACKENDS, {name: STAND_INS[name].backend()} if name in STAND_INS else {}):
        yield


@pytest.fixture
def runtime() -> Iterator[ctypes.CDLL]:
    """The stand-in for the CUDA runtime, as if nothing had been done with it, and the backend over it."""
    if cuda_on_host.missing():
        pytest.skip(f"builds the stand-in: {cuda_on_host.missing()}")
    library = cuda_on_host.control()
    library.control_reset()
    collect_garbage()  # optimizers of other tests, which have events of their own
    # Not by monkeypatch, which tests undo in their middle.
    with mock.patch.dict(BACKENDS, {cuda_on_host.NAME: cuda_on_host.backend()}):
        yield library
    library.control_reset()


@pytest.fixture
def host() -> Iterator[Any]:
    """The Triton backend on the host, which is a backend for as long."""
    module = triton_on_host.backend()
    with mock.patch.dict(BACKENDS, {triton_on_host.NAME: module}):
        yield module


@pytest.fixture
def host_backends() -> Iterator[list[str]]:
    """Every backend for the CPU's memory that serves here, the stand-ins among them, by their names."""
    cases = [case for case in backend_cases() if case.device == "cpu" and not refusal(case)]
    modules = {case.name: STAND_INS[case.name].backend() for case in cases if case.name in STAND_INS}
    with mock.patch.dict(BACKENDS, modules):
        yield [case.name for case in cases]


def collect_garbage() -> None:
    """Collects it, and has no later collection look through what is left: modules, tests, and reports of tests, which
    grow to a second's work."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module")
def little_to_look_through() -> None:
    """For tests that collect garbage: they look through what their own module left, and not each through all there
    is."""
    collect_garbage()


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """Each test begins from one seed, and leaves torch's modes as it found them: the next one runs in this process."""
    if torch.cuda.is_initialized():
        torch.manual_seed(0)
    else:
        # Which would write down the stack, for each kind of device that there might be: longer than most tests take.
        torch.default_generator.manual_seed(0)
    before = modes()
    yield
    left = modes()
    if left != before:
        torch.set_grad_enabled(True)
        pytest.fail(f"left (gradients, default dtype, default device) as {left}, not as {before}")


def modes() -> tuple[bool, torch.dtype, torch.device]:
    # torch 2.6's get_default_device raises once a default device was set and taken back.
    return torch.is_grad_enabled(), torch.get_default_dtype(), torch.empty(0).device
