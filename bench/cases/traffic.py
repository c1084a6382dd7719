"""What a step must move and launch: the bytes and launches of each way to write it, by arithmetic.

Ours are counted too, in the stand-in for the CUDA runtime (see suites/counts.py); a test compares. Bytes are those of
arrays as long as the parameters; what a launch reads of its table is less than 1 % of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from lookahead_fused.bench.opponents import PLAIN, SYNC, Setting
from lookahead_fused.bench.parameters import Shape

# of one array: read or written once
FP32, HALF = 4, 2


def step_bytes(setting: Setting) -> int:
    """Bytes a parameter that our step moves when it does not sync."""
    moments = 1 if setting.rule == "sgd" else 2
    state = 2 * FP32 * moments  # read and written
    if setting.dtype == "bf16-master":
        return state + 5 * HALF  # gradient read; parameter and low half of its master, each read and written
    size = FP32 if setting.dtype == "fp32" else HALF
    return state + 3 * size  # gradient read, parameter read and written


def sync_bytes(setting: Setting) -> int:
    """Bytes a parameter that a sync adds to the step: the slow weight, read and written."""
    return 2 * FP32


def mean_bytes(setting: Setting) -> float:
    """Bytes a parameter and step, over a window of k steps."""
    return step_bytes(setting) + sync_bytes(setting) / setting.k


# ------------------------------------------------------------------------------------------------------------
# torch's fused optimizers on CUDA

# multi_tensor_apply's constants in torch 2.13 for CUDA 13, by the number of tensor lists (1 to 5), from
# torch/include/ATen/native/cuda/MultiTensorApply.cuh; a build for an older CUDA has the second line.
CHUNK = 65536
MAX_TENSORS = {"CUDA 13": (770, 448, 336, 252, 210), "CUDA 12": (110, 64, 48, 36, 30)}
MAX_BLOCKS = {"CUDA 13": 2240, "CUDA 12": 320}


def multi_tensor_launches(shapes: Sequence[Shape], lists: int, built_for: str = "CUDA 13") -> int:
    """Launches of one multi_tensor_apply over as many lists of tensors of these shapes."""
    most_tensors, most_blocks = MAX_TENSORS[built_for][lists - 1], MAX_BLOCKS[built_for]
    launches = tensors = blocks = 0
    for shape in shapes:
        chunks = -(-math.prod(shape) // CHUNK)
        if chunks:
            tensors += 1
        for chunk in range(chunks):
            blocks += 1
            last = chunk == chunks - 1
            if (tensors == most_tensors and last) or blocks == most_blocks:
                launches += 1
                blocks = 0
                tensors = 0 if last else 1
    return launches + (blocks > 0)


def torch_bytes(setting: Setting, name: str) -> float:
    """Bytes a parameter and step of torch's fused optimizer in fp32, alone or with a foreach sync."""
    if setting.dtype != "fp32":
        raise ValueError(f"torch's fused step is predicted for fp32 alone, got {setting.dtype}")
    # lerp reads two and writes one, copy reads one and writes one.
    return step_bytes(setting) + {PLAIN: 0, SYNC: 5 * FP32 / setting.k}[name]


def torch_launches(setting: Setting, shapes: Sequence[Shape], name: str) -> float:
    """Launches a step, on average over k: AdamW's fused kernel and the step counters; the sync's lerp and copy."""
    lists = 3 if setting.rule == "sgd" else 4
    launches: float = multi_tensor_launches(shapes, lists)
    if setting.rule != "sgd":
        launches += multi_tensor_launches([()] * len(shapes), 1)  # _foreach_add_ on the counters
    if name == SYNC:
        launches += 2 * multi_tensor_launches(shapes, 2) / setting.k
    return launches


# Of ours: one that advances counters and decides on syncs, one that walks all chunks; see tests/test_cuda_launches.py.
OUR_LAUNCHES = 2
