"""What `processes.in_fork` and `on_ranks` fork: a process that has imported what takes longer than most of what is run
there, torch's own last part of it, which comes with its first optimizer; and that has done nothing with it."""

import gc

import helpers  # noqa: F401
import pytest  # noqa: F401
import torch._dynamo

if torch.distributed.is_available():
    import torch.distributed.checkpoint
    import torch.distributed.fsdp
    import torch.distributed.tensor

# No fork looks through all this for garbage.
gc.collect()
gc.freeze()
