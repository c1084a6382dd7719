"""The machine code of `_cuda`, for each architecture it was built for: what no run on one card would show."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.gpu import cuda_code
from lookahead_fused import _build as build

pytestmark = pytest.mark.xdist_group("cuda-code")

# 65536 registers of a multiprocessor, for 1024 threads at least.
MOST_REGISTERS = 64
# How many moments each rule has, and how many of them not every step has.
MOMENTS = {"Adam": (3, 1), "Sgd": (1, 0), "RMSprop": (3, 2), "RAdam": (2, 0), "Lion": (1, 0), "External": (1, 0)}
# The walks over moments in codes: a kernel for all patterns of dtypes.
CODED = ("coded", "coded_averaged")
# Those that divide, and take a root.
DIVIDE = ("Adam", "RMSprop", "RAdam")


@pytest.fixture(scope="module")
def path() -> Path:
    module = build.module("_cuda")
    if module is None:
        pytest.skip(build.reason("_cuda"))
    for name in ("cuobjdump", "nvdisasm"):
        if cuda_code.tool(name) is None:
            pytest.skip(f"{name} was found neither in triton's wheel nor on PATH")
    assert module.__file__ is not None
    return Path(module.__file__)


@pytest.fixture(scope="module")
def kernels(path: Path) -> list[cuda_code.Kernel]:
    return cuda_code.kernels(path)


def rule_of(kernel: cuda_code.Kernel) -> str:
    return re.split(r"[<,>]", kernel.name)[1]


def is_bf16(kernel: cuda_code.Kernel) -> bool:
    """Of the parameter."""
    return "," in kernel.name and "BFloat16" in kernel.name.split(",")[1]


def has_narrow_moments(kernel: cuda_code.Kernel) -> bool:
    return kernel.name.endswith(", BFloat16>") and kernel.name.count(",") == 3


def walks(kernels: list[cuda_code.Kernel], *kinds: str) -> Iterator[tuple[cuda_code.Kernel, str]]:
    for kernel in kernels:
        if kernel.name.partition("<")[0] in (kinds or ("chunks", "averaged")):
            yield kernel, f"{kernel.name} on {kernel.architecture}"


def test_every_kernel_is_there_for_every_architecture(
    kernels: list[cuda_code.Kernel], capsys: pytest.CaptureFixture[str]
) -> None:
    with capsys.disabled():
        print("\n" + cuda_code.table(kernels))
    module = build.module("_cuda")
    assert module is not None
    entries = [entry.partition("+")[0].replace(".", "") for entry in module.architectures.split()]
    names = {kernel.name for kernel in kernels}
    for kind in ("chunks<", "averaged<"):
        assert len([name for name in names if name.startswith(kind)]) == 12 * (len(MOMENTS) - 1) + 7
    for kind in CODED:
        assert len([name for name in names if name.startswith(f"{kind}<")]) == len(MOMENTS)
    assert len([name for name in names if name.startswith("rows<")]) == 2 * len(MOMENTS)
    assert {(k.name, k.architecture) for k in kernels} == {(name, f"sm_{entry}") for name in names for entry in entries}
    assert len(kernels) == len(names) * len(entries)


def test_no_spills_and_room_for_1024_threads(kernels: list[cuda_code.Kernel]) -> None:
    for kernel in kernels:
        where = f"{kernel.name} on {kernel.architecture}"
        # Spills stand on the stack; what is called local memory here is an array with a changing index. A row's thread
        # may keep a number there over the slow path of an fp64 division, which is a call.
        divides = kernel.name.startswith("rows") and "double" in kernel.name
        assert (kernel.stack <= 8 * divides, kernel.local) == (True, 0), where
        assert divides or not [code for code in kernel.opcodes() if re.match(r"(LDL|STL)\b", code)], where
        assert kernel.registers <= MOST_REGISTERS, where


def test_memory_is_reached_as_global_and_16_bytes_at_a_time(kernels: list[cuda_code.Kernel]) -> None:
    """Elements are loaded with a hint or without, and so is the table: counted are accesses of a size."""
    for kernel, where in walks(kernels):
        codes = kernel.opcodes()
        assert not [code for code in codes if re.match(r"(LD|ST)(\.|$)", code)], where
        wide = {
            op: sum(n for code, n in codes.items() if code.startswith(op) and ".128" in code) for op in ("LDG", "STG")
        }
        averaged = kernel.name.startswith("averaged")
        if "double, float" in kernel.name or (averaged and "double" in kernel.name):
            assert wide == {"LDG": 0, "STG": 0}, where
            continue
        moments, _ = MOMENTS[rule_of(kernel)]
        if has_narrow_moments(kernel):
            continue
        if averaged:
            # y or its whole master, z or x, the moments; what 16 bits have, a half of a master too, takes 8 bytes.
            wanted = (2 if rule_of(kernel) == "External" else moments + 2) - is_bf16(kernel)
            assert min(wide.values()) >= wanted, where
            continue
        # Each array has its place in the vector path: p, g, phi and what it caches, the moments.
        assert wide["LDG"] >= moments + 3, where
        assert wide["STG"] >= moments + 2, where


def test_enough_loads_are_in_flight(kernels: list[cuda_code.Kernel], capsys: pytest.CaptureFixture[str]) -> None:
    """By Little's law: an H100 moves 3.35 TB/s by 132 multiprocessors in some 700 ns, 18 KB each; here 32 at least.

    Counted is what a thread of the vector path has asked for before it needs the first of it: parameter, gradient and
    all moments, or parameter and one more in a sync alone. What not every step has is not counted: the parameter or its
    master, AMSGrad's maximum, RMSprop's momentum and its gradients' average.
    """
    lines = []
    for kernel, where in walks(kernels, "averaged"):
        # Around an optimizer that is not fused, 16 bits are refused: no row is walked by that one.
        unused = rule_of(kernel) == "External" and is_bf16(kernel)
        if "double" not in kernel.name and not unused and not has_narrow_moments(kernel):
            _, optional = MOMENTS[rule_of(kernel)]
            asked = cuda_code.bytes_asked_before_use(kernel) - 16 * optional
            assert asked * kernel.resident_threads(256) >= 32 << 10, where
    for kernel, where in walks(kernels, "chunks"):
        if "double, float" in kernel.name or has_narrow_moments(kernel):
            continue
        moments, optional = MOMENTS[rule_of(kernel)]
        if is_bf16(kernel):
            # Two paths: with a master a thread takes half as many elements, of the parameter 8 bytes without a hint.
            with_master, *others = cuda_code.bytes_asked_with_halves(kernel)
            assert (with_master + 8 - 16 * optional) * kernel.resident_threads(256) >= 32 << 10, where
            asked = max(others) - 16 * optional
        else:
            asked = cuda_code.bytes_asked_before_use(kernel) - 16 * ("Float16" in kernel.name) - 16 * optional
        in_flight = asked * kernel.resident_threads(256)
        lines.append(f"{where:58} {asked:4} bytes a thread, {in_flight // 1024:3} KB a multiprocessor")
        assert asked >= 16 * (1 + (rule_of(kernel) != "External") + moments - optional), where
        assert in_flight >= 32 << 10, where
    with capsys.disabled():
        print("\n" + "\n".join(sorted(lines)))


def test_narrow_moments_take_8_bytes_a_thread(
    kernels: list[cuda_code.Kernel], capsys: pytest.CaptureFixture[str]
) -> None:
    """Beside them what is computed in takes 16, fp32 parameters and gradients too, and what 16 bits have 8. In flight
    is what an H100 needs at least, by Little's law: see above."""
    lines = []
    for kernel, where in walks(kernels):
        if not has_narrow_moments(kernel):
            continue
        codes, (moments, optional) = kernel.opcodes(), MOMENTS[rule_of(kernel)]
        found = {
            (op, size): sum(n for code, n in codes.items() if code.startswith(op) and f".{size}" in code)
            for op in ("LDG", "STG")
            for size in ("64", "128")
        }
        external, averaged = rule_of(kernel) == "External", kernel.name.startswith("averaged")
        _, param, grad, _ = kernel.name.split(", ")
        in_fp32 = (param == "float") + (grad == "float" and not external)
        # phi and its momentum; z or x.
        assert found["LDG", "128"] >= in_fp32 + (1 if averaged else 2), where
        assert found["STG", "128"] >= (param == "float") + (1 if averaged else 2), where
        if not (external and averaged):
            in_halves = 2 - external - in_fp32 + moments + (not averaged)
            assert found["LDG", "64"] >= in_halves, where
            assert found["STG", "64"] >= moments + (param != "float") + (not averaged), where
            asked = sum(cuda_code.bytes_asked_with_halves(kernel)[:1]) - 8 * optional
            in_flight = asked * kernel.resident_threads(256)
            lines.append(f"{where:58} {asked:4} bytes a thread, {in_flight // 1024:3} KB a multiprocessor")
            assert in_flight >= 18 << 10, where
    with capsys.disabled():
        print("\n" + "\n".join(sorted(lines)))


def test_codes_take_4_bytes_a_thread(kernels: list[cuda_code.Kernel], capsys: pytest.CaptureFixture[str]) -> None:
    """Beside them what is in fp32 takes 16, and what has 16 bits 8. In flight is what an H100 needs at least, by
    Little's law (see above), in a step: a sync of its own has less to ask for."""
    lines = []
    for kernel, where in walks(kernels, *CODED):
        codes, (moments, optional) = kernel.opcodes(), MOMENTS[rule_of(kernel)]
        external, averaged = rule_of(kernel) == "External", kernel.name.startswith("coded_averaged")
        found = {
            (op, size): sum(n for code, n in codes.items() if re.fullmatch(rf"{op}\.E(\.EF)?{size}(\.SYS)?", code))
            for op in ("LDG", "STG")
            for size in ("", r"\.64", r"\.128", r"\.U8")
        }
        assert not [code for code in codes if re.match(r"(LD|ST)(\.|$)", code)], where
        # Weights and gradient, of 32 bits and of 16; phi and its momentum, z, or x.
        assert found["LDG", r"\.128"] >= 2 - external + (1 if averaged else 2), where
        assert found["STG", r"\.128"] >= 1 + (1 if averaged else 2), where
        assert found["LDG", r"\.64"] >= 3 - external, where
        assert found["STG", r"\.64"] >= 3, where
        # The moments', and the first one's copy.
        of_moments = 0 if external and averaged else moments + (not averaged)
        assert found["LDG", ""] >= of_moments, where
        assert found["STG", ""] >= of_moments, where
        # Where they are taken one by one.
        assert found["LDG", r"\.U8"] == found["STG", r"\.U8"] == 4 * of_moments, where
        if not external and not averaged:
            # The gradient is loaded in fp32 or, by 8 bytes, in 16 bits.
            asked = cuda_code.bytes_asked_with_codes(kernel)[0] - 8 - 4 * optional
            in_flight = asked * kernel.resident_threads(256)
            lines.append(f"{where:58} {asked:4} bytes a thread, {in_flight // 1024:3} KB a multiprocessor")
            assert in_flight >= 18 << 10, where
    with capsys.disabled():
        print("\n" + "\n".join(sorted(lines)))


def test_a_block_s_largest_is_found_in_registers(kernels: list[cuda_code.Kernel]) -> None:
    """By one instruction, or on the oldest architecture by five shuffles. Nothing is written to shared memory but what
    the first thread prepares for its block."""
    for kernel, where in walks(kernels, *CODED):
        codes = kernel.opcodes()
        if rule_of(kernel) == "External" and kernel.name.startswith("coded_averaged"):
            continue
        reduced = sum(n for code, n in codes.items() if re.match(r"C?REDUX\.MAX", code))
        shuffled = sum(n for code, n in codes.items() if code.startswith("SHFL.BFLY"))
        moments, _ = MOMENTS[rule_of(kernel)]
        assert reduced >= moments or kernel.architecture == "sm_75", where
        assert shuffled >= 5 * moments if kernel.architecture == "sm_75" else shuffled == 0, where
        barriers = [i for i, line in enumerate(kernel.code) if cuda_code.opcode(line).startswith("BAR.SYNC")]
        assert len(barriers) == 1, where
        assert not [line for line in kernel.code[barriers[0] :] if cuda_code.opcode(line).startswith("STS")], where


def test_the_module_is_small(path: Path) -> None:
    assert path.stat().st_size <= 10 << 20


def test_what_a_file_holds_is_compared_with_what_was_asked_for(
    path: Path, kernels: list[cuda_code.Kernel], capsys: pytest.CaptureFixture[str]
) -> None:
    """The check of `make wheel ARCHS=...`: exactly the list, PTX apart from machine code."""
    module = build.module("_cuda")
    assert module is not None
    built = module.architectures
    assert cuda_code.expected(built) == cuda_code.contents(path, kernels)
    assert cuda_code.expected("9.0;10.0a+PTX") == {"sm_90", "sm_100a", "compute_100a"}
    assert cuda_code.main(["--expect", built, str(path)]) == 0
    assert cuda_code.main(["--expect", f"{built} 99.0", str(path)]) == 1
    assert "built for another list than" in capsys.readouterr().out


def test_the_rules_are_rounded_operation_by_operation(kernels: list[cuda_code.Kernel]) -> None:
    """Outside of the sequences that make an IEEE division or root, nothing is fused, nothing approximate.

    Those sequences are recognized by where they stand: a rule without division and root has none of their
    instructions, and one with them has an approximate start (MUFU) for each division and root, and no more.
    """
    for kernel, where in walks(kernels, "chunks", "averaged", *CODED):
        codes = kernel.opcodes()
        fused = [code for code in codes if re.match(r"(FFMA|DFMA|HFMA2(?!\.MMA)|FSWZ)", code)]
        starts = {code for code in codes if code.startswith("MUFU")}
        if rule_of(kernel) not in DIVIDE:
            assert [code for code in fused if not _moves_a_constant(kernel, code)] == [], where
            assert starts == set(), where
        else:
            assert starts <= {"MUFU.RCP", "MUFU.RSQ", "MUFU.RCP64H", "MUFU.RSQ64H"}, where


def _moves_a_constant(kernel: cuda_code.Kernel, code: str) -> bool:
    """The compiler spreads moves over the pipes: HFMA2 R1, -RZ, RZ, 0, 1 sets a register."""
    return all("-RZ, RZ" in line for line in kernel.code if cuda_code.opcode(line) == code)


def test_ptx_asks_for_nothing_fused_or_approximate(path: Path) -> None:
    """There a division is one instruction. The machine code for every architecture comes of the same source."""
    text = cuda_code.ptx_text(path)
    if not text:
        pytest.skip("the module holds no PTX")
    assert re.search(r"\bdiv\.rn\.f32\b", text)
    assert re.search(r"\bsqrt\.rn\.f32\b", text)
    assert re.findall(r"\b(?:fma|mad)\.\w+\.f\d+\b|\.approx\b|\.full\b|\.ftz\b", text) == []
    # Without a rounding mode the assembler may fuse.
    assert re.findall(r"\b(?:add|sub|mul)\.f(?:32|64)\b", text) == []


def test_bf16_is_rounded_by_an_instruction_where_there_is_one(kernels: list[cuda_code.Kernel]) -> None:
    """But for one that has a master, as all have whose policy averages: there integers tell the halves apart."""
    for kernel, where in walks(kernels):
        if is_bf16(kernel):
            rounds = [code for code in kernel.opcodes() if re.match(r"F2FP?\..*BF16", code)]
            assert bool(rounds) is (kernel.architecture != "sm_75" and kernel.name.startswith("chunks")), where


def test_no_fp64_outside_of_fp64(kernels: list[cuda_code.Kernel]) -> None:
    for kernel, where in walks(kernels, "chunks", "averaged", *CODED):
        if "double" not in kernel.name:
            wide = [code for code in kernel.opcodes() if re.match(r"D(ADD|MUL|FMA|SETP|MNMX)|MUFU.*64|.*F64", code)]
            assert wide == [], where


def test_the_check_sees_a_fused_operation() -> None:
    """The patterns above match what they are meant for."""
    line = "@P0 FFMA.FTZ R1, R2, R3, R4 ;"
    assert cuda_code.opcode(line) == "FFMA.FTZ"
    assert cuda_code.opcode("@!UP1 LD.E.128 R4, [R2.64] ;") == "LD.E.128"
    assert cuda_code.opcode("LDG.E.EF.128 R4, desc[UR4][R2.64] ;") == "LDG.E.EF.128"
