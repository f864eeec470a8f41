"""Benchmarks: a ratio in one run, outputs compared first."""
