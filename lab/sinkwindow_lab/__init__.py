"""Measure sinkwindow: models, corpora, perplexity, speed, memory, and the tables made from them.

The lab is the only package that uses data sets, model names and clocks. Measuring returns the records of `records.py`
(plain JSON); rendering (`tables.py`) is a pure function of those records. asv, pytest-benchmark and the command line
call the same functions. `import sinkwindow` imports nothing of it, and the lab's dependencies are the extra
`sinkwindow[lab]`.
"""
