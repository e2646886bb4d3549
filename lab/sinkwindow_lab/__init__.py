"""Measure sinkwindow: models, corpora, perplexity, speed, memory, and the tables made from them.

The lab is the only package that uses data sets, model names and clocks. `inputs` and `ways` give `measure` what to
measure; every number is a `Measurement` of `records.py`, and `reports` and `render` make pages from these. What a user
can mend raises a `LabError`, also where a docstring does not say so; the command line shows it as one line.
"""
