"""`process_group`: the mean over workers in theta's place at a sync, by a group of this process alone."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers import (
    EXTERNAL_CLASSES,
    LOOKAHEAD_CLASSES,
    TORCH_CLASSES,
    BackendCase,
    assert_unchanged,
    check_message,
    make_grads,
    make_params,
    same_tensor_bits,
    seeded,
    snapshot,
)
from runs import assert_same_run

import lookahead_fused
from lookahead_fused import EMA, Lookahead, LookaheadAdamW, LookaheadSGD, _workers
from lookahead_fused import _masters as masters

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="this torch was built without torch.distributed"
)

SHAPES = ((7,), (3, 5), (), (0,), (3000,), (2, 3))


@pytest.fixture
def alone() -> Iterator[Any]:
    """A group of this process alone, in which all_reduce changes nothing: no threads, no sockets."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    yield torch.distributed.group.WORLD
    torch.distributed.destroy_process_group()


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """The tensors that all_reduce is given from now on, as they are then."""
    given: list[torch.Tensor] = []
    real = torch.distributed.all_reduce

    def all_reduce(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        given.append(tensor.clone())
        return real(tensor, *args, **kwargs)

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    return given


def make(rule: str, params: Any, backend: str, **hyper: Any) -> Any:
    wrapped = rule.removeprefix("wrapped-")
    if wrapped == rule:
        return LOOKAHEAD_CLASSES[rule](params, backend=backend, **hyper)
    names = ("k", "alpha", "pullback_momentum", "outer_momentum", "process_group")
    ours = {name: hyper.pop(name) for name in names if name in hyper}
    return Lookahead((TORCH_CLASSES | EXTERNAL_CLASSES)[wrapped](params, **hyper), backend=backend, **ours)


def train(optimizer: Any, steps: range) -> None:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for t in steps:
        for i, (p, g) in enumerate(zip(params, make_grads(params, generator=seeded(t)), strict=True)):
            # The phases of two of them differ from the others'.
            p.grad = None if (i, t) in ((1, 1), (4, 0), (4, 1)) else g
        optimizer.step()


def pulled_back(**hyper: Any) -> dict[str, Any]:
    return {"k": 3, "alpha": 0.3, "pullback_momentum": "pullback", **hyper}


CASES: dict[str, tuple[str, torch.dtype, dict[str, Any]]] = {
    "adamw": ("adamw", torch.float32, pulled_back(outer_momentum=0.6)),
    "adamw-master": ("adamw", torch.bfloat16, pulled_back(master_weights=True)),
    "sgd": ("sgd", torch.float64, pulled_back(momentum=0.9)),
    # Pulled back, a narrow moment is rounded once more: between the inner step and the event.
    "bfloat16": ("sgd", torch.bfloat16, {"k": 3, "momentum": 0.9, "master_weights": True, "state_dtype": "bfloat16"}),
    "int8": ("adamw", torch.float32, {"k": 3, "pullback_momentum": "reset", "state_dtype": "int8"}),
    "rmsprop": ("rmsprop", torch.float32, {"k": 2, "momentum": 0.9, "pullback_momentum": "reset"}),
    "lion": ("lion", torch.float32, {"k": 1, "alpha": 1.2, "outer_momentum": 0.5}),
    "never": ("radam", torch.float32, {"k": 2**60}),
    "wrapped": ("wrapped-sgd", torch.float32, pulled_back(momentum=0.9)),
    "unfused": ("wrapped-nadam", torch.float32, pulled_back()),
}


@pytest.mark.parametrize("name", CASES)
def test_one_worker_trains_as_without_a_group(backend: BackendCase, alone: Any, name: str) -> None:
    """A mean over one is what it was: an inner step, the mean and a sync must give a step's bits, of a first step
    (where phi starts), of parameters whose phases differ, of masters and moments. A sync of more rows than are due, a
    count that advances twice or not, phi from after the first update: each gives others."""
    rule, dtype, hyper = CASES[name]
    runs = []
    for group in (None, alone):
        params = make_params(SHAPES, dtype, device=backend.device)
        groups = [{"params": params[:3]}, {"params": params[3:], "lr": 0.02}]
        optimizer = make(rule, groups, backend.name, lr=0.1, process_group=group, **hyper)
        train(optimizer, range(7))
        optimizer.sync()
        train(optimizer, range(7, 11))
        runs.append(optimizer)
    assert_same_run(*runs)


@pytest.mark.parametrize("base", ["sgd", "nadam"])
def test_a_closure(alone: Any, base: str) -> None:
    """Its gradients decide what is due, and over a base of its own kind they come within the base's step."""
    runs = []
    for group in (None, alone):
        params = make_params(SHAPES)
        optimizer = make(f"wrapped-{base}", params, "auto", lr=0.1, k=2, process_group=group)
        grads = iter(make_grads(params * 6, generator=seeded(1)))

        def closure(params: Any = params, grads: Any = grads) -> float:
            for p in params:
                p.grad = next(grads)
            return 3.0

        for _ in range(5):
            for p in params:
                p.grad = None
            assert optimizer.step(closure) == 3.0
        runs.append(optimizer)
    assert_same_run(*runs)


def test_bytes_on_the_wire(alone: Any, sent: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """1/k of what data-parallel training sends, in one piece for each device and dtype or in buckets, and nothing in
    the steps between: not even a question whether somebody syncs."""
    shapes, k, steps = ((300,), (1000,), (20, 5)), 4, 13
    params = [*make_params(shapes), *make_params(((50,),), torch.float64), *make_params(((40,),), torch.bfloat16)]
    optimizer = LookaheadAdamW(params, k=k, process_group=alone)
    per_step = []
    for t in range(steps):
        for p, g in zip(params, make_grads(params, generator=seeded(t)), strict=True):
            p.grad = g
        optimizer.step()
        per_step.append([(tensor.dtype, tensor.numel()) for tensor in sent if tensor.is_floating_point()])
        assert len(sent) == (len(per_step[-1]) + 1 if (t + 1) % k == 0 else 0), f"step {t + 1}"
        sent.clear()
    # 16-bit weights are summed in fp32.
    assert per_step == [[(torch.float32, 1440), (torch.float64, 50)] if (t + 1) % k == 0 else [] for t in range(steps)]
    gradients = sum(p.numel() * p.element_size() for p in params) + 40 * 2
    total = sum(dtype.itemsize * n for step in per_step for dtype, n in step)
    assert total == steps // k * gradients
    monkeypatch.setattr(_workers, "BUCKET_BYTES", 1024)
    optimizer.sync()
    assert [tensor.numel() for tensor in sent if tensor.dtype == torch.float32] == [256] * 5 + [160]


def test_the_mean_is_of_what_is_kept(alone: Any, sent: list[torch.Tensor]) -> None:
    """The master, where there is one: of the rounded parameters the mean would lose what accumulates there."""
    params = make_params(((300,),), torch.bfloat16)
    optimizer = LookaheadSGD(params, lr=1e-3, k=2, master_weights=True, process_group=alone)
    twin_params = make_params(((300,),), torch.bfloat16)
    twin = LookaheadSGD(twin_params, lr=1e-3, k=1000, master_weights=True)
    for o in (optimizer, twin):
        train(o, range(2))
    master = masters.join(twin_params[0].detach(), twin.state[twin_params[0]]["master_low"])
    assert not torch.equal(master, twin_params[0].float())
    assert same_tensor_bits(sent[-1], master)


class Lost(Exception):
    pass


def lose_worker(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """So many calls of all_reduce come to their end."""
    left = iter(range(after))

    def all_reduce(*args: Any, **kwargs: Any) -> None:
        if next(left, None) is None:
            raise Lost

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)


@pytest.mark.parametrize("rule", ["adamw", "wrapped-sgd", "wrapped-nadam"])
@pytest.mark.parametrize("k", [1, 3])
def test_a_worker_that_does_not_come_changes_nothing(
    alone: Any, monkeypatch: pytest.MonkeyPatch, rule: str, k: int
) -> None:
    """Not even a first step, which makes state. An inner step made before the others are waited for would stay."""
    optimizer = make(rule, make_params(SHAPES), "auto", lr=0.1, k=k, process_group=alone)
    train(optimizer, range(k - 1))
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for p, g in zip(params, make_grads(params, generator=seeded(9)), strict=True):
        p.grad = g
    before = snapshot(optimizer)
    with monkeypatch.context() as patched:
        lose_worker(patched, 0)
        with pytest.raises(Lost):
            optimizer.step()
    assert_unchanged(before, snapshot(optimizer))


@pytest.mark.parametrize("after", [0, 1, 2])
def test_a_sync_without_all_workers_changes_nothing(alone: Any, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """Wherever the other is lost: also after some of the means are there."""
    optimizer = LookaheadAdamW([*make_params(SHAPES), *make_params(SHAPES, torch.float64)], k=5, process_group=alone)
    train(optimizer, range(3))
    before = snapshot(optimizer)
    with monkeypatch.context() as patched:
        lose_worker(patched, after)
        with pytest.raises(Lost):
            optimizer.sync()
    assert_unchanged(before, snapshot(optimizer))


@pytest.mark.parametrize("rule", ["adamw", "wrapped-nadam"])
@pytest.mark.parametrize("after", [1, 2])
def test_sync_makes_up_for_a_mean_that_was_lost(
    alone: Any, monkeypatch: pytest.MonkeyPatch, rule: str, after: int
) -> None:
    """The inner step stays, whole, and no weight is a mean: `sync()` makes the undisturbed run's bits of it."""
    runs = []
    for disturbed in (False, True):
        params = [*make_params(SHAPES), *make_params(SHAPES, torch.float64)]
        optimizer = make(rule, params, "auto", lr=0.1, process_group=alone, **pulled_back(outer_momentum=0.5))
        for t in range(7):
            for p, g in zip(params, make_grads(params, generator=seeded(t)), strict=True):
                p.grad = g
            if disturbed and t == 5:
                with monkeypatch.context() as patched:
                    lose_worker(patched, after)
                    with pytest.raises(Lost):
                        optimizer.step()
                optimizer.sync()
            else:
                optimizer.step()
        runs.append(optimizer)
    assert_same_run(*runs)


def test_what_a_step_refuses_is_refused_before_others_wait(alone: Any, sent: list[torch.Tensor]) -> None:
    params = make_params(((7,), (3,)))
    optimizer = LookaheadAdamW(params, k=1, process_group=alone)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    sent.clear()
    moment = optimizer.state[params[1]]["exp_avg"]
    optimizer.state[params[1]]["exp_avg"] = torch.zeros(8)
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match="'exp_avg' of parameter 1"):
        optimizer.step()
    optimizer.param_groups[0]["k"] = 0
    with pytest.raises(ValueError, match="k must be an int >= 1, got 0"):
        optimizer.step()
    optimizer.param_groups[0]["k"] = 1
    optimizer.state[params[1]]["exp_avg"] = moment
    before = snapshot(optimizer)
    optimizer.state[params[1]]["slow_param"] = torch.zeros(8)
    with pytest.raises(ValueError, match="'slow_param' of parameter 1"):
        optimizer.sync()
    optimizer.state[params[1]]["slow_param"] = before["state"][1]["slow_param"]
    assert_unchanged(before, snapshot(optimizer))
    assert not sent


def test_a_count_that_a_checkpoint_brought_in_another_form(alone: Any) -> None:
    """ZeRO keeps one as a float32, others as a number: each tells the phase."""
    runs = []
    for form in (lambda n: n, lambda n: n.float().reshape(1), float, int):
        params = make_params(SHAPES)
        optimizer = LookaheadAdamW(params, k=3, process_group=alone)
        train(optimizer, range(2, 4))
        for p in params:
            optimizer.state[p]["step"] = form(optimizer.state[p]["step"])
        train(optimizer, range(4, 6))
        runs.append(optimizer)
    for other in runs[1:]:
        assert_same_run(runs[0], other)


@pytest.mark.parametrize("rule", ["adamw", "wrapped-adagrad"])
def test_what_had_no_step_has_nothing_to_sync(alone: Any, sent: list[torch.Tensor], rule: str) -> None:
    """Its workers' weights may still differ, and phi is none of theirs. Adagrad has state before its first step."""
    params = make_params(((7,), (3,)))
    if rule == "adamw":
        optimizer: Any = LookaheadAdamW(params, process_group=alone)
    else:
        optimizer = Lookahead(torch.optim.Adagrad(params), process_group=alone)
    optimizer.sync()
    assert [tensor.dtype for tensor in sent] == [torch.int64]
    sent.clear()
    params[1].grad = torch.ones(3)
    optimizer.step()
    optimizer.sync()
    assert [tensor.numel() for tensor in sent if tensor.is_floating_point()] == [3]


@pytest.mark.parametrize("cls", [LookaheadAdamW, Lookahead])
def test_no_copy_has_the_group(alone: Any, cls: Any) -> None:
    """A copy trains by itself: nobody else would come to its syncs. Loading a checkpoint keeps the group."""
    params = make_params(((7,),))
    first = params if cls is LookaheadAdamW else torch.optim.Adam(params, lr=0.1)
    optimizer = cls(first, k=2, process_group=alone)
    train(optimizer, range(3))
    assert "process_group" not in str(optimizer.state_dict())
    for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert other._workers is None
        train(other, range(3, 5))
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert optimizer._workers.group is alone


class Keeps(torch.optim.SGD):
    """A base with a process group of its own."""

    def __init__(self, params: Any, process_group: Any = "its own") -> None:
        super().__init__(params, lr=0.1)
        self.defaults["process_group"] = process_group
        for group in self.param_groups:
            group["process_group"] = process_group


def test_what_is_refused(alone: Any) -> None:
    params = make_params(((7,), (3,)))
    base = torch.optim.SGD([params[0]], lr=0.1)
    hooks = {name: len(v) for name, v in vars(base).items() if name.endswith("_hooks")}
    wrong: tuple[Any, ...] = (0, "world", object(), [0, 1], torch.distributed.GroupMember.NON_GROUP_MEMBER)
    for group in wrong:
        for cls in LOOKAHEAD_CLASSES.values():
            with pytest.raises(TypeError) as raised:
                cls(params, process_group=group)
            check_message(raised.value, "process_group", "got")
        with pytest.raises(TypeError, match="process_group"):
            Lookahead(base, process_group=group)
    assert hooks == {name: len(v) for name, v in vars(base).items() if name.endswith("_hooks")}
    assert "lookahead_k" not in base.param_groups[0]
    # It is the whole optimizer's, whether or not that has one.
    for own in (None, alone):
        with pytest.raises(ValueError, match="process_group must not stand in a parameter group"):
            LookaheadAdamW([{"params": params, "process_group": alone}], process_group=own)
        optimizer = LookaheadAdamW(params[:1], process_group=own)
        wrapper = Lookahead(torch.optim.SGD(params[:1], lr=0.1), process_group=own)
        for given, key in (
            (optimizer, "process_group"),
            (wrapper, "process_group"),
            (wrapper, "lookahead_process_group"),
        ):
            with pytest.raises(ValueError, match=f"{key} must not stand in a parameter group"):
                given.add_param_group({"params": params[1:], key: alone})
            assert len(given.param_groups) == 1
    with pytest.raises(ValueError, match="process_group must not stand"):
        Lookahead(torch.optim.SGD([{"params": params, "process_group": alone}], lr=0.1))
    with pytest.raises(TypeError, match="process_group"):
        EMA(torch.optim.SGD(params, lr=0.1), process_group=alone)  # type: ignore[call-arg]
    with pytest.raises(TypeError):
        LookaheadAdamW(params, 1e-3, (0.9, 0.99), 1e-8, 0.0, False, alone)  # type: ignore[misc]
    # What a base calls so is its own.
    kept = Lookahead(Keeps(params), k=1, process_group=alone)
    train(kept, range(2))
    assert kept.param_groups[0]["process_group"] == "its own"


def test_dtensors_are_refused(alone: Any) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor

    mesh = init_device_mesh("cpu", (1,))
    plain = torch.nn.Parameter(torch.ones(4))
    param = torch.nn.Parameter(DTensor.from_local(torch.ones(4), mesh))
    base = torch.optim.SGD([plain, param], lr=0.1)
    for build in (
        lambda: LookaheadSGD([plain, param], process_group=alone),
        lambda: Lookahead(base, process_group=alone),
    ):
        with pytest.raises(TypeError, match=r"process_group must be None with DTensors.*parameter 1 of group 0"):
            build()
    assert "lookahead_k" not in base.param_groups[0]
    # fully_shard may have come later.
    optimizer = LookaheadSGD([plain], process_group=alone)
    optimizer.param_groups[0]["params"].append(param)
    plain.grad, param.grad = torch.ones(4), DTensor.from_local(torch.ones(4), mesh)
    with pytest.raises(TypeError, match="process_group must be None with DTensors"):
        optimizer.step()
    with pytest.raises(TypeError, match="process_group must be None with DTensors"):
        optimizer.sync()
    assert torch.equal(plain, torch.ones(4))


def test_a_capture_is_refused(alone: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph would replay one decision, and a rank in it waits for nobody."""
    optimizer = LookaheadSGD(make_params(((7,),)), k=2, process_group=alone)
    train(optimizer, range(1))
    before = snapshot(optimizer)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(_workers, "is_capturing", lambda device: True)
    for call in (optimizer.step, optimizer.sync):
        with pytest.raises(RuntimeError, match="process_group cannot be captured in a CUDA graph"):
            call()
    assert_unchanged(before, snapshot(optimizer))


def test_every_class_has_the_argument_and_tells_of_it() -> None:
    for cls in (*LOOKAHEAD_CLASSES.values(), Lookahead):
        assert "process_group: A torch.distributed group" in (cls.__doc__ or "")
    assert "process_group" not in (lookahead_fused.EMA.__doc__ or "")
