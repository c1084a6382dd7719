"""``python -m lookahead_fused``: a report for a bug ticket; works when something is broken."""

from __future__ import annotations

import sys


def main() -> int:
    """Prints the report. Returns the exit status: 1 where a check failed."""
    try:
        from .report import collect, render
    except Exception as error:  # a torch that does not import is what such a report is for
        print(f"lookahead_fused cannot be imported: {type(error).__name__}: {error}")
        print(f"python: {sys.version}")
        return 1
    sections, healthy = collect()
    print(render(sections))
    return 0 if healthy else 1


if __name__ == "__main__":
    sys.exit(main())
