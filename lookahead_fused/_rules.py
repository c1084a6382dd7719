"""What the optimizers know of each rule: its arguments and its state.

The mathematics stands in `csrc/rules`, in `backends/triton_rules.py` and, in its plainest form, in
`backends/reference.py`. Here is what all of them are told.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ._hyperparameters import BELOW_ONE, Argument, Number, NumberOrTensor, Pair, Switch

Group = Mapping[str, Any]


@dataclass(frozen=True)
class Rule:
    """One inner optimizer: the name under which every backend has its rule, its arguments and its state's names.

    The first of `moments` is the one that a policy acts on; `moments_in_use` tells which of them a group has, `always`
    are those that every group has, and `squares` the means of squares among them, which are never negative. Where
    `corrects_bias`, they mean nothing without the count of updates. `check` raises for arguments that do not go
    together. Without `first_moment_needs`, an argument, there is no first moment, and an optimizer whose policy is to
    act on it is refused. With `subtracts_moments_with`, another one, a difference of moments is what it works with.
    """

    name: str
    arguments: tuple[Argument, ...]
    moments: tuple[str, ...]
    moments_in_use: Callable[[Group], tuple[bool, ...]]
    always: tuple[str, ...] = ()
    squares: tuple[str, ...] = ()
    corrects_bias: bool = False
    check: Callable[[Group], None] = lambda group: None
    first_moment_needs: str = ""
    subtracts_moments_with: str = ""
    step_name: str = "step"
    reads_gradient: bool = True


def _number(key: str, expected: str = "a float >= 0", at_least: float = 0.0, presence: bool = False) -> Argument:
    return Argument(key, Number(expected, at_least=at_least), (key,), presence)


def _switch(key: str, default: bool = False) -> Argument:
    return Argument(key, Switch(), (key,), default=default)


def _live(key: str) -> Argument:
    return Argument(key, NumberOrTensor("a float >= 0 or a tensor of one element", at_least=0.0), (key,))


# See MAX_LIVE in csrc/table/table.h.
_LR, _WEIGHT_DECAY = _live("lr"), _live("weight_decay")
_BETA = Number("a float in [0, 1)", at_least=0.0, at_most=BELOW_ONE)
_BETAS = Argument("betas", Pair("a pair of floats in [0, 1)", each=_BETA), ("beta1", "beta2"))

ADAM = Rule(
    name="adam",
    arguments=(
        _LR,
        _BETAS,
        _number("eps"),
        _WEIGHT_DECAY,
        _switch("decoupled_weight_decay"),
        _switch("amsgrad"),
        _switch("maximize"),
    ),
    moments=("exp_avg", "exp_avg_sq", "max_exp_avg_sq"),
    moments_in_use=lambda group: (True, True, bool(group["amsgrad"])),
    always=("exp_avg", "exp_avg_sq"),
    squares=("exp_avg_sq", "max_exp_avg_sq"),
    corrects_bias=True,
)

# torch's AdamW had no such entry in its groups at first: there it is what the class says.
ADAMW = replace(
    ADAM,
    arguments=tuple(replace(a, default=True) if a.key == "decoupled_weight_decay" else a for a in ADAM.arguments),
)


def _check_nesterov(group: Group) -> None:
    if group.get("nesterov") and (group["momentum"] <= 0 or group["dampening"] != 0):
        raise ValueError(
            "nesterov=True must come with momentum > 0 and dampening = 0, "
            f"got momentum={group['momentum']!r} and dampening={group['dampening']!r}"
        )


SGD = Rule(
    name="sgd",
    arguments=(
        _LR,
        _number("momentum", presence=True),
        _number("dampening", "a float", at_least=-float("inf")),
        _WEIGHT_DECAY,
        _switch("nesterov"),
        _switch("maximize"),
    ),
    moments=("momentum_buffer",),
    moments_in_use=lambda group: (group["momentum"] != 0,),
    check=_check_nesterov,
)


RMSPROP = Rule(
    name="rmsprop",
    arguments=(
        _LR,
        _number("alpha"),
        _number("eps"),
        _WEIGHT_DECAY,
        _number("momentum", presence=True),
        _switch("centered"),
        _switch("maximize"),
    ),
    moments=("momentum_buffer", "square_avg", "grad_avg"),
    # A momentum below zero, which a scheduler may leave, has the buffer rest.
    moments_in_use=lambda group: (group["momentum"] != 0, True, bool(group["centered"])),
    always=("square_avg",),
    squares=("square_avg",),
    first_moment_needs="momentum",
    subtracts_moments_with="centered",
)

RADAM = Rule(
    name="radam",
    arguments=tuple(argument for argument in ADAM.arguments if argument.key != "amsgrad"),
    moments=("exp_avg", "exp_avg_sq"),
    moments_in_use=lambda group: (True, True),
    always=("exp_avg", "exp_avg_sq"),
    squares=("exp_avg_sq",),
    corrects_bias=True,
)

LION = Rule(
    name="lion",
    arguments=(
        _LR,
        _BETAS,
        _WEIGHT_DECAY,
        _switch("maximize"),
    ),
    moments=("exp_avg",),
    moments_in_use=lambda group: (True,),
    always=("exp_avg",),
)


def external(moment: str, acts_on_moment: Callable[[Group], bool], step_name: str, reads_lr: bool = False) -> Rule:
    """The rule of an inner optimizer that is not ours: its step is done, and what is left is the policy's.

    Args:
        moment: The state name of the first moment, which is looked at only where the policy acts on it.
        acts_on_moment: Whether the policy of a parameter group does.
        step_name: The state name of the policy's own count of steps; the other optimizer need not keep one.
        reads_lr: The policy weighs by the learning rate, 1 in a group that has none.
    """
    return Rule(
        name="external",
        arguments=(replace(_LR, default=1.0),) if reads_lr else (),
        moments=(moment,),
        moments_in_use=lambda group: (acts_on_moment(group),),
        step_name=step_name,
        reads_gradient=False,
    )
