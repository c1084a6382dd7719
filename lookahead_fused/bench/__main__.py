"""``python -m lookahead_fused.bench``: times the optimizers, and finds what became slower.

    run                          this package against torch's optimizers
    compare A B                  two installs against each other, or two files that run wrote
    check --baseline FILE        a run against an earlier one, by its ratios to torch's optimizers

Exits with 0 where nothing is slower, 1 where something is, 2 where it was called wrongly or could not measure, 3 where
the time did not suffice to tell.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from . import opponents, pairs, parameters, schema, tables
from . import run as runs
from .measure import Unavailable

SLOWER, FAULT, UNDECIDED = 1, 2, 3
STATUS = {"holds": 0, "slower": SLOWER, "undecided": UNDECIDED}
# One that is bound by memory, and one that is bound by the host.
CASES = ("gpt2-small", "many-small")
MOMENTS = "Times of different moments, with all in them that the machine did then: better give two installs."


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit status."""
    options = _parser().parse_args(arguments)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    try:
        status: int = options.command(options)
    except (schema.Malformed, Unavailable, pairs.WorkerFailed) as error:
        print(error, file=sys.stderr)
        return FAULT
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m lookahead_fused.bench",
        description="Times the optimizers. Exits with 0 where nothing is slower, 1 where something is, 2 where it was "
        "called wrongly or could not measure, 3 where the time did not suffice to tell.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(required=True, metavar="command")

    run = commands.add_parser("run", help="this package against torch's optimizers", allow_abbrev=False)
    run.set_defaults(command=_run)
    _add_selection(run)

    compare = commands.add_parser("compare", help="two installs against each other", allow_abbrev=False)
    compare.set_defaults(command=_compare)
    compare.add_argument("a", type=Path, metavar="A", help="a Python interpreter, a directory with the package in it, "
                         "or a file that run wrote")  # fmt: skip
    compare.add_argument("b", type=Path, metavar="B", help="the same; the one that may be slower")
    compare.add_argument("--case", choices=parameters.CASES, default="gpt2-small", help="the list of parameters")
    _add_setting(compare)
    compare.add_argument("--backend", default="cpu", choices=("cpu", "reference"), help="of both (default: cpu)")
    compare.add_argument("--seconds", type=_positive, default=300.0, help="at most (default: 300)")
    _add_limit(compare, 0.98)
    _add_outputs(compare)

    check = commands.add_parser("check", help="a run against an earlier one", allow_abbrev=False)
    check.set_defaults(command=_check)
    check.add_argument("--baseline", type=Path, required=True, metavar="FILE", help="that run wrote earlier")
    _add_selection(check)
    _add_limit(check, 0.95)
    return parser


def _add_selection(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--case",
        action="append",
        choices=parameters.CASES,
        help=f"a list of parameters; may be repeated (default: {', '.join(CASES)})",
    )
    _add_setting(parser)
    parser.add_argument(
        "--against",
        action="append",
        choices=runs.AGAINST,
        help=f"whom; may be repeated (default: {', '.join(runs.DEFAULT_AGAINST)})",
    )
    parser.add_argument("--device", choices=runs.DEVICES, default="cpu", help="where (default: cpu)")
    parser.add_argument("--seconds", type=_positive, default=20.0, help="for each case, about (default: 20)")
    _add_outputs(parser)


def _add_setting(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--optimizer", choices=opponents.RULE_TITLES, default="adamw", help="(default: adamw)")
    parser.add_argument("--dtype", choices=opponents.DTYPE_TITLES, default="fp32", help="(default: fp32)")
    parser.add_argument("--k", type=_count, default=opponents.K, help="steps between syncs (default: %(default)s)")
    parser.add_argument("--threads", type=_count, help="of every side (default: torch's)")


def _add_limit(parser: argparse.ArgumentParser, default: float) -> None:
    parser.add_argument(
        "--fail-below",
        type=_share,
        default=default,
        metavar="RATIO",
        help=f"of the speed before; less than 1 (default: {default})",
    )


def _add_outputs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was found there; see bench/README.md")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="append the table there, in Markdown")


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be more than 0, got {text}")
    return value


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return value


def _share(text: str) -> float:
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"must be between 0 and 1, got {text}")
    return value


# ------------------------------------------------------------------------------------------------------------
# the commands


def _run(options: argparse.Namespace) -> int:
    found = _measured(options)
    _publish(options, found, lambda markdown: tables.run_lines(found, markdown))
    return 0


def _measured(options: argparse.Namespace) -> schema.Run:
    if options.device == "cuda" and not torch.cuda.is_available():
        raise Unavailable("--device cuda: no CUDA device is visible to torch")
    device = runs.DEVICES[options.device]()
    setting = opponents.Setting(options.optimizer, options.dtype, options.k, options.device)
    masters = options.dtype == "bf16-master"
    against = options.against or (["torch-masters"] if masters else list(runs.DEFAULT_AGAINST))
    machine = runs.machine(options.device)
    results = [
        runs.measure(case, setting, list(dict.fromkeys(against)), device, options.seconds)
        for case in dict.fromkeys(options.case or CASES)
    ]
    return schema.Run(runs.package(), machine, results)


def _check(options: argparse.Namespace) -> int:
    before = schema.read(options.baseline, schema.Run)
    now = _measured(options)
    return _changes(options, before, now, runs.changes_of_ratios(before, now))


def _compare(options: argparse.Namespace) -> int:
    if options.a.suffix == options.b.suffix == ".json":
        before, now = schema.read(options.a, schema.Run), schema.read(options.b, schema.Run)
        if options.json:
            raise Unavailable("--json: two files that run wrote are compared to a table alone")
        return _changes(options, before, now, runs.changes_of_times(before, now), MOMENTS)
    sides = pairs.Install("A", options.a), pairs.Install("B", options.b)
    faults = [side.fault for side in sides if side.fault]
    if faults:
        raise Unavailable("\n".join(faults))
    work = pairs.Work(
        options.case, options.optimizer, options.dtype, options.k, options.backend, torch.get_num_threads()
    )
    machine = runs.machine("cpu")
    progress = pairs.compare(
        *sides, work, limit=options.fail_below, seconds=options.seconds, log=lambda line: print(line, flush=True)
    )
    found = pairs.record(progress, work, machine, options.fail_below)
    _publish(options, found, lambda markdown: tables.comparison_lines(found, markdown))
    return STATUS[found.verdict]


def _changes(
    options: argparse.Namespace, before: schema.Run, now: schema.Run, changes: list[runs.Change], note: str = ""
) -> int:
    """Publishes how a run differs from an earlier one, and takes the worst of the verdicts."""
    if not changes:
        raise Unavailable("both runs have no figure in common: give the baseline's --case, --optimizer, --dtype, --k")
    notes = [note] if note else []
    if other := runs.other_machine(before.machine, now.machine):
        notes.append("Measured on another machine than before, where ratios may differ: " + "; ".join(other))
    _publish(options, now, lambda markdown: tables.change_lines(changes, options.fail_below, notes, markdown))
    verdicts = {change.verdict(options.fail_below) for change in changes}
    return next(STATUS[verdict] for verdict in ("slower", "undecided", "holds") if verdict in verdicts)


def _publish(
    options: argparse.Namespace, found: schema.Run | schema.Comparison, lines: Callable[[bool], list[str]]
) -> None:
    """Prints the table, and writes what was asked for."""
    print("\n".join(lines(False)))
    if options.json:
        schema.write(found, options.json)
    if options.markdown:
        options.markdown.parent.mkdir(parents=True, exist_ok=True)
        # Appended: GITHUB_STEP_SUMMARY and its like are files that others write to as well.
        with options.markdown.open("a", encoding="utf-8") as file:
            file.write("\n".join(lines(True)) + "\n")


if __name__ == "__main__":
    sys.exit(main())
