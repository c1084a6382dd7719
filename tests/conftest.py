"""Every backend that this build knows, in turn; one that cannot serve here is skipped with its reason."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Iterator
from unittest import mock

import cuda_on_host
import hypothesis
import pytest
import torch
from helpers import BackendCase

import lookahead_fused
from lookahead_fused.backends import BACKENDS

# How far one step may be from the exact bits. A backend that is not named here owes them.
ULPS_PER_STEP = {"triton": 1.0}

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


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(2)


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


def backend_cases() -> list[BackendCase]:
    accelerators = {"cuda", "triton"}
    cases = [
        BackendCase(name, "cuda" if name in accelerators else "cpu", ULPS_PER_STEP.get(name, 0.0))
        for name in lookahead_fused.backends()
    ]
    cases.append(BackendCase(cuda_on_host.NAME, "cpu", 0.0))
    if torch.cuda.is_available():
        cases.append(BackendCase("reference", "cuda", 0.0))
    return cases


def refusal(case: BackendCase) -> str:
    """Why a backend cannot be tried here, or ""."""
    if case.name == cuda_on_host.NAME:
        return cuda_on_host.missing()
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
    """The CUDA backend on the host is a backend in the tests that try it, and in no other."""
    tried = "backend" in request.fixturenames and request.getfixturevalue("backend").name == cuda_on_host.NAME
    with mock.patch.dict(BACKENDS, {cuda_on_host.NAME: cuda_on_host.backend()} if tried else {}):
        yield


@pytest.fixture
def runtime() -> Iterator[ctypes.CDLL]:
    """The stand-in for the CUDA runtime, as if nothing had been done with it, and the backend over it."""
    if cuda_on_host.missing():
        pytest.skip(f"builds the stand-in: {cuda_on_host.missing()}")
    library = cuda_on_host.control()
    library.control_reset()
    gc.collect()  # optimizers of other tests, which have events of their own
    # Not by monkeypatch, which tests undo in their middle.
    with mock.patch.dict(BACKENDS, {cuda_on_host.NAME: cuda_on_host.backend()}):
        yield library
    library.control_reset()


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
