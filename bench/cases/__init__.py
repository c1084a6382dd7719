"""What is measured: lists of parameters, settings, opponents, and the bytes that a step must move."""
