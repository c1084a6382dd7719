"""Options of the benchmarks under pytest, and what pytest-benchmark's JSON holds besides their results."""

from __future__ import annotations

import os
from dataclasses import asdict
from typing import Any

import pytest
import torch

from bench.suites import suite
from bench.suites.cpu import package
from lookahead_fused.bench.conditions import conditions
from lookahead_fused.bench.device import Device
from lookahead_fused.bench.measure import Effort

_skipped: dict[str, str] = {}


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("lookahead_fused")
    group.addoption("--device", choices=suite.DEVICES, default="cpu", help="where to measure")
    group.addoption("--effort", type=float, default=1.0, help="scales the numbers of rounds")
    group.addoption("--rounds", type=int, help="rounds of each benchmark, instead of its own number")
    group.addoption("--budget", type=float, default=5.0, help="seconds after which no further round is begun")
    group.addoption("--threads", type=int, help="threads of every side, instead of torch's default")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("python_functions", "bench*")
    if config.getoption("--threads"):
        torch.set_num_threads(config.getoption("--threads"))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--device") == "cuda" and not torch.cuda.is_available():
        for item in items:
            item.add_marker(pytest.mark.skip(reason="no CUDA device is visible"))


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> Device:
    return suite.DEVICES[request.config.getoption("--device")]()


@pytest.fixture(scope="session")
def effort(request: pytest.FixtureRequest) -> Effort:
    option = request.config.getoption
    return Effort(option("--effort"), option("--rounds"), option("--budget"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    report = yield
    if report.skipped and isinstance(report.longrepr, tuple):
        _skipped[item.name.removeprefix("bench[").removesuffix("]")] = str(report.longrepr[2]).removeprefix("Skipped: ")
    return report


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: object, output_json: dict[str, Any]) -> None:
    device = suite.DEVICES[config.getoption("--device")]()
    output_json["conditions"] = {
        **asdict(conditions()),
        "device": device.name,
        "gpu": torch.cuda.get_device_name() if device.name == "cuda" else "",
        "load_after": round(os.getloadavg()[0], 2),
        "package": package(),
    }
    output_json["skipped"] = _skipped
