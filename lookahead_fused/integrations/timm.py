"""The fused classes in timm's registry of optimizers: for `create_optimizer_v2` and a training script's `--opt`."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

from .._fused import FusedLookahead
from .._optimizers import (
    LookaheadAdam,
    LookaheadAdamW,
    LookaheadLion,
    LookaheadRAdam,
    LookaheadRMSprop,
    LookaheadSGD,
)

# What timm presets for the inner optimizer alone: only Lookahead is to be new under our names.
PRESETS: dict[type[FusedLookahead], dict[str, Any]] = {
    LookaheadAdam: {},
    LookaheadAdamW: {},
    LookaheadLion: {},
    LookaheadRAdam: {},
    LookaheadRMSprop: {"alpha": 0.9},
    LookaheadSGD: {"nesterov": True},
}
# The first release with a registry.
OLDEST = "1.0.12"


def register() -> None:
    """Names the fused classes to timm: `lookaheadfusedadam`, `lookaheadfusedadamw`, `lookaheadfusedlion`,
    `lookaheadfusedradam`, `lookaheadfusedrmsprop` and `lookaheadfusedsgd`.

    timm then makes them as it makes its own `adam`, `adamw`, `lion`, `radam`, `rmsprop` and `sgd`: with its parameter
    groups and presets, which are a weight decay of 0, a momentum of 0.9, Nesterov's form for SGD and an alpha of 0.9
    for RMSprop. Every further argument of the class (`k`, `pullback_momentum`, `max_grad_norm`, ...) is a keyword of
    `create_optimizer_v2`, and follows `--opt-kwargs` in timm's training script. For RMSprop `alpha` is its own, and
    Lookahead's is `lookahead_alpha`.

    The names have no underscore: timm takes `lookahead_` before a name for its own wrapper. A second call changes
    nothing. An entry of another maker under one of the names is replaced, of which timm warns.

    Raises:
        ImportError: timm is not installed, or has no registry of optimizers, as before 1.0.12.

    Example:
        >>> from lookahead_fused.integrations.timm import register
        >>> register()
        >>> optimizer = timm.optim.create_optimizer_v2(model, "lookaheadfusedadamw", lr=1e-3, weight_decay=0.05, k=5)
    """
    timm = _timm()
    # The registry itself has no public name; timm's own functions read this one.
    registry = timm.optim._optim_factory.default_registry
    known = registry.list_optimizers()
    for cls, presets in PRESETS.items():
        inner = cls.__name__.removeprefix("Lookahead")
        accepted = inspect.signature(cls).parameters
        entry = timm.optim.OptimInfo(
            name=f"lookaheadfused{inner.lower()}",
            opt_class=cls,
            description=f"lookahead_fused.{cls.__name__}: {inner} with Lookahead in the same pass over memory",
            has_eps="eps" in accepted,
            has_momentum="momentum" in accepted,
            has_betas="betas" in accepted,
            defaults=presets,
        )
        if entry.name not in known or registry.get_optimizer_info(entry.name) != entry:
            registry.register(entry)


def _timm() -> Any:
    """timm with its optimizers imported, and known to have a registry of them."""
    try:
        timm = importlib.import_module("timm")
    except ModuleNotFoundError as error:
        # timm may be there and lack what it imports itself: its own error tells that best.
        if error.name != "timm":
            raise
        raise ImportError("register() needs timm: pip install timm", name="timm") from error
    optim = importlib.import_module("timm.optim")
    factory = getattr(optim, "_optim_factory", None)
    if not hasattr(factory, "default_registry") or not hasattr(optim, "OptimInfo"):
        raise ImportError(
            f"register() needs timm {OLDEST} or newer, which has a registry of optimizers; timm {timm.__version__} has "
            "none: pip install --upgrade timm",
            name="timm",
        )
    return timm
