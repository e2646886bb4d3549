"""How fast the cache is beside its floors: what `nox -s speed` and the GPU report measure, judge and show."""
