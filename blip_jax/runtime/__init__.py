"""What a run stands on: mesh, state, optimiser, checkpoints, writers.

Nothing here knows a task or a model; trees are known by their paths.
"""
