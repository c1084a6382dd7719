"""Moments in codes of 8 bits: `csrc/state/int8.h` and the package's statement of it in torch, by an oracle in NumPy."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import coded
import numpy as np
import pytest
import torch

from lookahead_fused import _codes as codes
from lookahead_fused.backends import reference_state

ROOT = Path(__file__).resolve().parents[1]
CXX = shlex.split(os.environ.get("CXX", "")) or ["c++"]
KINDS = {"signed": (coded.SIGNED, codes.SIGNED), "squares": (coded.SQUARES, codes.SQUARES)}
DRAWS = [(1, False, 0), (1, True, 0), (2, False, 1), (1000, False, 2), (2**31 + 5, False, 1), (2**40 + 3, True, 2)]
Pair = tuple[coded.Kind, codes.Kind]


@pytest.fixture(params=list(KINDS))
def kind(request: pytest.FixtureRequest) -> Pair:
    return KINDS[request.param]


def special() -> np.ndarray:
    """Numbers of every size together and apart, on and about those that have codes, and all that is not finite."""
    generator = np.random.default_rng(0)
    bits = generator.integers(0, 2**32, 64 * 128, dtype=np.uint32)
    exponents = generator.integers(0, 256, (200, 1)) + generator.integers(-40, 1, (200, 128))
    narrow = np.clip(exponents, 0, 255).astype(np.uint32) << 23
    narrow |= generator.integers(0, 2**23, narrow.shape, dtype=np.uint32)
    grid = np.arange(0, 2**31, 2**20, dtype=np.uint32)
    about = (grid[:, None] + np.array([0, 1, 2**19 - 1, 2**19, 2**19 + 1, 2**20 - 1], dtype=np.uint32)).ravel()
    ends = np.array([0, 1, 2**31, 2**31 + 1, 0x7F7FFFFF, 0x7F800000, 0xFF800000, 0x7FC00000, 0xFFFFFFFF, 0x7F700000])
    few = np.concatenate([ends.astype(np.uint32), np.full(20, 0x3F812345, dtype=np.uint32)])
    every = np.concatenate([bits, narrow.ravel(), narrow.ravel() | np.uint32(2**31), about, np.zeros(128), few])
    return every.astype(np.uint32).view(np.float32)


NUMBERS = special()


def same(a: np.ndarray, b: np.ndarray) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()


def test_the_package_encodes_as_the_oracle(kind: Pair) -> None:
    numbers = torch.from_numpy(NUMBERS)
    for updates, own_pass, moment in DRAWS:
        drawn = coded.draws(len(NUMBERS), updates, own_pass, moment)
        expected, tops = coded.encode(NUMBERS, kind[0], drawn)
        got, scale = reference_state.encoded(numbers, kind[1], numbers, moment, updates, own_pass)
        assert same(got.numpy(), expected)
        assert same(scale.numpy(), coded.scales(tops))


def test_the_package_encodes_to_the_nearest_as_the_oracle(kind: Pair) -> None:
    expected, tops = coded.encode(NUMBERS, kind[0])
    got, scale = codes.encoded(torch.from_numpy(NUMBERS), torch.from_numpy(NUMBERS), kind[1])
    assert same(got.numpy(), expected)
    assert same(scale.numpy(), coded.scales(tops))


def every_code(tops: np.ndarray) -> np.ndarray:
    return np.tile(np.arange(256, dtype=np.uint8), len(tops) // 2)


def every_top(kind: coded.Kind) -> np.ndarray:
    return np.repeat(np.arange(coded.LEAST - 1 + kind.codes, coded.LAST + 1), 2)


def test_the_package_decodes_as_the_oracle(kind: Pair) -> None:
    """Every code under every scale; each is a number in bf16, and NaN where it is not finite."""
    tops = every_top(kind[0])
    all_codes = every_code(tops)
    got = codes.decoded(torch.from_numpy(all_codes), torch.from_numpy(coded.scales(tops)), kind[1])
    assert got.dtype == torch.bfloat16
    expected = coded.decode(all_codes, tops, kind[0])
    found = got.float().numpy()
    assert np.array_equal(found, expected, equal_nan=True)
    numbers = ~np.isnan(expected)
    assert np.array_equal(np.signbit(found)[numbers], np.signbit(expected)[numbers])
    assert np.isfinite(expected).sum() == len(tops) // 2 * (254 if kind[0].has_sign else 255)


def test_what_codes_stand_for_comes_back(kind: Pair) -> None:
    """Encoded to the nearest: the state that is loaded is the state that was saved."""
    tops = every_top(kind[0])
    generator = np.random.default_rng(1)
    some = generator.integers(0, 256, len(tops) * 128, dtype=np.uint8)
    # Blocks whose codes are all small, too.
    some[: len(some) // 2] %= 8
    wide = codes.decoded(torch.from_numpy(some), torch.from_numpy(coded.scales(tops)), kind[1])
    back = codes.decoded(*codes.encoded(wide, wide, kind[1]), kind[1])
    assert same(back.view(torch.int16).numpy(), wide.view(torch.int16).numpy())
    # And at random, where the block has room.
    again = codes.decoded(*reference_state.encoded(wide.float(), kind[1], wide, 0, 5, False), kind[1])
    roomy = np.repeat((some.reshape(-1, 128) & (127 if kind[0].has_sign else 255) != kind[0].codes).all(1), 128)
    assert 0.1 < roomy.mean() < 1
    assert same(again.view(torch.int16).numpy()[roomy], wide.view(torch.int16).numpy()[roomy])


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which(CXX[0]) is None:
        pytest.skip(f"no C++ compiler ({CXX[0]}) was found")
    made = tmp_path_factory.mktemp("codes") / "codes"
    source = Path(__file__).with_name("codes.cpp")
    command = [*CXX, "-std=c++17", "-O1", "-ffp-contract=off", "-fsanitize=undefined"]
    command += ["-fno-sanitize-recover=undefined", f"-I{ROOT / 'csrc'}", str(source), "-o", str(made)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return made


def ran(program: Path, *arguments: int, given: bytes = b"") -> bytes:
    done = subprocess.run(
        [str(program), *(str(int(argument)) for argument in arguments)], input=given, capture_output=True, check=False
    )
    assert done.returncode == 0, (done.returncode, done.stderr)
    return done.stdout


def test_the_header_encodes_as_the_oracle(program: Path, kind: Pair) -> None:
    for updates, own_pass, moment in DRAWS:
        got = ran(program, int(not kind[0].has_sign), updates, own_pass, moment, given=NUMBERS.tobytes())
        expected, tops = coded.encode(NUMBERS, kind[0], coded.draws(len(NUMBERS), updates, own_pass, moment))
        wide = coded.decode(expected, tops, kind[0])
        at = 0
        for block in range(len(tops)):
            part = slice(block * 128, (block + 1) * 128)
            count = len(expected[part])
            assert got[at : at + 4] == coded.scales(tops[block : block + 1]).tobytes()
            assert got[at + 4 : at + 4 + count] == expected[part].tobytes()
            numbers = np.frombuffer(got[at + 4 + count : at + 4 + 5 * count], dtype=np.float32)
            assert np.array_equal(numbers, wide[part], equal_nan=True)
            at += 4 + 5 * count
        assert at == len(got)


@pytest.mark.parametrize("bits", [0, 1, 2**20, 0x3F812345, 0x7F800000, 0x7FC00001, 0x80000000, 0xBF800000, 0xFFFFFFFF])
def test_any_scale_makes_the_same_of_codes(program: Path, kind: Pair, bits: int) -> None:
    """One that was put there by hand makes numbers that mean nothing, and the same ones everywhere."""
    got = np.frombuffer(ran(program, int(not kind[0].has_sign), bits), dtype=np.uint32)
    scale = torch.from_numpy(np.array([bits] * 2, dtype=np.uint32).view(np.float32))
    wide = codes.decoded(torch.arange(256).to(torch.uint8), scale, kind[1])
    assert np.array_equal(wide.view(torch.int16).numpy().view(np.uint16).astype(np.uint32) << 16, got)


# ------------------------------------------------------------------------------------------------------------
# what is promised of them


@pytest.mark.parametrize("moment", [0, 1, 2])
@pytest.mark.parametrize("share", [2.0**-14, 0.01, 0.3, 0.5, 0.93, 0.999, 1.0, 1.06, 1.3, 100.7])
def test_the_mean_is_the_number(kind: Pair, moment: int, share: float) -> None:
    """Above the least number of a block for both kinds, and below it where there is a sign."""
    count = 1 << 17
    least = coded.number(np.array([127 * 8 + 1 - kind[0].codes + 1 + 7]))[0]
    x = torch.full((count,), share * least, dtype=torch.float32)
    x[::128] = 1.9
    wide = codes.decoded(*reference_state.encoded(x, kind[1], x, moment, 12, False), kind[1]).double()
    found = torch.cat([row[1:] for row in wide.view(-1, 128)])
    exact = x[1].double().item()
    values = found.unique()
    assert len(values) <= 2
    if not kind[0].has_sign and share < 1:
        assert values.tolist() == [least]
        return
    spread = (found - exact).pow(2).mean().sqrt().item()
    assert abs(found.mean().item() - exact) <= 4 * spread / count**0.5 + 2.0**-16 * least


def test_a_square_is_0_where_it_is_0() -> None:
    x = torch.tensor([0.0, -0.0, 1e-45, 1e-30, 1e-12, 1.0])
    for wide in (codes.encoded(x, x, codes.SQUARES), reference_state.encoded(x, codes.SQUARES, x, 1, 3, False)):
        assert (codes.decoded(*wide, codes.SQUARES) > 0).tolist() == [False, False, True, True, True, True]


def test_blocks_are_cut_in_memory(kind: Pair) -> None:
    """In the order of a tensor's memory, whatever its strides."""
    x = torch.rand(8, 5, 7, generator=torch.Generator().manual_seed(0))
    moved = x.permute(2, 0, 1)
    for encode in (codes.encoded, lambda v, like, k: reference_state.encoded(v, k, like, 1, 3, False)):
        flat, scale = encode(x.flatten(), x.flatten(), kind[1])
        found, same_scale = encode(moved, moved, kind[1])
        assert found.stride() == moved.stride()
        assert torch.equal(scale, same_scale)
        assert torch.equal(found.permute(1, 2, 0).flatten(), flat)
        # Of values that lie otherwise than the parameter.
        again, _ = encode(moved.contiguous(), moved, kind[1])
        assert torch.equal(again, found)
        assert torch.equal(
            codes.decoded(found, scale, kind[1]).permute(1, 2, 0).flatten(), codes.decoded(flat, scale, kind[1])
        )
