"""What an 8-bit code does to the moments of a real training run: codes by their formulas, and the errors of each."""
