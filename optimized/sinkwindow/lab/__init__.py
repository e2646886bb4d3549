"""What measures sinkwindow: models, corpora, perplexity, speed, memory and the tables made of them.

The lab is the only place that knows data sets, model names and clocks. Measuring returns the records of `records.py`
(plain JSON); rendering (`tables.py`) is a pure function of those records. asv, pytest-benchmark and the command line
call the same functions. Nothing here is imported by `import sinkwindow`, and its dependencies are the extra
`sinkwindow[lab]`.
"""
