"""Measures sides against each other, and knows neither optimizers nor lists of parameters."""
