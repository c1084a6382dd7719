"""The room of codes: formulas by what is known of them, and errors on numbers of which they can be told."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

from bench.codes import errors
from bench.codes.__main__ import PAIRS, measured
from bench.codes.codecs import Bf16, Codec, Distance, Floating, Table, dynamic, eight_bit_float, linear, logarithmic
from bench.codes.errors import Pair
from bench.codes.moments import SLICE, in_blocks, train
from bench.codes.tables import shown
from bench.demo import data
from bench.demo.models import GPT
from bench.demo.runs import Task
from lookahead_fused import _codes as package

EXACT: dict[str, Floating | Distance] = {
    "m 3 bits": Floating(20, True),
    "m 2 bits": Floating(21, True),
    "v 3 bits": Floating(20, False),
    "v 4 bits": Floating(19, False),
    "distance of m": Distance(True),
    "distance of v": Distance(False),
}
PAIR = {pair.name: pair for pair in PAIRS}
ALL_DRAWS = torch.arange(1 << 16, dtype=torch.int32).unsqueeze(1)


def numbers(rows: int = 64, columns: int = 128, *, decades: float = 4, seed: int = 0) -> Tensor:
    """Of both signs, evenly spread over so many decades."""
    generator = torch.Generator().manual_seed(seed)
    size = 10 ** (-decades * torch.rand(rows, columns, generator=generator))
    return size * torch.randn(rows, columns, generator=generator).sign()


def nearest(codec: Floating | Distance) -> Floating | Distance:
    return replace(codec, unbiased=False)


def written(codec: Codec, x: Tensor, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return codec(x, torch.randint(1 << 16, x.shape, generator=generator, dtype=torch.int32))


@pytest.mark.parametrize("codec", EXACT.values(), ids=EXACT)
def test_what_a_code_told_it_tells_again(codec: Floating | Distance) -> None:
    x = numbers(decades=7) if codec.signed else numbers(decades=12).abs()
    told = written(codec, x)
    assert torch.equal(written(nearest(codec), told), told)
    # Whatever is drawn, what needs no rounding is not rounded; but the range of some may begin a code higher.
    above = told.abs() > (1e-3 if isinstance(codec, Floating) else 0) * told.abs().amax(1, keepdim=True)
    assert torch.equal(written(codec, told, seed=1)[above], told[above])


@pytest.mark.parametrize("codec", EXACT.values(), ids=EXACT)
@pytest.mark.parametrize("number", [1.0, 0.99, 0.061, 3.3e-4, 2.6e-5, 4e-6, 1e-14])
def test_the_mean_over_all_draws_is_the_number(codec: Floating | Distance, number: float) -> None:
    """2.6e-5 lies just below the least of 3 bits, and is rounded up to it once and not twice."""
    block = torch.tensor([[1.3, number]])
    told = codec(block.expand(1 << 16, -1), ALL_DRAWS.expand(-1, 2))[:, 1]
    mean = told.double().mean().item()
    if codec.signed or number > 1e-4:
        # Bits below the 16 that are drawn are cut off: of the least number as well as of others.
        assert mean == pytest.approx(number, rel=2**-16, abs=told.max().item() * 2**-16)
    elif number == 1e-14:
        assert told.unique().numel() == 1  # the least, and never 0
        assert mean > number
    assert told.unique().numel() <= 2


@pytest.mark.parametrize(
    ("codec", "half"),
    [
        (Floating(20, True), 2**-4),
        (Floating(21, True), 2**-3),
        (Floating(20, False), 2**-4),
        (Floating(19, False), 2**-5),
        (Distance(True), 2**-5),
        (Distance(False), 2**-6),
    ],
)
def test_near_the_largest_the_nearest_is_within_half_a_distance(codec: Floating | Distance, half: float) -> None:
    x = numbers(decades=0.55)
    x[:, 0] = 1
    x = x if codec.signed else x.abs()
    worst = ((written(nearest(codec), x) - x) / x).abs().max().item()
    assert half / 1.2 < worst <= half


def test_a_small_second_moment_does_not_become_0_and_0_stays() -> None:
    x = torch.tensor([[1.0, 1e-30, 0.0]])
    for codec in (EXACT["v 3 bits"], nearest(EXACT["v 3 bits"]), Table(logarithmic(False, 9), keeps=True)):
        told = written(codec, x)
        assert told[0, 1] > 0
        assert told[0, 2] == 0
    assert written(Table(linear(False)), x)[0, 1] == 0
    assert written(Table(dynamic(False)), x)[0, 1] == 0


@pytest.mark.parametrize("codec", EXACT.values(), ids=EXACT)
def test_numbers_that_are_not_finite_leave_their_block_alone(codec: Floating | Distance) -> None:
    x = numbers().abs()
    x[0, 0], x[1, 5] = math.inf, math.nan
    told = written(codec, x)
    assert told.isnan().sum() == 2
    assert ((told - x) / x)[told.isfinite()].abs().max() <= 0.25
    largest = torch.full((1, 2), torch.finfo(torch.float32).max)
    assert written(codec, largest).isfinite().all()


@pytest.mark.parametrize(("signed", "least"), [(True, 0.55e-6), (False, 0.325e-6)])
def test_the_dynamic_map_is_the_published_one(signed: bool, least: float) -> None:
    values = dynamic(signed)
    assert len(values) == 256
    assert list(values) == sorted(set(values))
    assert (values[-1], min(value for value in values if value > 0)) == (1, pytest.approx(least))
    assert min(values) == (pytest.approx(-1 + 0.9 / 128) if signed else 0)


@pytest.mark.parametrize(
    ("exponent", "mantissa", "special", "dtype"), [(4, 3, 1, torch.float8_e4m3fn), (5, 2, 4, torch.float8_e5m2)]
)
def test_formats_of_8_bits_are_torchs(exponent: int, mantissa: int, special: int, dtype: torch.dtype) -> None:
    theirs = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    theirs = theirs[theirs.isfinite()].unique() / torch.finfo(dtype).max
    assert eight_bit_float(exponent, mantissa, special, True) == pytest.approx(theirs.tolist(), rel=1e-6)


def test_bf16_is_torchs() -> None:
    x = numbers()
    assert torch.equal(written(Bf16(False), x), x.bfloat16().float())
    told = written(Bf16(), x)
    assert torch.equal(told, told.bfloat16().float())
    assert 2**-8 < ((told - x) / x).abs().max() <= 2**-7


def test_a_table_without_bias_has_the_numbers_mean() -> None:
    codec = Table(linear(True), unbiased=True)
    told = codec(torch.tensor([[1.0, -0.1234]]).expand(1 << 16, -1), ALL_DRAWS.expand(-1, 2))
    assert told[:, 1].double().mean().item() == pytest.approx(-0.1234, rel=1e-4)
    assert told[:, 1].unique().numel() == 2


def test_no_block_holds_two_tensors() -> None:
    blocks = in_blocks([torch.full((130,), 1.0), torch.full((3,), 2.0)], 128)
    assert [row.unique().tolist() for row in blocks] == [[1], [0, 1], [0, 2]]


def test_decades_are_counted_from_the_blocks_largest() -> None:
    found = errors.within([torch.tensor([1.0, 0.1, 0.0, -1e-3]), torch.tensor([1e-7])], 4)
    assert (found.worst, found.half) == (pytest.approx(3), pytest.approx(1))


@pytest.mark.parametrize("alone", [False, True])
def test_v_fades_on_average_as_it_would(alone: bool) -> None:
    """beta2 = 0.999 over 2000 steps without gradients, the mean within 2 %: of whole blocks, and beside what stays."""
    second = numbers(decades=3).abs()
    for name in ("m 3 bits, v 4", "distance"):
        assert errors.faded(PAIR[name], second, 2000, alone=alone) == pytest.approx(1, abs=0.02), name


def test_to_the_nearest_it_stalls() -> None:
    """Unless the block's scale fades with it, as that of a table does."""
    second = numbers(8, decades=3).abs()
    for name in ("distance, nearest", "E4M3", "dynamic, small blocks", "bf16, nearest"):
        assert errors.faded(PAIR[name], second, 500, alone=True) > 1.6, name
    assert errors.faded(PAIR["E4M3"], second, 500, alone=False) == pytest.approx(1, abs=0.01)


def test_a_small_gradient_beside_large_ones_trains_as_far_as_the_range_of_v_goes() -> None:
    """Half as many decades as v's; below that a step is a fraction of what it is in fp32, and never a huge one."""
    found = {
        name: errors.uneven(PAIR[name], steps=300, blocks=8) for name in ("m 3 bits, v 3", "m 3 bits, v 4", "bf16")
    }
    along = {name: [round(one.along, 1) for one in of_code] for name, of_code in found.items()}
    assert along["bf16"] == along["m 3 bits, v 3"] == [1, 1, 1, 1]
    assert along["m 3 bits, v 4"][:2] == [1, 1]
    assert along["m 3 bits, v 4"][2] < 0.5
    assert found["bf16"][0].error < 0.1 < found["m 3 bits, v 3"][0].error < 0.3


def test_exact_codes_cost_nothing() -> None:
    def exact(x: Tensor, draw: Tensor) -> Tensor:
        return x

    gradients = 1e-3 * torch.randn(12, 2, 256, generator=torch.Generator().manual_seed(0))
    found, second = errors.kept(Pair("exact", exact, exact, 128), gradients)
    assert (found.mean, found.root.worst, found.step_error.worst, found.share) == (1, 0, 0, 0)
    assert second.shape == (4, 128)
    expected = torch.zeros(2, 256, dtype=torch.float64)
    for gradient in gradients.double():
        expected = 0.999 * expected + 0.001 * gradient**2
    assert torch.allclose(second.view(2, 256).double(), expected, rtol=1e-5)


def test_a_run_gives_every_figure_and_its_tables() -> None:
    task = Task(
        key="gpt",
        title="Tiny GPT",
        model=partial(GPT, width=32, layers=1, heads=2, context=16),
        data=partial(data.stdlib_text, context=16, batch=4, seed=0, held_out_batches=2, max_bytes=1 << 18),
        steps=13,
        lr=1e-3,
        weight_decay=0.1,
        warmup=5,
    )
    trained = train(task, 13, (3, 13))
    assert [moments.step for moments in trained.moments] == [3, 13]
    assert trained.losses[-1] < trained.losses[0]
    assert trained.gradients.shape == (13, 9, SLICE)
    # The gradients that were kept make the moments that torch made.
    _, second = errors.kept(PAIR["bf16, nearest"], trained.gradients)
    assert torch.allclose(second.view(9, SLICE)[2, :32], trained.moments[-1].second[2], rtol=1e-4)
    found = measured(trained, fading=5)
    assert {row["code"] for row in found["kept"]} == set(PAIR)
    assert all(math.isfinite(row["step_error"]["worst"]) for row in (*found["once"], *found["kept"], *found["blocks"]))
    text = shown(task.title, found)
    assert all(f"| {pair.name} | {pair.block} |" in text for pair in PAIRS)


@pytest.mark.parametrize("kind", [package.SIGNED, package.SQUARES], ids=["signed", "squares"])
@pytest.mark.parametrize("unbiased", [True, False])
def test_the_packages_codes_are_those_that_are_measured(kind: package.Kind, unbiased: bool) -> None:
    codec = Floating(kind.shift, bool(kind.sign), unbiased)
    x = numbers(decades=9)
    x = x if kind.sign else x.abs()
    draw = torch.randint(1 << 16, x.shape, generator=torch.Generator().manual_seed(5), dtype=torch.int32)
    codes, scale = package.encoded(x, x, kind, draw.flatten() if unbiased else None)
    assert x.shape[1] == package.BLOCK
    assert torch.equal(package.decoded(codes, scale, kind).float(), codec(x, draw))
