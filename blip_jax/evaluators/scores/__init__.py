"""Metrics: pure functions of NumPy arrays and strings."""
