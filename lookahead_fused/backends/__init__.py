"""Which backends there are, which of them serve here, and which one a parameter gets.

``lookahead_fused.backends()`` is the function `backends` of this package, and ``lookahead_fused.backends`` the package.

A backend is a module with
    NAME, DEVICES           what it is called, and the device types it serves (None: any)
    unavailable(device) -> str   why it does not serve on this machine, or on one device of it; "" where it does
    part(spec) -> Part      a part of an optimizer's parameters, for this backend to step
"""

from __future__ import annotations

import sys
import warnings
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from .._hyperparameters import Argument, Kind
from . import cpu, cuda, reference, triton

# In the order in which "auto" prefers them.
BACKENDS: dict[str, ModuleType] = {module.NAME: module for module in (cuda, triton, cpu, reference)}


@dataclass(frozen=True)
class BackendStatus:
    """Whether a backend serves on this machine, and if not, why."""

    available: bool
    reason: str


def backends() -> dict[str, BackendStatus]:
    """Tells which backends serve here, and why the others do not.

    Returns:
        A dict from backend name, in the order in which ``backend="auto"`` prefers them, to a `BackendStatus` with
        ``available`` (bool) and ``reason`` (str, empty where available).
    """
    reasons = {name: module.unavailable() for name, module in BACKENDS.items()}
    return {name: BackendStatus(not reason, reason) for name, reason in reasons.items()}


class _CallablePackage(ModuleType):
    """The function and the package have one name; under it there is only room for one object."""

    def __call__(self) -> dict[str, BackendStatus]:
        return backends()

    __call__.__doc__ = backends.__doc__


sys.modules[__name__].__class__ = _CallablePackage


@dataclass(frozen=True)
class _Name(Kind):
    """ "auto", or one of the backends that there are when it is asked."""

    expected: str = "'auto' or a backend's name"
    is_switch: bool = True

    def check_step(self, name: str, value: Any) -> None:
        if not isinstance(value, str) or (value != "auto" and value not in BACKENDS):
            known = ", ".join(map(repr, ("auto", *BACKENDS)))
            raise ValueError(f"{name} must be one of {known}, got {value!r}")

    def encode(self, value: Any) -> tuple[float, ...]:
        return (0.0,)


def backend_argument(key: str) -> Argument:
    """The entry of a parameter group that names a backend."""
    return Argument(key, _Name(), name="backend")


def choose(name: str, device: torch.device, argument: str = "backend") -> ModuleType:
    """The backend for parameters on a device.

    Raises:
        ValueError: no backend is called `name`.
        RuntimeError: the named backend cannot serve this device here; the message says why.
    """
    _Name().check(argument, name)
    if name != "auto":
        module = BACKENDS[name]
        reason = _refusal(module, device)
        if reason:
            raise RuntimeError(f"{argument}={name!r} cannot serve a parameter on {device}: {reason}")
        return module
    passed: list[str] = []
    for module in BACKENDS.values():
        reason = _refusal(module, device)
        if not reason:
            if passed:
                _warn_once(device.type, module.NAME, passed)
            return module
        if _made_for(module, device):
            passed.append(f"{module.NAME}: {reason}")
    raise RuntimeError(f"no backend serves a parameter on {device}: {'; '.join(passed)}")


def _made_for(module: ModuleType, device: torch.device) -> bool:
    return module.DEVICES is None or device.type in module.DEVICES


def _refusal(module: ModuleType, device: torch.device) -> str:
    if device.type == "meta":
        return "a tensor on the meta device has no elements to update"
    if not _made_for(module, device):
        return f"it serves devices of type {', '.join(module.DEVICES)}"
    reason: str = module.unavailable(device)
    return reason


_warned: set[tuple[str, str]] = set()


def _warn_once(device_type: str, taken: str, passed: list[str]) -> None:
    if (device_type, taken) not in _warned:
        _warned.add((device_type, taken))
        warnings.warn(
            f"lookahead_fused takes the slower backend {taken!r} for parameters on {device_type} ({'; '.join(passed)})",
            RuntimeWarning,
            stacklevel=2,
        )
