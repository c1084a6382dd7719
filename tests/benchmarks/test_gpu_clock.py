"""The clock of the benchmarks on a GPU: the device's time, whatever the host does meanwhile."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest

from lookahead_fused.bench.device import Cuda
from lookahead_fused.bench.measure import Schedule, Side


class Stream:
    """torch.cuda, as far as the clock uses it: what is enqueued begins once the host has enqueued it and the device is
    done with what came before, and an event has the time when the device gets to it."""

    CYCLES_PER_SECOND = 1e9

    def __init__(self) -> None:
        self.host = self.free = 0.0
        self.flushes = 0
        stream = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing
                self.at = math.inf

            def record(self) -> None:
                self.at = max(stream.host, stream.free)

            def query(self) -> bool:
                return self.at <= stream.host

            def synchronize(self) -> None:
                stream.host = max(stream.host, self.at)

            def elapsed_time(self, other: Any) -> float:
                return 1e3 * float(other.at - self.at)

        self.Event = Event

    def enqueue(self, device: float, host: float = 0.0) -> None:
        """Has the device work, after the host has for as long as it takes to tell it so."""
        self.host += host
        self.free = max(self.host, self.free) + device

    def _sleep(self, cycles: int) -> None:
        self.enqueue(cycles / self.CYCLES_PER_SECOND)

    def synchronize(self) -> None:
        self.host = max(self.host, self.free)

    def get_device_properties(self, index: int) -> Any:
        return type("", (), {"L2_cache_size": 1 << 20})

    def mem_get_info(self) -> tuple[int, int]:
        return 5, 9


@pytest.fixture
def stream() -> Stream:
    return Stream()


@pytest.fixture
def gpu(stream: Stream, monkeypatch: pytest.MonkeyPatch) -> Cuda:
    device = Cuda(cuda=stream, device="cpu", copy_bytes=1000, now=lambda: stream.host)

    def flush() -> None:
        stream.flushes += 1
        stream.enqueue(20e-6)

    monkeypatch.setattr(device, "flush", flush)
    return device


TURNS = Schedule(rounds=3, turns=2, steps=2)


def test_the_gpus_clock_times_steps_alone(gpu: Cuda, stream: Stream) -> None:
    sides = [
        Side("fast", lambda: stream.enqueue(1.0), lambda: stream.enqueue(7.0)),
        Side("slow", lambda: stream.enqueue(3.0)),
    ]
    samples = gpu.interleave(sides, TURNS)
    assert samples == {"fast": pytest.approx([1.0] * 3), "slow": pytest.approx([3.0] * 3)}
    assert stream.flushes == 2 * 4 * 2 * 2  # every step of every side, the warm-up's too
    assert gpu.available_bytes() == 5


@pytest.mark.parametrize("settle", [0, 4])
def test_a_slow_host_is_not_taken_for_a_slow_kernel(gpu: Cuda, stream: Stream, settle: int) -> None:
    """Torch's takes 300 µs to enqueue what the device does in 10, and longer than the cache takes to overwrite; in some
    steps, as at a sync, three times as long."""
    takes = itertools.cycle([300e-6, 300e-6, 900e-6])
    sides = [
        Side("theirs", lambda: stream.enqueue(10e-6, host=next(takes))),
        Side("ours", lambda: stream.enqueue(10e-6, host=5e-6)),
    ]
    samples = gpu.interleave(sides, Schedule(rounds=3, steps=3, settle=settle, period=3))
    assert samples == {"theirs": pytest.approx([10e-6] * 3), "ours": pytest.approx([10e-6] * 3)}
    assert not gpu.late


def test_a_step_that_the_device_had_to_wait_for_is_told(gpu: Cuda, stream: Stream) -> None:
    """As of one that enqueues more launches than a stream holds: its host waits until the device has begun."""

    def more_than_the_stream_holds() -> None:
        stream.synchronize()
        stream.enqueue(10e-6, host=300e-6)

    sides = [Side("too many", more_than_the_stream_holds), Side("few", lambda: stream.enqueue(10e-6, host=5e-6))]
    with pytest.warns(RuntimeWarning, match="too many: the device was done with waiting before 16 steps") as told:
        samples = gpu.interleave(sides, TURNS)
    assert samples["too many"] == pytest.approx([310e-6] * 3)
    assert (len(told), gpu.late) == (1, {"too many": 16})


def test_the_flush_writes_more_than_the_cache_holds() -> None:
    device = Cuda(cuda=Stream(), device="cpu")
    device.flush()
    assert device._flushed is not None
    assert device._flushed.nbytes == 4 << 20


def test_the_share_of_a_copy() -> None:
    """A copy reads and writes its buffer: a step of twice as many bytes takes as long at its bandwidth."""
    device = Cuda(cuda=Stream(), device="cpu", copy_bytes=1000)
    assert device.ceiling_seconds_per_step(1.0, 2000) == pytest.approx(1.0)
    assert device.ceiling_seconds_per_step(1.0, 500) == pytest.approx(0.25)
