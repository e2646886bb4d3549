"""Float64 models that compute in float64 throughout.

transformers computes root mean square norms in float32 whatever the model's dtype. Two ways of computing the same
float64 number differ by 1e-16; if a rounding boundary of float32 lies between them, the difference becomes 1e-8. That
is more than the 1e-9 that the tests allow, and not an error of the cache. Tests of exactness therefore keep the norms
of their models in float64.
"""

from __future__ import annotations

from sinkwindow_lab.inputs.wide import keep_norms_wide

__all__ = ["keep_norms_wide"]
