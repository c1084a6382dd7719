"""Shows a run of the suites to people, beside a prediction for GPUs."""
