"""The benchmarks, the counts, and the gate that compares both with a baseline."""
