"""The cache's speed compared with its lower bounds: what `nox -s speed` and the GPU report measure, judge and show."""
