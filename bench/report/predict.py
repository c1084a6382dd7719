"""A PREDICTION of step times on GPUs that nobody here has, from bytes and launches; and what a GPU then measured.

    python -m bench.report.predict [gpu-report/benchmarks.json]

Predicted time = bytes / published bandwidth + launches x `LAUNCH`. It is a bound and not a measurement: no kernel
reaches the published bandwidth, and a cache that holds a small model's state exceeds it. `make gpu-report` measures,
and fills the columns beside it for the card it ran on.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.cases import traffic
from lookahead_fused.bench import parameters
from lookahead_fused.bench.opponents import OURS, PLAIN, SYNC, K, Setting


@dataclass(frozen=True)
class Gpu:
    """A GPU by its published figures.

    Attributes:
        name: as the data sheet names it.
        bandwidth: of its memory, in bytes a second.
        link: to the host, in bytes a second in each of its two directions.
        source: the data sheet.
        link_source: of its link.
        matches: parts of the name that the driver gives it, all lower case.
    """

    name: str
    bandwidth: float
    link: float
    source: str
    link_source: str
    matches: tuple[str, ...]


# Of the data sheets' figures for both directions together the half: 64 GB/s for PCIe 4.0, 128 GB/s for 5.0.
PCIE4, PCIE5 = 32e9, 64e9
GPUS = (
    Gpu("A100 80GB SXM", 2.039e12, PCIE4, "NVIDIA A100 data sheet", "PCIe 4.0 x16, the same", ("a100", "80gb")),
    Gpu("H100 SXM", 3.35e12, PCIE5, "NVIDIA H100 data sheet", "PCIe 5.0 x16, the same", ("h100",)),
    Gpu("H200 SXM", 4.8e12, PCIE5, "NVIDIA H200 data sheet", "PCIe 5.0 x16, the same", ("h200",)),
    Gpu("B200", 8e12, PCIE5, "NVIDIA DGX B200 data sheet, 64 TB/s for 8", "PCIe 5.0 x16 of its hosts", ("b200",)),
)

# From one launch of a stream to the next, an assumption of ours: what an empty kernel takes.
LAUNCH = 3e-6
LISTS = (
    "resnet50", "bert-large", "gpt2-small", "gpt2-xl", "llama3-8b-8", "llama3-8b-64", "llama3-8b-512", "moe",
    "many-small", "one-large",
)  # fmt: skip
SETTING = Setting(device="cuda")


def seconds(name: str, case: parameters.Case, gpu: Gpu) -> float:
    """The predicted mean of a step over k, of ours or of torch's fused AdamW with or without a sync."""
    if name == OURS:
        moved, launches = traffic.mean_bytes(SETTING), float(traffic.OUR_LAUNCHES)
    else:
        moved, launches = traffic.torch_bytes(SETTING, name), traffic.torch_launches(SETTING, case.shapes, name)
    return case.elements * moved / gpu.bandwidth + launches * LAUNCH


def offloaded_sync_seconds(case: parameters.Case, gpu: Gpu) -> float:
    """What the slow weights of a sync take over the link with `offload_slow`: read one way while they are written the
    other, and longer than all that the sync moves on the device."""
    return case.elements * traffic.sync_bytes(SETTING) / 2 / gpu.link


def offloaded_seconds(case: parameters.Case, gpu: Gpu) -> float:
    """The predicted mean of a step over k with `offload_slow`: a step that syncs lasts as long as its link is busy."""
    step = case.elements * traffic.step_bytes(SETTING) / gpu.bandwidth
    syncing = max(step, offloaded_sync_seconds(case, gpu))
    return (step * (K - 1) + syncing) / K + traffic.OUR_LAUNCHES * LAUNCH


def predictions() -> list[dict[str, Any]]:
    """A record for each list and GPU."""
    return [
        {
            "case": key,
            "title": parameters.CASES[key].title,
            "gpu": gpu.name,
            "ms": {name: seconds(name, parameters.CASES[key], gpu) * 1e3 for name in (OURS, SYNC, PLAIN)},
            "offloaded_ms": offloaded_seconds(parameters.CASES[key], gpu) * 1e3,
            "offloaded_sync_ms": offloaded_sync_seconds(parameters.CASES[key], gpu) * 1e3,
        }
        for key in LISTS
        for gpu in GPUS
    ]


def measured(content: dict[str, Any] | None) -> dict[str, dict[str, Any]]:
    """Of a run on a GPU, by list: our milliseconds a step, the share of a copy, and the ratios."""
    found: dict[str, dict[str, Any]] = {}
    for benchmark in (content or {}).get("benchmarks", ()):
        info = benchmark["extra_info"]
        plain = info.get("rule") == "adamw" and info.get("dtype") == "fp32" and info.get("k") == K
        if info.get("device") != "cuda" or not plain or info["layout"] == "each":
            continue
        figures = {(figure["kind"], figure["of"]): figure["value"]["median"] for figure in info["figures"]}
        # Of one group and of two the lists that have both show the first.
        found.setdefault(
            info["case"],
            {
                "ms": info["median_seconds"][OURS] * 1e3,
                "share": figures.get(("share", OURS)),
                SYNC: figures.get(("ratio", SYNC)),
                PLAIN: figures.get(("ratio", PLAIN)),
            },
        )
    return found


def card(content: dict[str, Any] | None) -> Gpu | None:
    """Which of the GPUs a run was on, or None."""
    name = str((content or {}).get("conditions", {}).get("gpu", "")).lower()
    return next((gpu for gpu in GPUS if name and all(part in name for part in gpu.matches)), None)


HEADER = ("list", "GPU", "ours, ms", "fused + sync, ms", "plain fused, ms", "against sync", "against plain",
          "offloaded, ms", "its sync's link, ms",
          "MEASURED ms", "share of a copy", "against sync", "against plain")  # fmt: skip


def table(content: dict[str, Any] | None = None) -> list[list[str]]:
    """The rows below ``HEADER``: predictions, and measurements where the run was on that GPU."""
    rows = []
    on, found = card(content), measured(content)
    for record in predictions():
        ms = record["ms"]
        own = found.get(record["case"]) if on is not None and on.name == record["gpu"] else None
        filled = ["—"] * 4
        if own is not None:
            filled = [f"{own['ms']:.3f}", "—" if own["share"] is None else f"{own['share']:.1f} %"]
            filled += ["—" if own[name] is None else f"{own[name]:.2f}×" for name in (SYNC, PLAIN)]
        rows.append([
            record["title"], record["gpu"], *(f"{ms[name]:.3f}" for name in (OURS, SYNC, PLAIN)),
            f"{ms[SYNC] / ms[OURS]:.2f}×", f"{ms[PLAIN] / ms[OURS]:.2f}×",
            f"{record['offloaded_ms']:.3f}", f"{record['offloaded_sync_ms']:.3f}", *filled,
        ])  # fmt: skip
    return rows


def assumptions() -> str:
    """What the predictions stand on."""
    bandwidths = "; ".join(
        f"{gpu.name} {gpu.bandwidth / 1e12:g} TB/s ({gpu.source}), {gpu.link / 1e9:g} GB/s each way to the host "
        f"({gpu.link_source})"
        for gpu in GPUS
    )
    return (
        f"A prediction, not a measurement: AdamW, fp32, k = {K}, means over k steps, device time alone. Bytes over "
        f"published bandwidth, and {LAUNCH * 1e6:g} µs for each launch (assumed). {bandwidths}. Launches of torch: "
        "multi_tensor_apply as torch 2.13 for CUDA 13 has it. Offloaded: with `offload_slow`, whose sync takes what "
        "its link takes. Measured columns: `make gpu-report` on that card."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="predicted step times on GPUs", allow_abbrev=False)
    parser.add_argument("report", nargs="?", type=Path, help="what `make gpu-report` measured, to be put beside it")
    options = parser.parse_args()
    content = json.loads(options.report.read_text()) if options.report and options.report.exists() else None
    console = Console(width=190)
    shown = Table(title="PREDICTED step times on GPUs")
    for number, title in enumerate(HEADER):
        shown.add_column(title, justify="left" if number < 2 else "right")
    for row in table(content):
        shown.add_row(*row)
    console.print(shown)
    console.print(assumptions())
    if content is not None and card(content) is None:
        console.print(f"Measured on {content['conditions']['gpu']!r}, which has no prediction:")
        for name, own in measured(content).items():
            console.print(f"  {name}: {own}")


if __name__ == "__main__":
    main()
