"""A Ctrl-C at any moment: a step is made or not made, the slow weights stand in all parameters or in none."""

from __future__ import annotations

import _imp
import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import pytest
import torch
from helpers import BackendCase, UnfusedRMSprop, assert_unchanged, make_optimizer, make_params, set_grad, snapshot
from runs import advance, assert_same_run, gradients_of

from lookahead_fused import Lookahead

# Where Python looks for signals: as a function begins, and when one of C's has returned.
MOMENTS = ("call", "c_return")


class Interrupt:
    """Presses Ctrl-C the `at`-th time that Python looks for signals in an action. 0: never, and only counts."""

    def __init__(self, at: int = 0) -> None:
        self.at, self.moments = at, 0
        self.handler: Any = signal.default_int_handler

    def in_action(self, action: Callable[[], None]) -> None:
        sys.setprofile(self._look)
        try:
            action()
        finally:
            self.at = 0
            sys.setprofile(None)

    def _look(self, frame: FrameType, event: str, argument: Any) -> None:
        # What is raised in a generator that is being closed, or an object that is deleted, is swallowed; Python's own
        # importing, cut off as it leaves, keeps its lock.
        if event not in MOMENTS or frame.f_code.co_name in ("<genexpr>", "__del__"):
            return
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return
        # While Ctrl-C is held back, one moment is like another.
        before, self.handler = self.handler, signal.getsignal(signal.SIGINT)
        if self.handler is before and before is not signal.default_int_handler:
            return
        self.moments += 1
        if self.moments == self.at:
            signal.raise_signal(signal.SIGINT)


@pytest.fixture(autouse=True)
def usual_handler() -> Iterator[None]:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    # torch's own `no_grad` may be cut off on its way out, in its optimizers' steps too.
    torch.set_grad_enabled(True)
    assert not _imp.lock_held(), "no other thread can import any more"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    signal.signal(signal.SIGINT, before)


def at_all_moments(action: Callable[[], None], check: Callable[[bool], None], most: int) -> None:
    """Interrupts an action again and again, at `most` moments spread over it, and checks what is left each time.

    The check is told whether the action came to its end.
    """
    whole = Interrupt()
    whole.in_action(action)
    check(True)
    assert whole.moments > 20
    # The first moments of an action are the many checks before it changes anything, so that there is none to spare at
    # its end.
    for at in range(whole.moments, 0, -max(1, whole.moments // most)):
        ended = False
        with contextlib.suppress(KeyboardInterrupt):
            Interrupt(at).in_action(action)
            ended = True
        check(ended)


def is_free(lock: Any) -> bool:
    """Asked on another thread, as this one may have it twice."""
    found: list[bool] = []

    def ask() -> None:
        found.append(lock.acquire(blocking=False))
        if found[0]:
            lock.release()

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    return found[0]


def one(device: str) -> list[torch.nn.Parameter]:
    return make_params([(7,)], device=device)


def one_kind(device: str) -> list[torch.nn.Parameter]:
    """One of them lies in memory that has gaps, and is stepped in a copy."""
    return [*one(device), torch.nn.Parameter(torch.ones(4, 6, device=device)[:, ::2])]


def mixed(device: str) -> list[torch.nn.Parameter]:
    """Of two dtypes: stepped one after the other, and swapped in different ways."""
    return [*one_kind(device), *make_params([(3, 5)], torch.bfloat16, device=device)]


def make(rule: str, params: list[torch.nn.Parameter], backend: BackendCase) -> Any:
    if rule == "external":
        return Lookahead(UnfusedRMSprop(params, lr=0.1), k=2, backend=backend.name)
    return make_optimizer(rule, params, backend, lr=0.1, k=2)


RULES = ["adamw", "wrapped-sgd", "external"]
KINDS = [one, one_kind, mixed]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rule", RULES)
def test_slow_weights(backend: BackendCase, rule: str, kind: Callable) -> None:
    """After a block that was interrupted on its way in or out theta is back, and all goes on."""
    params = kind(backend.device)
    optimizer = make(rule, params, backend)
    advance(optimizer, params, range(3))
    before = snapshot(optimizer, params)
    hooks = len(getattr(optimizer, "base_optimizer", optimizer)._optimizer_state_dict_post_hooks)

    blocks: list[Any] = []

    def enter() -> None:
        blocks[:] = [optimizer.slow_weights()]
        blocks[0].__enter__()

    def enter_and_leave() -> None:
        with optimizer.slow_weights():
            pass

    def check(ended: bool) -> None:
        assert_unchanged(before, snapshot(optimizer, params))
        assert is_free(optimizer._lock)
        assert len(getattr(optimizer, "base_optimizer", optimizer)._optimizer_state_dict_post_hooks) == hooks
        optimizer._refuse_inside_slow_weights("a step")

    def check_entering(ended: bool) -> None:
        # A notebook keeps the traceback of an error, and with it the block.
        if ended:
            blocks[0].__exit__(None, None, None)
        check(ended)

    at_all_moments(enter, check_entering, 200)
    at_all_moments(enter_and_leave, check, 200)
    with optimizer.slow_weights():
        inside = snapshot(optimizer, params)["params"]
    assert not torch.equal(inside[0], params[0])
    advance(optimizer, params, [3])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("call", ["step", "sync"])
@pytest.mark.parametrize("rule", RULES)
def test_a_step_or_sync(backend: BackendCase, rule: str, call: str, kind: Callable) -> None:
    """It is made in every parameter or in none; a base's step and the sync after it are one."""
    params, twin_params = kind(backend.device), kind(backend.device)
    optimizer, twin = make(rule, params, backend), make(rule, twin_params, backend)
    for o, ps in ((optimizer, params), (twin, twin_params)):
        advance(o, ps, range(3))
    seen = set()

    def check(ended: bool) -> None:
        made = not torch.equal(params[0], twin_params[0])
        seen.add(made)
        assert made or not ended
        if made:
            getattr(twin, call)()
        assert_same_run(optimizer, twin)
        with torch.no_grad():
            for p, q in zip(params, twin_params, strict=True):
                q.copy_(p.add_(1.0))  # or a second sync would change nothing

    at_all_moments(getattr(optimizer, call), check, 60)
    assert seen == {False, True}


@pytest.mark.parametrize("rule", RULES)
def test_a_first_step(backend: BackendCase, rule: str) -> None:
    """One that was interrupted before it was made is made by the next call, from where the parameters are then."""

    def start() -> tuple[Any, list[torch.nn.Parameter]]:
        params = mixed(backend.device)
        optimizer = make(rule, params, backend)
        for p, g in zip(params, gradients_of(0, params), strict=True):
            set_grad(p, g)
        return optimizer, params

    def go_on(optimizer: Any, params: list[torch.nn.Parameter], steps: int) -> dict[str, Any]:
        with torch.no_grad():
            for p in params:
                p.add_(1.0)
        for _ in range(steps):
            optimizer.step()
        return {**snapshot(optimizer, params), "members": None}

    optimizer, params = start()
    optimizer.step()
    first = params[0].detach().clone()
    expected = {True: go_on(optimizer, params, 2), False: go_on(*start(), 3)}
    now: list[Any] = []

    def first_step() -> None:
        now[:] = start()
        now[0].step()

    def check(ended: bool) -> None:
        if ended or len(now) == 2:
            made = torch.equal(now[1][0], first)
            assert made or not ended
            assert_unchanged(expected[made], go_on(*now, 2 if made else 3))
        now.clear()

    at_all_moments(first_step, check, 20)
