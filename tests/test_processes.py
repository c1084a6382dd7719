"""The package in a process: what importing it does, how many threads it takes, what a fork leaves of it."""

from __future__ import annotations

import sys

import pytest
import torch
from helpers import assert_unchanged, make_params, snapshot
from processes import needs_cpu_backend, needs_fork, needs_proc, python
from releases import needs_torch
from runs import advance

import lookahead_fused
from lookahead_fused.backends import cpu

# Under older ones a step takes threads of its own.
lends_threads = needs_torch("2.10", "a function that lends its threads")
# Nanoseconds of work after which a thread is a step's helper, and not one that was woken and slept again.
ENOUGH = 20_000_000

PRELUDE = """
import json, os, sys
import torch
from lookahead_fused import LookaheadAdamW

def make(count=1 << 20):
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(count))
    p.grad = torch.randn(count)
    return p, LookaheadAdamW([p], lr=0.1, k=2, backend="cpu")
"""


# ------------------------------------------------------------------------------------------------------------
# import


@pytest.mark.parametrize("asks", [False, True], ids=["import", "backends"])
def test_import_is_harmless(asks: bool) -> None:
    """It imports neither Triton nor torch's compiler, starts no CUDA (which would poison a later fork), no thread,
    and tells nothing; nor does it to ask which backends serve where no GPU is visible. Where one is, that takes its
    driver and Triton's."""
    script = f"""
    import json, os, sys, warnings
    import torch
    before = set(sys.modules), os.listdir("/proc/self/task") if os.path.isdir("/proc/self/task") else []
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        import lookahead_fused
        if {asks}:
            lookahead_fused.backends()
    after = set(sys.modules), os.listdir("/proc/self/task") if os.path.isdir("/proc/self/task") else []
    print(json.dumps({{
        "modules": sorted(after[0] - before[0]),
        "threads": len(after[1]) - len(before[1]),
        "cuda": torch.cuda.is_initialized(),
        "told": [str(w.message) for w in told],
    }}))
    """
    hidden = {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""} if asks else {}
    found = python(script, **hidden)
    roots = {name.split(".")[0] for name in found["modules"]}
    assert "lookahead_fused" in roots
    assert not roots & {"triton", "numpy", "setuptools", "pybind11"}
    assert not any(name.startswith(("torch._dynamo", "torch._inductor")) for name in found["modules"])
    assert (found["threads"], found["cuda"], found["told"]) == (0, False, [])


# ------------------------------------------------------------------------------------------------------------
# threads and forks


@needs_proc
@needs_cpu_backend
@pytest.mark.parametrize("own", [pytest.param(False, marks=lends_threads), True], ids=["torch", "own"])
def test_threads(own: bool) -> None:
    """OMP_NUM_THREADS and torch.set_num_threads bind a step. It takes torch's threads and none besides; where it may
    not, one less of its own than torch would use, which it keeps and lets sleep where fewer are asked for."""
    script = f"""

    def threads():
        return {{int(name) for name in os.listdir("/proc/self/task")}}

    def busy(thread):
        with open(f"/proc/self/task/{{thread}}/schedstat") as file:
            return int(file.read().split()[0])

    def step(times=1):
        # torch takes its own threads before the step, and none in it.
        for _ in range(3):
            torch.ones(1 << 22).add_(1).clone()
        before = threads()
        for _ in range(times):
            optimizer.step()
        return threads() - before

    # The nanoseconds of this thread and of each other one in so many steps, or until another has had its part; and how
    # many steps they were.
    def work(steps):
        optimizer.step()
        before = {{thread: busy(thread) for thread in threads()}}
        for made in range(1, steps + 1):
            optimizer.step()
            worked = {{thread: busy(thread) - before[thread] for thread in before}}
            main, others = worked.pop(os.getpid()), sorted(worked.values())
            if others[-1] >= {ENOUGH}:
                break
        return main, others, made

    p, optimizer = make()
    from lookahead_fused._parts import Tuning
    from lookahead_fused._table import Table
    optimizer._table = Table(optimizer._table.rule, optimizer._table.policy, Tuning(own_threads={own}))
    found = {{"omp": torch.get_num_threads(), "taken": []}}
    taken = step()
    found["taken"].append(len(taken))
    for count in (1, 2, 4, 4, 1, 3):
        torch.set_num_threads(count)
        taken |= step()
        found["taken"].append(len(taken))
    torch.set_num_threads(2)
    step()
    found["with two"] = work(10_000)
    torch.set_num_threads(1)
    found["alone"] = work(found["with two"][-1])
    print(json.dumps(found))
    """
    # Asleep between regions: a thread that spins has time of its own also where nobody calls it.
    found = python(script, PRELUDE, OMP_NUM_THREADS="1", OMP_WAIT_POLICY="passive")
    assert found["omp"] == 1
    assert found["taken"] == ([0, 0, 1, 3, 3, 3, 3] if own else [0] * 7)
    # Not compared with the helper: where other work holds the cores it comes late, and finds little to do.
    main, (*idle, helper), _ = found["with two"]
    assert helper >= ENOUGH, found
    assert max(idle, default=0) < 0.2 * main, found
    main, idle, _ = found["alone"]
    assert max(idle) < 0.2 * main, found


@needs_cpu_backend
def test_threads_that_flush_subnormal_numbers_compute_them_all_the_same() -> None:
    """torch.set_flush_denormal is one thread's setting, but a thread begins with that of the one that starts it:
    torch's, if it was made before torch first needed them."""
    script = """
    torch.set_num_threads(2)
    flushes = torch.set_flush_denormal(True)
    p, optimizer = make()
    optimizer.param_groups[0]["weight_decay"] = 0
    p.data.fill_(0).view(torch.int32).fill_(1)  # the smallest number
    p.grad.zero_()
    optimizer.step()
    lost = int((p.detach().view(torch.int32) != 1).sum())
    print(json.dumps({"flushes": flushes, "lost": lost}))
    """
    found = python(script, PRELUDE)
    if not found["flushes"]:
        pytest.skip("this machine cannot flush subnormal numbers")
    assert found["lost"] == 0


FORKED = """
import hashlib

def weights():
    return hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in params)).hexdigest()

def run(steps):
    # Ends a child that waits for threads which only its parent has.
    import faulthandler
    faulthandler.dump_traceback_later(60, exit=True)
    for _ in range(steps):
        optimizer.step()
    faulthandler.cancel_dump_traceback_later()

def child(steps):
    # What a forked child has after some steps: its status, its weights, how many threads, and whose.
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        torch.set_num_threads(2)
        run(steps)
        from lookahead_fused import _cpu
        count = len(os.listdir("/proc/self/task")) if os.path.isdir("/proc/self/task") else 2
        os.write(writing, json.dumps([weights(), count, _cpu.torch_threads_serve()]).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        theirs = pipe.read()
    return os.waitpid(child, 0)[1], json.loads(theirs)

torch.set_num_threads(2)
torch.manual_seed(0)
# Each too small for torch to share, whose own operators wait forever in a forked child; together enough for a step to.
params = [torch.nn.Parameter(torch.randn(10_000)) for _ in range(40)]
for p in params:
    p.grad = torch.randn(10_000)
optimizer = LookaheadAdamW(params, lr=0.1, k=2, backend="cpu")
"""


@needs_cpu_backend
@needs_fork
@pytest.mark.parametrize("steps", [0, 3])
def test_fork(steps: int) -> None:
    """A child has none of its parent's threads, torch's least of all (GNU's OpenMP waits for them forever), and steps
    all the same, with threads of its own and to the same bits; the parent goes on. Whether the parent stepped before,
    or only torch did, and the child is the first to."""
    script = f"""
    torch.ones(1 << 22).add_(1)
    run({steps})
    status, theirs = child(2)
    before = weights()
    run(2)
    print(json.dumps({{"status": status, "child": theirs, "before": before, "after": weights()}}))
    """
    found = python(script, PRELUDE + FORKED)
    assert found["status"] == 0
    weights, threads, torchs = found["child"]
    assert weights == found["after"] != found["before"]
    assert threads >= 2
    assert not torchs


@needs_cpu_backend
@pytest.mark.skipif(sys.platform != "linux", reason="torch's library is looked for by its name on Linux")
@lends_threads
def test_torch_threads_serve() -> None:
    """In a process that was not forked: this one is, and then executes a program."""
    script = """
    optimizer = make()[1]
    optimizer.step()
    from lookahead_fused import _cpu
    print(json.dumps(_cpu.torch_threads_serve()))
    """
    assert python(script, PRELUDE) is True


# ------------------------------------------------------------------------------------------------------------
# backends


def test_backends() -> None:
    """A name for each, with whether it serves here, and if not, why; a caller's copy."""
    found = lookahead_fused.backends()
    assert list(found)[-1] == "reference"
    assert found["reference"] == lookahead_fused.BackendStatus(True, "")
    for status in found.values():
        assert isinstance(status, lookahead_fused.BackendStatus)
        assert (status.reason == "") == status.available
    found.clear()
    assert lookahead_fused.backends()
    with pytest.raises(AttributeError):
        lookahead_fused.backends()["reference"].available = False


@pytest.fixture
def broken_cpu(monkeypatch: pytest.MonkeyPatch) -> str:
    """No compiled CPU backend here, and nobody warned of it yet."""
    reason = "the compiler was on holiday"
    monkeypatch.setattr(cpu, "unavailable", lambda device=None: reason)
    monkeypatch.setattr(sys.modules["lookahead_fused.backends"], "_warned", set())
    return reason


def test_a_named_backend_that_cannot_serve_raises(broken_cpu: str) -> None:
    """With the reason, and before anything changed; never another in its place."""
    params = make_params([(3,), (4,)])
    named = {"params": params[1:], "backend": "cpu"}
    optimizers = [
        lookahead_fused.LookaheadAdamW([{"params": params[:1], "backend": "reference"}, named]),
        lookahead_fused.Lookahead(torch.optim.AdamW(params), backend="cpu"),
    ]
    for optimizer in optimizers:
        before = snapshot(optimizer)
        with pytest.raises(RuntimeError, match=f"'cpu'.*{broken_cpu}"):
            advance(optimizer, params, [0])
        after = snapshot(optimizer)
        assert_unchanged({**before, "grads": after["grads"]}, after)
    assert lookahead_fused.backends()["cpu"] == lookahead_fused.BackendStatus(False, broken_cpu)


def test_auto_tells_once_what_it_had_to_take(broken_cpu: str) -> None:
    """One warning with the reason, however many optimizers and steps; and the steps are made."""
    params, twin_params = make_params([(5,)]), make_params([(5,)])
    optimizers = [lookahead_fused.LookaheadAdamW(params), lookahead_fused.LookaheadSGD(params)]

    def run() -> None:
        for optimizer in optimizers:
            advance(optimizer, params, range(3))

    with pytest.warns(RuntimeWarning, match=rf"'reference'.*cpu: {broken_cpu}") as told:
        run()
    assert len(told) == 1
    for cls in (lookahead_fused.LookaheadAdamW, lookahead_fused.LookaheadSGD):
        advance(cls(twin_params, backend="reference"), twin_params, range(3))
    assert torch.equal(params[0], twin_params[0])


@needs_cpu_backend
@pytest.mark.filterwarnings("error")
def test_auto_is_silent_where_the_best_serves() -> None:
    params = make_params([(5,)])
    advance(lookahead_fused.LookaheadAdamW(params), params, range(2))


@pytest.mark.parametrize("name", ["auto", "cpu", "reference"])
def test_no_backend_serves_the_meta_device(name: str) -> None:
    p = torch.nn.Parameter(torch.empty(3, device="meta"))
    p.grad = torch.empty(3, device="meta")
    optimizer = lookahead_fused.LookaheadAdamW([p], backend=name)
    with pytest.raises(RuntimeError, match="meta"):
        optimizer.step()
    assert not optimizer.state
