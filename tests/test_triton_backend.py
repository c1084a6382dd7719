"""The Triton backend's Python: launches, uploads and compilations.

The backend-parametrised suite runs through `triton_on_host` for numbers; here is what a recorder in a launch's place,
or a driver that launches nothing, can tell.
"""

from __future__ import annotations

import copy
import gc
import mmap
import types
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import triton_on_host
from cuda_host import RULES
from helpers import make_optimizer, make_params, same_tensor_bits, seeded
from host_work import Stepped, assert_host_work
from torch import Tensor
from triton_host import HOST, Driver, Recorder, needs_interpreter, needs_triton, set_grads

from lookahead_fused import _build as build
from lookahead_fused._parts import CHUNK_ELEMENTS as CHUNK
from lookahead_fused._parts import Pass
from lookahead_fused.backends import triton

# ------------------------------------------------------------------------------------------------------------
# launches, uploads, memory


@needs_interpreter
@pytest.mark.parametrize("count", [1, 148, 3000])
def test_launches_and_uploads_of_a_step(host: Any, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two launches for any number of tensors and groups; one copy where a gradient moved, none where none did; and no
    copy's source is written again, however late the device reads it."""
    params = make_params([(3,)] * count)
    groups = [{"params": params[: count // 2 + 1], "lr": 0.1}, {"params": params[count // 2 + 1 :]}]
    optimizer = make_optimizer("adamw", [g for g in groups if g["params"]], HOST)
    set_grads(params, 1)
    rows, chunks = Recorder(None), Recorder(None)
    kernels = types.SimpleNamespace(**{**vars(triton_on_host.kernels()), "rows": rows, "chunks": chunks})
    monkeypatch.setattr(host, "kernels", lambda: kernels)
    optimizer.step()
    assert (rows.grids, chunks.grids) == ([((count + 31) // 32,)], [(count,)])
    sources: list[tuple[Tensor, Tensor]] = []

    def pinned(like: Tensor) -> Tensor:
        sources.append((like.clone(), like.clone()))
        return sources[-1][0]

    monkeypatch.setattr(host, "_pinned", pinned)
    for moved in (False, True, "lr", False, True):
        if moved is True:
            for p in params:
                assert p.grad is not None
                p.grad = p.grad.clone()
        if moved == "lr":
            optimizer.param_groups[0]["lr"] *= 2
        before = len(sources), len(rows.grids), len(chunks.grids)
        optimizer.step()
        made = len(sources) - before[0], len(rows.grids) - before[1], len(chunks.grids) - before[2]
        assert made == (1 if moved else 0, 1, 1)
    assert all(torch.equal(source, as_given) for source, as_given in sources)


@needs_interpreter
@pytest.mark.parametrize("numel", [1, 1500])
@pytest.mark.parametrize(
    ("dtype", "master", "moments"),
    [
        (torch.float32, False, "float32"),
        (torch.float64, False, "float32"),
        (torch.bfloat16, True, "float32"),
        (torch.float32, False, "int8"),
        (torch.bfloat16, True, "int8"),
    ],
)
@pytest.mark.parametrize("rule", RULES)
def test_each_array_is_read_and_written_once(
    host: Any, rule: str, dtype: torch.dtype, master: bool, moments: str, numel: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is let through by the masks: 28 bytes for each fp32 parameter of AdamW, 36 in a sync; of moments in codes 16
    bytes, 24 in a sync, and beside them 16 for each block."""
    from triton.runtime import interpreter

    memory = interpreter._interpreter
    traffic: Counter[tuple[int, str]] = Counter()
    watched: list[Tensor] = []

    def count(use: str, pointers: Any, mask: Any) -> None:
        for address in pointers[mask]:
            for i, tensor in enumerate(watched):
                if tensor.data_ptr() <= address < tensor.data_ptr() + tensor.nbytes:
                    traffic[i, use] += tensor.itemsize

    load, store = memory.load, memory.store

    def counted_load(pointers: Any, mask: Any, *rest: Any) -> Any:
        count("r", pointers, mask)
        return load(pointers, mask, *rest)

    def counted_store(pointers: Any, value: Any, mask: Any) -> Any:
        count("w", pointers, mask)
        return store(pointers, value, mask)

    monkeypatch.setattr(memory, "load", counted_load)
    monkeypatch.setattr(memory, "store", counted_store)
    p = torch.nn.Parameter(torch.randn(numel).to(dtype))
    chosen = {"master_weights": master, "state_dtype": moments}
    optimizer = make_optimizer(rule, [p], HOST, **RULES[rule], **chosen)
    for t in range(1, 4):
        set_grads([p], t)
        state = optimizer.state.get(p, {})
        names = [name for name in state if name != "step"]
        assert p.grad is not None
        watched[:] = [p.detach(), p.grad, *(state[name] for name in names)]
        traffic.clear()
        optimizer.step()
        if t == 1:
            continue
        moved = [(traffic[i, "r"] / x.nbytes, traffic[i, "w"] / x.nbytes) for i, x in enumerate(watched)]
        assert moved[:2] == [(1, 1), (1, 0)]
        for name, got in zip(names, moved[2:], strict=True):
            at_sync = name in ("slow_param", "cached_momentum", "cached_momentum_scale", "outer_momentum_buffer")
            assert got == ((0, 0) if at_sync and t % 3 else (1, 1)), name
        if rule == "adamw" and dtype != torch.float64:
            codes = moments == "int8"
            of_each = (26 if master else 28) - (12 if codes else 0) + (0 if t % 3 else 8)
            assert sum(traffic.values()) == numel * of_each + (16 * -(-numel // 128) if codes else 0)


@needs_interpreter
def test_streams_that_read_its_memory_are_made_known(host: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Freed, it must not be given away while another stream than the one it was made on still reads it."""
    used: list[int] = []
    monkeypatch.setattr(host, "_used_on_current_stream", lambda tensor: used.append(tensor.data_ptr()))
    params = make_params([(5,)])
    optimizer = make_optimizer("adamw", params, HOST)
    # Once for each stream: the allocator remembers it as long as the memory is the optimizer's.
    for stream, expected in ((0, False), (7, True), (7, False), (0, False), (8, True), (7, False)):
        monkeypatch.setattr(host, "_stream", lambda device, stream=stream: stream)
        used.clear()
        set_grads(params, stream)
        optimizer.step()
        stepper = optimizer._table.parts[0].stepper
        memory = {x.data_ptr() for x in vars(stepper).values() if isinstance(x, Tensor)}
        on_the_host = {x.data_ptr() for x in (stepper.staged, stepper.uploaded, stepper.spare)}
        assert set(used) == (memory - on_the_host if expected else set())


@needs_interpreter
def test_a_tensor_of_more_than_2_to_the_32_elements(host: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its last chunk is that of a small tensor; an offset of 32 bits would end in the tensor's first elements. Of some
    50 GB of addresses there is memory behind those alone that are touched."""
    size = 2**32 + 1500
    tail = size % CHUNK

    def sparse(dtype: torch.dtype) -> Tensor:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # MAP_NORESERVE, which Python names from 3.13 on
        return torch.frombuffer(mmap.mmap(-1, size * dtype.itemsize, flags=flags), dtype=dtype)

    def make(get: Callable[[torch.dtype], Tensor]) -> tuple[torch.optim.Optimizer, list[Tensor]]:
        p = torch.nn.Parameter(get(torch.bfloat16))
        p.grad = get(torch.bfloat16)
        optimizer = make_optimizer("sgd", [p], HOST, lr=0.1, momentum=0.9, k=2)
        state = {"slow_param": get(torch.float32), "momentum_buffer": get(torch.float32)}
        optimizer.state[p] = {"step": torch.ones((), dtype=torch.float64), **state}
        tensors = [p.detach(), p.grad, *state.values()]
        for i, tensor in enumerate(tensors):
            tensor[-tail:] = torch.randn(tail, generator=seeded(i)).to(tensor.dtype)
        return optimizer, tensors

    class Last(Recorder):
        """Of a kernel's programs the last alone."""

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            self.grids.append(grid)
            chunk = build.module("_cpu").layout()["CHUNK"]  # type: ignore[union-attr]

            def launch(fixed: Any, moving: Any, steps: Any, held: Any, at: int, *rest: Any, **options: Any) -> None:
                self.kernel[(1,)](fixed, moving, steps, held, at + (grid[0] - 1) * chunk, *rest, **options)

            return launch

    last = Last(triton_on_host.kernels().chunks)
    kernels = types.SimpleNamespace(**{**vars(triton_on_host.kernels()), "chunks": last})
    monkeypatch.setattr(host, "kernels", lambda: kernels)
    optimizer, huge = make(sparse)
    twin, small = make(lambda dtype: torch.zeros(tail, dtype=dtype))
    before = [tensor.clone() for tensor in small]
    optimizer.step()
    twin.step()
    assert last.grids == [(-(-size // CHUNK),), (1,)]
    for tensor, expected in zip(huge, small, strict=True):
        assert torch.equal(tensor[-tail:], expected)
        assert not tensor[:CHUNK].any()
    assert not any(torch.equal(small[i], before[i]) for i in (0, 2, 3))


@needs_interpreter
@pytest.mark.parametrize(
    ("rule", "dtype", "moments"),
    [
        ("adamw", torch.float32, "float32"),
        ("adamw", torch.bfloat16, "float32"),
        ("adam", torch.float64, "float32"),
        ("sgd", torch.float32, "float32"),
        ("sgd", torch.float16, "float32"),
        ("adamw", torch.float32, "int8"),
    ],
)
def test_the_stand_in_computes_what_the_interpreter_does(
    host: Any, rule: str, dtype: torch.dtype, moments: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It repeats what a program before did, as far as that took the same way, by calls of NumPy: over rows with and
    without a gradient, with and without whole blocks, steps with and without a sync, an overflow, another set of
    hyperparameters."""
    quick = triton_on_host.kernels()
    plain = types.SimpleNamespace(**{**vars(quick), "rows": quick.rows.interpreted, "chunks": quick.chunks.interpreted})
    runs = []
    for kernels in (plain, quick):
        monkeypatch.setattr(host, "kernels", lambda kernels=kernels: kernels)
        params = make_params([(5,), (1024,), (2500,), (3, 4)], dtype)
        changed = {"maximize": True, "weight_decay": 0.1, "pullback_momentum": "pullback", "k": 3, "lr": 0.2}
        groups = [{"params": params[:1]}, {"params": params[1:], **changed}]
        optimizer: Any = make_optimizer(rule, groups, HOST, **{**RULES[rule], "k": 2}, state_dtype=moments)
        for t in range(9):
            set_grads(params, t)
            params[t % 4].grad = None
            optimizer.found_inf = torch.tensor(float(t == 4))
            optimizer.step()
        runs.append([*params, *(x for p in params for x in optimizer.state[p].values())])
    assert len(runs[0]) == len(runs[1]) >= 12
    assert all(same_tensor_bits(a, b) for a, b in zip(*runs, strict=True))


# ------------------------------------------------------------------------------------------------------------
# Triton's own launch path, with a driver that launches nothing


@pytest.fixture
def driver(host: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> Iterator[type[Driver]]:
    """The backend on the host over Triton's compiler and `Driver`."""
    import triton as compiler
    from triton.runtime import driver as config

    monkeypatch.setattr(host, "kernels", triton.kernels)
    # Also where nothing is interpreted.
    monkeypatch.setattr(host, "unavailable", lambda device=None: "")
    before = dict(vars(config))
    config.set_active(Driver())
    for kernel in (triton.kernels().rows, triton.kernels().chunks):
        kernel.device_caches.clear()
    Driver.launches = 0
    with compiler.knobs.cache.scope():
        compiler.knobs.cache.dir = str(tmp_path)
        yield Driver
    for kernel in (triton.kernels().rows, triton.kernels().chunks):
        kernel.device_caches.clear()
    # What was compiled unloads itself by the driver that loaded it.
    gc.collect()
    vars(config).update(before)


def compilations() -> int:
    """How many kernels Triton has compiled for this process."""
    kernels = triton.kernels()
    return sum(len(kernel.device_caches[0][0]) for kernel in (kernels.rows, kernels.chunks))


@needs_triton
def test_one_compilation_for_any_value(driver: type[Driver]) -> None:
    """Two kernels for a rule and its dtypes: not a further one for a learning rate, a schedule, a number of tensors,
    another size or alignment, a loss scale, k, alpha, or an lr that is a tensor. None is compiled in a capture."""
    odd = torch.zeros(9)[1:2].view(())
    for shapes, hyper in (
        ([(1,)], {}),
        ([(16,)] * 16, {"lr": torch.tensor(0.1), "k": 1, "alpha": 1.0}),
        ([(7,), (40_000,)], {"lr": odd, "amsgrad": True, "weight_decay": 0.3, "pullback_momentum": "pullback"}),
        ([(3,)] * 129, {"maximize": True, "betas": (0.5, 0.6), "eps": 1.0}),
    ):
        params = make_params(shapes)
        optimizer: Any = make_optimizer("adamw", params, HOST, **hyper)
        set_grads(params, 1)
        optimizer.step()
        for scale, held in ((odd + 2, odd), (torch.ones(()), torch.zeros(16)[4:5].view(()))):
            optimizer.grad_scale, optimizer.found_inf = scale, held
            optimizer._table.step(optimizer.param_groups, optimizer.state, scale, None)
            (part,) = optimizer._table.parts
            part.refresh(optimizer.state, Pass.STEP)
            part.run(scale, held)
            part.release()
        optimizer.param_groups[0]["lr"] = 0.25
        optimizer._table.step(optimizer.param_groups, optimizer.state)
    assert driver.launches > 20
    assert compilations() == 2
    other = make_params([(3,)], torch.float64)
    optimizer = make_optimizer("sgd", other, HOST)
    set_grads(other, 1)
    optimizer.step()
    assert compilations() == 4


@needs_triton
@pytest.mark.slow
def test_host_work_of_a_step(driver: type[Driver], capsys: pytest.CaptureFixture[str]) -> None:
    """All of Python's and Triton's part of two launches: the same for any number of tensors, which C++ reads in the
    quick way."""

    def begin(count: int) -> Stepped:
        params = make_params([(3,)] * count)
        optimizer = make_optimizer("adamw", params, HOST)
        set_grads(params, 1)
        return Stepped(params, optimizer.step)

    found = assert_host_work(begin, most_fixed=1000)
    with capsys.disabled():
        print(f"\nTriton, host work: {found}")


@needs_interpreter
def test_copies_of_an_optimizer_share_nothing(host: Any) -> None:
    params = make_params([(5,)])
    optimizer = make_optimizer("adamw", params, HOST, lr=0.1)
    set_grads(params, 1)
    optimizer.step()
    other = copy.deepcopy(optimizer)
    (q,) = other.param_groups[0]["params"]
    before = params[0].detach().clone()
    q.grad = torch.ones_like(q)
    other.step()
    assert torch.equal(params[0], before)
    assert not torch.equal(q, before)
