"""Evaluation on held-out splits: one evaluator per question."""
