"""Benchmarks over the project's history (asv); docs/benchmarks.md explains how to run and read them.

Every class has static parameter lists, so that a graph goes on from commit to commit. Each number is lower-is-better.
What is measured is a function of `sinkwindow.lab`, the one that the tables use; a commit that lacks it has no number
there. Nothing is timed before its output was found right.
"""
