"""Which GPUs there are, and whether the CUDA backend serves them: `python -m bench.gpu.card` prints it as JSON.

Asked in a process of its own: a driver that hangs must not take the report with it, and what a stage has just built is
imported anew.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass

from bench.gpu.runner import Outcome, Piece, run

# The first import of torch, from a disk that has just been mounted, is among it.
LIMIT = 120.0
# Of the line with the JSON: torch and a driver may print others.
START = "card: "


@dataclass(frozen=True)
class Card:
    """The GPUs of this machine.

    Attributes:
        names: as torch has them.
        architectures: their compute capabilities, as TORCH_CUDA_ARCH_LIST has them.
        serves: whether the CUDA backend serves one of them.
        reason: why it does not.
        triton: why Triton does not serve one of them, or "".
        driver: what the driver lists, where torch sees none.
        unknown: why it is not known whether there are any.
    """

    names: tuple[str, ...] = ()
    architectures: tuple[str, ...] = ()
    serves: bool = False
    reason: str = ""
    triton: str = ""
    driver: str = ""
    unknown: str = ""

    def refusal(self, needs: str) -> Outcome | None:
        """Why what needs "cuda" or "triton" is not run. A GPU that the first of them does not serve is a failure, as is
        one that may be there."""
        if self.unknown:
            return Outcome("", "FAILED", f"it is not known whether there is a GPU: {self.unknown}")
        if needs == "triton" and self.names:
            return Outcome("", "skipped", self.triton) if self.triton else None
        if needs == "cuda" and self.serves:
            return None
        if self.names or self.driver:
            found = ", ".join(self.names) or self.driver
            return Outcome(
                "", "FAILED", f"there is a GPU ({found}), and the CUDA backend does not serve it: {self.reason}"
            )
        return Outcome("", "skipped", f"no GPU here: {self.reason}")


def look() -> Card:
    """Raises nothing that torch or a broken driver raises not."""
    import torch

    import lookahead_fused

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    numbers = {torch.cuda.get_device_capability(index) for index in range(count)}
    status = lookahead_fused.backends()
    return Card(
        tuple(torch.cuda.get_device_name(index) for index in range(count)),
        tuple(f"{major}.{minor}" for major, minor in sorted(numbers)),
        status["cuda"].available,
        status["cuda"].reason,
        status["triton"].reason,
        # Not torch's word alone: a build of torch without CUDA sees no GPU where there is one.
        "" if count else _listed(),
    )


def _listed() -> str:
    said: list[str] = []
    outcome = run(Piece("driver", ["nvidia-smi", "-L"], LIMIT / 6), said.append)
    return said[0].strip() if outcome.verdict == "passed" and said and "GPU" in said[0] else ""


def ask() -> Card:
    """The same, of a process of its own: one that fails or hangs does not take this one with it."""
    said: list[str] = []
    outcome = run(Piece("card", [sys.executable, "-m", "bench.gpu.card"], LIMIT), said.append)
    if outcome.verdict != "passed":
        return Card(unknown=f"asking torch: {outcome}")
    told = json.loads(next(line for line in said if line.startswith(START)).removeprefix(START))
    return Card(**{**told, "names": tuple(told["names"]), "architectures": tuple(told["architectures"])})


if __name__ == "__main__":
    print(START + json.dumps(asdict(look())))
