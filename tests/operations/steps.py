"""Operations that ask something of the optimizer: steps, syncs, looks at the slow weights, checkpoints, copies,
settings, and what it must refuse."""

from __future__ import annotations

import copy
import pickle
import random
from typing import Any

import torch
from helpers import can_set_grad_dtype, make_tensor, seeded, set_grad
from runs import through_a_file
from torch import Tensor

from .registry import operation
from .worlds import Group, World, base_of, has_bits, spelled

SHAPES = ((7,), (3, 5), (), (33,), (1,), (0,), (2, 3, 4, 5), (0, 3), (130,), (64, 2))
NUMBERS: dict[str, tuple[Any, ...]] = {
    "lr": (0.1, 0.03, 0.0),
    "weight_decay": (0.0, 0.1),
    "k": (1, 2, 3, 4),
    "alpha": (0.0, 0.25, 0.3, 0.5, 0.8, 1.0),
    "pullback_momentum": ("none", "pullback", "reset"),
    "maximize": (False, True),
}
ADAM: dict[str, tuple[Any, ...]] = {
    **NUMBERS,
    "betas": ((0.9, 0.999), (0.8, 0.95), (0.0, 0.9)),
    "eps": (1e-8, 1e-3),
    "amsgrad": (False, True),
}
CHOICES: dict[str, dict[str, tuple[Any, ...]]] = {
    "adamw": ADAM,
    "adam": ADAM,
    "sgd": {**NUMBERS, "momentum": (0.0, 0.9, 0.5), "dampening": (0.0, 0.2)},
    "external": {**NUMBERS, "momentum": (0.9, 0.5), "alpha of RMSprop": (0.9, 0.99)},
    "nadam": {**NUMBERS, "betas": ((0.9, 0.999), (0.8, 0.95))},
    "adagrad": {**NUMBERS, "pullback_momentum": ("none",), "lr_decay": (0.0, 0.1)},
}


def draw_hyper(rule: str, draw: random.Random) -> dict[str, Any]:
    hyper = {name: draw.choice(values) for name, values in CHOICES[base_of(rule)].items() if " " not in name}
    hyper["lr"] = draw.choice((0.1, 0.03))
    if rule == "sgd" and hyper["momentum"] and not hyper["dampening"]:
        hyper["nesterov"] = draw.random() < 0.5
    return hyper


def draw_group(rule: str, draw: random.Random) -> Group:
    shapes = tuple(draw.choice(SHAPES) for _ in range(draw.randint(1, 4)))
    if draw.random() < 0.05:
        shapes += ((16_387,),)  # more than one chunk
    hyper = draw_hyper(rule, draw)
    dtype = draw.choice((torch.float32, torch.float32, torch.float64, torch.bfloat16))
    if has_bits(rule):
        dtype = draw.choice((dtype, dtype, torch.float16))
    if rule in ("adamw", "adam", "sgd"):
        hyper["master_weights"] = draw.random() < 0.3
    return Group(shapes, dtype, hyper, draw.randrange(2**32))


# ------------------------------------------------------------------------------------------------------------
# steps


def lay_out(values: Tensor, kind: str) -> Tensor:
    """The values in another place and order in memory."""
    dims = tuple(reversed(range(values.dim())))
    if kind == "transposed":
        return values.permute(dims).contiguous().permute(dims)
    if kind == "strided":
        wide = torch.full((*values.shape, 2), 77.0, dtype=values.dtype)
        wide[..., 1] = values
        return wide[..., 1]
    if kind == "misaligned":
        flat = torch.full((values.numel() + 3,), 77.0, dtype=values.dtype)
        flat[3:] = values.flatten()
        return flat[3:].view(values.shape)
    if kind == "negated":
        return torch._neg_view(-values)
    if kind == "expanded":
        return values.sum().expand(values.shape)
    return values


def give_gradients(world: World, draw: random.Random) -> tuple[str, tuple[int, ...]]:
    """Gradients for most parameters; says which and how, and which have none."""
    told, missing = [], []
    scale = 10.0 ** draw.choice((-3, 0, 0, 0, 2))
    for index, p in enumerate(world.params):
        values = make_tensor(p.shape, p.dtype, generator=seeded(draw.randrange(2**32)), scale=scale)
        kind = draw.choice(("plain",) * 4 + ("transposed", "strided", "misaligned", "negated", "expanded", "fp32"))
        in_place, none = draw.random() < 0.3, draw.random() < 0.25
        if none:
            p.grad = None
            missing.append(index)
            told.append("None")
        elif in_place and p.grad is not None and p.grad.is_contiguous() and not p.grad.is_neg():
            p.grad.copy_(values)
            told.append("in place")
        else:
            if kind == "fp32" and can_set_grad_dtype() and has_bits(world.rule) and p.dtype.itemsize == 2:
                values = values.float()
            set_grad(p, lay_out(values, kind))
            told.append(kind)
    return f"gradients {', '.join(told)}, of size {scale:g}", tuple(missing)


@operation(weight=30, made="computed")
def step(world: World, draw: random.Random) -> str:
    told, missing = give_gradients(world, draw)
    with world.versions_tell(missing):
        world.optimizer.step()
    return told


@operation(weight=8, made="computed")
def step_again(world: World, draw: random.Random) -> str:
    """The gradients of the last step, as they now lie."""
    with world.versions_tell():
        world.optimizer.step()
    return "the gradients that are there"


@operation(weight=5, made="computed", fused_only=True)
def step_scaled(world: World, draw: random.Random) -> str:
    """As under torch.amp.GradScaler."""
    told, missing = give_gradients(world, draw)
    scale, found = draw.choice((1024.0, 3.0)), draw.random() < 0.4
    world.optimizer.grad_scale = torch.tensor(scale)
    world.optimizer.found_inf = torch.tensor(float(found))
    try:
        before = world.everything() if found and not (world.is_oracle or world.is_quiet) else None
        with world.versions_tell(missing):
            world.optimizer.step()
        if before is not None:
            world.same_as(before, "changed by a step with found_inf")
    finally:
        del world.optimizer.grad_scale, world.optimizer.found_inf
    return f"{told}, scaled by {scale:g}{', found_inf' * found}"


@operation(weight=5, made="computed")
def sync(world: World, draw: random.Random) -> str:
    with world.versions_tell():
        world.optimizer.sync()
    return "now"


# ------------------------------------------------------------------------------------------------------------
# the slow weights


class Thrown(Exception):
    """A user's own."""


@operation(weight=6)
def slow_weights(world: World, draw: random.Random) -> str:
    """Enters, looks, and leaves; the weights are as before."""
    optimizer, nested, fails = world.optimizer, draw.random() < 0.3, draw.random() < 0.3
    refused = draw.choice(("", "step", "sync", "load", "copy"))
    calls = {
        "step": optimizer.step,
        "sync": optimizer.sync,
        "load": lambda: optimizer.load_state_dict(optimizer.state_dict()),
        "copy": lambda: copy.deepcopy(optimizer),
    }
    with world.versions_tell():
        try:
            with optimizer.slow_weights():
                look(world)
                if nested:
                    with optimizer.slow_weights():
                        look(world)
                if refused:
                    world.refused(calls[refused], RuntimeError)
                if fails:
                    raise Thrown
        except Thrown:
            pass
    told = [
        text for text, true in (("nested", nested), (f"{refused} refused", refused), ("left by raise", fails)) if true
    ]
    return ", ".join(told) or "looked at"


def look(world: World) -> None:
    world.seen += [p.detach().clone() for p in world.params]
    saved = world.optimizer.state_dict()["state"]
    # Beside a state that a base made early they stand before they have begun.
    begun = [saved[i] for i in sorted(saved) if "slow_param" in saved[i] and saved[i].get("lookahead_step") != 0]
    world.seen += [own["slow_param"].clone() for own in begun]


# ------------------------------------------------------------------------------------------------------------
# checkpoints and copies


def saved(world: World) -> Any:
    return through_a_file(([p.detach() for p in world.params], world.optimizer.state_dict()))


def load_fresh(world: World, checkpoint: Any, contiguous: bool) -> None:
    """A new process: the model made anew, the weights loaded, an optimizer over them, the state loaded."""
    weights, state_dict = checkpoint
    params = [torch.nn.Parameter(w.contiguous() if contiguous else w) for w in weights]
    groups, start = [], 0
    for group in state_dict["param_groups"]:
        groups.append({"params": params[start : start + len(group["params"])]})
        start += len(group["params"])
    world.optimizer = world.fresh_optimizer(groups)
    world.optimizer.load_state_dict(state_dict)
    kept = {world.setting(group, "backend") for group in world.optimizer.param_groups}
    assert world.is_oracle or kept == {world.backend}, f"a checkpoint made backend {world.backend!r} {kept}"


@operation(weight=5, made="loaded")
def save_and_load(world: World, draw: random.Random) -> str:
    contiguous = draw.random() < 0.5
    load_fresh(world, saved(world), contiguous)
    return f"into a fresh optimizer{', weights contiguous' * contiguous}"


@operation(weight=4, made="loaded")
def load_in_place(world: World, draw: random.Random) -> str:
    """What was saved a moment ago, into the same optimizer."""
    through_file = draw.random() < 0.7
    state_dict = world.optimizer.state_dict()
    world.optimizer.load_state_dict(through_a_file(state_dict) if through_file else state_dict)
    return "from a file" if through_file else "its own state_dict()"


@operation(weight=3)
def save(world: World, draw: random.Random) -> str:
    world.saved = saved(world)
    return "for later"


@operation(weight=3, made="loaded")
def return_to_saved(world: World, draw: random.Random) -> str:
    """What was saved some operations ago, into the same optimizer and parameters, or into fresh ones."""
    fresh = draw.random() < 0.5
    if world.saved is None:
        return ""
    weights, state_dict = through_a_file(world.saved)
    same = [len(g["params"]) for g in state_dict["param_groups"]] == [
        len(g["params"]) for g in world.optimizer.param_groups
    ]
    if fresh or not same or any(w.dtype != p.dtype for w, p in zip(weights, world.params, strict=True)):
        load_fresh(world, (weights, state_dict), contiguous=False)
        return "in a fresh optimizer"
    with torch.no_grad():
        for p, w in zip(world.params, weights, strict=True):
            p.copy_(w)
    world.optimizer.load_state_dict(state_dict)
    return "in place"


@operation(weight=4)
def copy_all(world: World, draw: random.Random) -> str:
    """Parameters and optimizer together; the originals may then be stepped, which is nothing to the copies."""
    pickled, stepped = draw.random() < 0.5, draw.random() < 0.5
    old = world.optimizer
    world.optimizer = pickle.loads(pickle.dumps(old)) if pickled else copy.deepcopy(old)
    if stepped:
        for group in old.param_groups:
            for p in group["params"]:
                set_grad(p, torch.ones_like(p))
        old.step()
    return f"{'pickled' if pickled else 'deepcopy'}{', the original stepped' * stepped}"


# ------------------------------------------------------------------------------------------------------------
# groups and settings


@operation(weight=3)
def add_group(world: World, draw: random.Random) -> str:
    group = draw_group(world.rule, draw)
    # torch's Adagrad makes its state in the constructor alone, and cannot step a group that came later.
    if len(world.optimizer.param_groups) >= 4 or base_of(world.rule) == "adagrad":
        return ""
    world.optimizer.add_param_group(group.made(world.rule))
    return f"of {group.shapes}, {group.dtype}, {group.hyper}"


@operation(weight=14)
def set_hyper(world: World, draw: random.Random) -> str:
    index = draw.randrange(len(world.optimizer.param_groups))
    group, choices = world.optimizer.param_groups[index], CHOICES[base_of(world.rule)]
    name = draw.choice(sorted(choices))
    value = draw.choice(choices[name])
    if group.get("nesterov") and name in ("momentum", "dampening"):
        return ""
    name = "alpha" if " " in name else spelled(world.rule, name)
    group[name] = value
    return f"{name} of group {index} to {value!r}"


@operation(weight=5)
def set_lr_tensor(world: World, draw: random.Random) -> str:
    """lr as a tensor, or another number in that tensor."""
    index, value = draw.randrange(len(world.optimizer.param_groups)), draw.choice((0.1, 0.02, 0.0))
    group = world.optimizer.param_groups[index]
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(value)
        return f"in place to {value}, group {index}"
    group["lr"] = torch.tensor(value)
    return f"a tensor of {value}, group {index}"


@operation(weight=4)
def set_backend(world: World, draw: random.Random) -> str:
    """A group goes to another backend and, the next time, back: a run does not know where it was."""
    index, other = draw.randrange(len(world.optimizer.param_groups)), draw.choice(("reference", "cpu", "auto"))
    name = spelled(world.rule, "backend")
    group = world.optimizer.param_groups[index]
    group[name] = world.backend if group.get(name) != world.backend else other
    return f"of group {index}, to its own or {other}"


# ------------------------------------------------------------------------------------------------------------
# what must be refused, and change nothing


@operation(weight=5)
def bad_setting(world: World, draw: random.Random) -> str:
    give_gradients(world, draw)
    index = draw.randrange(len(world.optimizer.param_groups))
    name, value, kind = draw.choice(
        (
            ("alpha", 1.5, ValueError),
            ("alpha", "half", TypeError),
            ("k", 0, ValueError),
            ("k", 2.5, TypeError),
            ("pullback_momentum", "sometimes", ValueError),
            ("backend", "abacus", ValueError),
        )
    )
    group, name = world.optimizer.param_groups[index], spelled(world.rule, name)
    if not world.is_oracle and any(p.grad is not None for p in group["params"]):
        before = group[name]
        group[name] = value
        world.refused(world.optimizer.step, kind)
        group[name] = before
    return f"{name}={value!r} in group {index}"


@operation(weight=4, fused_only=True)
def bad_gradient(world: World, draw: random.Random) -> str:
    give_gradients(world, draw)
    index, p, _ = world.pick(draw)
    sparse = (draw.random() < 0.5 or not can_set_grad_dtype()) and p.dim() > 0
    if not (sparse or can_set_grad_dtype()):
        return "none, since this torch keeps gradients in their parameter's dtype"
    wrong = torch.float64 if p.dtype != torch.float64 else torch.float16
    set_grad(p, torch.ones_like(p, dtype=p.dtype if sparse else wrong))
    if sparse and p.grad is not None:
        p.grad = p.grad.contiguous().to_sparse()
    if not world.is_oracle:
        world.refused(world.optimizer.step, TypeError)
    p.grad = None
    return f"{'sparse' if sparse else wrong} for parameter {index}"


@operation(weight=3, fused_only=True)
def bad_state(world: World, draw: random.Random) -> str:
    give_gradients(world, draw)
    index, p, _ = world.pick(draw)
    own = world.state_of(p)
    bad = draw.choice((torch.ones(*p.shape, 2), torch.ones(p.shape, dtype=torch.int64), [1.0]))
    if "slow_param" not in own or p.grad is None:
        return ""
    before = own["slow_param"]
    own["slow_param"] = bad
    world.refused(world.optimizer.step, TypeError, ValueError)
    own["slow_param"] = before
    return f"slow_param of parameter {index} a {getattr(bad, 'dtype', type(bad).__name__)}"


@operation(weight=2)
def bad_group(world: World, draw: random.Random) -> str:
    again, optimizer = draw.random() < 0.5, world.optimizer
    group = {"params": [world.params[0]]} if again else {"params": [torch.nn.Parameter(torch.ones(2))]}
    if not again:
        group[spelled(world.rule, "k")] = 0
    world.refused(lambda: optimizer.add_param_group(group), ValueError)
    return "a parameter twice" if again else "k=0"


@operation(weight=2)
def bad_checkpoint(world: World, draw: random.Random) -> str:
    state_dict = through_a_file(world.optimizer.state_dict())
    state_dict["param_groups"] = [*state_dict["param_groups"], {**state_dict["param_groups"][0], "params": [99]}]
    world.refused(lambda: world.optimizer.load_state_dict(state_dict), ValueError)
    return "a group too many"
