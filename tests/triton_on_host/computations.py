"""What an interpreted program asked of the interpreter's builder, as a function over NumPy's arrays.

The builder takes and gives handles, whose types it finds out and checks at each call; along one way through a kernel
they are the same each time. So they are found out here, once, and what is left of a call is the one of NumPy that it
comes down to, as the builder itself tells. A call of which nothing is known here is made of the builder as it is.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import CodeType
from typing import Any, NamedTuple

import numpy as np
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle, interpreter_builder

# The name of the builder's member, and what it was given: a place among all that was made before, or anything else.
Call = tuple[str, list[tuple[bool, Any]]]


class Form(NamedTuple):
    """What a handle is, whatever it holds."""

    dtype: Any
    data: np.dtype
    shape: tuple[int, ...]

    @classmethod
    def of(cls, handle: TensorHandle) -> Form:
        data = handle.__dict__["data"]
        return cls(handle.dtype, data.dtype, data.shape)


def computation(calls: list[Call], forms: list[Form | None]) -> Callable[[list[Any]], None]:
    """A function that takes the arrays made so far, makes these calls and appends what they give."""
    writer = Writer(forms)
    first = len(forms) - len(calls)
    for place, (name, given) in enumerate(calls, first):
        writer.write(place, name, given)
    made = ", ".join(writer.names[place] for place in range(first, len(forms)))
    source = "\n ".join(["def computation(made):", *writer.lines, f"made += ({made},)"])
    namespace = dict(writer.constants)
    exec(_compiled(source), namespace)
    return namespace["computation"]  # type: ignore[no-any-return]


@functools.cache
def _compiled(source: str) -> CodeType:
    """Many ways differ in their constants alone, which have names in the source."""
    return compile(source, __name__, "exec")


class Writer:
    """Writes calls down as lines of a function; what it takes from outside are constants of the function."""

    def __init__(self, forms: list[Form | None]) -> None:
        self.forms = forms
        self.lines: list[str] = []
        self.names: dict[int, str] = {}
        self.constants: dict[str, Any] = {}

    def write(self, place: int, name: str, given: list[tuple[bool, Any]]) -> None:
        form = self.forms[place]
        own = getattr(self, name, None)
        written = own(form, *given) if own else self.operation(name, form, given)
        if written is None:
            written = self.as_it_is(name, form, given)
        if form is not None and written.isidentifier():
            self.names[place] = written
            return
        self.names[place] = "None" if form is None else f"v{place}"
        self.lines.append(written if form is None else f"v{place} = {written}")

    # -- what stands in a line

    def constant(self, value: Any) -> str:
        name = f"k{len(self.constants)}"
        self.constants[name] = value
        return name

    def array(self, given: tuple[bool, Any]) -> str:
        is_place, value = given
        if not is_place:
            return self.constant(value.data)
        if value not in self.names:
            self.names[value] = f"v{value}"
            self.lines.append(f"v{value} = made[{value}]")
        return self.names[value]

    def form_of(self, given: tuple[bool, Any]) -> Form:
        is_place, value = given
        form = self.forms[value] if is_place else Form.of(value)
        assert form is not None
        return form

    def in_dtype(self, written: str, before: Any, after: Any) -> str:
        return written if before == after else f"{written}.astype({self.constant(after)})"

    # -- calls

    def as_it_is(self, name: str, form: Form | None, given: list[tuple[bool, Any]]) -> str:
        handle = self.constant(TensorHandle)
        arguments = [
            f"{handle}({self.array(x)}, {self.constant(self.form_of(x).dtype)})" if x[0] else self.constant(x[1])
            for x in given
        ]
        call = f"{self.constant(getattr(interpreter_builder, name))}({', '.join(arguments)})"
        return call if form is None else f"{call}.data"

    def operation(self, name: str, form: Form | None, given: list[tuple[bool, Any]]) -> str | None:
        """One that the builder makes by a function of NumPy's over all its elements."""
        if name in vars(interpreter_builder) or form is None:
            return None
        asked = [x if x[0] or isinstance(x[1], TensorHandle) else x[1] for x in given]
        try:
            function, operands = getattr(InterpreterBuilder, name)(Asked(), *asked)
        except AttributeError:  # it does more with a handle than to hand it on
            return None
        if not all(any(x is y for y in asked) for x in operands):
            return None
        forms = [self.form_of(x) for x in operands]
        if function == "cast":
            # Of bfloat16, NumPy knows nothing.
            is_numpys = all("bf16" not in str(dtype) for dtype in (forms[0].dtype, form.dtype))
            return self.in_dtype(self.array(operands[0]), forms[0].data, form.data) if is_numpys else None
        bits = [np.bitwise_and, np.bitwise_or, np.bitwise_xor]
        if len(forms) == 2 and function not in bits and all(x.data == np.bool_ for x in forms):
            return None  # the interpreter counts modulo 2
        with np.errstate(all="ignore"):
            made = function(*(np.ones(1, x.data) for x in forms)).dtype
        call = f"{self.constant(function)}({', '.join(self.array(x) for x in operands)})"
        return self.in_dtype(call, made, form.data)

    def create_bitcast(self, form: Form, source: tuple[bool, Any], dtype: tuple[bool, Any]) -> str:
        written = self.array(source)
        same = self.form_of(source).data == form.data
        return written if same else f"{written}.view({self.constant(form.data)})"

    create_int_to_ptr = create_ptr_to_int = create_bitcast

    def create_addptr(self, form: Form, pointer: tuple[bool, Any], offset: tuple[bool, Any]) -> str:
        size = max(1, TensorHandle.get_element_ty(form).primitive_bitwidth // 8)  # type: ignore[arg-type]
        if not offset[0]:
            return f"{self.array(pointer)} + {self.constant(size * offset[1].data.astype(np.uint64))}"
        distance = self.in_dtype(self.array(offset), self.form_of(offset).data, np.dtype(np.uint64))
        return f"{self.array(pointer)} + {size} * {distance}"

    def create_load(self, form: Form, pointer: tuple[bool, Any], *options: Any) -> str:
        mask = self.constant(np.ones(form.shape, dtype=bool))
        return self._load(form, pointer, mask, self.constant(np.zeros(form.shape, dtype=form.data)))

    def create_masked_load(
        self, form: Form, pointer: tuple[bool, Any], mask: tuple[bool, Any], other: tuple[bool, Any], *options: Any
    ) -> str:
        nothing = other == (False, None)
        instead = self.constant(np.zeros(form.shape, dtype=form.data)) if nothing else self.array(other)
        return self._load(form, pointer, self.array(mask), instead)

    def _load(self, form: Form, pointer: tuple[bool, Any], mask: str, other: str) -> str:
        memory = self.constant(interpreter._interpreter)
        return f"{memory}.load({self.array(pointer)}, {mask}, {other}, {self.constant(form.data)})"

    def create_masked_store(self, form: None, *given: Any) -> str:
        pointer, value, mask, *_ = given
        memory = self.constant(interpreter._interpreter)
        return f"{memory}.store({self.array(pointer)}, {self.array(value)}, {self.array(mask)})"

    def create_splat(self, form: Form, block: tuple[bool, Any], source: tuple[bool, Any]) -> str:
        return f"{self.constant(_repeated)}({self.array(source)}, {form.shape}, {self.constant(form.data)})"


class Asked:
    """In the builder's place, to be told what one of its members comes down to."""

    def unary_op(self, operand: Any, function: Any) -> Any:
        return function, [operand]

    def binary_op(self, left: Any, right: Any, function: Any) -> Any:
        return function, [left, right]

    def ternary_op(self, first: Any, second: Any, third: Any, function: Any) -> Any:
        return function, [first, second, third]

    def cast_impl(self, source: Any, dtype: Any) -> Any:
        return "cast", [source]


def _repeated(value: np.ndarray, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    made = np.empty(shape, dtype)
    made[...] = value
    return made
