"""How often `compare` finds a planted slowdown, and how often it finds one where there is none.

    python -m bench.suites.power [--runs 40] [--slowdown 2] [--case gpt2-small] [--seconds 300] [--record FILE]
                                 [--json FOLDER]

A copy of this package is made whose step walks so many percent more bytes: a second optimizer of the same class steps a
tensor of its own after each step. `compare` then compares this package with that copy, and with itself; the two kinds
of run take turns, so that both see the same machine. Forty of each take more than an hour: with `--record` a run goes
on where an earlier one ended.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import lookahead_fused
from lookahead_fused.bench import pairs, parameters, schema, sequential
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


@dataclass(frozen=True)
class Run:
    """One comparison, as a line of the record has it.

    Attributes:
        kind: "planted" or "same".
        verdict: "slower", "holds" or "undecided".
        ratio: of the speeds by the cores' time.
        pairs: of processes.
        seconds: that it took.
        load: the load average before it.
        utc: when.
        processor: where.
        rule: by what it was decided, and on what: only comparisons of one rule make one table.
    """

    kind: str
    verdict: str
    ratio: float
    pairs: int
    seconds: float
    load: float
    utc: str
    processor: str
    rule: dict[str, float | str]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="power and false alarms of compare", allow_abbrev=False)
    parser.add_argument("--runs", type=int, default=40, help="of each kind")
    parser.add_argument("--slowdown", type=float, default=2.0, metavar="PERCENT", help="that is planted")
    parser.add_argument("--case", choices=parameters.CASES, default="gpt2-small")
    parser.add_argument("--seconds", type=float, default=300, help="of a comparison, at most")
    parser.add_argument("--record", type=Path, metavar="FILE", help="a line a comparison; those in it count")
    parser.add_argument("--json", type=Path, metavar="FOLDER", help="write every comparison there")
    options = parser.parse_args(arguments)
    limit = 1 - options.slowdown / 100
    rule = _rule(options.case, options.slowdown, options.seconds)
    runs = recorded(options.record, rule) if options.record else []
    print(f"{describe(conditions())}\n", flush=True)
    work = Work(options.case)
    own = Install("A", Path(lookahead_fused.__file__).parents[1])
    with tempfile.TemporaryDirectory() as folder:
        others = {"planted": planted(Path(folder), options.slowdown), "same": own.given}
        while kind := missing(runs, options.runs):
            where = machine("cpu")
            progress = pairs.compare(own, Install("B", others[kind]), work, limit=limit, seconds=options.seconds)
            told = pairs.record(progress, work, where, limit)
            ratio = round(told.ratios["cores"].median, 4)
            place = (where.load_before, where.utc, where.processor)
            runs.append(Run(kind, told.verdict, ratio, told.pairs, told.elapsed, *place, rule))
            print(f"{len(runs):3} {kind:8}{told.verdict:10} {ratio:.4f} {told.elapsed:5.0f} s", flush=True)
            if options.record:
                with options.record.open("a") as file:
                    file.write(json.dumps(asdict(runs[-1])) + "\n")
            if options.json:
                schema.write(told, options.json / f"{kind}-{len(runs)}.json")
    print("\n" + "\n".join(summary(runs)))
    return 0


def recorded(path: Path, rule: dict[str, float | str]) -> list[Run]:
    """What is in a record; none where there is no file.

    Raises:
        SystemExit: a comparison in it was decided by another rule, or is of other work.
    """
    runs = [Run(**json.loads(line)) for line in path.read_text().splitlines()] if path.exists() else []
    for run in runs:
        if run.rule != rule:
            other = {name: value for name, value in run.rule.items() if rule.get(name) != value}
            raise SystemExit(f"{path}: a comparison of {run.utc} is no more of this kind ({other}); name another file")
    return runs


def missing(runs: Sequence[Run], wanted: int) -> str:
    """The kind of the next comparison, by turns; "" where there are as many of each as wanted."""
    counts = {kind: sum(run.kind == kind for run in runs) for kind in ("planted", "same")}
    fewest = min(counts, key=lambda kind: counts[kind])
    return fewest if counts[fewest] < wanted else ""


def summary(runs: Sequence[Run]) -> list[str]:
    """A line of a Markdown table for each kind."""
    heads = ["", "runs", "slower", "holds", "undecided", "median ratio", "from", "to", "median s", "most s"]
    rows = [_row(kind, [run for run in runs if run.kind == kind]) for kind in ("planted", "same")]
    return table(heads, rows, markdown=True)


def _row(kind: str, runs: Sequence[Run]) -> list[str]:
    counts = Counter(run.verdict for run in runs)
    ratios, seconds = sorted(run.ratio for run in runs), [run.seconds for run in runs]
    told = [len(runs), *(counts[verdict] for verdict in ("slower", "holds", "undecided"))]
    found = [f"{ratio:.4f}" for ratio in (statistics.median(ratios), ratios[0], ratios[-1])]
    return [kind, *map(str, told), *found, f"{statistics.median(seconds):.0f}", f"{max(seconds):.0f}"]


def _rule(case: str, slowdown: float, seconds: float) -> dict[str, float | str]:
    names = ("TRIM", "FALSE_ALARM", "MISS", "BETWEEN", "KNOWN", "FIRST_LOOK", "FEWEST")
    decided_by = {name.lower(): float(getattr(sequential, name)) for name in names}
    return {"case": case, "slowdown": slowdown, "seconds": seconds, **decided_by}


if __name__ == "__main__":
    raise SystemExit(main())
