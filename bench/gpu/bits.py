"""Whether a backend gives the bits of the CPU's: rules x dtypes x policies, on shapes that kernels get wrong.

The suite asks far more. This is what is worth knowing in a machine's first minute.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bench.gpu.results import Results
from lookahead_fused import EMA, GPA, Lion, Lookahead, ScheduleFree

# Every hyperparameter that adds a branch or a column, and no default.
RULES: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "adamw": (torch.optim.AdamW, {"lr": 0.1, "betas": (0.8, 0.9), "weight_decay": 0.1}),
    "sgd": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    "adam": (torch.optim.Adam, {"lr": 0.1, "amsgrad": True, "maximize": True, "weight_decay": 0.1}),
    "rmsprop": (torch.optim.RMSprop, {"lr": 0.1, "momentum": 0.9, "centered": True, "weight_decay": 0.1}),
    "radam": (torch.optim.RAdam, {"lr": 0.1, "betas": (0.9, 0.8), "weight_decay": 0.1}),
    "lion": (Lion, {"lr": 0.1, "weight_decay": 0.1}),
}
# With an event in every second or third step.
POLICIES: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "lookahead": functools.partial(Lookahead, k=2, alpha=0.3),
    "ema": functools.partial(EMA, decay=0.9, every=2, start=1, warmup=True),
    "outer": functools.partial(Lookahead, k=2, alpha=0.7, outer_momentum=0.5),
    "gpa": functools.partial(GPA, train_interp=0.6, eval_interp=0.8),
    "pullback": functools.partial(Lookahead, k=3, pullback_momentum="pullback"),
    "schedule-free": functools.partial(ScheduleFree, interp=0.8, r=1),
    "reset": functools.partial(Lookahead, k=2, pullback_momentum="reset", outer_momentum=0.5, outer_nesterov=False),
    "mean": functools.partial(EMA, decay="uniform", every=2),
}
# The parameters' dtype, whether they have masters, and the moments' dtype where that is another than computed in.
DTYPES: dict[str, tuple[torch.dtype, bool, str]] = {
    "fp32": (torch.float32, False, "float32"),
    "bf16": (torch.bfloat16, False, "float32"),
    "bf16-master": (torch.bfloat16, True, "float32"),
    "fp64": (torch.float64, False, "float32"),
    "fp16": (torch.float16, False, "float32"),
    "fp16-master": (torch.float16, True, "float32"),
    "fp32, int8 moments": (torch.float32, False, "int8"),
    "bf16-master, int8 moments": (torch.bfloat16, True, "int8"),
}
AVERAGED = ("gpa", "schedule-free")
STEPS = 6
# Of a vector and its tail, of some chunks and a tail, of none, and many of less than a vector.
SHAPES: tuple[tuple[int, ...], ...] = ((5,), (300, 7), (), (1025,), (0,), (70_001,), *(((3,),) * 60))
# The shapes by their places whose tensors begin one element after an aligned address.
MISALIGNED = (1, 3)


@dataclass(frozen=True)
class Case:
    rule: str
    dtype: str
    policy: str

    def __str__(self) -> str:
        return f"{self.rule} {self.dtype} {self.policy}"


def cases() -> list[Case]:
    """Every pair of a rule and a policy in every dtype that it takes. The first few have each of them."""
    made = []
    for (r, rule), (d, dtype), (p, policy) in itertools.product(*map(enumerate, (RULES, DTYPES, POLICIES))):
        of_params, master, _ = DTYPES[dtype]
        narrow = of_params.itemsize == 2 and not master
        if not (policy in AVERAGED and narrow):  # refused: x cannot be recovered from 16 bits
            made.append(((p - d) % len(POLICIES) + (d - r) % len(RULES), Case(rule, dtype, policy)))
    return [case for _, case in sorted(made, key=lambda pair: pair[0])]


def parameters(dtype: torch.dtype, device: str) -> list[nn.Parameter]:
    return [nn.Parameter(_placed(value, device, shift=i in MISALIGNED)) for i, value in enumerate(drawn(-1, dtype))]


def set_gradients(params: Iterable[nn.Parameter], step: int) -> None:
    for i, (p, value) in enumerate(zip(params, drawn(step, p0(params)), strict=True)):
        p.grad = _placed(value, p.device.type, shift=i in MISALIGNED)


def p0(params: Iterable[nn.Parameter]) -> torch.dtype:
    return next(iter(params)).dtype


@functools.cache
def drawn(step: int, dtype: torch.dtype) -> list[Tensor]:
    """The gradients of a step, and of step -1 the parameters: the same on every device."""
    generator = torch.Generator().manual_seed(step + 1)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]


def _placed(value: Tensor, device: str, shift: bool) -> Tensor:
    memory = torch.empty(value.numel() + shift, dtype=value.dtype, device=device)
    return memory[int(shift) :].view(value.shape).copy_(value)


def optimizer(case: Case, params: list[nn.Parameter], backend: str) -> torch.optim.Optimizer:
    rule, hyper = RULES[case.rule]
    _, master, state_dtype = DTYPES[case.dtype]
    if state_dtype != "float32":
        hyper = {name: value for name, value in hyper.items() if name != "centered"}  # refused: a variance of 8 bits
    return POLICIES[case.policy](rule(params, **hyper), master_weights=master, state_dtype=state_dtype, backend=backend)


def contents(params: list[nn.Parameter], made: torch.optim.Optimizer) -> dict[str, Tensor]:
    """All tensors that steps have written, by their names, on the CPU."""
    found = {}
    for i, p in enumerate(params):
        own = {name: value for name, value in made.state[p].items() if isinstance(value, Tensor)}
        for name, value in {"parameter": p.detach(), **own}.items():
            found[f"{name} of parameter {i} of shape {tuple(p.shape)}"] = value.cpu()
    return found


def run(case: Case, backend: str, device: str, steps: int = STEPS) -> dict[str, Tensor]:
    """What a parameter list is after some steps."""
    params = parameters(DTYPES[case.dtype][0], device)
    made = optimizer(case, params, backend)
    for step in range(steps):
        set_gradients(params, step)
        made.step()
    return contents(params, made)


def difference(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> str:
    """The first tensor whose bits differ, with how many; "" where all are the same."""
    if ours.keys() != theirs.keys():
        return f"there are {sorted(ours.keys() ^ theirs.keys())} in one of them alone"
    for name, a in ours.items():
        b = theirs[name]
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            return f"{name}: {a.dtype} of shape {tuple(a.shape)}, and {b.dtype} of shape {tuple(b.shape)}"
        bytes_of = [t.contiguous().reshape(-1).view(torch.uint8).view(-1, t.element_size()) for t in (a, b)]
        wrong = (bytes_of[0] != bytes_of[1]).any(1)
        if wrong.any():
            at = int(wrong.nonzero()[0])
            values = a.reshape(-1)[at].item(), b.reshape(-1)[at].item()
            return f"{name}: {int(wrong.sum())} of {a.numel()}, the first at {at}: {values[0]!r}, not {values[1]!r}"
    return ""


def compare(chosen: Iterable[Case], backend: str, device: str, against: str, results: Results) -> bool:
    """Whether all cases have the bits of the backend `against` on the CPU."""
    equal = tried = 0
    for case in chosen:
        if not results.has_time_for(str(case)):
            continue
        tried += 1
        try:
            found = difference(run(case, backend, device), run(case, against, "cpu"))
        except Exception as error:
            found = f"{type(error).__name__}: {error}"
        equal += not found
        results.add(f"{case}: {found or 'equal'}", case=str(case), difference=found)
        if "CUDA error" in found:
            results.close("stopped: after an error of the device nothing that follows in this process can be believed")
            return False
    results.close(f"{equal} of {tried} cases have the bits of {against}, on {device} by {backend}")
    return 0 < tried == equal
