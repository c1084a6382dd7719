"""Which GPUs there are, and whether the CUDA backend serves them: `python -m bench.gpu.card` prints it as JSON.

Asked in a process of its own: a driver that hangs must not take the report with it, and what a stage has just built is
imported anew.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, dataclass

from bench.gpu.runner import ROOT, Outcome

# The first import of torch, from a disk that has just been mounted, is among it.
LIMIT = 120.0


@dataclass(frozen=True)
class Card:
    """The GPUs of this machine.

    Attributes:
        names: as torch has them.
        architectures: their compute capabilities, as TORCH_CUDA_ARCH_LIST has them.
        serves: whether the CUDA backend serves one of them.
        reason: why it does not.
        driver: what the driver lists, where torch sees none.
        unknown: why it is not known whether there are any.
    """

    names: tuple[str, ...] = ()
    architectures: tuple[str, ...] = ()
    serves: bool = False
    reason: str = ""
    driver: str = ""
    unknown: str = ""

    def refusal(self, needs: str) -> Outcome | None:
        """Why what needs a "card" or its "backend" is not run. A GPU that is there and is not served is a failure, as
        is one that may be there."""
        if self.unknown:
            return Outcome("", "FAILED", f"it is not known whether there is a GPU: {self.unknown}")
        if self.serves or (needs == "card" and self.names):
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
    status = lookahead_fused.backends()["cuda"]
    return Card(
        tuple(torch.cuda.get_device_name(index) for index in range(count)),
        tuple(f"{major}.{minor}" for major, minor in sorted(numbers)),
        status.available,
        status.reason,
        # Not torch's word alone: a build of torch without CUDA sees no GPU where there is one.
        "" if count else _listed(),
    )


def _listed() -> str:
    try:
        told = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=LIMIT / 6)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return told.stdout.strip() if told.returncode == 0 and "GPU" in told.stdout else ""


def ask() -> Card:
    """The same, of a process of its own: one that fails or hangs does not take this one with it."""
    command = [sys.executable, "-m", "bench.gpu.card"]
    try:
        told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT)
    except subprocess.TimeoutExpired:
        return Card(unknown=f"asking torch takes more than {LIMIT:.0f} s")
    if told.returncode != 0:
        return Card(unknown=(told.stderr.strip().splitlines() or ["no word of why"])[-1])
    said = json.loads(told.stdout.splitlines()[-1])
    return Card(**{**said, "names": tuple(said["names"]), "architectures": tuple(said["architectures"])})


if __name__ == "__main__":
    print(json.dumps(asdict(look())))
