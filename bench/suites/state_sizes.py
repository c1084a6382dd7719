"""What optimizers keep beside the parameters, measured from their state, in GB for models of 1 B and 8 B parameters.

    python -m bench.suites.state_sizes

README has this table; tests/benchmarks/test_state_sizes.py compares the two.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lookahead_fused import LookaheadAdamW
from lookahead_fused.bench.memory import state_bytes
from lookahead_fused.bench.tables import table

ELEMENTS = 1 << 20
SIZES = {"1 B": 1, "8 B": 8}


@dataclass(frozen=True)
class Kept:
    """One row: an optimizer over parameters of a dtype."""

    title: str
    dtype: torch.dtype
    make: Callable[[list[Tensor]], torch.optim.Optimizer]


def ours(**options: object) -> Callable[[list[Tensor]], torch.optim.Optimizer]:
    """LookaheadAdamW with such options."""
    return lambda params: LookaheadAdamW(params, **options)  # type: ignore[arg-type]


ROWS = (
    Kept("`torch.optim.AdamW`, fp32", torch.float32, torch.optim.AdamW),
    Kept("LookaheadAdamW, fp32", torch.float32, ours()),
    Kept('with `state_dtype="bfloat16"`', torch.float32, ours(state_dtype="bfloat16")),
    Kept('with `state_dtype="int8"`', torch.float32, ours(state_dtype="int8")),
    Kept("LookaheadAdamW, bf16 with exact masters", torch.bfloat16, ours(master_weights=True)),
    Kept('with `state_dtype="bfloat16"`', torch.bfloat16, ours(master_weights=True, state_dtype="bfloat16")),
    Kept('with `state_dtype="int8"`', torch.bfloat16, ours(master_weights=True, state_dtype="int8")),
)


def bytes_per_parameter(kept: Kept) -> float:
    """Of the state after a step, over one parameter of `ELEMENTS`; a count of steps is less than a thousandth of it."""
    param = torch.nn.Parameter(torch.ones(ELEMENTS, dtype=kept.dtype))
    param.grad = torch.ones_like(param)
    optimizer = kept.make([param])
    optimizer.step()
    return state_bytes(optimizer, [param]) / ELEMENTS


def lines() -> list[str]:
    """The lines of README's table."""
    rows = []
    for kept in ROWS:
        each = bytes_per_parameter(kept)
        rows.append([kept.title, f"{each:.2f}", *(f"{each * size:.1f}" for size in SIZES.values())])
    return table(["state", "bytes a parameter", *(f"{size}, GB" for size in SIZES)], rows, markdown=True)


if __name__ == "__main__":
    print("\n".join(lines()))
