"""Where the Triton backend serves, and what is said where it does not."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from triton_host import Driver, needs_triton

import lookahead_fused
from lookahead_fused import _build as build
from lookahead_fused.backends import BACKENDS, BackendStatus, choose, triton


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """A machine with a GPU, on which nobody has asked yet whether Triton works."""
    if build.module("_cpu") is None:
        pytest.skip(build.reason("_cpu"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    forget()
    yield monkeypatch
    forget()


def forget() -> None:
    triton._broken.cache_clear()
    triton._not_driven.cache_clear()


def test_without_a_device() -> None:
    if any(map(triton._is_visible, triton.DEVICES)):
        pytest.skip("there is a device")
    status = lookahead_fused.backends()["triton"]
    assert not status.available
    assert "no device of type cuda or xpu" in status.reason or build.module("_cpu") is None


def test_not_installed(fresh: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "triton"]:
        fresh.delitem(sys.modules, name)
    fresh.setitem(sys.modules, "triton", None)
    real = __import__

    def without(name: str, *rest: Any) -> Any:
        if name.split(".")[0] == "triton":
            raise ModuleNotFoundError("No module named 'triton'", name="triton")
        return real(name, *rest)

    fresh.setattr("builtins.__import__", without)
    assert triton.unavailable(torch.device("cuda")) == "triton is not installed"
    assert triton.version() == "triton is not installed"


@needs_triton
def test_broken(fresh: pytest.MonkeyPatch) -> None:
    """Whatever comes out of it is the reason, and nothing is raised."""
    fresh.setattr(triton, "kernels", mock.Mock(side_effect=OSError("libtriton.so: undefined symbol")))
    reason = triton.unavailable(torch.device("cuda"))
    assert "triton does not work here: OSError: libtriton.so: undefined symbol" in reason


@needs_triton
def test_too_old(fresh: pytest.MonkeyPatch) -> None:
    fresh.setattr(triton, "version", lambda: "3.3.1")
    assert triton.unavailable(torch.device("cuda")) == (
        "triton 3.3.1 does not compile the kernels: install torch 2.8 or newer, which brings triton 3.4 or newer"
    )


@needs_triton
def test_without_a_driver(fresh: pytest.MonkeyPatch) -> None:
    from triton import runtime

    if torch.cuda.is_available():
        pytest.skip("there is a driver")
    fresh.setattr(runtime, "driver", type(runtime.driver)())
    assert "0 active drivers" in triton.unavailable(torch.device("cuda"))


@needs_triton
def test_a_query_leaves_the_device_alone(fresh: pytest.MonkeyPatch) -> None:
    """A process that asked which backends serve may fork, and its children use a GPU. What initializes one, or has
    Triton's driver do so, is asked where there is a parameter on it, or where it is initialized already."""
    from triton import runtime

    class Asked:
        @property
        def active(self) -> Any:
            raise RuntimeError("the driver was asked")

    initializes = mock.Mock(side_effect=RuntimeError("CUDA was initialized"))
    for owner, name in (
        (torch.accelerator, "is_available"),
        (torch.accelerator, "device_count"),
        (torch.accelerator, "current_accelerator"),
        (torch.cuda, "is_available"),
        (torch.cuda, "_lazy_init"),
        (torch.cuda, "get_device_capability"),
        (torch._C, "_cuda_getDeviceCount"),
    ):
        fresh.setattr(owner, name, initializes, raising=False)
    fresh.setattr(runtime, "driver", Asked())
    assert lookahead_fused.backends()["triton"] == BackendStatus(True, "")
    assert "the driver was asked" in triton.unavailable(torch.device("cuda"))
    forget()
    fresh.setattr(torch.cuda, "is_initialized", lambda: True)
    assert "the driver was asked" in triton.unavailable()
    initializes.assert_not_called()


@needs_triton
def test_a_driver_of_other_devices(fresh: pytest.MonkeyPatch) -> None:
    from triton import runtime

    drivers = type(runtime.driver)()
    drivers.set_active(Driver())
    fresh.setattr(runtime, "driver", drivers)
    assert triton.unavailable(torch.device("cuda")) == ""
    fresh.setattr(torch.cuda, "device_count", lambda: 0)
    fresh.setattr(torch.xpu, "device_count", lambda: 1)
    assert "drives devices of type cuda, not xpu" in triton.unavailable(torch.device("xpu"))
    assert "no device of type cuda" in triton.unavailable(torch.device("cuda"))


def test_without_the_table(fresh: pytest.MonkeyPatch) -> None:
    fresh.setattr(triton, "native", lambda: None)
    fresh.setattr(build, "reason", lambda name: "no C++17 compiler was found")
    assert "_cpu: no C++17 compiler was found" in triton.unavailable(torch.device("cuda"))


def test_auto_prefers_cuda_then_triton_and_tells_of_a_slower_one(fresh: pytest.MonkeyPatch) -> None:
    fresh.setattr(sys.modules[choose.__module__], "_warned", set())
    reasons = {"cuda": "no code for this card", "triton": ""}
    for name in reasons:
        fresh.setattr(BACKENDS[name], "unavailable", lambda device=None, name=name: reasons[name])
    device = torch.device("cuda")
    with pytest.warns(RuntimeWarning, match=r"'triton' for parameters on cuda \(cuda: no code for this card\)"):
        assert choose("auto", device) is triton
    reasons["triton"] = "broken"
    with pytest.warns(RuntimeWarning, match=r"'reference' .*cuda: no code for this card; triton: broken"):
        assert choose("auto", device).NAME == "reference"
    reasons.update(cuda="")
    assert choose("auto", device).NAME == "cuda"
    assert choose("auto", torch.device("cpu")).NAME in ("cpu", "reference")
    with pytest.raises(RuntimeError, match="it serves devices of type cuda, xpu"):
        choose("triton", torch.device("cpu"))
