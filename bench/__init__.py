"""How fast the optimizers are, what they cost, what they do for training, and what else can be known of them without a
user's program.

Rooms, from the bottom up: cuda_on_host, harness, cases, suites, report, gpu, demo, codes, evidence. A room imports only
from those before it, and none from the tests. What a room is for stands in its docstring.

Below them all lies `lookahead_fused.bench`, which is installed with the package: turns, samples, devices, lists of
parameters, opponents, and the command that compares two installs.
"""

import os

# Before torch is imported: its profiler, which only counts allocations here, is chatty on stderr.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
