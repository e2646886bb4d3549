"""Benchmarks over the project's history (asv); docs/benchmarks.md explains how to run and read them.

Every class has static parameter lists, so that a graph continues from commit to commit. Lower numbers are better. The
benchmarks call the functions of `sinkwindow_lab` that the tables use; a commit that does not have a function has no
number for it. Nothing is timed before its output has been checked.
"""
