"""Step times on a GPU: against torch's optimizers, and as a share of what a copy within the device reaches.

    python bench/gpu.py

Times are of the device, by events around whole windows of k steps; the sides take turns, and what is reported is the
median over rounds of ratios within a round.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Sequence

import cases
import opponents
import torch

import lookahead_fused

K = 5
ROUNDS = 15


def milliseconds(window: Callable[[], None]) -> float:
    """The device's time for one call."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    window()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


def compare(name: str, shapes: Sequence[cases.Shape], dtype: torch.dtype, bytes_per_parameter: float) -> None:
    """One line: our time, the share of a copy's bandwidth, and the ratio to torch's fused step with a foreach sync.

    Args:
        bytes_per_parameter: what a step moves on average over k steps.
    """
    params = [torch.nn.Parameter(torch.randn(shape, device="cuda", dtype=dtype) * 0.02) for shape in shapes]
    twins = [torch.nn.Parameter(p.detach().clone()) for p in params]
    for p in (*params, *twins):
        p.grad = torch.randn_like(p)
    ours = lookahead_fused.LookaheadAdamW(params, **opponents.ADAMW, k=K, alpha=opponents.ALPHA, backend="cuda")
    theirs = opponents.torch_adamw_sync(twins, K)
    count = sum(p.numel() for p in params)
    source = torch.empty(1 << 28, device="cuda")
    target = torch.empty_like(source)

    def window(step: Callable[[], object]) -> Callable[[], None]:
        def run() -> None:
            for _ in range(K):
                step()

        return run

    def copy() -> None:
        target.copy_(source)

    sides = (window(ours.step), window(theirs.step), copy)
    for side in sides:
        side()
    rounds = [[milliseconds(side) for side in sides] for _ in range(ROUNDS)]
    share = [(bytes_per_parameter * count * K / mine) / (2 * source.nbytes / copying) for mine, _, copying in rounds]
    faster = [other / mine for mine, other, _ in rounds]
    print(
        f"{name:34} {statistics.median(r[0] for r in rounds) / K:8.3f} ms a step, {statistics.median(share):5.1%} of a "
        f"copy's bandwidth, {statistics.median(faster):5.2f} x torch fused + foreach sync"
    )


def main() -> int:
    status = lookahead_fused.backends()["cuda"]
    if not status.available:
        print(f"no CUDA benchmark: {status.reason}")
        return 0
    print(torch.cuda.get_device_name(), torch.__version__, lookahead_fused.__version__)
    gpt2 = cases.gpt2(layers=12, width=768)
    compare("GPT-2, 148 tensors, fp32", gpt2, torch.float32, 28 + 8 / K)
    compare("GPT-2, 148 tensors, bf16", gpt2, torch.bfloat16, 22 + 8 / K)
    compare("one tensor of 64 Mi, fp32", ((1 << 26,),), torch.float32, 28 + 8 / K)
    compare("1000 tensors of 64, fp32", ((64,),) * 1000, torch.float32, 28 + 8 / K)
    return 0


if __name__ == "__main__":
    sys.exit(main())
