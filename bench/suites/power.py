"""How often `compare` finds a planted slowdown, and how often it finds one where there is none.

    python -m bench.suites.power [--runs 40] [--slowdown 2] [--case gpt2-small] [--seconds 300] [--json FOLDER]

A copy of this package is made whose step walks so many percent more bytes: a second optimizer of the same class steps a
tensor of its own after each step. `compare` then compares this package with that copy, and with itself; the two kinds
of run take turns, so that both see the same machine.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
from collections import Counter
from pathlib import Path

import lookahead_fused
from lookahead_fused.bench import pairs, parameters, schema
from lookahead_fused.bench.conditions import conditions, describe
from lookahead_fused.bench.pairs import Install, Work
from lookahead_fused.bench.run import machine
from lookahead_fused.bench.tables import table

# Appended to the copy's __init__.py: the same kernels, on the same threads, over so much more memory.
PLANT = """

def _plant(share):
    import torch

    exact = LookaheadAdamW.step

    def step(self, closure=None):
        result = exact(self, closure)
        further = self.__dict__.get("_further")
        if further is None:
            groups = self.param_groups
            elements = sum(p.numel() for group in groups for p in group["params"])
            p = torch.nn.Parameter(torch.randn(max(int(elements * share), 1)))
            p.grad = 0.01 * torch.randn_like(p)
            options = {name: self.defaults[name] for name in ("lr", "betas", "eps", "weight_decay", "k", "alpha")}
            further = self.__dict__["_further"] = LookaheadAdamW([p], **options, backend=groups[0]["backend"])
        exact(further)
        return result

    LookaheadAdamW.step = step


_plant(SHARE)
"""


def planted(folder: Path, percent: float) -> Path:
    """A directory with a copy of this package in it whose LookaheadAdamW is so much slower."""
    package = folder / "lookahead_fused"
    shutil.copytree(Path(lookahead_fused.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    with (package / "__init__.py").open("a") as source:
        source.write(PLANT.replace("SHARE", repr(percent / 100)))
    return folder


def main() -> int:
    parser = argparse.ArgumentParser(description="power and false alarms of compare", allow_abbrev=False)
    parser.add_argument("--runs", type=int, default=40, help="of each kind")
    parser.add_argument("--slowdown", type=float, default=2.0, metavar="PERCENT", help="that is planted")
    parser.add_argument("--case", choices=parameters.CASES, default="gpt2-small")
    parser.add_argument("--seconds", type=float, default=300, help="of a comparison, at most")
    parser.add_argument("--json", type=Path, metavar="FOLDER", help="write every comparison there")
    options = parser.parse_args()
    limit = 1 - options.slowdown / 100
    print(f"{describe(conditions())}\n", flush=True)
    found: dict[str, list[schema.Comparison]] = {"planted": [], "same": []}
    work = Work(options.case)
    own = Install("A", Path(lookahead_fused.__file__).parents[1])
    with tempfile.TemporaryDirectory() as folder:
        others = {"planted": planted(Path(folder), options.slowdown), "same": own.given}
        for number in range(options.runs):
            for kind, other in others.items():
                where = machine("cpu")
                progress = pairs.compare(own, Install("B", other), work, limit=limit, seconds=options.seconds)
                told = pairs.record(progress, work, where, limit)
                found[kind].append(told)
                ratio = told.ratios["cores"].median
                print(f"{number + 1:3} {kind:8}{told.verdict:10} {ratio:.4f} {told.elapsed:5.0f} s", flush=True)
                if options.json:
                    schema.write(told, options.json / f"{kind}-{number + 1}.json")
    heads = ["", "runs", "slower", "holds", "undecided", "median ratio", "median s", "most s"]
    print("\n" + "\n".join(table(heads, [_row(kind, runs) for kind, runs in found.items()], markdown=True)))
    return 0


def _row(kind: str, runs: list[schema.Comparison]) -> list[str]:
    counts = Counter(run.verdict for run in runs)
    ratios = statistics.median(run.ratios["cores"].median for run in runs)
    seconds = [run.elapsed for run in runs]
    told = [len(runs), counts["slower"], counts["holds"], counts["undecided"], f"{ratios:.4f}"]
    return [kind, *map(str, told), f"{statistics.median(seconds):.0f}", f"{max(seconds):.0f}"]


if __name__ == "__main__":
    raise SystemExit(main())
