"""Conversion of weights: external checkpoints to native ones, and back."""
