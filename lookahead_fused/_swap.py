"""Parameters and slow weights trade places, whole or not at all."""

from __future__ import annotations

import itertools
from collections.abc import Container, Iterable, Iterator, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from . import _build as build
from ._tensors import is_dense, is_laid_out_like, local_tensor
from ._torch import dispatch_mode_is_on, is_plain

# Elements that trade places at a time where no compiled code does it.
_BLOCK = 1 << 20

Pair = tuple[Tensor, Tensor]


class Swap:
    """The trade of some parameters and their slow weights.

    All memory that it needs is taken here, before anything changes. Where the two have one dtype that is room for one
    block of each device and dtype, which all pairs use in turn; for a parameter that has gaps, or lies otherwise than
    its slow weights, the block is the whole of it. Elsewhere it is a copy of each parameter.

    Args:
        pairs: Parameters, each with its slow weights.
    """

    def __init__(self, pairs: list[Pair]) -> None:
        self._trading: list[Pair] = []
        self._aside: list[tuple[Tensor, Tensor, Tensor]] = []
        self._owners: list[Pair] = []
        self._held: list[Pair] = []
        self._versions: dict[int, int] = {}
        # Whoever evaluates in inference mode may leave it first.
        with torch.inference_mode(False), torch.no_grad():
            for owner, state in pairs:
                theta, phi = local_tensor(owner), local_tensor(state)
                if theta.dtype == phi.dtype:
                    self._trading.append((theta, phi))
                    self._owners.append((owner, state))
                else:
                    self._set_aside(owner, state, owner.clone())
            self._rooms = _Rooms(pair for pair in self._trading if not _lie_in_memory(*pair))

    @classmethod
    def entered(cls, held: Iterable[tuple[Tensor, Tensor, Tensor]]) -> Swap:
        """A trade that was made elsewhere, and that nothing is moved for: the parameters hold phi, or soon will.

        Args:
            held: Parameters, each with its slow weights and with what to put back, which becomes the swap's own.
        """
        swap = cls([])
        for owner, state, train in held:
            swap._set_aside(owner, state, train)
        swap._look()
        return swap

    def _set_aside(self, owner: Tensor, state: Tensor, train: Tensor) -> None:
        theta, held = local_tensor(owner), local_tensor(train)
        self._aside.append((theta, local_tensor(state), _as_plain(held) if is_plain(theta) else held))
        self._held.append((owner, train))

    def traded(self) -> dict[int, Tensor]:
        """Of each slow weight that holds theta now, by id, the parameter that holds phi."""
        return {id(state): owner for owner, state in self._owners}

    def train_params(self) -> dict[int, Tensor]:
        """Of each parameter that holds phi now, by id, the tensor that holds its theta."""
        return {id(owner): train for owner, train in (*self._owners, *self._held)}

    def written(self) -> set[int]:
        """The parameters, by id, that somebody has written into since they hold phi."""
        return {
            id(owner) for owner, _ in (*self._owners, *self._held) if self._versions.get(id(owner)) != _version(owner)
        }

    @torch.no_grad()
    def enter(self) -> None:
        """Puts phi into the parameters. To be called where no interrupt comes."""
        self._trade(self._trading)
        for theta, phi, _ in self._aside:
            theta.copy_(phi)
        self._look()

    @torch.no_grad()
    def enter_again(self) -> None:
        """The same after `leave`, where theta may be another by now."""
        for theta, _, held in self._aside:
            held.copy_(theta)
        self.enter()

    @torch.no_grad()
    def leave(self, without: Container[int] = ()) -> None:
        """Puts theta back, the last first: parameters may share memory. To be called where no interrupt comes.

        Args:
            without: The ids of parameters that keep what they hold.
        """
        for (theta, _, held), (owner, _) in zip(reversed(self._aside), reversed(self._held), strict=True):
            if id(owner) not in without:
                theta.copy_(held)
        pairs = zip(self._trading, self._owners, strict=True)
        self._trade([pair for pair, (owner, _) in pairs if id(owner) not in without][::-1])

    def _look(self) -> None:
        self._versions = {id(owner): _version(owner) for owner, _ in (*self._owners, *self._held)}

    def _trade(self, pairs: Sequence[Pair]) -> None:
        # Asked anew on the way out: meanwhile somebody may have laid them out otherwise, or turned a mode on that would
        # not see what is written through addresses. Only then leaving may take memory.
        seen = dispatch_mode_is_on()
        for in_memory, run in itertools.groupby(pairs, lambda pair: not seen and _lie_in_memory(*pair)):
            if in_memory:
                _exchange(list(run))
                continue
            for theta, phi in run:
                for a, b, held in _blocks(theta, phi, self._rooms.room(theta, phi)):
                    held.copy_(a)
                    a.copy_(b)
                    b.copy_(held)


def _version(owner: Tensor) -> int:
    # An inference tensor has none.
    return 0 if owner.is_inference() else owner._version


def _exchange(pairs: list[Pair]) -> None:
    native = build.module("_cpu")
    assert native is not None
    native.exchange(Tensor, pairs, torch.get_num_threads(), False)
    increment_version([t for pair in pairs for t in pair if not t.is_inference()])


class _Rooms:
    """Room for a block of each pair that trades places by operators: one for all of a device and dtype."""

    def __init__(self, pairs: Iterable[Pair]) -> None:
        self._shared: dict[tuple[torch.device, torch.dtype], Tensor] = {}
        self._own: dict[int, Tensor] = {}
        wanted: dict[tuple[torch.device, torch.dtype], int] = {}
        for theta, phi in pairs:
            if is_plain(theta):
                key = theta.device, theta.dtype
                wanted[key] = max(wanted.get(key, 0), _block(theta, phi))
            else:
                # Only its own class knows how to make a tensor like it.
                self._own[id(theta)] = torch.empty_like(theta)
        for (device, dtype), count in wanted.items():
            self._shared[device, dtype] = _room(count, device, dtype)

    def room(self, theta: Tensor, phi: Tensor) -> Tensor:
        if not is_plain(theta):
            return self._own[id(theta)]
        room, count = self._shared.get((theta.device, theta.dtype)), _block(theta, phi)
        return room if room is not None and room.numel() >= count else _room(count, theta.device, theta.dtype)


def _room(count: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    return _as_plain(torch.empty(count, device=device, dtype=dtype))


def _as_plain(made: Tensor) -> Tensor:
    """What was made beside a tensor with memory, which it has too; raises TypeError where it has none."""
    if not is_plain(made):
        raise TypeError(
            f"slow_weights() must be entered outside of a mode that makes a {type(made).__name__} beside parameters "
            "with memory"
        )
    return made


def _alike(theta: Tensor, phi: Tensor) -> bool:
    return is_plain(theta) and is_plain(phi) and is_laid_out_like(theta, phi) and is_dense(theta)


def _lie_in_memory(theta: Tensor, phi: Tensor) -> bool:
    """Compiled code can have them trade places."""
    on_host = theta.device.type == phi.device.type == "cpu"
    return on_host and build.module("_cpu") is not None and _alike(theta, phi)


def _block(theta: Tensor, phi: Tensor) -> int:
    """How many elements trade places at a time. All, where the two lie otherwise: a flat view may not exist."""
    return min(theta.numel(), _BLOCK) if _alike(theta, phi) else theta.numel()


def _blocks(theta: Tensor, phi: Tensor, room: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    if not is_plain(theta):
        yield theta, phi, room
    elif not _alike(theta, phi):
        yield theta, phi, room[: theta.numel()].view(theta.shape)
    else:
        # The memory of both in its own order.
        a, b = (t.as_strided((t.numel(),), (1,)) for t in (theta, phi))
        for x, y in zip(torch.split(a, _BLOCK), torch.split(b, _BLOCK), strict=True):
            yield x, y, room[: x.numel()]
