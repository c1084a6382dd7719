"""State dicts of other packages' optimizers, brought into the form that ours load."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from ._checkpoint import TORCH_SWITCHES
from ._ema import EMA
from ._tensors import compute_dtype

# What a converter returns: the state dict, and what its user must be told.
_Converted = tuple[dict[str, Any], list[str]]


def convert(
    state_dict: Mapping[str, Any], source: str, parameters: Iterable[tuple[str, Tensor] | str] | None = None
) -> dict[str, Any]:
    """A state dict of another package's optimizer as one that the matching class or wrapper here loads.

    The input stays as it is. What cannot be carried over comes as a warning. Tensors that need no change are not
    copied: loading copies them.

    Sources:

    - ``"torch"``: a torch.optim optimizer's. It loads without `convert` too; torch's switches (`foreach`, `fused`,
      `capturable`, `differentiable`) are taken out, so that every machine can load the result.

    - ``"schedulefree"``: that of `schedulefree.AdamWScheduleFree` or `SGDScheduleFree`, for
      ``ScheduleFree(torch.optim.AdamW(...))`` or ``ScheduleFree(torch.optim.SGD(...))``. Their `betas[0]` or `momentum`
      is `interp`, and the base has neither a first moment nor a momentum. Save after `optimizer.train()`: in its eval
      mode the package keeps x in the parameters, and not y. Two things are not the same here. Weight decay acts on z,
      and not on y: with `weight_decay` other than 0 the run takes a slightly different path. There is no `warmup_steps`
      here: the learning rate goes over as the group has it, and what is left of a warm-up is a scheduler's to do.

    - ``"AveragedModel"``: that of `torch.optim.swa_utils.AveragedModel`, merged with that of the optimizer which trains
      the model (see the example), for ``EMA(optimizer)``. `n_averaged` becomes `average_start`, so that
      `decay="uniform"` goes on with the right weight. It counts calls and knows nothing of steps. So convert right
      after an update of the average, and merge in the state dict of the wrapper: its groups tell `every`. A state dict
      of the base alone does not, and `every` is 1 then, also in the result. Averages of buffers do not go over.

    Args:
        state_dict: What the source's `state_dict()` returned; also after `torch.load(..., weights_only=True)`.
        source: One of the names above.
        parameters: For "AveragedModel" alone: `model.named_parameters()`, or names, in the order of the optimizer's
            parameters. It may be left out where the optimizer was given `named_parameters()` and its groups have
            `param_names`.

    Returns:
        A new state dict. Averages and z are in fp32, of fp64 parameters in fp64; counts and sums are 0-dim fp64 tensors
        on the CPU. Other state keeps its dtype.

    Raises:
        TypeError: `state_dict` is not a mapping, or `parameters` are neither pairs of a name and a parameter nor names.
        ValueError: `source` is unknown; the state dict is not that source's, or its optimizer was in eval mode; `r` or
            `weight_lr_power` is not a whole number; `parameters` is missing, or its names, their order or their shapes
            do not fit; an averaged model's comes without that of an optimizer that has stepped.

    Example:
        >>> optimizer = EMA(torch.optim.AdamW(model.parameters(), lr=3e-4), decay="uniform", every=10)
        >>> optimizer.load_state_dict(saved["optimizer"])
        >>> both = {**saved["averaged_model"], **optimizer.state_dict()}
        >>> optimizer.load_state_dict(convert(both, "AveragedModel", model.named_parameters()))
    """
    converter = _SOURCES.get(source) if isinstance(source, str) else None
    if converter is None:
        raise ValueError(f"source must be one of {', '.join(map(repr, _SOURCES))}, got {source!r}")
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"state_dict must be a mapping, got {type(state_dict).__name__}")
    if parameters is not None and converter is not _averaged_model:
        raise ValueError(f"parameters must be None for source={source!r}, whose state dict has an order of its own")
    with torch.no_grad():
        converted, told = converter(state_dict, parameters)
    for message in told:
        warnings.warn(f"convert from {source!r}: {message}", stacklevel=2)
    return converted


# ------------------------------------------------------------------------------------------------------------
# torch


def _torch(state_dict: Mapping[str, Any], _: object) -> _Converted:
    _check_optimizers(state_dict, "a torch.optim optimizer's")
    return {**state_dict, "state": _states(state_dict), "param_groups": _groups(state_dict)}, []


def _check_optimizers(state_dict: Mapping[str, Any], whose: str) -> None:
    for key in ("state", "param_groups"):
        if key not in state_dict:
            raise ValueError(f"state_dict must be {whose}, got one without {key!r}")


def _states(state_dict: Mapping[str, Any]) -> dict[Any, Any]:
    """The states by the parameters' numbers, and what else an optimizer keeps there, in new dicts."""
    return {key: dict(own) if isinstance(own, Mapping) else own for key, own in state_dict["state"].items()}


def _groups(state_dict: Mapping[str, Any], without: Sequence[str] = ()) -> list[dict[str, Any]]:
    """The groups in new dicts and lists, without torch's switches and some other entries."""
    left_out = {*TORCH_SWITCHES, *without}
    return [
        {key: list(value) if key == "params" else value for key, value in group.items() if key not in left_out}
        for group in state_dict["param_groups"]
    ]


# ------------------------------------------------------------------------------------------------------------
# schedulefree

# What its groups keep besides hyperparameters that torch's have too.
_OF_SCHEDULE_FREE = (
    "r", "k", "warmup_steps", "train_mode", "weight_sum", "lr_max", "scheduled_lr", "weight_lr_power"
)  # fmt: skip
_SCHEDULE_FREE = "schedule_free_"


def _schedulefree(state_dict: Mapping[str, Any], _: object) -> _Converted:
    whose = "that of schedulefree's AdamWScheduleFree or SGDScheduleFree"
    _check_optimizers(state_dict, whose)
    told: list[str] = []
    states: dict[Any, Any] = {}
    groups = _groups(state_dict, without=_OF_SCHEDULE_FREE)
    for index, (theirs, group) in enumerate(zip(state_dict["param_groups"], groups, strict=True)):
        where = f"group {index}"
        missing = [key for key in _OF_SCHEDULE_FREE if key not in theirs]
        if missing or not ("betas" in theirs or "momentum" in theirs):
            raise ValueError(f"state_dict must be {whose}, got {where} without {', '.join(missing) or 'betas'}")
        known = {key: own for key in theirs["params"] if (own := state_dict["state"].get(key))}
        if known and not theirs["train_mode"]:
            raise ValueError(
                f"state_dict must be saved in train mode, and {where} has train_mode=False: its parameters hold x; "
                "call optimizer.train() before saving the model and the optimizer"
            )
        _set_hyperparameters(theirs, group, where)
        scalars = {
            "step": _scalar(theirs["k"]),
            "weight_sum": _scalar(theirs["weight_sum"]),
            "lr_max": _scalar(theirs["lr_max"]),
            # Where y lies between z and x, by which x is recovered.
            "y_interp": _scalar(group[_SCHEDULE_FREE + "interp"]),
        }
        kept = ("z", "exp_avg_sq") if "betas" in theirs else ("z",)
        for key, own in known.items():
            lacking = [name for name in kept if not isinstance(own.get(name), Tensor)]
            if lacking:
                raise ValueError(f"state_dict must be {whose}, got a state of parameter {key} without {lacking[0]!r}")
            made = {name: scalar.clone() for name, scalar in scalars.items()}
            made.update((name, _in_compute_dtype(own[name])) for name in kept)
            if "exp_avg_sq" in kept:
                # At beta1 = 0 the first moment is the gradient, whatever it was before.
                made["exp_avg"] = torch.zeros_like(made["exp_avg_sq"])
            states[key] = made
        told += _told_of_schedule_free(theirs, where, [key for key in theirs["params"] if key not in known])
    return {"state": states, "param_groups": groups}, told


def _set_hyperparameters(theirs: Mapping[str, Any], group: dict[str, Any], where: str) -> None:
    if "betas" in theirs:
        interp, beta2 = theirs["betas"]
        group.update(betas=(0.0, beta2), amsgrad=False, decoupled_weight_decay=True)
    else:
        interp = theirs["momentum"]
        group.update(momentum=0.0, dampening=0.0, nesterov=False)
    group["maximize"] = False
    group[_SCHEDULE_FREE + "interp"] = interp
    for name in ("r", "weight_lr_power"):
        value = float(theirs[name])
        if value < 0 or not value.is_integer():
            raise ValueError(f"{name} of {where} must be a whole number >= 0, got {theirs[name]!r}")
        group[_SCHEDULE_FREE + name] = int(value)


def _told_of_schedule_free(theirs: Mapping[str, Any], where: str, without_state: list[Any]) -> list[str]:
    told, steps = [], int(theirs["k"])
    if steps < theirs["warmup_steps"]:
        told.append(
            f"{where} is at step {steps} of its warmup_steps={theirs['warmup_steps']}, and there is no warm-up here: "
            "its learning rate is the full one from now on; let a torch.optim.lr_scheduler finish the warm-up"
        )
    if theirs["weight_decay"] != 0:
        told.append(
            f"{where} has weight_decay={theirs['weight_decay']}, which acts on y there and on z here: "
            "the run goes on along a slightly different path"
        )
    if steps > 0 and without_state:
        told.append(
            f"parameters {_listed(without_state)} of {where} had no gradient yet: should they get one, their steps and "
            f"weights count from there, and not from the group's {steps} steps"
        )
    return told


# ------------------------------------------------------------------------------------------------------------
# AveragedModel

_MODULE = "module."


def _averaged_model(state_dict: Mapping[str, Any], parameters: Iterable[tuple[str, Tensor] | str] | None) -> _Converted:
    if "n_averaged" not in state_dict:
        raise ValueError("state_dict must be an AveragedModel's, got one without 'n_averaged'")
    if not state_dict.keys() >= {"state", "param_groups"}:
        raise ValueError(
            "state_dict must have the optimizer's entries beside the averaged model's: "
            "{**averaged_model.state_dict(), **optimizer.state_dict()}"
        )
    named = _named(parameters, state_dict["param_groups"])
    averages = _averages(state_dict, named)
    groups, states = _groups(state_dict), _states(state_dict)
    members = [(group, key) for group in groups for key in group["params"]]
    if len(members) != len(named):
        raise ValueError(f"parameters must be the optimizer's {len(members)} parameters, got {len(named)}")
    converted = {"state": states, "param_groups": groups}
    told = _told_of_buffers(state_dict, averages)
    samples = int(state_dict["n_averaged"])
    if samples == 0:
        return converted, [*told, "n_averaged is 0: there is no average to go on from"]
    if not any(states.get(key) or _keeps_nothing(group) for group, key in members):
        # A first step would begin the average anew.
        raise ValueError("state_dict must hold the state of an optimizer that has stepped, got one without any")

    new, shortened, late = [], [], []
    for (group, key), (name, param) in zip(members, named, strict=True):
        if not (averages[name].is_floating_point() or averages[name].is_complex()):
            continue
        own = states.get(key) or {}
        # The first sample was the weights after the update with which the average began.
        since = (samples - 1) * int(group.setdefault(EMA.policy.every, 1))
        if not own and not _keeps_nothing(group):
            # It was never updated, and is its own average.
            if param is None or param.requires_grad:
                new.append(name)
            continue
        steps, counts = _count(own, group, since)
        began = max(0.0, steps - since)
        if steps < since:
            shortened.append(name)
        if group.get(EMA.policy.start, 0) > began:
            late.append(name)
        average = _in_compute_dtype(averages[name])
        states[key] = {**own, **counts, "slow_param": average, "average_start": _scalar(began)}
    if new:
        told.append(f"{_listed(new)} had no gradient yet: their averages begin with their first step")
    if shortened:
        told.append(
            f"{_listed(shortened)} had fewer updates than n_averaged={samples} needs: a uniform mean and a warm-up go "
            "on as if the average had begun with the first of them"
        )
    if late:
        told.append(
            f"the average of {_listed(late)} began before {EMA.policy.start} says: with start=0 the samples from "
            "before would count too"
        )
    return converted, told


def _keeps_nothing(group: Mapping[str, Any]) -> bool:
    """Whether the group is of torch's SGD without momentum."""
    return "dampening" in group and group.get("momentum") == 0


def _count(own: Mapping[str, Any], group: Mapping[str, Any], since: int) -> tuple[float, dict[str, Tensor]]:
    """How many updates a parameter had, with the state entries that say so and that it lacks."""
    steps = float(own["step"]) if "step" in own else since + 1.0
    # Around a base whose step is its own the wrapper counts by itself, and which base it will be cannot be seen here.
    counts = {EMA.policy.prefix + "step": _scalar(steps)}
    if "step" not in own and "dampening" in group:
        # torch's SGD counts nothing. At a step of 0 its momentum would be one that has not begun.
        counts["step"] = _scalar(steps)
    return steps, counts


def _named(
    parameters: Iterable[tuple[str, Tensor] | str] | None, groups: Sequence[Mapping[str, Any]]
) -> list[tuple[str, Tensor | None]]:
    """The names in the optimizer's order, each with its parameter where that was given."""
    known = list(chain.from_iterable(group.get("param_names") or [None] * len(group["params"]) for group in groups))
    if parameters is None:
        if not known or None in known:
            raise ValueError("parameters must be model.named_parameters() for source='AveragedModel', got None")
        return [(name, None) for name in known]
    named: list[tuple[str, Tensor | None]] = []
    for given in parameters:
        if isinstance(given, str):
            named.append((given, None))
        elif isinstance(given, tuple) and len(given) == 2 and isinstance(given[1], Tensor):
            named.append(given)
        else:
            kind = type(given).__name__
            raise TypeError(f"parameters must be pairs of a name and a parameter, or names, got a {kind}")
    for position, (own, (name, _)) in enumerate(zip(known, named, strict=False)):
        if own not in (None, name):
            raise ValueError(
                f"parameters must be in the optimizer's order, got {name!r} at position {position}, where it has "
                f"{own!r}"
            )
    return named


def _averages(state_dict: Mapping[str, Any], named: list[tuple[str, Tensor | None]]) -> dict[str, Tensor]:
    missing = [name for name, _ in named if not isinstance(state_dict.get(_MODULE + name), Tensor)]
    if missing:
        raise ValueError(f"parameters must be the averaged model's, which has no {_listed(missing)}")
    made = {}
    for name, param in named:
        average = state_dict[_MODULE + name]
        if param is not None and param.shape != average.shape:
            raise ValueError(
                f"parameters must have the averages' shapes: {name} is {tuple(param.shape)}, and its average "
                f"{tuple(average.shape)}"
            )
        made[name] = average
    return made


def _told_of_buffers(state_dict: Mapping[str, Any], averages: Mapping[str, Tensor]) -> list[str]:
    taken = {_MODULE + name for name in averages}
    # A parameter that two modules share is there under both names.
    held = {_memory(state_dict[name]) for name in taken}
    others = [
        key.removeprefix(_MODULE)
        for key, value in state_dict.items()
        if key.startswith(_MODULE) and key not in taken and not (isinstance(value, Tensor) and _memory(value) in held)
    ]
    if not others:
        return []
    return [f"{_listed(others)} of the averaged model are not among the parameters, and stay behind"]


def _memory(tensor: Tensor) -> tuple[object, ...]:
    # An empty tensor shares no memory, and is none but itself.
    return (tensor.data_ptr(), tensor.shape) if tensor.numel() else (id(tensor),)


# ------------------------------------------------------------------------------------------------------------


def _scalar(value: Any) -> Tensor:
    return torch.tensor(float(value), dtype=torch.float64, device="cpu")


def _in_compute_dtype(tensor: Tensor) -> Tensor:
    """A copy in the dtype that slow weights have."""
    dtype = tensor.dtype if tensor.is_complex() else compute_dtype(tensor.dtype)
    return tensor.detach().to(dtype, copy=True)


def _listed(names: Sequence[Any], most: int = 5) -> str:
    shown = ", ".join(map(str, names[:most]))
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


_SOURCES: dict[str, Callable[[Mapping[str, Any], Any], _Converted]] = {
    "torch": _torch,
    "schedulefree": _schedulefree,
    "AveragedModel": _averaged_model,
}
