"""Reads the machine code out of a compiled `_cuda`, and lists what wheels or modules hold of it.

    python -m bench.gpu.cuda_code [--expect LIST] FILE...

With `--expect "9.0 12.0+PTX"` it fails where that is not exactly what they hold. `cuobjdump` and `nvdisasm` come with
triton's wheel and with the CUDA toolkit.
"""

from __future__ import annotations

import functools
import importlib.util
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Kernel:
    """One kernel for one architecture. `code` is its machine code, an instruction a line."""

    name: str
    architecture: str
    registers: int
    stack: int
    local: int
    code: tuple[str, ...]

    def opcodes(self) -> Counter[str]:
        """How often each instruction stands there, with its modifiers."""
        return Counter(opcode(line) for line in self.code)

    def resident_threads(self, block: int) -> int:
        """How many threads a multiprocessor has room for, in blocks of so many: by registers and by the hardware."""
        most = {"sm_75": 1024, "sm_86": 1536, "sm_89": 1536, "sm_120": 1536}.get(self.architecture, 2048)
        # Registers are handed out to warps, 8 for each thread at a time.
        by_registers = 65536 // (32 * -(-self.registers // 8) * 8) * 32
        return min(most, by_registers) // block * block


def tool(name: str) -> str | None:
    """A program of the CUDA toolkit, from triton's wheel or from PATH."""
    triton = importlib.util.find_spec("triton")
    for place in (triton.submodule_search_locations or ()) if triton else ():
        program = Path(place, "backends", "nvidia", "bin", name)
        if program.is_file():
            return str(program)
    return shutil.which(name)


def opcode(line: str) -> str:
    return re.sub(r"^@!?U?P\w+\s+", "", line).split()[0].rstrip(";")


def resources(module: Path) -> dict[tuple[str, str], dict[str, int]]:
    """For every architecture and kernel in a module the bytes of its STACK and LOCAL memory, and its registers, REG. A
    cubin is for one architecture, which is not named, but "". Quicker than the machine code by far."""
    cuobjdump = tool("cuobjdump")
    assert cuobjdump is not None
    usage: dict[tuple[str, str], dict[str, int]] = {}
    architecture = function = ""
    for line in _output(cuobjdump, "-res-usage", str(module)).splitlines():
        if found := re.search(r"^arch = (sm_\w+)", line):
            architecture = found[1]
        elif found := re.search(r"^ *Function (\S+):", line):
            function = found[1]
        elif found := re.findall(r"(REG|STACK|LOCAL):(\d+)", line):
            usage[architecture, function] = {key: int(value) for key, value in found}
    return usage


@functools.cache
def kernels(module: Path) -> list[Kernel]:
    """Every kernel of every architecture in a module, or in a cubin."""
    cuobjdump = tool("cuobjdump")
    assert cuobjdump is not None
    result = []
    architecture = function = ""
    code: dict[tuple[str, str], list[str]] = {}
    for line in _output(cuobjdump, "-sass", str(module)).splitlines():
        if found := re.search(r"^\s*(?:code for|arch =) (sm_\w+)", line):
            architecture = found[1]
        elif found := re.search(r"^\s*Function : (\S+)", line):
            function = found[1]
        elif found := re.search(r"/\*[0-9a-f]{4,}\*/\s+(.*?;)", line):
            code.setdefault((architecture, function), []).append(found[1].strip("{} "))
    for (architecture, function), used in resources(module).items():
        if not architecture:
            (architecture,) = (arch for arch, name in code if name == function)
        lines = tuple(code[architecture, function])
        result.append(Kernel(_short(function), architecture, used["REG"], used["STACK"], used.get("LOCAL", 0), lines))
    return result


def bytes_asked_before_use(kernel: Kernel) -> int:
    """What the first run of 16-byte loads asks for, before an instruction reads what one of them brings."""
    return next(iter(_runs_of_loads(kernel, {"128": 16})), 0)


def bytes_asked_with_halves(kernel: Kernel) -> list[int]:
    """The same of every run, counted with loads of 8 bytes: those that have a hint, as no load of the table has."""
    return _runs_of_loads(kernel, {"128": 16, "EF.64": 8})


def bytes_asked_with_codes(kernel: Kernel) -> list[int]:
    """The same with the codes of moments, 4 bytes."""
    return _runs_of_loads(kernel, {"128": 16, "EF.64": 8, "EF": 4})


def _runs_of_loads(kernel: Kernel, counted: dict[str, int]) -> list[int]:
    runs, asked, pending = [], 0, set[int]()
    for line in kernel.code:
        registers = [int(r) for r in re.findall(r"\bR(\d+)\b", line)]
        found = re.search(rf"LDG\.\S*({'|'.join(map(re.escape, counted))})\S* R(\d+),", line)
        if found:
            # Its address may lie where its value will.
            size = counted[found[1]]
            pending |= set(range(int(found[2]), int(found[2]) + size // 4))
            asked += size
        elif pending & set(registers[0 if _only_reads(line) else 1 :]):
            runs.append(asked)
            asked, pending = 0, set()
    return [*runs, asked] if asked else runs


def _only_reads(line: str) -> bool:
    return opcode(line).startswith(("STG", "STS", "ISETP", "FSETP", "DSETP"))


def ptx(module: Path) -> list[str]:
    """The architectures that a module has PTX for."""
    cuobjdump = tool("cuobjdump")
    assert cuobjdump is not None
    return sorted(set(re.findall(r"\.(sm_\w+)\.ptx", _output(cuobjdump, "-lptx", str(module)))))


def ptx_text(module: Path) -> str:
    """All PTX in a module; empty where it has none."""
    cuobjdump = tool("cuobjdump")
    assert cuobjdump is not None
    return _output(cuobjdump, "-ptx", str(module))


def _short(mangled: str) -> str:
    """chunks<Adam, BFloat16, float, float> or coded<Adam>, of the mangled name."""
    letters = {"f": "float", "d": "double"}
    names = re.search(
        r"\d(rows|chunks|averaged|coded|coded_averaged)INS0_\d+([A-Z][a-zA-Z]+?)E(.*?)EEvNS_6LaunchE", mangled
    )
    if names is None:
        return mangled
    rest = re.findall(r"NS0?_\d+(\w+?)E|(S\d?_)|([fd])", names[3])
    types: list[str] = []
    last = ""
    for named, again, letter in rest:
        # What is named again is the class that was named last.
        last = named or last
        types.append(last if named or again else letters[letter])
    return f"{names[1]}<{', '.join([names[2], *types])}>"


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def table(found: list[Kernel]) -> str:
    lines = [f"{'kernel':48} {'arch':7} {'registers':>9} {'stack':>5} {'128-bit LDG/STG':>15} {'narrower':>8}"]
    for kernel in sorted(found, key=lambda k: (k.name, by_number(k.architecture))):
        codes = kernel.opcodes()
        access = {name: n for name, n in codes.items() if name.startswith(("LDG", "STG"))}
        wide = [sum(n for name, n in access.items() if name.startswith(op) and ".128" in name) for op in ("LDG", "STG")]
        narrow = sum(access.values()) - sum(wide)
        lines.append(
            f"{kernel.name:48} {kernel.architecture:7} {kernel.registers:9} {kernel.stack:5} "
            f"{f'{wide[0]}/{wide[1]}':>15} {narrow:8}"
        )
    return "\n".join(lines)


def contents(module: Path, found: list[Kernel]) -> set[str]:
    """What a module is built for: "sm_90" for machine code, "compute_90" for PTX."""
    return {kernel.architecture for kernel in found} | {name.replace("sm_", "compute_") for name in ptx(module)}


def expected(architectures: str) -> set[str]:
    """The same of an entry of TORCH_CUDA_ARCH_LIST: "9.0 12.0+PTX" is sm_90, sm_120 and compute_120."""
    entries = [entry.partition("+") for entry in architectures.replace(";", " ").split()]
    numbers = [(number.replace(".", ""), suffix) for number, _, suffix in entries]
    return {f"sm_{n}" for n, _ in numbers} | {f"compute_{n}" for n, suffix in numbers if suffix == "PTX"}


def by_number(name: str) -> tuple[int, str]:
    return int(re.sub(r"\D", "", name)), name


def with_code(names: list[str]) -> list[str]:
    """Of a wheel's files those with machine code: where it is for several Pythons, the library they load."""
    libraries = [name for name in names if "/liblookahead_fused_cuda-" in name]
    return libraries or [name for name in names if "/_cuda." in name]


def main(words: list[str]) -> int:
    wanted, paths = (expected(words[1]), words[2:]) if words[:1] == ["--expect"] else (None, words)
    status = 0
    for path in paths:
        with tempfile.TemporaryDirectory() as directory:
            modules = [Path(path)]
            if path.endswith(".whl"):
                with zipfile.ZipFile(path) as archive:
                    names = with_code(archive.namelist())
                    modules = [Path(archive.extract(name, directory)) for name in names]
            for module in modules:
                found = kernels(module)
                print(f"{path}: {module.name}, {module.stat().st_size} bytes")
                held = contents(module, found)
                print("built for", *sorted(held, key=by_number))
                print(table(found))
                if wanted is not None and held != wanted:
                    print(f"{path}: built for another list than {' '.join(sorted(wanted, key=by_number))}")
                    status = 1
            if not modules:
                print(f"{path}: no _cuda in it")
                status = 1 if wanted else status
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
