"""Engines of CapFilt: who hands out the work units of a job.

Units, labels, bytes and done-files are the same with all of them.
"""
