"""Scores of predictions: pure functions of numpy arrays and strings."""
