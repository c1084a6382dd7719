"""Operations on memory behind the optimizer's back: parameters, gradients and state move, are shared, cast, replaced
and removed, and keep their values."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import nullcontext

import torch
from helpers import make_tensor, seeded
from torch import Tensor

from lookahead_fused import _policies

from .registry import operation
from .steps import give_gradients, lay_out
from .worlds import World, has_bits

LAYOUTS = ("plain", "transposed", "strided", "misaligned")


def is_resizable(tensor: Tensor) -> bool:
    # torch itself dies where shared memory is resized.
    return bool(tensor.untyped_storage().resizable()) and not tensor.is_shared()


def clone(tensor: Tensor) -> None:
    tensor.data = tensor.data.clone()


@torch.no_grad()
def set_(tensor: Tensor) -> None:
    tensor.set_(tensor.detach().clone())  # type: ignore[call-overload]


def share_memory_(tensor: Tensor) -> None:
    tensor.data.share_memory_()


def resize_alias(tensor: Tensor) -> None:
    """An alias grows, and its storage moves, which is the tensor's own."""
    if is_resizable(tensor):
        tensor.detach().resize_(tensor.untyped_storage().nbytes() // tensor.element_size() + 1024)


def free_and_restore(tensor: Tensor) -> None:
    """As FSDP does between two forwards. Another tensor takes the old place meanwhile."""
    if is_resizable(tensor):
        size, content = empty(tensor)
        occupant = torch.full((size,), 85, dtype=torch.uint8)
        refill(tensor, size, content)
        assert bool((occupant == 85).all())


def empty(tensor: Tensor) -> tuple[int, Tensor]:
    storage = tensor.untyped_storage()
    size = storage.nbytes()
    content = torch.empty(0, dtype=torch.uint8).set_(storage).clone()  # type: ignore[call-overload]
    storage.resize_(0)
    return size, content


def refill(tensor: Tensor, size: int, content: Tensor) -> None:
    storage = tensor.untyped_storage()
    storage.resize_(size)
    torch.empty(0, dtype=torch.uint8).set_(storage).copy_(content)  # type: ignore[call-overload]


MOVES: tuple[Callable[[Tensor], None], ...] = (clone, set_, share_memory_, resize_alias, free_and_restore)


@operation(weight=16)
def move(world: World, draw: random.Random) -> str:
    name, tensor = world.pick_tensor(draw)
    way = draw.choice(MOVES)
    # What is freed, nobody may look at.
    with world.leaving(tensor) if way in (clone, set_) else nullcontext():
        way(tensor)
    return f"{name} by {way.__name__}"


@operation(weight=6)
def move_all(world: World, draw: random.Random) -> str:
    """The snippet that everybody copies to move an optimizer to a device, and its kin."""
    way = draw.choice(MOVES)
    for tensor in world.tensors():
        way(tensor)
    return f"parameters and state by {way.__name__}"


@operation(weight=5, fused_only=True)
def step_over_freed_memory(world: World, draw: random.Random) -> str:
    """A step while a tensor has no memory behind it is refused."""
    give_gradients(world, draw)
    index, p, _ = world.pick(draw)
    own = world.state_of(p)
    tensor = {"": p, "'s gradient": p.grad, "'s slow_param": own.get("slow_param")}
    name = draw.choice(sorted(tensor))
    chosen = tensor[name]
    if p.grad is None or chosen is None or chosen.numel() == 0:
        return ""
    # In memory of its own, which may be resized in every world.
    chosen.data = chosen.data.clone()
    if not world.is_oracle:
        before = world.everything()
        size, content = empty(chosen)
        try:
            world.optimizer.step()
        except (RuntimeError, ValueError) as error:
            world.seen.append(type(error).__name__)
        else:
            raise AssertionError(f"stepped though parameter {index}{name} has no memory")
        finally:
            refill(chosen, size, content)
        world.same_as(before, "changed by a refused step")
    return f"parameter {index}{name}"


@operation(weight=8)
def lay_out_anew(world: World, draw: random.Random) -> str:
    name, tensor = world.pick_tensor(draw)
    kind = draw.choice((*LAYOUTS, "channels_last"))
    with world.leaving(tensor):
        if kind != "channels_last":
            tensor.data = lay_out(tensor.detach().clone(memory_format=torch.contiguous_format), kind)
        elif tensor.dim() == 4:
            tensor.data = tensor.detach().to(memory_format=torch.channels_last)
    return f"{name} {kind}"


@operation(weight=3)
def flatten(world: World, draw: random.Random) -> str:
    """The parameters of a group become views of one buffer."""
    index = draw.randrange(len(world.optimizer.param_groups))
    params = world.optimizer.param_groups[index]["params"]
    dtype = params[0].dtype
    members = [p for p in params if p.dtype == dtype]
    flat = torch.empty(sum(p.numel() for p in members), dtype=dtype)
    start = 0
    for p in members:
        place = flat[start : start + p.numel()].view(p.shape)
        place.copy_(p.detach())
        with world.leaving(p):
            p.data = place
        start += p.numel()
    return f"group {index}"


@operation(weight=5, fused_only=True)
def cast(world: World, draw: random.Random) -> str:
    index, p, group = world.pick(draw)
    dtype = draw.choice((torch.float32, torch.bfloat16, torch.float16, torch.float64))
    if group.get("master_weights"):
        # The master decides, and what it becomes beside an fp32 parameter is nobody's promise.
        return ""
    p.grad = None
    with world.leaving(p):
        p.data = p.data.to(dtype)
    return f"parameter {index} to {dtype}"


@operation(weight=4)
def new_weights(world: World, draw: random.Random) -> str:
    index, p, group = world.pick(draw)
    values = make_tensor(p.shape, p.dtype, generator=seeded(draw.randrange(2**32)))
    in_place = draw.random() < 0.5
    if group.get("master_weights"):
        return ""
    if in_place:
        with torch.no_grad():
            p.copy_(values)
    else:
        p.data = values
    return f"parameter {index} {'copied in' if in_place else 'replaced'}"


@operation(weight=3)
def swap_tensors(world: World, draw: random.Random) -> str:
    """torch's way to give a parameter another tensor's whole inside, as `Module.to` has it under a future flag."""
    index, p, _ = world.pick(draw)
    p.grad = None
    torch.utils.swap_tensors(p, torch.nn.Parameter(p.detach().clone()))
    return f"parameter {index}"


# ------------------------------------------------------------------------------------------------------------
# state


@operation(weight=6)
def replace_state(world: World, draw: random.Random) -> str:
    """The entries of a parameter become other objects of the same values; of a dtype in which they are exact."""
    index, p, _ = world.pick(draw)
    own = world.state_of(p)
    kind, dtype = draw.choice(LAYOUTS), draw.choice((torch.float64, None, None))
    whole, counts = draw.random() < 0.3, draw.choice((torch.float32, torch.int64, torch.float64))
    replaced = {}
    for name, value in own.items():
        ours = has_bits(world.rule) or name in _policies.Lookahead().entries
        if isinstance(value, Tensor) and name.endswith("step"):
            replaced[name] = value.to(counts, copy=True) if ours else value.clone()
        elif isinstance(value, Tensor):
            contiguous = value.detach().clone(memory_format=torch.contiguous_format)
            replaced[name] = lay_out(contiguous.to(dtype) if dtype and ours else contiguous, kind)
    own.update(replaced)
    if whole and own:
        world.optimizer.state[p] = dict(own)
    return f"of parameter {index}: {kind}, {dtype or 'same dtype'}, count {counts}{', a new dict' * whole}"


@operation(weight=8, fused_only=True)
def come_back_to_state(world: World, draw: random.Random) -> str:
    """A user holds a parameter's state tensors over some steps, and then moves them without asking the optimizer."""
    index, p, _ = world.pick(draw)
    way, steps = draw.choice(MOVES), draw.randint(0, 2)
    held = [value for _, value in sorted(world.state_of(p).items()) if isinstance(value, Tensor)]
    told = []
    for to_come in reversed(range(steps + 1)):
        if to_come == 0:
            for value in held:
                way(value)
        told.append(give_gradients(world, draw)[0])
        world.optimizer.step()
    return f"of parameter {index} by {way.__name__} before the last of the steps with {'; '.join(told)}"


@operation(weight=3)
def clear_state(world: World, draw: random.Random) -> str:
    index, p, _ = world.pick(draw)
    what = draw.choice(("all", "of one", "slow weights", "moment"))
    own = world.state_of(p)
    adagrad = world.rule.endswith("adagrad")
    if what in ("all", "of one") and not adagrad:
        if what == "all":
            world.optimizer.state.clear()
        else:
            world.optimizer.state.pop(p, None)
    elif what == "slow weights":
        own.pop("slow_param", None)
        own.pop("cached_momentum", None)
    elif what == "moment" and has_bits(world.rule):
        own.pop(draw.choice(("exp_avg", "exp_avg_sq", "momentum_buffer")), None)
    else:
        return ""
    return f"{what}, parameter {index}"
