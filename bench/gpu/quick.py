"""What is worth knowing in a GPU's first minutes: `python -m bench.gpu.quick ROOM... [--device cpu] [--out FOLDER]`.

    bits        the bits of the CPU backend: rules x dtypes x policies, on awkward shapes, with events
    graphs      replays of captured steps equal eager steps
    bandwidth   the share of a measured copy: lists of tensors x chunk sizes
    times       host time and device time of a step

Each room prints as it goes and leaves FOLDER/ROOM.json, whole at any moment. On `--device cpu` the reference backend
takes the CUDA backend's place in `bits` and `graphs`, and a copy of memory that of the device's: it shows that the
rooms work, and no figure of it says anything of a GPU. So does `--backend cuda-host`, the CUDA sources on the host.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from bench import cuda_on_host
from bench.gpu import bandwidth, bits, graphs, times
from bench.gpu.results import Results
from bench.gpu.runner import SKIPPED
from lookahead_fused.backends import BACKENDS
from lookahead_fused.bench.conditions import conditions
from lookahead_fused.bench.device import Cpu, Cuda, Device

# The bytes of the copy on a GPU; on a CPU only to see it work.
COPY_BYTES = {"cuda": 1 << 30, "cpu": 1 << 22}


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="bench.gpu.quick", description="a GPU's first minutes", allow_abbrev=False)
    parser.add_argument("rooms", nargs="+", choices=ROOMS, metavar="ROOM", help=", ".join(ROOMS))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--backend", help="what is tried (default: cuda, and reference on a CPU)")
    parser.add_argument("--out", type=Path, help="the folder for the JSON")
    parser.add_argument("--name", help="the name of the JSON, instead of the room's")
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds of a room for beginning something")
    parser.add_argument("--cases", type=int, help="of bits and graphs so many cases, of which the first cover most")
    parser.add_argument("--small", action="store_true", help="small lists and few rounds: to see it work")
    options = parser.parse_args(words)
    options.backend = options.backend or {"cuda": "cuda", "cpu": "reference"}[options.device]
    if options.backend == cuda_on_host.NAME:
        BACKENDS[options.backend] = cuda_on_host.backend()
    for needed in dict.fromkeys((options.backend, "cpu")):
        reason = BACKENDS[needed].unavailable()
        if reason:
            print(f"backend {needed} does not serve here: {reason}")
            return SKIPPED
    where = conditions()
    passed = True
    for room in options.rooms:
        card = torch.cuda.get_device_name() if options.device == "cuda" else where.machine
        path = options.out / f"{options.name or room}.json" if options.out else None
        about = {"room": room, "backend": options.backend, "device": options.device, "card": card}
        results = Results(path, options.budget, **about, torch=where.torch, utc=where.utc)
        passed = ROOMS[room](options, results) and passed
    return 0 if passed else 1


def _bits(options: argparse.Namespace, results: Results) -> bool:
    return bits.compare(bits.cases()[: options.cases], options.backend, options.device, "cpu", results)


def _graphs(options: argparse.Namespace, results: Results) -> bool:
    capture = graphs.on_gpu if options.device == "cuda" else graphs.as_it_is
    return graphs.compare(graphs.CASES[: options.cases], options.backend, options.device, capture, results)


def _bandwidth(options: argparse.Namespace, results: Results) -> bool:
    lists = bandwidth.SMALL if options.small else bandwidth.LISTS
    return bandwidth.measure(lists, _measured(options), _device(options), COPY_BYTES[options.device], results,
                             2 if options.small else bandwidth.ROUNDS)  # fmt: skip


def _times(options: argparse.Namespace, results: Results) -> bool:
    lists = bandwidth.SMALL if options.small else times.LISTS
    return times.measure(lists, _measured(options), _device(options), results, 2 if options.small else times.ROUNDS)


def _measured(options: argparse.Namespace) -> str:
    """The reference has no chunks, and nobody wants to know its times."""
    return "cpu" if options.backend == "reference" else str(options.backend)


def _device(options: argparse.Namespace) -> Device:
    return Cuda() if options.device == "cuda" else Cpu()


ROOMS: dict[str, Callable[[argparse.Namespace, Results], bool]] = {
    "bits": _bits,
    "graphs": _graphs,
    "bandwidth": _bandwidth,
    "times": _times,
}

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
