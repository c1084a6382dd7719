"""The package in a process: what importing it does, how many threads it takes, what a fork leaves of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_unchanged, make_params, snapshot
from runs import advance

import lookahead_fused
from lookahead_fused.backends import cpu

ROOT = str(Path(lookahead_fused.__file__).parent.parent)
CPU = lookahead_fused.backends()["cpu"]
needs_cpu_backend = pytest.mark.skipif(not CPU.available, reason=f"backend cpu: {CPU.reason}")
needs_proc = pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="counts threads in Linux's /proc")

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


def python(script: str, prelude: str = PRELUDE, **environment: str) -> Any:
    """What a script prints, from JSON; it runs in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", prelude + textwrap.dedent(script)],
        env={**os.environ, "PYTHONPATH": ROOT, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout}\n{done.stderr}"
    return json.loads(done.stdout)


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
    found = python(script, prelude="", **hidden)
    roots = {name.split(".")[0] for name in found["modules"]}
    assert "lookahead_fused" in roots
    assert not roots & {"triton", "numpy", "setuptools", "pybind11"}
    assert not any(name.startswith(("torch._dynamo", "torch._inductor")) for name in found["modules"])
    assert (found["threads"], found["cuda"], found["told"]) == (0, False, [])


# ------------------------------------------------------------------------------------------------------------
# threads and forks


@needs_proc
@needs_cpu_backend
def test_threads() -> None:
    """OMP_NUM_THREADS and torch.set_num_threads bind a step: it takes one thread less of its own, keeps them for
    the next, and lets them sleep where fewer are asked for."""
    script = """
    def threads():
        return {int(name) for name in os.listdir("/proc/self/task")}

    def busy(thread):
        with open(f"/proc/self/task/{thread}/schedstat") as file:
            return int(file.read().split()[0])

    def step(times=1):
        # torch takes its own threads before the step, and none in it.
        for _ in range(3):
            torch.ones(1 << 22).add_(1).clone()
        before = threads()
        for _ in range(times):
            optimizer.step()
        return threads() - before

    p, optimizer = make()
    found = {"omp": torch.get_num_threads(), "own": []}
    taken = step()
    found["own"].append(len(taken))
    for count in (1, 2, 4, 4, 1, 3):
        torch.set_num_threads(count)
        taken |= step()
        found["own"].append(len(taken))
    torch.set_num_threads(2)
    step()
    before = {thread: busy(thread) for thread in taken}
    step(30)
    found["busy"] = sorted(busy(thread) - before[thread] for thread in taken)
    print(json.dumps(found))
    """
    found = python(script, OMP_NUM_THREADS="1")
    assert found["omp"] == 1
    assert found["own"] == [0, 0, 1, 3, 3, 3, 3]
    first, second, third = found["busy"]
    assert max(first, second) < 0.2 * third, f"nanoseconds of each thread: {found['busy']}"


@needs_cpu_backend
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_fork() -> None:
    """A child has none of its parent's threads, and steps all the same, with threads of its own and to the same
    bits; the parent goes on."""
    script = """
    import hashlib
    def weights():
        return hashlib.sha256(p.detach().numpy().tobytes()).hexdigest()

    torch.set_num_threads(2)
    p, optimizer = make()
    for _ in range(3):
        optimizer.step()
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        import faulthandler
        faulthandler.dump_traceback_later(60, exit=True)
        torch.set_num_threads(2)
        optimizer.step()
        optimizer.step()
        count = len(os.listdir("/proc/self/task")) if os.path.isdir("/proc/self/task") else 2
        os.write(writing, json.dumps([weights(), count]).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        theirs = pipe.read()
    status = os.waitpid(child, 0)[1]
    before = weights()
    optimizer.step()
    optimizer.step()
    print(json.dumps({"status": status, "child": json.loads(theirs), "before": before, "after": weights()}))
    """
    found = python(script)
    assert found["status"] == 0
    weights, threads = found["child"]
    assert weights == found["after"] != found["before"]
    assert threads >= 2


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
    monkeypatch.setattr(cpu, "native", lambda: None)
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
