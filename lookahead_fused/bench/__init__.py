"""Times the optimizers: against torch's in one process, or two installs of this package against each other.

``python -m lookahead_fused.bench`` is the command. Importing ``lookahead_fused`` imports nothing of this, and the
modules here import each other by relative names alone: `pairs` starts one harness, this one, over two installs.
"""
