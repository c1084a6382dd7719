"""Backends on the host, by the modules that stand in for a device."""

from __future__ import annotations

import sys
from pathlib import Path

import triton_on_host

# For bench. Last, and not first as pytest's own `pythonpath`: an installed wheel comes before the package of its name
# in the source tree.
sys.path.append(str(Path(__file__).resolve().parents[1]))

from bench import cuda_on_host

STAND_INS = {module.NAME: module for module in (cuda_on_host, triton_on_host)}
