"""What a run stands on: mesh, state, optimiser, checkpoints, files, metrics.

Nothing here knows a task or a model; trees are known by their paths.
"""
