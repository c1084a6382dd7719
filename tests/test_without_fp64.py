"""Devices without fp64 (Apple's, Intel's Arc): the count of updates lies on the CPU, and the reference backend serves.

One is made here in Python over CPU memory, by torch's own means for such, and refuses fp64 as those do. In a process of
its own: a process has room for one such device.
"""

from __future__ import annotations

import pytest
import torch
from releases import needs_torch
from test_processes import python

from lookahead_fused import _tensors as tensors
from lookahead_fused.backends import choose, triton

DEVICE = """
import copy, io, json
import torch
import torch.utils._pytree as pytree
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from lookahead_fused import GPA, Lookahead, LookaheadAdamW, LookaheadSGD

_setup_privateuseone_for_python_backend("small")
RAW = {}

class Small(torch.Tensor):
    @staticmethod
    def __new__(cls, raw):
        made = torch._C._acc.create_empty_tensor(raw.shape, raw.dtype)
        made.__class__ = cls
        return made

    def __init__(self, raw):
        RAW[self.untyped_storage()._cdata] = raw  # detach() makes another object, of the same storage

    @property
    def raw(self):
        found = RAW[self.untyped_storage()._cdata]
        # view() as another type of the same size is not told to the device.
        return found if found.dtype == self.dtype else found.view(self.dtype)

def refuse(dtype):
    if dtype in (torch.float64, torch.complex128):
        raise TypeError("the small device doesn't support float64")

def to_raw(x):
    if isinstance(x, Small):
        return x.raw
    return torch.device("cpu") if isinstance(x, torch.device) and x.type == "small" else x

def to_small(x):
    if not isinstance(x, torch.Tensor):
        return x
    refuse(x.dtype)
    return Small(x)

def fallback(op, *args, **kwargs):
    target = kwargs.get("device")
    goes_to_cpu = isinstance(target, torch.device) and target.type == "cpu"
    if isinstance(target, torch.device) and target.type == "small":
        refuse(kwargs.get("dtype") or torch.get_default_dtype())
    raw_args, raw_kwargs = pytree.tree_map(to_raw, args), pytree.tree_map(to_raw, kwargs)
    raw_kwargs.pop("pin_memory", None)
    if op.name() == "aten::_copy_from":
        to_raw(args[1]).copy_(to_raw(args[0]))
        return args[1]
    out = op(*raw_args, **raw_kwargs)
    if op._schema.is_mutable:
        # torch's in-place operators return what they wrote.
        given = dict(zip((a.name for a in op._schema.arguments), args)) | kwargs
        writes = [a.name for a in op._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
        return given[writes[0]] if len(op._schema.returns) == 1 else None
    return out if goes_to_cpu else pytree.tree_map(to_small, out)

library = torch.library.Library("_", "IMPL")
library.fallback(fallback, "PrivateUse1")

def on_small(tensor):
    return Small(tensor.detach().clone()).requires_grad_(True)

def on_cpu(tensor):
    return torch.nn.Parameter(tensor.detach().clone())
"""

RUNS = """
FORMS = {
    "adamw": lambda p, backend: LookaheadAdamW([p], lr=0.1, amsgrad=True, k=2, backend=backend),
    "pullback": lambda p, backend: LookaheadAdamW([p], lr=0.1, k=2, pullback_momentum="pullback", backend=backend),
    "master": lambda p, backend: LookaheadAdamW([p], lr=0.1, k=2, master_weights=True, backend=backend),
    "sgd": lambda p, backend: LookaheadSGD([p], lr=0.1, momentum=0.9, k=2, backend=backend),
    "wrapper": lambda p, backend: Lookahead(torch.optim.AdamW([p], lr=0.1), k=2, backend=backend),
    "gpa": lambda p, backend: GPA(torch.optim.AdamW([p], lr=0.1), 0.6, 0.8, backend=backend),
    "external": lambda p, backend: Lookahead(torch.optim.Adamax([p], lr=0.1, foreach=False), k=2, backend=backend),
}

def run(form, backend, place):
    torch.manual_seed(0)
    dtype = torch.bfloat16 if form == "master" else torch.float32
    p = place(torch.randn(7).to(dtype))
    optimizer, ends, counts = FORMS[form](p, backend), [], set()

    def train(p, optimizer, steps):
        for step in steps:
            gradient = torch.randn(7, generator=torch.Generator().manual_seed(step)).to(dtype)
            p.grad = place(gradient).detach()
            optimizer.step()

    def keep(p):
        ends.append((p.raw if isinstance(p, Small) else p.detach()).float().tolist())

    train(p, optimizer, range(5))
    with optimizer.slow_weights():
        keep(p)
    keep(p)
    if form != "gpa":
        optimizer.sync()
    keep(p)
    for saved in (copy.deepcopy(optimizer.state_dict()), optimizer.state_dict()):
        q = place(p.raw if isinstance(p, Small) else p)
        resumed = FORMS[form](q, backend)
        resumed.load_state_dict(saved)
        if form != "gpa":
            resumed.sync()
        train(q, resumed, range(5, 8))
        keep(q)
        name = "lookahead_step" if form == "external" else "step"
        count = resumed.state[q][name]
        counts.add((str(count.device), str(count.dtype), count.item()))
    return {"ends": ends, "counts": sorted(counts)}

try:
    torch.zeros((), dtype=torch.float64, device="small")
except TypeError:
    refused = True
else:
    refused = False
print(json.dumps({
    "refused": refused,
    "runs": {
        f"{form} {backend}": [run(form, backend, place) for place in (on_cpu, on_small)]
        for form, backend in [*((form, "auto") for form in FORMS), ("adamw", "reference")]
    },
}))
"""


@needs_torch("2.13", "devices made in Python")
def test_a_run() -> None:
    """Steps, slow_weights(), a sync and two loads: what the reference backend computes on the CPU, with the count on
    the CPU. By more than its last bits only where the device's root is not rounded correctly, as the CPU's is."""
    found = python(RUNS, DEVICE, OMP_NUM_THREADS="1")
    assert found["refused"], "the device was to refuse fp64"
    for name, (on_cpu, on_small) in found["runs"].items():
        for ours, theirs in zip(on_small["ends"], on_cpu["ends"], strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-6), name
        assert on_small["counts"] == [["cpu", "torch.float64", 8.0]], name
        assert on_cpu["counts"] == on_small["counts"], name


@pytest.mark.parametrize("device", ["xpu", "mtia"])
def test_triton_says_that_it_cannot(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    """Its kernels count in fp64. Named it raises, and is not taken for granted where it is only asked for."""
    monkeypatch.setattr(getattr(torch, device), "device_count", lambda: 1)
    monkeypatch.setattr(getattr(torch, device), "is_initialized", lambda: True)
    monkeypatch.setattr(triton, "native", lambda: object())
    monkeypatch.setattr(triton, "_broken", lambda: "")
    monkeypatch.setattr(triton, "_not_driven", lambda device_type: "")
    monkeypatch.setattr(tensors, "_has_fp64", lambda device_type: True)
    assert choose("auto", torch.device(device)) is triton
    monkeypatch.setattr(tensors, "_has_fp64", lambda device_type: device_type == "cpu")
    assert f"devices of type {device} have no fp64" in triton.unavailable()
    with pytest.raises(RuntimeError, match=f"'triton' cannot serve a parameter on {device}.*have no fp64"):
        choose("triton", torch.device(device))
    with pytest.warns(RuntimeWarning, match="have no fp64"):
        assert choose("auto", torch.device(device)).NAME == "reference"
