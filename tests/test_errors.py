"""Bad input raises before anything changed, and names the argument, what was expected and what came."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import (
    LOOKAHEAD_ARGUMENTS,
    LOOKAHEAD_CLASSES,
    TORCH_CLASSES,
    assert_unchanged,
    check_message,
    make_params,
    snapshot,
)

import lookahead_fused
from lookahead_fused.backends import BACKENDS

NAN, INF = float("nan"), float("inf")
# (argument, bad value, error, what the message must tell beside the argument's name)
COMMON: list[tuple[str, Any, type[Exception], str]] = [
    ("lr", -0.1, ValueError, "-0.1"),
    ("lr", NAN, ValueError, "nan"),
    ("lr", "0.1", TypeError, "str|0.1"),
    ("lr", None, TypeError, "None"),
    ("lr", torch.tensor([0.1, 0.2]), (ValueError, TypeError), r"0-dim|scalar|shape|element|\(2,\)"),
    ("lr", torch.tensor(-0.1), ValueError, "-0.1"),
    ("lr", torch.tensor(True), (TypeError, ValueError), "bool"),
    ("lr", torch.tensor(0.1 + 0j), (TypeError, ValueError), "complex"),
    ("weight_decay", -0.1, ValueError, "-0.1"),
    ("weight_decay", NAN, ValueError, "nan"),
    ("weight_decay", "0", TypeError, "str|0"),
    ("k", 0, ValueError, "0"),
    ("k", -3, ValueError, "-3"),
    ("k", 2.5, TypeError, "float|2.5"),
    ("k", "5", TypeError, "str"),
    ("k", None, TypeError, "None"),
    ("alpha", -0.01, ValueError, "-0.01"),
    ("alpha", 1.01, ValueError, "1.01"),
    ("alpha", NAN, ValueError, "nan"),
    ("alpha", "0.5", TypeError, "str"),
    ("alpha", None, TypeError, "None"),
    ("pullback_momentum", "pull", ValueError, "pull"),
    ("pullback_momentum", True, (TypeError, ValueError), "True|bool"),
    ("pullback_momentum", None, (TypeError, ValueError), "None"),
    ("outer_momentum", -0.1, ValueError, "-0.1"),
    ("outer_momentum", 1, ValueError, "1"),
    ("outer_momentum", NAN, ValueError, "nan"),
    ("outer_momentum", "0.5", TypeError, "str"),
    ("outer_nesterov", "no", TypeError, "str|no"),
    ("master_weights", "yes", TypeError, "str|yes"),
    ("maximize", "yes", TypeError, "str|yes"),
    ("backend", "gpu", ValueError, "gpu"),
    ("backend", 3, (TypeError, ValueError), "3|int"),
    ("differentiable", True, ValueError, "True|differentiable"),
]
ADAM: list[tuple[str, Any, type[Exception], str]] = [
    ("betas", (-0.1, 0.9), ValueError, "-0.1"),
    ("betas", (0.9, 1.0), ValueError, "1.0"),
    ("betas", (1.0, 0.9), ValueError, "1.0"),
    ("betas", (0.9, NAN), ValueError, "nan"),
    ("betas", (0.9,), (ValueError, TypeError), "2|two|pair"),
    ("betas", (0.9, 0.99, 0.999), (ValueError, TypeError), "2|two|pair"),
    ("betas", 0.9, TypeError, "float|0.9"),
    ("betas", ("0.9", 0.999), TypeError, "str"),
    ("eps", -1e-8, ValueError, "-1e-08"),
    ("eps", NAN, ValueError, "nan"),
    ("eps", "1", TypeError, "str"),
    ("amsgrad", "yes", TypeError, "str|yes"),
]
SGD: list[tuple[str, Any, type[Exception], str]] = [
    ("momentum", -0.5, ValueError, "-0.5"),
    ("momentum", NAN, ValueError, "nan"),
    ("momentum", "0.9", TypeError, "str"),
    ("dampening", NAN, ValueError, "nan"),
    ("dampening", "0", TypeError, "str"),
    ("nesterov", True, ValueError, "momentum"),  # without momentum
    ("nesterov", "yes", TypeError, "str|yes"),
]
BAD = [
    pytest.param(rule, *case, id=f"{rule}-{case[0]}-{case[1]!r}".replace("torch.", ""))
    for rule, cases in (("adamw", [*COMMON, *ADAM]), ("adam", ADAM), ("sgd", [*COMMON, *SGD]))
    for case in cases
]


@pytest.mark.parametrize(("rule", "argument", "value", "error", "came"), BAD)
def test_bad_keyword(rule: str, argument: str, value: Any, error: type[Exception], came: str) -> None:
    """At construction, as an argument and in a group."""
    cls = LOOKAHEAD_CLASSES[rule]
    with pytest.raises(error) as caught:
        cls(make_params([(3,)]), **{argument: value})
    check_message(caught.value, argument, came)
    if argument != "differentiable":
        with pytest.raises(error) as caught:
            cls([{"params": make_params([(3,)]), argument: value}])
        check_message(caught.value, argument, came)


@pytest.mark.parametrize(
    ("rule", "argument", "value", "error", "came"),
    [case for case in BAD if case.values[1] != "differentiable"],
)
def test_bad_keyword_in_an_added_group(rule: str, argument: str, value: Any, error: type[Exception], came: str) -> None:
    """The optimizer stays as it was, without the group, and goes on."""
    params = make_params([(3,), (4,)])
    optimizer = LOOKAHEAD_CLASSES[rule](params)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    before = snapshot(optimizer)
    with pytest.raises(error) as caught:
        optimizer.add_param_group({"params": make_params([(5,)]), argument: value})
    check_message(caught.value, argument, came)
    assert_unchanged(before, snapshot(optimizer))
    optimizer.step()


WRAPPER_BAD = [case for case in COMMON if case[0] in (*LOOKAHEAD_ARGUMENTS, "backend")]


@pytest.mark.parametrize(("argument", "value", "error", "came"), WRAPPER_BAD)
def test_bad_keyword_of_the_wrapper(argument: str, value: Any, error: type[Exception], came: str) -> None:
    """The base stays as it was: nothing of ours in its groups, and it can be wrapped again."""
    base = torch.optim.AdamW(make_params([(3,)]))
    before = snapshot(base)
    with pytest.raises(error) as caught:
        lookahead_fused.Lookahead(base, **{argument: value})
    check_message(caught.value, argument, came)
    assert_unchanged(before, snapshot(base))
    lookahead_fused.Lookahead(base)


@pytest.mark.parametrize("value", [None, 3, "adam", torch.optim.AdamW, lambda: None])
def test_the_wrapper_wants_an_optimizer(value: Any) -> None:
    with pytest.raises(TypeError, match=r"(?i)optimizer"):
        lookahead_fused.Lookahead(value)


def test_an_unavailable_backend_says_why() -> None:
    """A named backend that cannot serve raises, with the reason that the report gives."""
    for name, status in lookahead_fused.backends().items():
        assert isinstance(status.available, bool)
        assert status.available or status.reason
        if not status.available:
            (p,) = make_params([(3,)])
            p.grad = torch.ones_like(p)
            with pytest.raises((ValueError, RuntimeError)) as caught:
                lookahead_fused.LookaheadAdamW([p], backend=name).step()
            assert name in str(caught.value)
            # These parameters are on a CPU, and a backend for other devices says that first.
            devices = BACKENDS[name].DEVICES
            expected = status.reason if devices is None or "cpu" in devices else "it serves devices of type"
            assert expected in str(caught.value)


def test_a_typing_error_is_not_swallowed() -> None:
    for cls in LOOKAHEAD_CLASSES.values():
        with pytest.raises(TypeError, match="alhpa"):
            cls(make_params([(3,)]), alhpa=0.5)
    own = {
        "sgd": (1e-3, 0.9, 0, 0, True),
        "rmsprop": (1e-2, 0.9, 1e-8, 0.0, 0.9, True, False, None, True, False),
        "lion": (1e-4, (0.9, 0.99), 0.1),
    }
    for rule, cls in LOOKAHEAD_CLASSES.items():
        positional = own.get(rule, (1e-3, (0.9, 0.999), 1e-8, 0.0, True))
        cls(make_params([(3,)]), *positional)
        with pytest.raises(TypeError, match="positional"):
            cls(make_params([(3,)]), *positional, False)


@pytest.mark.parametrize("mode", ["pullback", "reset"])
def test_a_first_moment_that_is_not_kept(mode: str) -> None:
    """RMSprop without momentum is told where it is made; a momentum that becomes 0 later lets the run go on."""
    (p,) = make_params([(3,)])
    for make in (
        lambda **hyper: LOOKAHEAD_CLASSES["rmsprop"]([p], pullback_momentum=mode, k=1, **hyper),
        lambda **hyper: lookahead_fused.Lookahead(torch.optim.RMSprop([p], **hyper), 1, 0.5, mode),
    ):
        with pytest.raises(ValueError, match="pullback_momentum") as caught:
            make()
        check_message(caught.value, "momentum=0", mode)
        optimizer: Any = make(momentum=0.9)
        with pytest.raises(ValueError, match="pullback_momentum"):
            optimizer.add_param_group({"params": make_params([(4,)]), "momentum": 0.0})
        for momentum in (0.9, 0.0, -0.1, 0.9):
            optimizer.param_groups[0]["momentum"] = momentum
            p.grad = torch.ones_like(p)
            optimizer.step()
        assert p.isfinite().all()


@pytest.mark.parametrize("name", ["alpha", "lookahead_alpha"])
def test_the_two_alphas_of_rmsprop(name: str) -> None:
    """torch's keeps its name, and Lookahead's has one of its own; an error names the one that was written."""
    (p,) = make_params([(3,)])
    with pytest.raises(ValueError, match=f"^{name} must be") as caught:
        LOOKAHEAD_CLASSES["rmsprop"]([p], **{name: -1.0})
    check_message(caught.value, name, "-1.0")
    optimizer = LOOKAHEAD_CLASSES["rmsprop"]([p], 0.1, 0.8, lookahead_alpha=0.25)
    group = optimizer.param_groups[0]
    assert (group["alpha"], group["lookahead_alpha"]) == (0.8, 0.25)
    assert "lookahead_alpha: Step size" in str(type(optimizer).__doc__)


def test_torchs_switches_change_nothing_and_are_not_kept() -> None:
    """foreach, fused, capturable: accepted, also per group, and not in the checkpoint as True."""
    for rule, cls in LOOKAHEAD_CLASSES.items():
        for switch in ("foreach", "fused", "capturable"):
            optimizer = cls(make_params([(3,)]), **{switch: True})
            assert not any(optimizer.param_groups[0].get(name) for name in (switch, "differentiable"))
            if rule not in TORCH_CLASSES:
                continue
            (p,) = make_params([(3,)])
            theirs = TORCH_CLASSES[rule]([p])
            p.grad = torch.ones_like(p)
            optimizer.param_groups[0]["params"][0].grad = torch.ones_like(p)
            optimizer.step()
            theirs.load_state_dict(optimizer.state_dict())
            theirs.step()
        cls(make_params([(3,)]), differentiable=False)


def test_tensor_betas_work_or_are_refused_by_name() -> None:
    betas = (torch.tensor(0.9), torch.tensor(0.99))
    for rule in ("adamw", "adam"):
        runs = []
        try:
            for b in (betas, tuple(float(x) for x in betas)):
                (p,) = make_params([(6,)])
                optimizer = LOOKAHEAD_CLASSES[rule]([p], betas=b)
                for _ in range(3):
                    p.grad = torch.ones_like(p)
                    optimizer.step()
                runs.append(p)
        except (TypeError, ValueError) as error:
            check_message(error, "betas", "Tensor|tensor")
        else:
            assert torch.equal(*runs)


# ------------------------------------------------------------------------------------------------------------
# parameters


@pytest.mark.parametrize("rule", LOOKAHEAD_CLASSES)
def test_bad_parameters(rule: str) -> None:
    cls = LOOKAHEAD_CLASSES[rule]
    (p,) = make_params([(3,)])
    for params, error, message in (
        ([], ValueError, "empty"),
        (p, TypeError, "iterable|Tensor"),
        ([1.0], TypeError, "float"),
        ([p * 2], ValueError, "leaf"),
        ([{"params": [p]}, {"params": [p]}], ValueError, "more than one"),
        ([{"lr": 0.1}], (ValueError, KeyError), "params"),
    ):
        with pytest.raises(error, match=message):
            cls(params)
    optimizer = cls([p])
    with pytest.raises(ValueError, match="more than one"):
        optimizer.add_param_group({"params": [p]})
    assert len(optimizer.param_groups) == 1
