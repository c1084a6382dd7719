"""The global norm of an optimizer's gradients, taken before a step: what clips them, and whether the step is finite.

The gradients are read once more and not written: a step multiplies them by the clip's coefficient in registers. The sum
is made in the order that `csrc/table/norm.h` states, by every backend.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from ._hyperparameters import ABOVE_ZERO, Number, Switch
from ._tensors import copy_in_layout, count_device, has_layout_of
from ._torch import is_dtensor

MAX_NORM, SKIP = "max_grad_norm", "skip_nonfinite"
_LARGEST = Number("a number > 0, or None", at_least=ABOVE_ZERO)
_SKIP = Switch()

_DOCUMENTED = """max_grad_norm: The largest norm of all gradients together, a number > 0, or None. In a step whose
            gradients, unscaled, have a larger one they are multiplied by what `torch.nn.utils.clip_grad_norm_` has,
            max_grad_norm / (norm + 1e-6), and stay as they were. DTensors add what all ranks of their mesh have.
            `grad_norm` tells the last norm without waiting for it.
        skip_nonfinite: Whether a step changes nothing where that norm is inf or NaN; `skipped_steps` counts those.
            Both arguments are the whole optimizer's, not a group's, and stand in no state dict."""

# See csrc/table/norm.h.
LANES = 64
BLOCK = 4096


_Class = TypeVar("_Class", bound=type[Any])


def documents_norm(cls: _Class) -> _Class:
    """The two arguments are the same in every class, and stated once."""
    cls.__doc__ = (cls.__doc__ or "").replace("{norm}", _DOCUMENTED)
    return cls


class Part(Protocol):
    """What of a part is needed here."""

    @property
    def device(self) -> torch.device: ...
    def sum_squares(self, order: Order, sums: Tensor) -> None:
        """Writes the place of each parameter that it has a row for, 0 for one without a gradient."""

    def make_clip(self, sums: Tensor, clip: ClipOnDevice) -> bool:
        """True if the device has made all of it."""


@dataclass(frozen=True)
class ClipOnDevice:
    """What a device makes of all sums without the host.

    Attributes:
        grad_scale: What the gradients were multiplied by, one fp32 number, or None.
        found_inf: Not 0 where the step is skipped whatever the norm, one fp32 number, or None.
        clip: Gets the norm and the coefficient, and has the norm from which on gradients are clipped, infinity where
            none are: three fp64 numbers.
        skip: Gets whether the step is skipped, also where the norm is not finite, one fp32 number; or None.
        skipped: Counts where the norm is not finite, one int64 number; or None.
    """

    grad_scale: Tensor | None
    found_inf: Tensor | None
    clip: Tensor
    skip: Tensor | None
    skipped: Tensor | None

    @property
    def own(self) -> tuple[Tensor, ...]:
        """What is written."""
        return tuple(tensor for tensor in (self.clip, self.skip, self.skipped) if tensor is not None)

    def addresses(self) -> tuple[int, ...]:
        """In the order of the attributes, 0 for None."""
        return tuple(map(address, (self.grad_scale, self.found_inf, self.clip, self.skip, self.skipped)))


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


class Order:
    """All parameters of an optimizer, in the order in which their sums are added.

    None of them is held.

    Attributes:
        count: How many there are.
        home: The device of the first, on which the sums are added; the CPU where that has no fp64.
        place_of: By a parameter's id its place.

    Raises:
        ValueError: DTensors are sharded over other ranks than others, so that the ranks would not clip alike.
    """

    def __init__(self, params: Sequence[Tensor]) -> None:
        self.count = len(params)
        self.home = count_device(params[0].device) if params else torch.device("cpu")
        self.place_of = {id(param): place for place, param in enumerate(params)}
        self._sums: dict[torch.device, Tensor] = {}
        # Of DTensors: the process groups whose ranks have the other shards, and the places of the parameters.
        self._sharded = [(groups, torch.tensor(places, device=self.home)) for groups, places in _sharded(params)]

    def sums(self, device: torch.device) -> Tensor:
        """One fp64 number for each parameter, which stays 0 where no part on that device writes it."""
        device = count_device(device)
        if device not in self._sums:
            self._sums[device] = torch.zeros(self.count, dtype=torch.float64, device=device)
        return self._sums[device]

    def all_sums(self) -> Tensor:
        """The sums of all devices, and of all ranks that have shards, at home."""
        sums = self.sums(self.home)
        # Each number is there on one device, and 0 on the others.
        for device, others in self._sums.items():
            if device != self.home:
                sums = sums + others.to(self.home)
        for groups, places in self._sharded:
            own = sums[places]
            for group in groups:
                torch.distributed.all_reduce(own, group=group)
            sums = sums.index_copy(0, places, own)
        return sums


@dataclass(frozen=True)
class Clip:
    """What a step is told: a tensor of one fp64 number, and whether it is skipped, by one of fp32 or not at all."""

    coefficient: Tensor
    found_inf: Tensor | None

    def measure(self, *_: object) -> Clip:
        """Of a norm that was taken before."""
        return self


class Norm(Protocol):
    """Takes the norm of all gradients of a step; see `GlobalNorm.measure`."""

    def measure(
        self, parts: Sequence[Part], order: Order, grad_scale: Tensor | None, found_inf: Tensor | None
    ) -> Clip: ...


class GlobalNorm:
    """The norm of one optimizer's gradients, and what it does to a step.

    Args:
        max_grad_norm: The largest norm, beyond which the gradients are clipped to it; or None.
        skip_nonfinite: Whether a step whose norm is not finite changes nothing.

    Raises:
        TypeError, ValueError: `max_grad_norm` is not a number > 0, or `skip_nonfinite` not True or False.
    """

    def __init__(self, max_grad_norm: float | None = None, skip_nonfinite: bool = False) -> None:
        if max_grad_norm is not None:
            _LARGEST.check(MAX_NORM, max_grad_norm)
        _SKIP.check(SKIP, skip_nonfinite)
        self.max_grad_norm = None if max_grad_norm is None else float(max_grad_norm)
        self.skip_nonfinite = bool(skip_nonfinite)
        # Looked at in every step, also in those of optimizers without a norm.
        self.is_asked = max_grad_norm is not None or self.skip_nonfinite
        # The norm and the coefficient of the last step, and how many steps were skipped: written in place, so that a
        # captured graph writes them in every replay.
        self._clip: Tensor | None = None
        self._skip: Tensor | None = None
        self._skipped: Tensor | None = None

    def last(self, device: torch.device) -> Tensor:
        """The norm that the last step found, a 0-dim tensor of its own; NaN before the first."""
        if self._clip is None:
            return torch.full((), math.nan, dtype=torch.float64, device=count_device(device))
        return self._clip[0].clone()

    def skipped(self, device: torch.device) -> Tensor:
        """How many steps were skipped, a 0-dim tensor of its own."""
        if self._skipped is None:
            return torch.zeros((), dtype=torch.int64, device=count_device(device))
        return self._skipped.clone()

    def measure(self, parts: Sequence[Part], order: Order, grad_scale: Tensor | None, found_inf: Tensor | None) -> Clip:
        """The clip of a step.

        Args:
            parts: Refreshed for the step.
            order: Of the optimizer's parameters.
            grad_scale, found_inf: As a step is given them.
        """
        for part in parts:
            part.sum_squares(order, order.sums(part.device))
        sums = order.all_sums()
        clip = self._clip_on(order.home, grad_scale, found_inf)
        if not any(part.make_clip(sums, clip) for part in parts if part.device == order.home):
            _make_clip(sums, clip)
        return Clip(clip.clip[1], found_inf if clip.skip is None else clip.skip)

    def was_finite(self) -> bool:
        """Whether the norm was that was taken last, which is waited for."""
        return self._clip is not None and math.isfinite(self._clip[0].item())

    def count_skip(self) -> None:
        """A step is skipped for what another worker found."""
        assert self._skipped is not None
        self._skipped += 1

    def _clip_on(self, device: torch.device, grad_scale: Tensor | None, found_inf: Tensor | None) -> ClipOnDevice:
        if self._clip is None or self._clip.device != device:
            largest = math.inf if self.max_grad_norm is None else self.max_grad_norm
            self._clip = torch.tensor([math.nan, math.nan, largest], dtype=torch.float64, device=device)
        if self.skip_nonfinite and (self._skipped is None or self._skipped.device != device):
            start = 0 if self._skipped is None else int(self._skipped)
            self._skipped = torch.full((), start, dtype=torch.int64, device=device)
            self._skip = torch.zeros((), dtype=torch.float32, device=device)
        return ClipOnDevice(
            None if grad_scale is None else grad_scale.to(device, torch.float32).reshape(()),
            None if found_inf is None else found_inf.to(device, torch.float32).reshape(()),
            self._clip,
            self._skip,
            self._skipped,
        )


def _sharded(params: Sequence[Tensor]) -> list[tuple[list[Any], list[int]]]:
    meshes: dict[tuple[Any, tuple[int, ...]], list[int]] = {}
    for place, param in enumerate(params):
        if is_dtensor(param):
            dtensor: Any = param
            over = tuple(dim for dim, placement in enumerate(dtensor.placements) if placement.is_shard())
            meshes.setdefault((dtensor.device_mesh, over), []).append(place)
    # A rank that has shards of both sees the ranks of either; those of one alone would add less.
    ranks = [(frozenset(mesh.mesh.flatten().tolist()), places[0]) for (mesh, _), places in meshes.items()]
    for index, (own, place) in enumerate(ranks):
        for others, other_place in ranks[:index]:
            if not (own <= others or others <= own):
                raise ValueError(
                    f"{MAX_NORM} and {SKIP} need DTensors on meshes of the same ranks, or of some of them, got ranks "
                    f"{sorted(others)} of parameter {other_place} and {sorted(own)} of parameter {place}: use an "
                    "optimizer for each, or clip by torch.nn.utils.clip_grad_norm_"
                )
    return [([mesh.get_group(dim) for dim in over], places) for (mesh, over), places in meshes.items() if over]


def sum_of_squares(gradient: Tensor, param: Tensor) -> Tensor:
    """Of a gradient's elements, by torch's operators: one fp64 number.

    Args:
        param: Whose layout tells the order of the elements.
    """
    if not has_layout_of(gradient, param):
        gradient = copy_in_layout(gradient, param, gradient.dtype)
    flat = gradient.as_strided((gradient.numel(),), (1,)).to(count_device(gradient.device)).double()
    blocks = torch.nn.functional.pad(flat * flat, (0, -flat.numel() % BLOCK)).view(-1, BLOCK)
    return sum_in_lanes(sum_in_lanes(blocks))


def sum_in_lanes(values: Tensor) -> Tensor:
    """Over the last dimension: lane l adds the values l, l + LANES, ...; then the lanes are added by halves."""
    if values.shape[-1] == 1:
        return values[..., 0]
    padded = torch.nn.functional.pad(values, (0, -values.shape[-1] % LANES))
    strides = padded.view(*values.shape[:-1], padded.shape[-1] // LANES, LANES)
    lanes = torch.zeros_like(strides[..., 0, :]) if strides.shape[-2] else values.new_zeros((*values.shape[:-1], LANES))
    for i in range(strides.shape[-2]):
        lanes = lanes + strides[..., i, :]
    while lanes.shape[-1] > 1:
        half = lanes.shape[-1] // 2
        lanes = lanes[..., :half] + lanes[..., half:]
    return lanes[..., 0]


def _make_clip(sums: Tensor, clip: ClipOnDevice) -> None:
    """The same by torch's operators; see `write_clip` in `csrc/table/norm.h`."""
    scale = 1.0 if clip.grad_scale is None else clip.grad_scale.double()
    norm = _square_root(sum_in_lanes(sums)) / scale
    clip.clip[0] = norm
    clip.clip[1] = (clip.clip[2] / (norm + 1e-6)).clamp(max=1.0)
    if clip.skip is not None and clip.skipped is not None:
        bad = ~norm.isfinite()
        clip.skipped.add_(bad)
        clip.skip.copy_(bad if clip.found_inf is None else bad | (clip.found_inf != 0))


def _square_root(x: Tensor) -> Tensor:
    """Rounded correctly; torch's on a CPU is MKL's."""
    if x.device.type != "cpu":
        return x.sqrt()
    return torch.tensor(math.sqrt(x.item()), dtype=torch.float64, device="cpu")
