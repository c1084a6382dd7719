"""The CPU backend's own promises: the same bits whatever walks the table, exact 16-bit conversions, no memory."""

from __future__ import annotations

import ctypes
import itertools
import mmap
import re
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import make_params, make_tensor, same_tensor_bits, seeded, set_grad, tune
from torch import Tensor

import lookahead_fused
from lookahead_fused import _build as build

native = build.module("_cpu")
pytestmark = pytest.mark.skipif(native is None, reason=build.reason("_cpu"))

# Sizes around every register width and the chunk sizes below, and one that several threads share.
SIZES = (1, 3, 4, 7, 8, 15, 16, 17, 31, 33, 100, 1000, 4097, 150_001)
CLASSES = {
    "adamw": (lookahead_fused.LookaheadAdamW, {"amsgrad": True, "weight_decay": 0.1}),
    "sgd": (lookahead_fused.LookaheadSGD, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
}
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def restore() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def run(
    rule: str,
    dtype: torch.dtype,
    *,
    order: int = 1,
    master_weights: bool = False,
    grad_dtype: torch.dtype | None = None,
    groups: int = 1,
    **tuning: Any,
) -> list[list[Tensor]]:
    """Five steps over all sizes, in their order or against it; returns parameters and state in their order."""
    params = make_params([(size,) for size in SIZES], dtype)
    cls, hyper = CLASSES[rule]
    ordered = params[::order]
    optimizer = cls(
        [{"params": ordered[i::groups]} for i in range(groups)],
        lr=0.01,
        k=2,
        alpha=0.3,
        pullback_momentum="pullback",
        master_weights=master_weights,
        backend="cpu",
        **hyper,
    )
    tune(optimizer, **tuning)
    generator = seeded(1)
    for _ in range(5):
        for p in params:
            set_grad(p, make_tensor(p.shape, grad_dtype or dtype, generator=generator))
        optimizer.step()
    return [[p.detach(), *optimizer.state[p].values()] for p in params]


def assert_same_bits(ours: list[list[Tensor]], theirs: list[list[Tensor]]) -> None:
    for a, b in zip(itertools.chain(*ours), itertools.chain(*theirs), strict=True):
        assert same_tensor_bits(a, b)


@pytest.mark.parametrize("rule", CLASSES)
@pytest.mark.parametrize(
    ("dtype", "grad_dtype", "master_weights"),
    [(dtype, None, False) for dtype in DTYPES]
    + [(dtype, None, True) for dtype in DTYPES[2:]]
    + [(torch.bfloat16, torch.float32, False), (torch.float64, torch.float32, False)],
)
def test_instruction_sets_agree(
    rule: str, dtype: torch.dtype, grad_dtype: torch.dtype | None, master_weights: bool
) -> None:
    if grad_dtype is not None and not hasattr(Tensor, "grad_dtype"):
        pytest.skip("this torch keeps gradients in their parameter's dtype")
    assert native is not None
    sets = native.instruction_sets()
    assert sets[0] == "baseline"
    results = []
    for name in sets:
        results.append(run(rule, dtype, grad_dtype=grad_dtype, master_weights=master_weights, instruction_set=name))
    for name, result in zip(sets[1:], results[1:], strict=True):
        print(name)
        assert_same_bits(result, results[0])


@pytest.mark.parametrize("rule", CLASSES)
def test_walks_agree(rule: str) -> None:
    """Threads, whose they are, chunk size, order, grouping and the way in which tensors are described leave no
    trace."""
    expected = run(rule, torch.float32)
    walks = [(1, 1, 1, 1), (2, 17, -1, 3), (3, 1000, 1, 5), (8, 1 << 20, -1, 14)]
    for own_threads, (threads, chunk, order, groups) in itertools.product([False, True], walks):
        torch.set_num_threads(threads)
        tuning = {"own_threads": own_threads, "chunk_elements": chunk}
        assert_same_bits(run(rule, torch.float32, order=order, groups=groups, **tuning), expected)
    for way in ("EXCHANGE_API", "ATTRIBUTES"):
        assert_same_bits(run(rule, torch.float32, way=way), expected)


@pytest.mark.skipif(sys.platform != "linux", reason="torch's library is looked for by its name on Linux")
def test_tensors_are_described_in_the_fastest_way() -> None:
    """On every torch of these tests, after one look at each kind of tensor; a slower way where it is asked for."""
    for way in ("SHIM", "EXCHANGE_API", "ATTRIBUTES"):
        if way == "EXCHANGE_API" and not hasattr(Tensor, "__dlpack_c_exchange_api__"):
            continue  # torch has it since 2.10
        params = [torch.nn.Parameter(torch.ones(3, dtype=dtype)) for dtype in DTYPES[:2]]
        optimizer = lookahead_fused.LookaheadAdamW(params, backend="cpu")
        tune(optimizer, way=way)
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
        ways = [part.table.way.name for part in optimizer._table.parts]
        assert ways == [way] * 2


def test_tensors_trade_places_that_only_their_attributes_describe(monkeypatch: pytest.MonkeyPatch) -> None:
    """As under torch before 2.10, which has no exchange API: a class's first tensor is described by its attributes."""
    monkeypatch.delattr(torch.Tensor, "__dlpack_c_exchange_api__", raising=False)
    pairs = [
        (torch.nn.Parameter(torch.randn(5, 7, dtype=dtype)), torch.randn(5, 7, dtype=dtype))
        for dtype in (torch.float32, torch.bfloat16, torch.float64)
    ]
    before = [(a.detach().clone(), b.clone()) for a, b in pairs]
    native.exchange(Tensor, pairs, 1, False)
    for (a, b), (was_a, was_b) in zip(pairs, before, strict=True):
        assert same_tensor_bits(a, was_b)
        assert same_tensor_bits(b, was_a)


def test_every_instruction_set_of_the_processor_is_found() -> None:
    """A compiler's own library may know none of them, and every step would be a slow one with the right bits."""
    cpuinfo = Path("/proc/cpuinfo")
    flags = re.search(r"^flags\s*:(.*)$", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.is_file() else None
    if flags is None:
        pytest.skip("only Linux on x86 lists the processor's flags")
    needed = {"avx2": "avx2 f16c", "avx512": "avx2 f16c avx512f avx512bw avx512dq avx512vl"}
    present = [name for name, listed in needed.items() if set(listed.split()) <= set(flags[1].split())]
    assert native is not None
    assert native.instruction_sets() == ["baseline", *present]


def test_an_instruction_set_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match="avx1024"):
        run("sgd", torch.float32, instruction_set="avx1024")


@pytest.mark.parametrize("module", ["_cpu", "_cuda"])
def test_a_module_shares_nothing_of_pybind11_with_another(module: str) -> None:
    """What turns exceptions into Python's is among it. In modules that have a C++ library each linked into them, as
    those of a release wheel have, one would not know the other's, and tell of "an unknown exception"."""
    if build.module(module) is None:
        pytest.skip(build.reason(module))
    api = ctypes.pythonapi
    api.PyInterpreterState_Get.restype = ctypes.c_void_p
    api.PyInterpreterState_GetDict.argtypes = [ctypes.c_void_p]
    # A borrowed reference, which ctypes would take for one to give back.
    api.PyInterpreterState_GetDict.restype = ctypes.c_void_p
    kept = ctypes.cast(api.PyInterpreterState_GetDict(api.PyInterpreterState_Get()), ctypes.py_object).value
    assert [key for key in kept if "internals" in str(key) and f"lookahead_fused_{module}_" in str(key)]


def patterns(dtype: torch.dtype) -> Tensor:
    """Every number of a 16-bit format that is finite."""
    bits = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)
    values = bits.view(dtype)
    return values[values.isfinite()]


def instruction_sets() -> list[str]:
    return [] if native is None else native.instruction_sets()


@pytest.mark.parametrize("instruction_set", instruction_sets())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_number_is_widened_exactly(dtype: torch.dtype, instruction_set: str) -> None:
    values = patterns(dtype)
    param = torch.nn.Parameter(values.clone())
    param.grad = torch.zeros_like(param)
    optimizer = lookahead_fused.LookaheadSGD([param], lr=0.0, k=10, backend="cpu")
    tune(optimizer, instruction_set=instruction_set)
    optimizer.step()
    assert same_tensor_bits(optimizer.state[param]["slow_param"], values.float())
    assert same_tensor_bits(param.detach(), values)


@pytest.mark.parametrize("instruction_set", instruction_sets())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fp32_is_rounded_to_16_bits_as_torch_rounds(dtype: torch.dtype, instruction_set: str) -> None:
    """Halfway cases, subnormal results, overflow, infinities; of a NaN, that it stays one."""
    if not hasattr(Tensor, "grad_dtype"):
        pytest.skip("this torch keeps gradients in their parameter's dtype")
    finite = patterns(dtype).double()
    ascending = finite.sort().values
    halfway = ((ascending[1:] + ascending[:-1]) / 2).float()
    random = torch.randint(-(1 << 31), 1 << 31, (1 << 20,), generator=seeded(0), dtype=torch.int64)
    values = torch.cat(
        [
            halfway,
            torch.nextafter(halfway, torch.tensor(float("inf"))),
            torch.nextafter(halfway, torch.tensor(float("-inf"))),
            random.to(torch.int32).view(torch.float32),
            torch.tensor([65519.996, 65520.0, 3.4e38, float("inf"), float("-inf"), float("nan"), 1e-45, 2**-25]),
        ]
    )
    param = torch.nn.Parameter(torch.zeros(values.shape, dtype=dtype))
    set_grad(param, -values)
    optimizer = lookahead_fused.LookaheadSGD([param], lr=1.0, k=10, backend="cpu")
    tune(optimizer, instruction_set=instruction_set)
    optimizer.step()
    got, expected = param.detach(), (0.0 + values).to(dtype)
    nans = expected.isnan()
    assert torch.equal(got.isnan(), nans)
    assert torch.equal(got[~nans].view(torch.int16), expected[~nans].view(torch.int16))


@pytest.mark.parametrize("own_threads", [False, True])
def test_subnormal_numbers_survive_a_thread_that_flushes_them(own_threads: bool) -> None:
    """torch.set_flush_denormal is one thread's setting; bits must not depend on who took an element."""
    values, grad = torch.full((300_000,), 1e-40), torch.full((300_000,), 1e-39)

    def steps() -> Tensor:
        param = torch.nn.Parameter(values.clone())
        param.grad = grad
        optimizer = lookahead_fused.LookaheadSGD([param], lr=0.5, backend="cpu")
        tune(optimizer, own_threads=own_threads)
        optimizer.step()
        return param.detach()

    expected = steps()
    if not torch.set_flush_denormal(True):
        pytest.skip("this machine cannot flush subnormal numbers")
    try:
        flushed = steps()
    finally:
        torch.set_flush_denormal(False)
    assert same_tensor_bits(flushed, expected)
    assert bool((expected != 0).all())


@pytest.mark.parametrize("own_threads", [False, True])
def test_two_threads_may_step_at_once(own_threads: bool) -> None:
    def train(seed: int, out: dict[int, Tensor]) -> None:
        param = torch.nn.Parameter(make_tensor((300_000,), generator=seeded(seed)))
        optimizer = lookahead_fused.LookaheadAdamW([param], lr=0.1, k=2, backend="cpu")
        tune(optimizer, own_threads=own_threads)
        for _ in range(8):
            param.grad = param.detach() * 0.5
            optimizer.step()
        out[seed] = param.detach()

    alone: dict[int, Tensor] = {}
    together: dict[int, Tensor] = {}
    for seed in range(4):
        train(seed, alone)
    threads = [threading.Thread(target=train, args=(seed, together)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(same_tensor_bits(together[seed], alone[seed]) for seed in range(4))


def test_a_step_takes_no_memory_that_grows_with_the_model() -> None:
    peak = re.compile(r"VmHWM:\s+(\d+) kB")
    reset, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
    params = [torch.nn.Parameter(torch.ones(1_000_000)) for _ in range(8)]
    optimizer = lookahead_fused.LookaheadAdamW(params, k=2, backend="cpu")
    for p in params:
        p.grad = torch.ones_like(p)
    for _ in range(4):
        optimizer.step()
    try:
        reset.write_text("5")
    except OSError as error:
        pytest.skip(f"the kernel does not tell a peak anew: {error}")
    before = int(peak.search(status.read_text()).group(1))  # type: ignore[union-attr]
    for _ in range(4):
        optimizer.step()
    after = int(peak.search(status.read_text()).group(1))  # type: ignore[union-attr]
    # One of the parameters alone is 4,000 kB.
    assert after - before < 1_000, f"the peak rose by {after - before} kB"


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage/enabled").exists(), reason="no huge pages here")
def test_large_state_asks_for_huge_pages() -> None:
    (param,) = make_params([(3 << 20,)], torch.float32)
    set_grad(param, torch.ones_like(param))
    optimizer = lookahead_fused.LookaheadAdamW([param], k=1, backend="cpu")
    optimizer.step()
    middle = 6 << 20
    for name in ("exp_avg", "exp_avg_sq", "slow_param"):
        assert "hg" in vm_flags(optimizer.state[param][name].data_ptr() + middle), name


def test_huge_pages_are_asked_for_within_the_memory_alone() -> None:
    huge = 1 << 21
    memory = mmap.mmap(-1, 4 * huge)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    first = -(-address // huge) * huge
    native.prefer_huge_pages(first + 1, 2 * huge)
    asked = ["hg" in vm_flags(first + i * huge) for i in range(3)]
    assert asked == [False, Path("/sys/kernel/mm/transparent_hugepage/enabled").exists(), False]


def vm_flags(address: int) -> list[str]:
    """What the kernel says of the mapping that an address lies in."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        bounds = re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line)
        if bounds:
            inside = int(bounds[1], 16) <= address < int(bounds[2], 16)
        elif inside and line.startswith("VmFlags:"):
            return line.split()[1:]
    raise AssertionError(f"no mapping holds {address:#x}")
