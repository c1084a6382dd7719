"""What a code costs: of moments that were written once, and of moments that lay in it for a whole run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from bench.codes.codecs import Codec
from bench.codes.moments import BETAS, EPS, Moments, in_blocks

RANDOM = 1 << 16
# The golden ratio of 16 bits: of its multiples any number of successive ones lie evenly.
GOLDEN = 40503
# Of gradients in one block, beside its largest, and over how many steps they are looked at.
SIZES, LAST = (1.0, 1e-2, 1e-3, 1e-4), 100
# Elements that are looked at while they fade; blocks between are left out. So many have a mean within 0.3 %.
FADING = 1 << 14


@dataclass(frozen=True)
class Pair:
    """A code for each of AdamW's two moments.

    Attributes:
        name: in tables.
        first, second: for m and for v.
        block: elements that have a scale together, where it is not being varied.
        even: draws of one element lie evenly over the steps (a random start, and multiples of the golden ratio);
            else each is a draw of its own.
    """

    name: str
    first: Codec
    second: Codec
    block: int
    even: bool = False


@dataclass(frozen=True)
class Spread:
    """Errors of many numbers: root of the mean square, what one in a thousand exceeds, and the largest."""

    rms: float
    often: float
    worst: float


@dataclass(frozen=True)
class OneShot:
    """Of moments that are written and read once. What is 0 in fp32 is left out.

    Attributes:
        root: of sqrt(v), relative.
        first: of m, relative.
        step_error: of m / (sqrt(v) + eps) with the corrections of Adam, in learning rates.
        share: length of the step's error over the step's.
        relative: of the step's elements, relative.
        second_lost, first_lost: share of v, and of m, that became 0.
    """

    root: Spread
    first: Spread
    step_error: Spread
    share: float
    relative: Spread
    second_lost: float
    first_lost: float


@dataclass(frozen=True)
class Kept:
    """Of moments that lay in the code from the first step on, beside fp32's from the same gradients.

    Attributes:
        mean: of v over fp32's, on average over the elements.
        root: of sqrt(v), relative.
        step_error: of the last step, in learning rates.
        share: length of the last step's error over the step's.
    """

    mean: float
    root: Spread
    step_error: Spread
    share: float


def one_shot(pair: Pair, moments: Moments, block: int, seed: int = 0) -> OneShot:
    """Errors of all moments of a network."""
    generator = torch.Generator().manual_seed(seed)
    first, second = in_blocks(moments.first, block), in_blocks(moments.second, block)
    new_first = pair.first(first, _draw(generator, first))
    new_second = pair.second(second, _draw(generator, second))
    exact, new = step_of(first, second, moments.step), step_of(new_first, new_second, moments.step)
    return OneShot(
        root=spread(_relative(new_second.sqrt(), second.sqrt())),
        first=spread(_relative(new_first, first)),
        step_error=spread((new - exact)[second > 0]),
        share=_share(new, exact),
        relative=spread(_relative(new, exact)),
        second_lost=_lost(new_second, second),
        first_lost=_lost(new_first, first),
    )


def kept(pair: Pair, gradients: Tensor, seed: int = 0) -> tuple[Kept, Tensor]:
    """Errors after a run over gradients [step, slice, elements], and the v of fp32, in blocks."""
    draws = _draws(pair, seed)
    shape = (-1, pair.block)
    exact = [torch.zeros_like(gradients[0]).view(shape) for _ in BETAS]
    stored = [moment.clone() for moment in exact]
    for gradient in gradients:
        for moments in (exact, stored):
            advance(moments, gradient.view(shape))
        m, v = stored
        stored = [pair.first(m, draws(m, 0)), pair.second(v, draws(v, 1))]
    second = exact[1]
    new, old = (step_of(first, second, len(gradients)) for first, second in (stored, exact))
    found = Kept(
        mean=_mean_ratio(stored[1], second),
        root=spread(_relative(stored[1].sqrt(), second.sqrt())),
        step_error=spread((new - old)[second > 0]),
        share=_share(new, old),
    )
    return found, second


def faded(pair: Pair, second: Tensor, steps: int, *, alone: bool, seed: int = 0) -> float:
    """Mean of v over exact decay after steps without gradients, from v in blocks.

    Args:
        alone: each block's largest stays as it is, so that the block's scale does too, and is left out of the mean;
            else all fade together.
    """
    draws = _draws(pair, seed)
    start = second.view(-1, pair.block)
    start = start[:: max(1, start.numel() // FADING)]
    fading = torch.full_like(start, BETAS[1])
    if alone:
        fading.scatter_(1, start.argmax(1, keepdim=True), 1.0)
    stored = exact = start
    for _ in range(steps):
        exact = exact * fading
        stored = torch.where(fading < 1, pair.second(stored * fading, draws(stored, 1)), start)
    return _mean_ratio(stored[fading < 1], exact[fading < 1])


@dataclass(frozen=True)
class Uneven:
    """Of elements of one size of gradients, in blocks with others.

    Attributes:
        size: over the largest in the block.
        along: what their steps have of fp32's, 1 where they are the same on average.
        error: length of the error over the length of fp32's steps.
    """

    size: float
    along: float
    error: float


def uneven(pair: Pair, steps: int = 600, blocks: int = 16, seed: int = 0) -> list[Uneven]:
    """The steps of elements whose gradients differ in size by `SIZES`, alternating in each block, over the last 100.

    Gradients are normal, and independent.
    """
    generator = torch.Generator().manual_seed(seed + 1)
    draws = _draws(pair, seed)
    sizes = torch.tensor(SIZES).repeat(blocks, pair.block // len(SIZES))
    exact, stored = ([torch.zeros_like(sizes) for _ in BETAS] for _ in range(2))
    both, length, error = (torch.zeros_like(sizes, dtype=torch.float64) for _ in range(3))
    for step in range(1, steps + 1):
        gradient = sizes * torch.randn(sizes.shape, generator=generator)
        for moments in (exact, stored):
            advance(moments, gradient)
        first, second = stored
        stored = [pair.first(first, draws(first, 0)), pair.second(second, draws(second, 1))]
        if step > steps - LAST:
            new, old = (step_of(m, v, step).double() for m, v in (stored, exact))
            both, length, error = both + new * old, length + old * old, error + (new - old) ** 2
    found = []
    for size in SIZES:
        there = sizes == torch.tensor(size)
        of_size = length[there].sum()
        found.append(Uneven(size, float(both[there].sum() / of_size), float((error[there].sum() / of_size).sqrt())))
    return found


@dataclass(frozen=True)
class Within:
    """How many decades elements lie below their block's largest; what is 0 is left out.

    Attributes:
        half, often, rarely: what half, one in a thousand and one in 100,000 exceed.
        worst: the farthest.
    """

    half: float
    often: float
    rarely: float
    worst: float


def within(tensors: Sequence[Tensor], block: int) -> Within:
    x = in_blocks(tensors, block).abs()
    below = (x.amax(1, keepdim=True).double() / x.double()).log10()[x > 0]
    half, often, rarely = (_exceeded(below, share) for share in (0.5, 1e-3, 1e-5))
    return Within(half, often, rarely, below.max().item())


def step_of(first: Tensor, second: Tensor, step: int) -> Tensor:
    """AdamW's, in learning rates, with the decay left out."""
    m, v = first / (1 - BETAS[0] ** step), second / (1 - BETAS[1] ** step)
    return m / (v.sqrt() + EPS)


def advance(moments: list[Tensor], gradient: Tensor) -> None:
    """AdamW's moments after a further gradient."""
    moments[0] = moments[0] + (1 - BETAS[0]) * (gradient - moments[0])
    moments[1] = BETAS[1] * moments[1] + (1 - BETAS[1]) * gradient * gradient


def spread(errors: Tensor) -> Spread:
    if not len(errors):
        return Spread(0.0, 0.0, 0.0)
    size = errors.abs()
    return Spread(errors.double().square().mean().sqrt().item(), _exceeded(size, 1e-3), size.max().item())


def _exceeded(values: Tensor, share: float) -> float:
    place = min(len(values) - 1, int(len(values) * (1 - share)))
    return float(values.kthvalue(place + 1).values)


def _draw(generator: Generator, like: Tensor) -> Tensor:
    return torch.randint(RANDOM, like.shape, generator=generator, dtype=torch.int32)


def _draws(pair: Pair, seed: int) -> Callable[[Tensor, int], Tensor]:
    """What is drawn for the numbers of a moment in each step: called once a step and moment."""
    generator = torch.Generator().manual_seed(seed)
    if not pair.even:
        return lambda like, moment: _draw(generator, like)
    rows: dict[int, Iterator[Tensor]] = {}

    def even(start: Tensor) -> Iterator[Tensor]:
        while True:
            yield start
            start = (start + GOLDEN) & (RANDOM - 1)

    return lambda like, moment: next(rows.setdefault(moment, even(_draw(generator, like))))


def _relative(new: Tensor, old: Tensor) -> Tensor:
    there = old != 0
    return (new[there] - old[there]) / old[there]


def _share(new: Tensor, old: Tensor) -> float:
    error, length = (x.double().square().sum().sqrt().item() for x in (new - old, old))
    return error / length


def _mean_ratio(new: Tensor, old: Tensor) -> float:
    there = old > 0
    return (new[there].double() / old[there].double()).mean().item()


def _lost(new: Tensor, old: Tensor) -> float:
    there = old != 0
    return (new[there] == 0).double().mean().item()
