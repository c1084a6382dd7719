"""`offload_slow`: slow weights in pinned host memory. Where there is no GPU a CPU's parameters play its part."""

from __future__ import annotations

import copy
import ctypes
import io
import pickle
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from cuda_host import HOST, set_grads
from helpers import (
    EXTERNAL_CLASSES,
    BackendCase,
    assert_unchanged,
    make_optimizer,
    make_params,
    same_tensor_bits,
    seeded,
    set_grad,
    snapshot,
)
from pinned_host import PinnedHost, pinned_host
from processes import python
from releases import needs_torch
from runs import advance, assert_same_run, copies, gradients_of, through_a_file
from test_cuda_graphs import Capture
from test_cuda_traffic import watch
from test_tensor_classes import Around
from test_without_fp64 import DEVICE

from bench.cuda_on_host import Torch
from lookahead_fused import EMA, GPA, Lookahead, LookaheadAdamW, ScheduleFree, _captures
from lookahead_fused import _offload as offload
from lookahead_fused.backends import gpu

SHAPES = ((4, 3), (5,), (), (0,), (300,))


def around(base: type[torch.optim.Optimizer], wrapper: Any, **given: Any) -> Any:
    return lambda params, b, **own: wrapper(base(params, lr=0.1), backend=b.name, **given, **own)


def of_class(rule: str, **given: Any) -> Any:
    return lambda params, b, **own: make_optimizer(rule, params, b, lr=0.1, **given, **own)


EXTERNAL = EXTERNAL_CLASSES["nadam"]
FORMS: dict[str, Any] = {
    "lookahead": of_class("adam", k=2, amsgrad=True, pullback_momentum="pullback"),
    "outer momentum": of_class("sgd", momentum=0.9, k=2, alpha=1.2, outer_momentum=0.5, pullback_momentum="reset"),
    "int8": of_class("adam", k=2, outer_momentum=0.5, pullback_momentum="pullback", state_dtype="int8"),
    "wrapper": around(torch.optim.AdamW, Lookahead, k=2, outer_momentum=0.5),
    "ema": around(torch.optim.AdamW, EMA, decay=0.7, every=2, start=1),
    "gpa": around(torch.optim.AdamW, GPA, train_interp=0.6, eval_interp=0.8),
    "schedule-free": around(torch.optim.AdamW, ScheduleFree, interp=0.8, r=1),
    "external": around(EXTERNAL, Lookahead, k=2, pullback_momentum="pullback", outer_momentum=0.5),
    "external ema": around(EXTERNAL, EMA, decay=0.7, every=2),
    "external gpa": around(EXTERNAL, GPA, train_interp=0.6, eval_interp=0.8),
}
ON_HOST = {"slow_param", "outer_momentum_buffer", "z", "x"}
forms = pytest.mark.parametrize("form", FORMS)


@pytest.fixture
def pinned(request: pytest.FixtureRequest) -> Iterator[PinnedHost]:
    if "backend" in request.fixturenames and request.getfixturevalue("backend").device != "cpu":
        pytest.skip("a GPU wants memory that is pinned: test_on_a_gpu")
    with pinned_host() as host:
        yield host


def assert_placed(pinned: PinnedHost, optimizer: Any) -> None:
    """What is slow lies on the host, and nothing else."""
    for own in optimizer.state.values():
        assert ON_HOST & own.keys()
        for name, value in own.items():
            assert value.numel() == 0 or pinned.has(value) == (name in ON_HOST), name


@forms
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bits_are_the_same(backend: BackendCase, pinned: PinnedHost, form: str, dtype: torch.dtype) -> None:
    """Steps, evaluations, syncs; with a master the slow weights leave the device, and the master stays."""
    own = {"master_weights": True} if dtype == torch.bfloat16 and "external" not in form else {}
    if dtype == torch.bfloat16 and form == "external gpa":
        pytest.skip("refused with 16 bits")
    runs = []
    for place in (True, False):
        params = make_params(SHAPES, dtype, device=backend.device)
        optimizer = FORMS[form](params, backend, offload_slow=place, **own)
        kept = []
        for part in (range(3), range(3, 6)):
            advance(optimizer, params, part)
            with optimizer.slow_weights():
                kept.append(copies(params))
            if hasattr(optimizer, "sync"):
                optimizer.sync()
        if place:
            assert_placed(pinned, optimizer)
        runs.append((optimizer, kept))
    (ours, evaluated), (theirs, expected) = runs
    for group in (*ours.param_groups, *theirs.param_groups):
        group[ours._table.policy.offload_slow] = None
    assert_same_run(ours, theirs)
    for a, b in zip(evaluated, expected, strict=True):
        assert all(same_tensor_bits(p, q) for p, q in zip(a, b, strict=True))


@pytest.mark.parametrize("form", ["lookahead", "outer momentum", "int8", "ema", "external"])
def test_the_link_is_used_at_events_alone(runtime: ctypes.CDLL, pinned: PinnedHost, form: str) -> None:
    """8 bytes of each slow weight in every second step, and not one of it in the others."""
    (p,) = params = make_params([(4099,)])
    optimizer = FORMS[form](params, HOST, offload_slow=True)
    set_grads(params, seeded(0))
    optimizer.step()
    assert_placed(pinned, optimizer)
    for t in range(2, 8):
        set_grads(params, seeded(t))
        if form == "external":
            # Its base steps without us; the pass over slow weights is what is counted.
            set_grad(p, torch.zeros_like(p))
        slow = [value for name, value in optimizer.state[p].items() if name in ON_HOST]
        runtime.control_reset()
        watch(runtime, *slow)
        optimizer.step()
        due = (t - 1) % 2 == 0 if form == "ema" else t % 2 == 0
        for i, value in enumerate(slow):
            assert (runtime.control_read(i), runtime.control_written(i)) == (value.nbytes * due, value.nbytes * due), t


def test_a_graph_captures_it(runtime: ctypes.CDLL, pinned: PinnedHost, monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for captured in (False, True):
        params = make_params([(5,), (300,)])
        optimizer = FORMS["outer momentum"](params, HOST, offload_slow=True)
        set_grads(params, seeded(0))
        optimizer.step()
        capture = Capture(runtime, monkeypatch)
        if captured:
            with capture:
                optimizer.step()
            monkeypatch.undo()
        for _ in range(5):
            capture.replay() if captured else optimizer.step()
        assert_placed(pinned, optimizer)
        results.append(snapshot(optimizer)["state"])
        if captured:
            capture.destroy()
    assert_unchanged(*results)


def test_pinned_memory_is_not_given_away_while_a_kernel_uses_it(runtime: ctypes.CDLL, pinned: PinnedHost) -> None:
    """torch's allocator is told of each piece once for a stream, and again where it lies elsewhere."""
    params = make_params([(5,), (300,)])
    optimizer = FORMS["outer momentum"](params, HOST, offload_slow=True)
    told: list[int] = []
    with mock.patch.object(gpu, "tell_pinned", lambda memory, device: told.append(memory.data_ptr())):
        for _ in range(3):
            set_grads(params, seeded(0))
            optimizer.step()
        pieces = {own[name].data_ptr() for own in optimizer.state.values() for name in ON_HOST & own.keys()}
        assert len(pieces) == 4
        assert sorted(told) == sorted(pieces)
        told.clear()
        with Torch.on(runtime.control_make_stream(0)):
            optimizer.step()
            optimizer.step()
        assert sorted(told) == sorted(pieces)
        told.clear()
        own = optimizer.state[params[0]]
        own["slow_param"] = own["slow_param"].clone()
        optimizer.step()
        assert own["slow_param"].data_ptr() in told


def test_telling_of_it_leaves_it_alone() -> None:
    memory = torch.arange(5.0)
    gpu.tell_pinned(memory.untyped_storage(), torch.device("cpu"))
    assert memory.tolist() == [0, 1, 2, 3, 4]


@forms
def test_whether_it_is_pinned_is_asked_once(backend: BackendCase, pinned: PinnedHost, form: str) -> None:
    """Not in a step: the answer takes the driver a microsecond for each tensor."""
    if backend.name == "reference":
        pytest.skip("makes its rows anew in every step")
    params = make_params(SHAPES, device=backend.device)
    optimizer = FORMS[form](params, backend, offload_slow=True)
    advance(optimizer, params, range(3))
    pinned.asked = 0
    advance(optimizer, params, range(3, 8))
    assert pinned.asked == 0


@forms
@pytest.mark.parametrize("how", ["replaced", "set", "loaded", "copied"])
def test_memory_that_is_not_pinned_is_pinned_first(
    backend: BackendCase, pinned: PinnedHost, form: str, how: str
) -> None:
    """No kernel gets the address of other host memory, whoever put it there."""
    params = make_params(SHAPES, device=backend.device)
    optimizer = FORMS[form](params, backend, offload_slow=True)
    twin_params = copies(params)
    twin = FORMS[form](twin_params, backend)
    for o, ps in ((optimizer, params), (twin, twin_params)):
        advance(o, ps, range(3))
    if how == "copied":
        optimizer = copy.deepcopy(optimizer)
        params = [p for group in optimizer.param_groups for p in group["params"]]
    elif how == "loaded":
        optimizer.load_state_dict(through_a_file(optimizer.state_dict()))
    for own in optimizer.state.values():
        for name in ON_HOST & own.keys():
            if how == "replaced":
                own[name] = own[name].clone()
            elif how == "set":
                with torch.no_grad():
                    own[name].set_(own[name].clone())
            assert own[name].numel() == 0 or not pinned.has(own[name])
    for o, ps in ((optimizer, params), (twin, twin_params)):
        advance(o, ps, range(3, 7))
    assert_placed(pinned, optimizer)
    for p, q in zip(params, twin_params, strict=True):
        assert same_tensor_bits(p, q)
        for name, value in twin.state[q].items():
            assert same_tensor_bits(optimizer.state[p][name], value), name


@forms
def test_checkpoints_cross_over(backend: BackendCase, pinned: PinnedHost, form: str) -> None:
    """Where slow weights lie belongs to the machine: a checkpoint of either kind resumes in the other."""
    for saved_so, loaded_so in ((True, False), (False, True)):
        params = make_params(SHAPES, device=backend.device)
        optimizer = FORMS[form](params, backend, offload_slow=saved_so)
        advance(optimizer, params, range(3))
        resumed_params = copies(params)
        resumed = FORMS[form](resumed_params, backend, offload_slow=loaded_so)
        resumed.load_state_dict(through_a_file(optimizer.state_dict()))
        for o, ps in ((optimizer, params), (resumed, resumed_params)):
            advance(o, ps, range(3, 7))
        key = optimizer._table.policy.offload_slow
        assert [group[key] for group in resumed.param_groups] == [loaded_so]
        assert_placed(pinned, resumed if loaded_so else optimizer)
        for p, q in zip(params, resumed_params, strict=True):
            assert same_tensor_bits(p, q)
            assert all(same_tensor_bits(value, resumed.state[q][name]) for name, value in optimizer.state[p].items())


def test_loading_keeps_it_off_the_device(pinned: PinnedHost) -> None:
    """torch's loading brings a whole state dict to the device, where there may be no room: it does not see these."""
    for form in ("outer momentum", "wrapper", "external gpa"):
        params = make_params(SHAPES)
        optimizer = FORMS[form](params, BackendCase("auto", "cpu", 0.0), offload_slow=True)
        advance(optimizer, params, range(3))
        loader = getattr(optimizer, "base_optimizer", optimizer)
        saved = copy.deepcopy(optimizer.state_dict())
        place = "_process_value_according_to_param_policy"
        with mock.patch.object(torch.optim.Optimizer, place, side_effect=lambda p, value, *_: value) as seen:
            loader.load_state_dict(saved)
        names = {call.args[4] for call in seen.call_args_list}
        assert names
        assert not names & ON_HOST
        assert ON_HOST & optimizer.state[params[0]].keys()


@forms
def test_no_room_on_the_host(backend: BackendCase, pinned: PinnedHost, form: str) -> None:
    """Named with the bytes and the way out, in the first step, before anything changed; with room it goes on."""
    params = make_params(SHAPES, device=backend.device)
    optimizer = FORMS[form](params, backend, offload_slow=True)
    for p, g in zip(params, gradients_of(0, params), strict=True):
        set_grad(p, g)
    before = snapshot(optimizer)
    pinned.room = 200
    key = optimizer._table.policy.offload_slow
    told = (
        rf"^{key}=True: could not pin 1200 bytes of host memory for the '\w+' of parameter 4 of group 0: "
        rf"CUDA error: out of memory; free memory, or leave slow weights on the device with {key}=False$"
    )
    with pytest.raises(RuntimeError, match=told):
        optimizer.step()
    assert_unchanged(before, snapshot(optimizer))
    pinned.room = 1 << 20
    optimizer.step()
    assert_placed(pinned, optimizer)


@forms
def test_the_host_waits_before_it_reads(pinned: PinnedHost, form: str) -> None:
    """A kernel may still be writing when a step returns, and torch does not know that it writes host memory."""
    params = make_params(SHAPES)
    optimizer = FORMS[form](params, BackendCase("auto", "cpu", 0.0), offload_slow=True)
    advance(optimizer, params, range(3))
    saved = optimizer.state_dict()

    def evaluate() -> None:
        with optimizer.slow_weights():
            pass

    reads = {
        "state_dict": optimizer.state_dict,
        "load_state_dict": lambda: optimizer.load_state_dict(saved),
        "slow_weights": evaluate,
        "deepcopy": lambda: copy.deepcopy(optimizer),
        "pickle": lambda: pickle.dump(optimizer, io.BytesIO()),
    }
    if hasattr(optimizer, "base_optimizer"):
        reads["state_dict of the base"] = optimizer.base_optimizer.state_dict
        reads["load_state_dict of the base"] = lambda: optimizer.base_optimizer.load_state_dict(saved)
    for name, read in reads.items():
        pinned.waits = 0
        read()
        assert pinned.waits > 0, name


def test_beside_a_capture(pinned: PinnedHost) -> None:
    """While another thread captures a graph, what pins memory or waits has leave for it, and the thread is then as it
    was."""
    mode, seen = 0, []

    def exchange(new: Any) -> int:
        nonlocal mode
        mode, new._obj.value = new._obj.value, mode
        return 0

    def noting(function: Any) -> Any:
        return lambda *args: (seen.append(mode), function(*args))[1]

    params = make_params([(5,)])
    optimizer = FORMS["lookahead"](params, BackendCase("auto", "cpu", 0.0), offload_slow=True)
    with (
        mock.patch.object(_captures, "_exchange_capture_mode", return_value=exchange),
        mock.patch.multiple(offload, pinned=noting(pinned.pinned), wait=noting(pinned.wait)),
    ):
        advance(optimizer, params, range(1))
        optimizer.state_dict()
        assert seen == [2, 2, 2]  # relaxed: to pin, to read theta, to read all
        assert mode == 0
        pinned.room = 0
        optimizer.state.clear()
        with pytest.raises(RuntimeError, match="could not pin"):
            advance(optimizer, params, range(1))
    assert mode == 0


def test_a_group_and_a_change_of_mind(backend: BackendCase, pinned: PinnedHost) -> None:
    """Per parameter group, and in the groups at any time: what lies elsewhere is moved in the next step."""
    params, others = make_params(SHAPES, device=backend.device), make_params(SHAPES, seed=1, device=backend.device)
    groups = [{"params": params, "offload_slow": True}, {"params": others}]
    optimizer = FORMS["outer momentum"](groups, backend)
    twins = copies([*params, *others])
    twin = FORMS["outer momentum"](twins, backend)
    both = [*params, *others]
    expected = {0: (True, False), 3: (False, False), 5: (True, True)}
    for step in range(8):
        if step in expected:
            for group, place in zip(optimizer.param_groups, expected[step], strict=True):
                group["offload_slow"] = place
            placed = expected[step]
        advance(optimizer, both, [step])
        advance(twin, twins, [step])
        for group, place in zip(optimizer.param_groups, placed, strict=True):
            for p in group["params"]:
                # Memory that is on the host is a GPU's to leave; here the two are one.
                slow = optimizer.state[p]["slow_param"]
                assert not place or slow.numel() == 0 or pinned.has(slow)
    for p, q in zip(both, twins, strict=True):
        assert same_tensor_bits(p, q)
        assert all(same_tensor_bits(value, optimizer.state[p][name]) for name, value in twin.state[q].items())


def test_it_changes_nothing_on_a_cpu() -> None:
    for form, make in FORMS.items():
        runs = []
        for place in (True, False):
            params = make_params(SHAPES)
            optimizer = make(params, BackendCase("auto", "cpu", 0.0), offload_slow=place)
            advance(optimizer, params, range(5))
            with optimizer.slow_weights():
                runs.append([p.detach().clone() for p in params])
            assert all(v.device.type == "cpu" for own in optimizer.state.values() for v in own.values()), form
            runs.append([p.detach().clone() for p in params])
        assert all(same_tensor_bits(a, b) for a, b in zip(runs[0] + runs[1], runs[2] + runs[3], strict=True)), form


def test_what_it_is_refused_for() -> None:
    params = make_params([(3,)])
    for wrong in (2, "yes", None, 0.0):
        with pytest.raises(TypeError, match=r"^offload_slow must be True or False, got "):
            LookaheadAdamW(params, offload_slow=wrong)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match=r"^offload_slow must be True or False, got "):
            EMA(torch.optim.SGD(params, lr=0.1), offload_slow=wrong)  # type: ignore[arg-type]


@forms
def test_another_device_is_refused(form: str) -> None:
    """By name and in the first step, before anything changed: its kernels may not read the host's memory."""
    params = make_params(SHAPES)
    optimizer = FORMS[form](params, BackendCase("auto", "cpu", 0.0), offload_slow=True)
    for p, g in zip(params, gradients_of(0, params), strict=True):
        set_grad(p, g)
    before = snapshot(optimizer)
    key = optimizer._table.policy.offload_slow
    with (
        mock.patch.object(offload, "is_apart", return_value=True),
        pytest.raises(ValueError, match=rf"^{key} must be False for parameter 0 of group 0 on cpu, got True: only"),
    ):
        optimizer.step()
    assert_unchanged(before, snapshot(optimizer))


# The reference backend, on a device whose memory is another than the host's.
TWO_PLACES = """
from unittest import mock
from processes import python
from pinned_host import PinnedHost
from lookahead_fused import EMA, ScheduleFree

FORMS = {
    "class": lambda p, **own: LookaheadAdamW(
        [p], lr=0.1, k=2, outer_momentum=0.5, pullback_momentum="pullback", **own),
    "master": lambda p, **own: LookaheadSGD([p], lr=0.1, momentum=0.9, k=2, master_weights=True, **own),
    "ema": lambda p, **own: EMA(torch.optim.AdamW([p], lr=0.1), 0.7, every=2, **own),
    "gpa": lambda p, **own: GPA(torch.optim.AdamW([p], lr=0.1), 0.6, 0.8, **own),
    "schedule-free": lambda p, **own: ScheduleFree(torch.optim.SGD([p], lr=0.1), **own),
    "external": lambda p, **own: Lookahead(
        torch.optim.Adamax([p], lr=0.1, foreach=False), k=2, outer_momentum=0.5, **own),
    "external gpa": lambda p, **own: GPA(torch.optim.Adamax([p], lr=0.1, foreach=False), 0.6, 0.8, **own),
}

def run(form, place, **own):
    torch.manual_seed(0)
    dtype = torch.bfloat16 if form == "master" else torch.float32
    p = place(torch.randn(7).to(dtype))
    optimizer, ends, places = FORMS[form](p, **own), [], set()

    def train(p, optimizer, steps):
        for step in steps:
            gradient = torch.randn(7, generator=torch.Generator().manual_seed(step)).to(dtype)
            p.grad = place(gradient).detach()
            optimizer.step()
        for name, value in optimizer.state[p].items():
            if value.dim():
                pinned = value.device.type == "cpu" and HOST.has(value)
                places.add((name, "pinned" if pinned else value.device.type))

    def keep(p):
        ends.append((p.raw if isinstance(p, Small) else p.detach()).float().tolist())

    train(p, optimizer, range(5))
    with optimizer.slow_weights():
        keep(p)
    keep(p)
    if hasattr(optimizer, "sync"):
        optimizer.sync()
        keep(p)
    q = place(p.raw if isinstance(p, Small) else p)
    resumed = FORMS[form](q, **own)
    resumed.load_state_dict(optimizer.state_dict())
    for name, pin in list(places):
        assert pin != "pinned" or resumed.state[q][name].device.type == "cpu", name
    with resumed.slow_weights():
        keep(q)
    train(q, resumed, range(5, 8))
    keep(q)
    return ends, sorted(places)

HOST = PinnedHost()
answers = {name: getattr(HOST, name) for name in ("pinned", "is_pinned", "wait")}
with mock.patch.multiple("lookahead_fused._offload", reaches_host=lambda device: True, **answers):
    print(json.dumps({form: [run(form, on_cpu), run(form, on_small, offload_slow=True)] for form in FORMS}))
"""


@needs_torch("2.13", "devices made in Python")
def test_the_reference_backend_copies() -> None:
    """Steps, evaluations, syncs and loads: slow weights are pinned, the rest is on the device, and no operator meets
    tensors of both."""
    for form, ((expected, _), (ends, places)) in python(TWO_PLACES, DEVICE, OMP_NUM_THREADS="1").items():
        for ours, theirs in zip(ends, expected, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-6), form
        assert ON_HOST & {name for name, _ in places}, form
        assert places == [[name, "pinned" if name in ON_HOST else "small"] for name, _ in places], form


# Of such a class codes are refused before that.
@pytest.mark.parametrize("form", [form for form in FORMS if form != "int8"])
def test_a_class_around_other_tensors_is_refused(pinned: PinnedHost, form: str) -> None:
    """Where its memory lies is its own business, and no kernel gets an address of it."""
    inner = torch.ones(4, 3)
    p = torch.nn.Parameter(Around(inner))
    optimizer = FORMS[form]([p], BackendCase("auto", "cpu", 0.0), offload_slow=True)
    p.grad = torch.ones(4, 3)
    key = optimizer._table.policy.offload_slow
    with pytest.raises(TypeError, match=rf"^{key} must be False for parameter 0 of group 0, got a Around: "):
        optimizer.step()
    assert not optimizer.state[p]
    assert torch.equal(inner, torch.ones(4, 3))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@forms
def test_on_a_gpu(form: str) -> None:
    """The bits of the same run with its slow weights on the device, and pinned memory that is torch's."""
    runs = []
    for place in (True, False):
        params = make_params(SHAPES, device="cuda")
        optimizer = FORMS[form](params, BackendCase("auto", "cuda", 0.0), offload_slow=place)
        advance(optimizer, params, range(5))
        with optimizer.slow_weights():
            runs.append([p.detach().cpu() for p in params])
        for own in optimizer.state.values():
            for name, value in own.items():
                assert (value.is_cpu and (value.is_pinned() or not value.numel())) == (place and name in ON_HOST), name
        runs.append([p.detach().cpu() for p in params])
    assert all(same_tensor_bits(a, b) for a, b in zip(runs[0] + runs[1], runs[2] + runs[3], strict=True))
