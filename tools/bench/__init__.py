"""The benchmark: what it measures, against what, and its results.

Its modules import each other relative to this package, because it has another
name where `tools/bench.py` runs it, without being installed.
"""
