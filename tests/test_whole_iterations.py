"""Whole iterations captured once and replayed: zero_grad, forward, backward, clip, scaler, step and average. The CUDA
backend's step is a graph of the stand-in for the CUDA runtime; torch's operators around it run again in each replay, on
the tensors that they had."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cuda_host import HOST
from helpers import seeded
from test_cuda_graphs import Capture
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from lookahead_fused import EMA, GPA, Lookahead, LookaheadAdamW, ScheduleFree

pytestmark = pytest.mark.usefixtures("runtime")

MAKERS: dict[str, Callable[..., Any]] = {
    "LookaheadAdamW": lambda params, live, **kw: LookaheadAdamW(
        params, **live("lr", "weight_decay", "alpha"), k=2, **kw
    ),
    "Lookahead": lambda params, live, **kw: Lookahead(
        torch.optim.SGD(params, momentum=0.9, **live("lr", "weight_decay")), k=2, **live("alpha"), **kw
    ),
    "EMA": lambda params, live, **kw: EMA(
        torch.optim.AdamW(params, **live("lr", "weight_decay")), **live("decay"), **kw
    ),
    "GPA": lambda params, live, **kw: GPA(
        torch.optim.AdamW(params, **live("lr", "weight_decay")), **live("train_interp", "eval_interp"), **kw
    ),
    "ScheduleFree": lambda params, live, **kw: ScheduleFree(
        torch.optim.AdamW(params, **live("lr", "weight_decay")), **live("interp"), **kw
    ),
}
ITERATIONS = 8
OVERFLOWS = 4


class Recorded(TorchDispatchMode):
    """What torch ran while this was on, and in its place among that what `insert` was told."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Callable[[], None]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        read = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        made = [t for t in tree_leaves(out) if isinstance(t, Tensor)]

        def call() -> None:
            again = [t for t in tree_leaves(func(*args, **kwargs)) if isinstance(t, Tensor)]
            for tensor, new in zip(made, again, strict=True):
                # Others are the tensors that were read, or views of them.
                if tensor.untyped_storage().data_ptr() not in read:
                    tensor.copy_(new)

        self.calls.append(call)
        return out

    def insert(self, call: Callable[[], None]) -> None:
        self.calls.append(call)

    def replay(self) -> None:
        with torch.no_grad():
            for call in self.calls:
                call()


class Training:
    """A model that is trained by iterations, on inputs and settings that are written into tensors before each."""

    def __init__(self, name: str, *, clips: str, set_to_none: bool, live: bool = True) -> None:
        torch.manual_seed(0)
        self.model = torch.nn.Sequential(torch.nn.Linear(4, 300), torch.nn.Tanh(), torch.nn.Linear(300, 1))
        self.x = torch.zeros(5, 4)
        self.live: dict[str, Tensor] = {}
        own = {"max_grad_norm": 0.1} if clips == "in the step" else {}
        self.optimizer = MAKERS[name](
            self.model.parameters(), self.settings if live else self.numbers, backend=HOST.name, **own
        )
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
        self.clips, self.set_to_none = clips, set_to_none
        self.loss = torch.zeros(())

    def settings(self, *names: str) -> dict[str, Tensor]:
        self.live.update({name: torch.tensor(0.5) for name in names})
        return {name: self.live[name] for name in names}

    def numbers(self, *names: str) -> dict[str, float]:
        return dict.fromkeys(names, 0.5)

    def iterate(self) -> None:
        self.optimizer.zero_grad(set_to_none=self.set_to_none)
        self.loss = self.model(self.x).square().mean()
        self.scaler.scale(self.loss).backward()
        if self.clips == "by torch":
            self.scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 0.1)
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def set(self, iteration: int) -> None:
        """The numbers of an iteration."""
        self.x.copy_(torch.randn(5, 4, generator=seeded(iteration)))
        if iteration == OVERFLOWS:
            self.x[0, 0] = torch.inf
        for place, number in enumerate(self.live.values()):
            number.fill_((1 + (iteration + place) % 4) / 8)

    def captured(self, runtime: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> Recorded:
        """Records an iteration, and makes it."""
        recorded, capture, step = Recorded(), Capture(runtime, monkeypatch), self.optimizer.step

        def captured_step() -> None:
            # The step itself sees no mode: it is a graph's.
            with _disable_current_modes():
                with capture:
                    step()
                capture.replay()
            recorded.insert(capture.replay)

        self.optimizer.step = captured_step
        with recorded:
            self.iterate()
        del self.optimizer.step
        return recorded

    def kept(self) -> list[Tensor]:
        """The weights and their state, where they lie."""
        return [*self.model.parameters(), *(value for own in self.optimizer.state.values() for value in own.values())]

    def told(self) -> list[Tensor]:
        """All that an iteration changes, and what it tells."""
        return [
            *self.kept(),
            *(p.grad for p in self.model.parameters() if p.grad is not None),
            *(torch.tensor(value) for value in self.scaler.state_dict().values()),
            self.optimizer.grad_norm,
            self.loss,
        ]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("clips", ["not", "in the step", "by torch"])
@pytest.mark.parametrize("name", MAKERS)
def test_replays_are_iterations(
    name: str, clips: str, set_to_none: bool, runtime: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With other inputs, learning rates, decays and interpolations each, through an overflow, after which the scaler's
    factor is another one."""
    eager, replayed = (Training(name, clips=clips, set_to_none=set_to_none) for _ in range(2))
    recorded = None
    for iteration in range(ITERATIONS):
        for training in (eager, replayed):
            training.set(iteration)
        eager.iterate()
        if iteration == 0:
            replayed.iterate()  # state and tables are made
        elif recorded is None:
            recorded = replayed.captured(runtime, monkeypatch)
        else:
            recorded.replay()
        assert same(eager.told(), replayed.told()), iteration
    # One iteration overflowed, and each two of the others doubled the factor.
    assert all(own["step"] == ITERATIONS - 1 for own in replayed.optimizer.state.values())
    assert replayed.scaler.get_scale() != 2.0**10
    assert all(torch.isfinite(p).all() for p in replayed.model.parameters())


FROZEN: dict[str, Callable[[Any], None]] = {
    "k": lambda group: group.update(k=1),
    "lr": lambda group: group.update(lr=0.0),
    "weight_decay": lambda group: group.update(weight_decay=0.25),
    "alpha": lambda group: group.update(alpha=0.25),
    "betas": lambda group: group.update(betas=(0.5, 0.5)),
    "eps": lambda group: group.update(eps=1.0),
    "pullback_momentum": lambda group: group.update(pullback_momentum="reset"),
}


@pytest.mark.parametrize("what", FROZEN)
def test_a_graph_freezes_what_is_no_tensor(what: str, runtime: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    """A number or a name in a group counts in replays as it was at the capture, also after a step beside them, in which
    it counts as it is."""
    results = []
    for changes in (False, True):
        training = Training("LookaheadAdamW", clips="not", set_to_none=True, live=False)
        training.set(0)
        training.iterate()
        recorded = training.captured(runtime, monkeypatch)
        if changes:
            FROZEN[what](training.optimizer.param_groups[0])
        for iteration in range(1, 3):
            training.set(iteration)
            recorded.replay()
        results.append([t.clone() for t in training.told()])
        kept = [t.detach().clone() for t in training.kept()]
        # An iteration without a sync, where k is 2, and one with.
        for _ in range(2):
            training.iterate()
        results.append([t.clone() for t in training.told()])
        with torch.no_grad():
            for t, value in zip(training.kept(), kept, strict=True):
                t.copy_(value)
        for _ in range(2):
            recorded.replay()
        results.append(training.kept())
    unchanged, after, again, frozen, changed, frozen_again = results
    assert same(unchanged, frozen)
    assert not same(after, changed)
    assert same(again, frozen_again)


def test_a_graph_freezes_which_parameters_have_gradients(runtime: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that had none at the capture stays, and one whose gradient is taken away is stepped with what lies there."""
    training = Training("LookaheadAdamW", clips="not", set_to_none=True)
    first, *_, last = training.model.parameters()
    training.set(0)
    training.iterate()
    last.requires_grad_(False)
    last.grad = None
    recorded = training.captured(runtime, monkeypatch)

    def counts() -> list[float]:
        return [training.optimizer.state[p]["step"].item() for p in (first, last)]

    steps = counts()
    first.grad, last.grad = None, torch.ones_like(last)
    for replay in range(2):
        before = first.detach().clone(), last.detach().clone()
        recorded.replay()
        assert counts() == [steps[0] + replay + 1, steps[1] + replay]
        assert not torch.equal(first, before[0])
        assert torch.equal(last, before[1])
        # A step beside it is of those that have gradients now, and tells no replay of them.
        training.optimizer.step()
        assert counts() == [steps[0] + replay + 1, steps[1] + replay + 1]
