"""Trains two small networks with and without Lookahead and compares."""
