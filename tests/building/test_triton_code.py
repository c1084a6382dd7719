"""What Triton's compiler makes of the kernels for NVIDIA's and AMD's GPUs, ahead of time: no GPU is needed for that."""

from __future__ import annotations

import functools
import itertools
import linecache
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import triton_on_host

from bench.gpu import cuda_code
from lookahead_fused import _build as build
from lookahead_fused.backends import triton as triton_backend

pytestmark = pytest.mark.skipif(
    bool(triton_on_host.not_compiled()), reason=f"compiles with Triton: {triton_on_host.not_compiled()}"
)

NVIDIA = {"sm_80": 80, "sm_90": 90, "sm_100": 100, "sm_120": 120}
AMD = ("gfx90a", "gfx942")
BEFORE_3_7 = not triton_on_host.not_compiled() and triton_on_host.release() < (3, 7)


def targets(*names: str) -> Any:
    """A target's kernels are compiled once, by the worker that has its tests."""
    cases = [pytest.param(name, marks=pytest.mark.xdist_group(f"triton-{name}")) for name in names]
    return pytest.mark.parametrize("target", cases)


RULES = ("adam", "sgd", "external")
FP32, FP64, BF16, FP16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
CODES = torch.uint8
# Of parameters, gradients and moments.
PATTERNS = (
    (FP32, FP32, FP32),
    (BF16, FP32, FP32),
    (FP16, FP16, FP32),
    (FP64, FP64, FP64),
    (FP32, FP32, BF16),
    (BF16, BF16, BF16),
    (FP32, FP32, CODES),
    (BF16, BF16, CODES),
)
# For one target each of these is compiled with every pattern, and the further rules and the policies that average,
# which have a walk of their own, with some. Up to its last stages Triton makes the same of a kernel for every target:
# of AMD's, one has every rule and every pattern; the others have every pattern, and the largest rule in each width that
# it computes in.
IN_FULL = "sm_90"
FURTHER = (
    ("rmsprop", 0),
    ("rmsprop", 3),
    ("radam", 1),
    ("lion", 2),
    ("rmsprop", 4),
    ("lion", 5),
    ("rmsprop", 6),
    ("lion", 7),
)
AVERAGED = (
    ("adam averaged", 0),
    ("adam averaged", 1),
    ("rmsprop averaged", 3),
    ("external averaged", 0),
    ("radam averaged", 4),
    ("adam averaged", 5),
    ("rmsprop averaged", 6),
    ("adam averaged", 7),
)
IN_PART = {
    "gfx942": (
        ("adam", 0),
        ("adam", 1),
        ("adam", 3),
        ("adam", 4),
        ("adam", 5),
        ("adam", 6),
        ("adam", 7),
        ("sgd", 2),
        ("external", 3),
        *FURTHER,
        *AVERAGED,
    )
}
LEAST = (
    ("adam", 0),
    ("adam averaged", 1),
    ("adam", 3),
    ("sgd", 2),
    ("adam", 4),
    ("adam averaged", 5),
    ("adam", 7),
    ("rmsprop averaged", 6),
)
# Those that divide, and take a root.
DIVIDES = ("adam", "rmsprop", "radam")
# Which arrays a walk reads and writes, each in one place; but phi, which starts in one place and is synced in another.
ARRAYS = {
    "adam": {
        "param": "rw",
        "grad": "r",
        "slow": "wrw",
        "cached": "rw",
        "companion": "rw",
        "m0": "rw",
        "m1": "rw",
        "m2": "rw",
    },
    "sgd": {"param": "rw", "grad": "r", "slow": "wrw", "cached": "rw", "companion": "rw", "m0": "rw"},
    "rmsprop": {
        "param": "rw",
        "grad": "r",
        "slow": "wrw",
        "cached": "rw",
        "companion": "rw",
        "m0": "rw",
        "m1": "rw",
        "m2": "rw",
    },
    "radam": {"param": "rw", "grad": "r", "slow": "wrw", "cached": "rw", "companion": "rw", "m0": "rw", "m1": "rw"},
    "lion": {"param": "rw", "grad": "r", "slow": "wrw", "cached": "rw", "companion": "rw", "m0": "rw"},
    "external": {"param": "rw", "slow": "rw", "cached": "rw", "companion": "rw", "m0": "rw"},
    "adam averaged": {"param": "rw", "grad": "r", "slow": "rw", "m0": "rw", "m1": "rw", "m2": "rw"},
    "rmsprop averaged": {"param": "rw", "grad": "r", "slow": "rw", "m0": "rw", "m1": "rw", "m2": "rw"},
    "radam averaged": {"param": "rw", "grad": "r", "slow": "rw", "m0": "rw", "m1": "rw"},
    "external averaged": {"param": "rw", "slow": "w", "companion": "rw"},
}


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    import triton

    with triton.knobs.cache.scope():
        triton.knobs.cache.dir = str(tmp_path_factory.mktemp("triton"))
        yield


@functools.cache
def compiled(target: str, kernel: str, rule: str, param: torch.dtype, grad: torch.dtype, state: torch.dtype) -> Any:
    """A kernel as the backend would have it compiled, from the second step on as from the first."""
    kernels = triton_backend.kernels()
    warps = 1 if kernel == "rows" else kernels.THREADS // gpu(target).warp_size
    return compiled_for(target, source(kernels, kernel, rule, param, grad, state), warps)


@functools.cache
def compiled_norm(target: str, kernel: str, grad: torch.dtype) -> Any:
    """The same of a kernel of `backends/triton_norm.py`."""
    from triton.compiler import ASTSource

    numbers = dict.fromkeys(("gradients_at", "first_block_at", "done_at", "partial_at", "skips"), "i32")
    types = {**numbers, "plan": "*u8", "moving": "*u8", "places": "*i64", "skipped": "*i64", "count": "i64"}
    types |= dict.fromkeys(("sums", "clip"), "*fp64") | dict.fromkeys(("grad_scale", "found_inf", "skip"), "*fp32")
    function = getattr(triton_backend.norm_kernels(), kernel)
    signature = {name: types.get(name, "constexpr") for name in function.arg_names}
    constants = {"G": triton_backend.kernels().DTYPES[grad]} if "G" in signature else {}
    warps = max(1, 32 // gpu(target).warp_size) if kernel == "squares" else 1
    return compiled_for(target, ASTSource(function, signature, constexprs=constants), warps)


def gpu(target: str) -> Any:
    from triton.backends.compiler import GPUTarget

    return GPUTarget("hip", target, 64) if target in AMD else GPUTarget("cuda", NVIDIA[target], 32)


def compiled_for(target: str, asked: Any, warps: int) -> Any:
    import triton

    return triton.compile(asked, target=gpu(target), options={"enable_fp_fusion": False, "num_warps": warps})


def source(
    kernels: ModuleType, kernel: str, rule: str, param: torch.dtype, grad: torch.dtype, state: torch.dtype
) -> Any:
    """A kernel for its compiler."""
    from triton.compiler import ASTSource

    types = {"fixed": "*u8", "moving": "*u8", "steps": "*fp64" if param == FP64 else "*fp32"}
    types |= {
        "grad_scale": "*fp32",
        "clip": "*fp64",
        "found_inf": "*fp32",
        "row_count": "i32",
        "chunks_at": "i32",
        "gradients_at": "i32",
        "pass_": "i32",
    }
    policy = kernels.POLICIES["schedule_free" if is_averaged(rule) else "lookahead"]
    constants = {
        "rule": kernels.RULES[rule.split()[0]],
        "policy": policy,
        "averages": policy.averages,
        "P": kernels.DTYPES[param],
        "G": kernels.DTYPES[grad],
        "S": kernels.DTYPES[state],
    }
    function = getattr(kernels, kernel)
    signature = {name: types.get(name, "constexpr") for name in function.arg_names}
    constants = {name: constants[name] for name in signature if signature[name] == "constexpr"}
    aligned = {(i,): [["tt.divisibility", 16]] for i in range(3)}
    return ASTSource(function, signature, constexprs=constants, attrs=aligned)


def is_narrow(state: torch.dtype) -> bool:
    return state.itemsize < 4


def has_codes(state: torch.dtype) -> bool:
    return state == CODES


def is_averaged(rule: str) -> bool:
    return rule.endswith("averaged")


def walks(target: str) -> Iterator[tuple[str, str, torch.dtype, torch.dtype, torch.dtype, Any]]:
    in_full = (*itertools.product(RULES, range(len(PATTERNS))), *FURTHER, *AVERAGED)
    for rule, i in in_full if target == IN_FULL else IN_PART.get(target, LEAST):
        pattern = PATTERNS[i]
        moments = " with codes" if has_codes(pattern[2]) else " with narrow moments" if is_narrow(pattern[2]) else ""
        yield f"{rule} of {pattern[0]}{moments} on {target}", rule, *pattern, compiled(target, "chunks", rule, *pattern)


def every_kernel(target: str) -> Iterator[tuple[str, Any]]:
    for where, rule, param, grad, state, walk in walks(target):
        yield where, walk
        if param in (FP32, FP64) and not is_narrow(state):
            yield f"rows of {where}", compiled(target, "rows", rule, param, grad, state)
    for grad in (FP32, BF16, FP16, FP64) if target == IN_FULL else (BF16,):
        yield f"squares of {grad} on {target}", compiled_norm(target, "squares", grad)
    yield f"clip on {target}", compiled_norm(target, "clip", FP64)


def arrays(rule: str, param: torch.dtype, grad: torch.dtype, state: torch.dtype) -> dict[str, tuple[str, int]]:
    """For each array how it is used, whatever of it a step runs, and the bytes of an element."""
    compute = 8 if param == FP64 else 4
    size = Counter({"param": param.itemsize, "grad": grad.itemsize})
    size |= dict.fromkeys(("cached", "m0", "m1", "m2"), state.itemsize)
    uses = dict(ARRAYS[rule])
    if param.itemsize < compute:
        uses["master"] = "rw"
        if param == BF16:
            size["master"] = 2
        elif is_averaged(rule):
            uses["param"] = "w"
    return {name: (use, size[name] or compute) for name, use in uses.items()}


def at_a_time(state: torch.dtype) -> int:
    """How many elements a thread takes. Where moments are codes, 16 bytes of fp32, and as many of each other array."""
    return 4 if has_codes(state) else 8


def width(state: torch.dtype, itemsize: int) -> int:
    """Of an access to an array, in bytes."""
    return at_a_time(state) * itemsize if has_codes(state) else 16


def sizes(rule: str, param: torch.dtype, grad: torch.dtype, state: torch.dtype) -> dict[str, tuple[int, int]]:
    """For each array the bytes for each element that the code reads and writes."""
    found = arrays(rule, param, grad, state)
    return {name: (uses.count("r") * size, uses.count("w") * size) for name, (uses, size) in found.items()}


def accesses(rule: str, param: torch.dtype, grad: torch.dtype, state: torch.dtype) -> dict[int, tuple[int, int]]:
    """Of each width how many accesses that takes a thread: reads and writes."""
    counts: dict[int, tuple[int, int]] = {}
    for uses, size in arrays(rule, param, grad, state).values():
        wide = width(state, size)
        each = at_a_time(state) * size // wide
        reads, writes = counts.get(wide, (0, 0))
        counts[wide] = reads + each * uses.count("r"), writes + each * uses.count("w")
    return counts


def test_what_a_walk_is_told_of_a_rule_are_constants() -> None:
    """As the newest Triton makes of any number in a tuple that is one, and the oldest does not."""
    from triton import JITFunction
    from triton.language import constexpr

    kernels = triton_backend.kernels()
    for told in (*kernels.RULES.values(), *kernels.POLICIES.values()):
        assert all(isinstance(value, (JITFunction, constexpr)) for value in told)


@pytest.mark.parametrize(
    ("kernel", "was", "edited"),
    [
        ("chunks", "second = max_v", "second = v"),  # in a rule's update
        ("rows", "1.0 - lr * hyper", "1.0 + lr * hyper"),  # in its prepare
        ("chunks", "multiply(factor, b - a)", "multiply(factor, a - b)"),  # in what an update calls
        ("chunks", "count // most * most", "count // most"),  # in the walk
        ("chunks", "(largest >> shift) + 1", "largest >> shift"),  # in how moments are encoded
        ("rows", "hypers", ""),  # in the compiled module's order of hyperparameters
    ],
)
def test_no_edited_kernel_is_taken_from_disk(
    kernel: str, was: str, edited: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triton keeps what it compiled under the hash of its source, and serves a later release with it."""

    def key(old: str = "", new: str = "") -> str:
        paths = [
            Path(str(triton_backend.kernels().__file__)).with_name(f"triton_{room}.py") for room in triton_on_host.ROOMS
        ]
        texts = {path.name: path.read_text(encoding="utf-8") for path in paths}
        assert any(old in text for text in texts.values())
        for name, text in texts.items():
            (tmp_path / name).write_text(text.replace(old, new) if old else text, encoding="utf-8")
        # Not from a file of bytecode, which is told from its source by seconds and a size.
        monkeypatch.setattr(sys, "dont_write_bytecode", True)
        linecache.clearcache()
        *_, module, _ = triton_on_host.kernels_again(tmp_path)
        found: str = source(module, kernel, "adam", FP32, FP32, FP32).hash()
        return found

    before = key()
    assert before == key()
    if edited:
        assert before != key(was, edited)
    else:
        native = build.module("_cpu")
        rules = {name: (found[0][::-1], *found[1:]) for name, found in native.rules().items()}  # type: ignore[union-attr]
        monkeypatch.setattr(native, "rules", lambda: rules)
        assert before != key()


# ------------------------------------------------------------------------------------------------------------
# NVIDIA


class Ptx:
    """Which array a wide access is to, by where its address comes from."""

    COLUMNS = (
        *("param", "grad", "step", "start", "y_interp", "weight_sum", "lr_max"),
        *("master", "slow", "cached", "cached scale", "companion", "m0", "m1", "m2", "scale 0", "scale 1", "scale 2"),
    )

    def __init__(self, text: str) -> None:
        self.lines = [re.sub(r"\s+", " ", line).strip() for line in text.splitlines()]
        self.made: dict[str, list[str]] = {}
        for line in self.lines:
            found = re.match(r"(?:@!?%p\d+ )?[a-z][\w.]* \{? ?(%\w+)", line)
            if found and not line.startswith(("st.", "bra", "setp")):
                self.made.setdefault(found[1], []).append(line)

    def accesses(self, widths: Iterable[int]) -> Iterator[tuple[str, str, bool, int]]:
        """("r" or "w", the array, whether it is masked, the bytes) for every access of some widths."""
        for line in self.lines:
            found = re.match(r"(@!?%p\d+ )?(ld|st)\.global(?:\.v(\d))?\.b(32|64) .*\[ ?(%rd\d+)", line)
            wide = int(found[3] or 1) * int(found[4]) // 8 if found else 0
            if found and wide in widths:
                yield {"ld": "r", "st": "w"}[found[2]], self._array(found[5]), found[1] is not None, wide

    def _array(self, register: str) -> str:
        found, seen, left = set(), {register}, [register]
        while left:
            for line in self.made.get(left.pop(), ()):
                if ld := re.match(r"ld\.global\.b64 \{ %rd\d+ \}, \[ (%rd\d+) \+ 0 \]", line):
                    found.add(self._column(ld[1]))
                    continue
                operands = set(re.findall(r"%r\w*\d+", line)) - seen
                seen |= operands
                left += operands
        # None of what is no row's: coefficients, for one.
        (name,) = found - {""} or {""}
        return name

    def _column(self, register: str) -> str:
        """Of the word at an address: a column of a row, nothing for one in a chunk, and else a gradient's."""
        (line,) = self.made[register]
        offset = 0
        if added := re.match(r"add\.s64 %rd\d+, (%rd\d+), (\d+);", line):
            offset = int(added[2])
            (line,) = self.made[added[1]]
        # A struct stands at its number times its size: by `mad`, and before Triton 3.5 by `mul` and `add`.
        lines = [line, *(made for register in re.findall(r"%rd\d+", line) for made in self.made.get(register, ()))]
        times = {int(found[1]) for x in lines if (found := re.match(r"(?:mad|mul)\.\S+ %rd\d+, %\w+, (\d+)[,;]", x))}
        sizes = build.module("_cpu").layout()  # type: ignore[union-attr]
        if sizes["ROW"] in times:
            return self.COLUMNS[offset // 8]
        return "" if sizes["CHUNK"] in times else "grad"


@targets(*NVIDIA)
def test_bytes_for_each_element(target: str) -> None:
    """Counted per array in the unmasked path, all of it in accesses of 16 bytes, or where moments are codes of four
    elements. Under no mask are the arrays that every row has; the others are asked for in the same accesses, by a
    predicate of their own, or in a branch."""
    for where, rule, param, grad, state, walk in walks(target):
        moved: Counter[tuple[str, str]] = Counter()
        always: Counter[str] = Counter()
        expected, own = sizes(rule, param, grad, state), arrays(rule, param, grad, state)
        widths = {width(state, size) for _, size in own.values()}
        for use, array, masked, wide in Ptx(walk.asm["ptx"]).accesses(widths):
            # Only beside codes, what is as wide is not all of an array's elements: scales are, and coefficients.
            assert array in own or has_codes(state), f"{where}: {array}"
            if array not in own or wide != width(state, own[array][1]):
                continue
            moved[array, use] += wide // at_a_time(state)
            always[array] += 0 if masked else wide // at_a_time(state)
        assert {name: (moved[name, "r"], moved[name, "w"]) for name in {name for name, _ in moved}} == expected, where
        if rule == "adam" and param == FP32 and not is_narrow(state):
            assert always == {"param": 8, "grad": 4, "slow": 8, "m0": 0, "m1": 0, "m2": 0, "cached": 0, "companion": 0}
        if rule == "adam" and param == BF16:
            assert (always["param"], always["master"]) == (4, 0)
        if rule == "adam" and param == FP16:
            # A whole master takes the parameter's place where it is read.
            assert (always["param"], always["master"]) == (2, 0)


@targets(*NVIDIA)
def test_ptx_rounds_operation_by_operation(target: str) -> None:
    """So Triton's compiler allows the CPU backend's bits: nothing is fused, nothing approximate, and the root and the
    division of the interpreter, NumPy's, are the ones that are compiled. It converts to 16 bits by rounding, which its
    interpreter does not: see `triton_on_host`."""
    for where, kernel in every_kernel(target):
        text = kernel.asm["ptx"]
        assert re.findall(r"\b(?:fma|mad)\.\w+\.f\d+|\.approx\b|\.full\b|\.ftz\b", text) == [], where
        assert re.findall(r"\b(?:add|sub|mul|div|sqrt)\.f(?:32|64)", text) == [], where
        # The assembler of Triton 3.6 fuses these with a sum, rounded as they say or not.
        assert not (BEFORE_3_7 and "mul.rn.f32x2" in text), where
    for where, rule, param, _, _, walk in walks(target):
        text = walk.asm["ptx"]
        width = "f64" if param == FP64 else "f32"
        for operation in ("div", "sqrt"):
            assert (f"{operation}.rn.{width}" in text) == (rule.split()[0] in DIVIDES), where
        if param != FP64:
            assert "f64" not in text, where
        # A master's halves are told apart by integers.
        if param.itemsize == 2 and not (is_averaged(rule) and param == BF16):
            assert re.search(r"cvt\.rn\.(bf16|f16)(x2)?\.f32", text), where


@targets(*NVIDIA)
def test_machine_code_spills_and_fuses_nothing(target: str, tmp_path: Path) -> None:
    for name in ("cuobjdump", "nvdisasm"):
        if cuda_code.tool(name) is None:
            pytest.skip(f"{name} was found neither in triton's wheel nor on PATH")
    for where, kernel in every_kernel(target):
        path = tmp_path / f"{where}.cubin"
        path.write_bytes(kernel.asm["cubin"])
        (used,) = cuda_code.resources(path).values()
        # Three blocks of 128 threads are resident, with four arrays' 32 bytes for each thread: 48 KiB under way. In
        # fp64 two are, with 64 bytes. What Triton makes of the largest walks before 3.7 needs more registers.
        most = 65536 // ((2 if "float64" in where or BEFORE_3_7 else 3) * 128)
        spilled = 16 if BEFORE_3_7 else 0
        assert (used["STACK"] <= spilled, used["LOCAL"], used["REG"] <= most) == (True, 0, True), f"{where}: {used}"
    for where, rule, param, *_ in walks(target):
        # With a division or a root come sequences of fused operations that round it correctly, none of them packed; and
        # 16 bits are computed in 32.
        divides = rule.split()[0] in DIVIDES
        if divides or param in (FP32, FP64):
            (code,) = cuda_code.kernels(tmp_path / f"{where}.cubin")
            fusing = r"FFMA2" if divides else r"[FD]FMA"
            fused = [x for x in code.code if re.match(fusing, cuda_code.opcode(x)) and "-RZ, RZ" not in x]
            assert fused == [], where


# ------------------------------------------------------------------------------------------------------------
# AMD


@targets(*AMD)
def test_amd_code(target: str) -> None:
    """128 bits an access on the unmasked path, or where moments are codes four elements, nothing spilled, nothing fused
    outside of a division or a root, and subnormal numbers kept."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend

    try:
        make_backend(GPUTarget("hip", target, 64)).hash()
    except Exception as error:
        if "linker" not in str(error):
            raise
        pytest.skip(f"links with a program that triton {triton_backend.version()} does not bring: {error}")
    for where, rule, param, grad, state, walk in walks(target):
        text = walk.asm["amdgcn"]
        for wide, (reads, writes) in accesses(rule, param, grad, state).items():
            words = {4: "dword", 8: "dwordx2", 16: "dwordx4"}[wide]
            # The table too is read 16 bytes at a time where its words lie side by side.
            assert len(re.findall(rf"\b(?:global|buffer)_load_{words}\b", text)) >= reads, where
            stores = len(re.findall(rf"\b(?:global|buffer)_store_{words}\b", text))
            # A loop that is short enough is unrolled; and what follows a branch may stand on both ways, before Triton
            # 3.7, and of Lion beside codes in 3.8.
            repeated = rule == "external averaged" and stores % writes == 0
            twice = (BEFORE_3_7 and stores > writes) or (has_codes(state) and writes < stores <= 2 * writes)
            # As wide as four codes are a scale, and an element where nothing is aligned.
            assert stores == writes or repeated or twice or (wide == 4 and stores > writes), where
        if rule.split()[0] not in DIVIDES:
            assert re.findall(r"\bv_(?:pk_)?(?:fma|mac)\w*", text) == [], where
    for where, kernel in every_kernel(target):
        text = kernel.asm["amdgcn"]
        counts = dict(re.findall(r"\.(vgpr_spill_count|sgpr_spill_count|private_segment_fixed_size):\s*(\d+)", text))
        spilled, scalars = counts.pop("vgpr_spill_count"), counts.pop("sgpr_spill_count")
        assert (spilled, counts) == ("0", {"private_segment_fixed_size": "0"}), where
        # Scalar ones go into lanes of a vector register, never to memory. gfx90a rounds to bf16 by masks, and averaging
        # has a few more.
        most = 16 if BEFORE_3_7 else 4 if "averaged of torch.bfloat16" in where else 0
        assert int(scalars) <= most, f"{where}: {scalars}"
        assert re.findall(r"\b(?:scratch|flat)_(?:load|store)\w*", text) == [], where
        assert re.findall(r"\.amdhsa_float_denorm_mode_(?:32|16_64) (\d)", text) == ["3", "3"], where
