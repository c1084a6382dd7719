"""Interpreted kernels, quick enough for a suite.

Nearly all of the interpreter's time goes into Triton's language: types, broadcasts, literals, the same for all programs
that take one way through a kernel. So the first program of a way is interpreted, and what it asked of the interpreter's
builder, which computes, is written down; the others do the same once more, by what `computations.py` makes of it. A way
is left where Python read a number (in an `if`, or for another round of a loop) and found another one: from there the
program is interpreted on, what was done before it standing as it is.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpretedFunction, TensorHandle, interpreter_builder, interpreter_semantic

from .computations import Call, Form, computation


class Way:
    """What programs have in common up to a number that Python reads, and by that number, how they go on.

    `forms`: of all that has been made by its end; its own calls made the last of them.
    """

    def __init__(self, forms: list[Form | None]) -> None:
        self.forms, self.calls = list(forms), list[Call]()
        self.reads: int | None = None
        self.then: dict[bytes, Way] = {}
        self.ends = False

    @functools.cached_property
    def again(self) -> Callable[[list[Any]], None]:
        return computation(self.calls, self.forms)

    def on(self, value: bytes) -> Way:
        if value not in self.then:
            self.then[value] = Way(self.forms)
        return self.then[value]


class Kernel:
    """In the place of an interpreted kernel."""

    def __init__(self, kernel: InterpretedFunction) -> None:
        self.interpreted, self.function = kernel, kernel.rewrite()
        annotations = inspect.get_annotations(kernel.fn)
        self.is_constant = ["constexpr" in str(annotations.get(name)) for name in kernel.arg_names]
        self.ways: dict[Any, Way] = {}

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        return functools.partial(self.launch, grid)

    def warmup(self, *given: Any, **options: Any) -> None:
        """Nothing is compiled."""

    def launch(self, grid: tuple[int], *given: Any, **options: Any) -> None:
        constants = [x for x, constant in zip(given, self.is_constant, strict=True) if constant]
        variables = [x for x, constant in zip(given, self.is_constant, strict=True) if not constant]
        forms = [form_of(x) for x in variables]
        # By what they print: Triton's constants have had no hash, and its types have none.
        key = *map(str, constants), *(str(form.dtype) for form in forms)
        if key not in self.ways:
            self.ways[key] = Way(forms)
        inputs = [
            np.array([x.data_ptr() if isinstance(x, torch.Tensor) else x], form.data)
            for x, form in zip(variables, forms, strict=True)
        ]
        interpreter_builder.set_grid_dim(*grid, 1, 1)
        for program in range(*grid):
            interpreter_builder.set_grid_idx(program, 0, 0)
            way, made, read = self.ways[key], list(inputs), 0
            while True:
                if way.calls:
                    way.again(made)
                if way.reads is None:
                    break
                way, read = way.on(made[way.reads].tobytes()), read + 1
            if not way.ends:
                arguments = [
                    x if constant else interpreter._implicit_cvt(x)
                    for x, constant in zip(given, self.is_constant, strict=True)
                ]
                Interpreted(self.function, way, arguments, made, read).run()


FORMS: dict[Any, Form] = {}


def form_of(argument: Any) -> Form:
    """Of the handle that the interpreter makes of a number or of a tensor, which is as long in the making as a launch;
    of tensors of one dtype it is one."""
    told = argument.dtype if isinstance(argument, torch.Tensor) else argument
    if told not in FORMS:
        FORMS[told] = Form.of(interpreter._implicit_cvt(argument).handle)
    return FORMS[told]


class Interpreted:
    """A program in the interpreter, from where no way leads on; in the place of the builder that it asks."""

    # The one whose numbers are watched: not while the builder computes.
    watching: Interpreted | None = None

    def __init__(self, function: Any, way: Way, arguments: list[Any], made: list[Any], read: int) -> None:
        self.function, self.way, self.arguments, self.read = function, way, arguments, read
        inputs = [argument.handle for argument in arguments if hasattr(argument, "handle")]
        self.made: list[TensorHandle | None] = list(inputs)
        for data, form in zip(made[len(inputs) :], way.forms[len(inputs) :], strict=True):
            self.made.append(None if form is None else TensorHandle(data, form.dtype))
        self.done, self.next = len(made), len(inputs)
        self.place = {id(handle): i for i, handle in enumerate(inputs)}
        self.known: set[int] = set()

    def run(self) -> None:
        # More calls come to it, where an error cut off the program before.
        vars(self.way).pop("again", None)
        language = interpreter._patch_lang(self.function)
        interpreter_semantic.builder, Interpreted.watching, TensorHandle.data = self, self, _data
        try:
            self.function(*self.arguments)
        finally:
            interpreter_semantic.builder, Interpreted.watching = interpreter_builder, None
            del TensorHandle.data
            language.restore()
        self.way.ends = True

    def __getattr__(self, name: str) -> Any:
        member = getattr(interpreter_builder, name)
        return functools.partial(self._call, name, member) if callable(member) else member

    def _call(self, name: str, member: Any, *given: Any) -> Any:
        pattern = [(id(x) in self.place, self.place.get(id(x), x)) for x in given]
        if name != "create_get_program_id" and not any(kept for kept, _ in pattern):
            return self._compute(member, given)
        if self.next == self.done:
            made = self._compute(member, given)
            assert made is None or isinstance(made, TensorHandle), f"{name} cannot be asked for again"
            self.made.append(made)
            self.way.calls.append((name, pattern))
            self.way.forms.append(None if made is None else Form.of(made))
            self.done += 1
        result = self.made[self.next]
        if result is not None:
            self.place[id(result)] = self.next
        self.next += 1
        return result

    def _compute(self, member: Any, given: tuple[Any, ...]) -> Any:
        Interpreted.watching = None
        try:
            return member(*given)
        finally:
            Interpreted.watching = self

    def was_read(self, handle: TensorHandle) -> None:
        place = self.place.get(id(handle))
        if place is None or place in self.known:
            return
        self.known.add(place)
        if self.read > 0:
            self.read -= 1
            return
        self.way.reads = place
        self.way = self.way.on(handle.__dict__["data"].tobytes())


# While a program is interpreted: a handle's own array stands in its dictionary, behind this.
_data = property(lambda handle: _read(handle), lambda handle, value: handle.__dict__.update(data=value))


def _read(handle: TensorHandle) -> Any:
    if Interpreted.watching is not None:
        Interpreted.watching.was_read(handle)
    return handle.__dict__["data"]


def counted(begin: Any, end: Any, step: Any) -> Iterator[Any]:
    """In a kernel, what `range` is to the compiler. Python's own would read where it begins and ends, so that programs
    over other numbers of elements took other ways; this asks before each round whether there is one."""
    step = getattr(step, "value", step)
    while begin < end:
        yield begin
        begin = begin + step


def by_name(look_up: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """For types that are not hashable."""
    found: dict[str, Any] = {}

    def looked_up(dtype: Any) -> Any:
        if dtype.name not in found:
            found[dtype.name] = look_up(dtype)
        return found[dtype.name]

    return looked_up


def prepare() -> None:
    """Has the interpreter look up once what a dtype is in NumPy."""
    interpreter._get_np_dtype = by_name(interpreter._get_np_dtype)
