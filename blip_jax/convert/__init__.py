"""Weights in and out: anyone's files as models of ours, and back."""
