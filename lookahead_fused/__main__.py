"""``python -m lookahead_fused``: a report for a bug ticket; works when something is broken."""

from __future__ import annotations

import io
import sys


def main() -> int:
    """Prints the report. Returns the exit status: 1 where a check failed."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A path or a message may hold letters that the terminal's encoding lacks.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        from ._report import collect, render
    except Exception as error:  # _report needs the standard library alone: the package itself is damaged
        print(f"lookahead_fused cannot make its report: {type(error).__name__}: {error}")
        print(f"python: {sys.version}")
        return 1
    sections, healthy = collect()
    print(render(sections))
    return 0 if healthy else 1


if __name__ == "__main__":
    sys.exit(main())
