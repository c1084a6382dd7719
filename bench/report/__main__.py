"""A run of the suite for people: a table in the terminal, and one HTML file with tables and pictures.

    python -m bench.report build/bench/bench.json [--html FILE] [--picture FILE] [--gpu FILE]

The page sets a run on a GPU, the file of --gpu, beside the prediction.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from rich.console import Console

from bench.report import page, pictures, tables


def main() -> None:
    parser = argparse.ArgumentParser(description="a run of the benchmarks for people", allow_abbrev=False)
    parser.add_argument("report", type=Path, help="the JSON that pytest-benchmark wrote")
    parser.add_argument("--html", type=Path, help="write the report there")
    parser.add_argument(
        "--picture", type=Path, help="write the picture of the ratios to near opponents there, as a PNG"
    )
    parser.add_argument("--gpu", type=Path, help="the JSON of a run on a GPU, to be put beside the prediction")
    options = parser.parse_args()
    content = json.loads(options.report.read_text())
    gpu = json.loads(options.gpu.read_text()) if options.gpu and options.gpu.exists() else None
    tables.to_terminal(content, Console(width=170))
    if options.html:
        options.html.write_text(page.to_html(content, gpu))
        print(options.html)
    if options.picture:
        title = "Speed of a lookahead_fused step against torch's, syncs included"
        pictures.save(pictures.ratios(content, all_opponents=False, title=title), options.picture)
        print(options.picture)


if __name__ == "__main__":
    main()
