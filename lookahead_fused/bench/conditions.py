"""Where and with what a run was made: without it a figure cannot be compared with another run's."""

from __future__ import annotations

import os
import platform
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Conditions:
    """Where and with what a run was made."""

    machine: str
    cores: int
    memory_gib: float
    huge_pages: str
    system: str
    python: str
    torch: str
    threads: int
    load_before: float
    utc: str


def conditions() -> Conditions:
    """The conditions of this process now."""
    return Conditions(
        machine=_cpu_name(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        memory_gib=round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
        huge_pages=_huge_pages(),
        system=f"{platform.system()} {platform.release()}",
        python=platform.python_version(),
        torch=torch.__version__,
        threads=torch.get_num_threads(),
        load_before=round(os.getloadavg()[0], 2),
        utc=time.strftime("%Y-%m-%d %H:%M", time.gmtime()),
    )


def describe(where: Conditions) -> str:
    """The conditions in lines for people."""
    fields = asdict(where)
    return (
        "{machine}, {cores} cores, {memory_gib} GiB, {system}, transparent huge pages: {huge_pages}\n"
        "torch {torch}, {threads} threads, Python {python}; load before: {load_before}; {utc} UTC"
    ).format(**fields)


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    fields: dict[str, str] = {}
    for line in info.read_text().splitlines() if info.exists() else ():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    name = fields.get("model name") or platform.processor() or sys.platform
    # Virtual machines hide the model's name; family and model still tell the generation.
    return f"{name} (family {fields['cpu family']}, model {fields['model']})" if "cpu family" in fields else name


def _huge_pages() -> str:
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not setting.exists():
        return "none"
    return setting.read_text().partition("[")[2].partition("]")[0]
