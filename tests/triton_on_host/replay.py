"""Interpreted kernels, quick enough for a suite.

Nearly all of the interpreter's time goes into Triton's language: types, broadcasts, literals, the same for all programs
that take one way through a kernel. So the first program of a way is interpreted, and what it asked of the interpreter's
builder, which computes, is written down; the others ask the builder alone for the same. A way is left where Python read
a number (in an `if`, or for the bounds of a loop) and found another one: from there the program is interpreted on, what
was done before it standing as it is.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from triton.runtime import interpreter
from triton.runtime.interpreter import InterpretedFunction, TensorHandle, interpreter_builder, interpreter_semantic


class Way:
    """What programs have in common up to a number that Python reads, and by that number, how they go on."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, list[tuple[bool, Any]]]] = []
        self.reads: int | None = None
        self.then: dict[bytes, Way] = {}
        self.ends = False


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
        arguments = [
            argument if constant else interpreter._implicit_cvt(argument)
            for argument, constant in zip(given, self.is_constant, strict=True)
        ]
        # By what they print: Triton's constants have had no hash.
        constants = zip(arguments, self.is_constant, strict=True)
        start = self.ways.setdefault(tuple(str(a if constant else a.type) for a, constant in constants), Way())
        handles = [argument.handle for argument in arguments if hasattr(argument, "handle")]
        interpreter_builder.set_grid_dim(*grid, 1, 1)
        for program in range(*grid):
            interpreter_builder.set_grid_idx(program, 0, 0)
            way, made, read = start, list(handles), 0
            while True:
                for name, pattern in way.calls:
                    made.append(getattr(interpreter_builder, name)(*[made[x] if kept else x for kept, x in pattern]))
                if way.reads is None:
                    break
                value = made[way.reads].data.tobytes()
                way, read = way.then.setdefault(value, Way()), read + 1
            if not way.ends:
                Interpreted(self.function, way, made, len(handles), read).run(arguments)


class Interpreted:
    """A program in the interpreter, from where no way leads on; in the place of the builder that it asks."""

    # The one whose numbers are watched: not while the builder computes.
    watching: Interpreted | None = None

    def __init__(self, function: Any, way: Way, made: list[TensorHandle | None], inputs: int, read: int) -> None:
        self.function, self.way, self.made, self.done, self.read = function, way, made, len(made), read
        self.place = {id(handle): i for i, handle in enumerate(made[:inputs])}
        self.next = inputs
        self.known: set[int] = set()

    def run(self, arguments: list[Any]) -> None:
        language = interpreter._patch_lang(self.function)
        interpreter_semantic.builder, Interpreted.watching, TensorHandle.data = self, self, _data
        try:
            self.function(*arguments)
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
            self.made.append(self._compute(member, given))
            self.way.calls.append((name, pattern))
            self.done += 1
        result = self.made[self.next]
        assert result is None or isinstance(result, TensorHandle), f"{name} cannot be asked for again"
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
        self.way = self.way.then.setdefault(handle.__dict__["data"].tobytes(), Way())


# While a program is interpreted: a handle's own array stands in its dictionary, behind this.
_data = property(lambda handle: _read(handle), lambda handle, value: handle.__dict__.update(data=value))


def _read(handle: TensorHandle) -> Any:
    if Interpreted.watching is not None:
        Interpreted.watching.was_read(handle)
    return handle.__dict__["data"]


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
