"""Measure what slow weights do for training, and judge by it every claim of the literature.

    python -m bench.evidence [--scale smoke|quick|full] [--out FOLDER] [--only GLOB] [--keep FILE] [--at-once JOBS]
    python -m bench.evidence report FILE ... [--out FOLDER]

The first runs the experiments, or goes on with a run that was cut off, and writes report.html, report.md and
figures.json; --keep writes the figures to a file of the repository too. The second makes both pages from such files,
that of `python -m bench.evidence.gpu` among them. Ends with 1 where a job raised, or where an exact result was not met,
and with 2 where it was called wrongly. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

try:
    import scipy  # type: ignore[import-untyped]  # noqa: F401  missed now, not after minutes of training
    from rich.console import Console

    from bench.evidence import results
    from bench.evidence.claims import Verdict, failed, judge, load, missing, pattern
    from bench.evidence.experiment import Experiment, Scale
    from bench.evidence.experiments import EXPERIMENTS
    from bench.evidence.figures import Picture
    from bench.evidence.records import Records
    from bench.evidence.report import summary, to_html, to_markdown
    from bench.evidence.run import run
except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] in ("bench", "lookahead_fused"):
        raise  # no package that could be installed
    sys.exit(f"the evidence needs {error.name}: pip install '.[evidence]', or run it by `make evidence`")

OUT = Path(__file__).resolve().parents[2] / "build" / "evidence"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run or report, as the arguments say; returns the exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    if given[:1] == ["report"]:
        parser.add_argument("report", choices=["report"])
        parser.add_argument("files", type=Path, nargs="+", help="figures.json, or what --keep wrote")
        parser.add_argument("--out", type=Path, default=OUT, help="folder of the pages (%(default)s)")
        options = parser.parse_args(given)
        return report(options.files, options.out)
    parser.add_argument("--scale", choices=[scale.value for scale in Scale], default="full", help="%(default)s")
    parser.add_argument("--out", type=Path, help=f"folder of record and pages ({OUT}/SCALE)")
    parser.add_argument("--only", metavar="GLOB", default="*", help="the experiments so named (%(default)s)")
    parser.add_argument("--keep", metavar="FILE", type=Path, help="also write the figures there")
    parser.add_argument(
        "--at-once", metavar="JOBS", type=int, default=os.cpu_count() or 1, help="on a thread each (%(default)s)"
    )
    options = parser.parse_args(given)
    scale = Scale(options.scale)
    chosen = [experiment for experiment in EXPERIMENTS if pattern(options.only).fullmatch(experiment.name)]
    if not chosen:
        names = ", ".join(experiment.name for experiment in EXPERIMENTS)
        parser.error(f"no experiment is named {options.only}; there are {names}")
    if options.at_once < 1:
        parser.error(f"argument --at-once: at least 1 job, not {options.at_once}")
    return measure(chosen, scale, options.out or OUT / scale.value, options.keep, options.at_once)


def measure(chosen: Sequence[Experiment], scale: Scale, out: Path, keep: Path | None, at_once: int) -> int:
    """Run experiments, judge, and write the pages.

    Args:
        chosen: of the experiments; those that are not chosen are not in the pages.
        scale: how much is run.
        out: folder of record.jsonl and of the pages, made if it is not there.
        keep: a further file for the figures.
        at_once: jobs, each on one thread.

    Returns:
        The exit status.
    """
    console = Console() if sys.stdout.isatty() else Console(width=118)
    records = Records(out / "record.jsonl")
    failures = run(chosen, scale, records, console, at_once)
    found, pictures = results.collect(chosen, scale, records)
    for path in (out / "figures.json", *([keep] if keep else [])):
        results.save(found, path)
    verdicts = _pages(found, pictures, out)
    unmet = failed(verdicts, all_run=len(chosen) == len(EXPERIMENTS) and not failures)
    if len(chosen) == len(EXPERIMENTS) and scale is Scale.FULL:  # the others leave experiments out
        for condition in missing(verdicts):
            print(f"note: no experiment gave {condition}", file=sys.stderr)
    for failure in failures:
        print(f"error: a job of {failure.experiment} failed, {failure.setting}: {failure.error}", file=sys.stderr)
    for verdict in unmet:
        print(f"error: {verdict.claim.id} must hold: {verdict.text}", file=sys.stderr)
    return 1 if failures or unmet else 0


def report(files: Sequence[Path], out: Path) -> int:
    """The pages of figures that were kept, without the pictures of the experiments; returns the exit status."""
    try:
        found = results.together([results.load(file) for file in files])
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    _pages(found, (), out)
    return 0


def _pages(found: results.Results, pictures: Sequence[Picture], out: Path) -> list[Verdict]:
    verdicts = judge(load(), found.figures)
    out.mkdir(parents=True, exist_ok=True)
    for name, text in (
        ("report.html", to_html(verdicts, found, pictures)),
        ("report.md", to_markdown(verdicts, found)),
    ):
        (out / name).write_text(text, encoding="utf-8")
        print(out / name)
    print(summary(verdicts))
    return verdicts


if __name__ == "__main__":
    sys.exit(main())
