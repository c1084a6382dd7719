"""Moments rounded to bf16 without bias: `csrc/state/bfloat16.h` and the reference's statement of it."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from lookahead_fused.backends.reference_state import rounded

ROOT = Path(__file__).resolve().parents[1]
CXX = shlex.split(os.environ.get("CXX", "")) or ["c++"]

# Counts of updates, of which two are beyond a word, whether a sync is a pass of its own, and places among the moments.
DRAWS = [(1, False, 0), (1, True, 0), (2, False, 1), (1000, False, 2), (2**31 + 5, False, 1), (2**40 + 3, True, 2)]


def of_bits(words: torch.Tensor) -> torch.Tensor:
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32).view(torch.float32)


@pytest.fixture(scope="module")
def numbers() -> torch.Tensor:
    """Every bf16 number with each of some lower halves: zeros, subnormal numbers, infinities and NaN among them."""
    lower = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    return of_bits((torch.arange(1 << 16)[:, None] << 16 | lower).flatten())


def test_the_header_rounds_as_the_reference(tmp_path: Path, numbers: torch.Tensor) -> None:
    if shutil.which(CXX[0]) is None:
        pytest.skip(f"no C++ compiler ({CXX[0]}) was found")
    program = tmp_path / "rounding"
    source = Path(__file__).with_name("rounding.cpp")
    command = [*CXX, "-std=c++17", "-O1", "-fsanitize=undefined", "-fno-sanitize-recover=undefined"]
    command += [f"-I{ROOT / 'csrc'}", str(source), "-o", str(program)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    given = numbers.numpy().tobytes()
    for updates, own_pass, moment in DRAWS:
        ran = [str(program), str(updates), str(int(own_pass)), str(moment)]
        done_bytes = subprocess.run(ran, input=given, capture_output=True, check=False)
        assert done_bytes.returncode == 0, done_bytes.stderr
        got = torch.frombuffer(bytearray(done_bytes.stdout), dtype=torch.int16)
        assert torch.equal(got, rounded(numbers, numbers, moment, updates, own_pass).view(torch.int16))


def test_a_number_becomes_a_neighbour(numbers: torch.Tensor) -> None:
    """What bf16 has stays, finite numbers stay finite, infinities and NaN what they are."""
    got = rounded(numbers, numbers, 0, 7, False).float()
    down = of_bits(numbers.view(torch.int32).long() & 0xFFFF0000)
    has_it = down == numbers
    assert torch.equal(got[has_it], numbers[has_it])
    assert torch.equal(got.isnan(), numbers.isnan())
    assert torch.equal(got.isinf(), numbers.isinf())
    finite = numbers.isfinite()
    up = of_bits((numbers.view(torch.int32).long() & 0xFFFF0000) + 0x10000)
    up = torch.where(up.isfinite(), up, down)
    assert ((got == down) | (got == up))[finite].all()
    assert (got.signbit() == numbers.signbit())[finite].all()


@pytest.mark.parametrize("moment", [0, 1, 2])
@pytest.mark.parametrize("lower", [1, 0x100, 0x5555, 0x8000, 0xFF00])
def test_the_mean_is_the_number(moment: int, lower: int) -> None:
    """Over elements, and over the steps of one element."""
    count = 1 << 18
    over_elements = of_bits(torch.full((count,), 0x3F800000 | lower))
    ups = (rounded(over_elements, over_elements, moment, 12, False).float() > 1.0).double()
    single = of_bits(torch.tensor([0x3F800000 | lower] * 64))
    over_steps = torch.stack([rounded(single, single, moment, t, False).float() > 1.0 for t in range(1, 4097)])
    share = lower / (1 << 16)
    for found in (ups, over_steps.double().flatten()):
        deviation = (share * (1 - share) / found.numel()) ** 0.5
        assert abs(found.mean().item() - share) <= 4 * deviation
    # Of each element, too: what one has drawn once it has not drawn for good.
    if 0.01 < share < 0.99:
        each = over_steps.double().mean(0)
        assert (each - share).abs().max().item() <= 5 * (share * (1 - share) / 4096) ** 0.5


def test_draws_are_independent() -> None:
    """Of neighbours, of steps, of the moments of an element, and of a sync and the steps about it."""
    count = 1 << 16
    x = of_bits(torch.full((count,), 0x3F808000))

    def ups(moment: int, updates: int, own_pass: bool = False) -> torch.Tensor:
        return (rounded(x, x, moment, updates, own_pass).float() > 1.0).double() - 0.5

    draws = [ups(0, 5), ups(1, 5), ups(2, 5), ups(0, 6), ups(0, 4), ups(0, 5, True), ups(0, 6, True), ups(0, 5).roll(1)]
    correlations = torch.corrcoef(torch.stack(draws)) - torch.eye(len(draws))
    assert correlations.abs().max().item() <= 5 / count**0.5


def test_places_are_counted_in_memory() -> None:
    """As the compiled backends walk: a parameter's strides do not change what an element draws."""
    x = torch.rand(6, 5, 4)
    moved = x.permute(2, 0, 1)
    assert torch.equal(rounded(x, x, 0, 3, False).permute(2, 0, 1), rounded(moved, moved, 0, 3, False))
