"""``python -m lookahead_fused``: a report for a bug ticket; works when something is broken."""

from __future__ import annotations

import contextlib
import faulthandler
import io
import os
import sys


def main() -> int:
    """Prints the report, section by section. Returns the exit status: 1 where a check or the printing failed."""
    with contextlib.suppress(Exception):  # without a standard error there is nowhere to print to
        # A library that crashes while it is loaded tells where.
        faulthandler.enable()
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A path or a message may hold letters that the terminal's encoding lacks.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        return _print_report()
    except OSError as error:  # the report's own are told in it: this is standard output's
        # What is left in the buffer would fail again at the exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):  # `| head` has enough
            print(f"lookahead_fused cannot print its report: {error}", file=sys.stderr)
        return 1


def _print_report() -> int:
    try:
        from ._report import render, sections
    except Exception as error:  # _report needs the standard library alone: the package itself is damaged
        print(f"lookahead_fused cannot make its report: {type(error).__name__}: {error}")
        print(f"python: {sys.version}", flush=True)
        return 1
    healthy = True
    for section in sections():
        # Each at once: what the next one imports may end the process.
        print(render(section), flush=True)
        healthy = healthy and section.healthy
    return 0 if healthy else 1


if __name__ == "__main__":
    sys.exit(main())
