"""Numbers that others published, shown with ours: facts with their source, never mixed with measurements.

Perplexities are comparable on the same text and model only; what carries over is the pattern.
"""

from __future__ import annotations

from typing import Final

PAPER: Final = "[arXiv 2309.17453](https://arxiv.org/abs/2309.17453)"
# Table 2: perplexity on the first 400,000 tokens of PG-19's concatenated test set, S + W.
SINKS: Final = (
    ("Falcon-7B", "17.90", "12.12", "12.12", "12.12", "12.12"),
    ("MPT-7B", "460.29", "14.99", "15.00", "14.99", "14.98"),
    ("Pythia-12B", "21.62", "11.95", "12.09", "12.09", "12.02"),
)
SINKS_LLAMA: Final = ("Llama-2-7B", "3359.95", "11.88", "10.51", "9.59", "9.54")
# Table 6, four sinks, the same text.
SIZES: Final = (
    ("Falcon-7B", "13.61", "12.84", "12.34", "12.12"),
    ("MPT-7B", "14.12", "14.25", "14.33", "14.99"),
    ("Pythia-12B", "13.17", "12.52", "12.08", "12.09"),
)
# Figure 10: milliseconds per token on one A6000.
STEPS: Final = (
    ("Llama-2-7B, re-computation", "63", "103", "223", "523", "1411"),
    ("Llama-2-7B, streaming", "31", "31", "35", "45", "65"),
    ("Llama-2-13B, re-computation", "99", "169", "361", "860", "2355"),
    ("Llama-2-13B, streaming", "48", "52", "60", "75", "106"),
)
# Pythia-2.8B on an RTX 4060 Ti, 2,000 tokens: a student project's first numbers and its author's fix.
REPAIR_COLUMNS: Final = ("baseline", "8 + 256", "8 + 512")
REPAIRED: Final = (
    ("WikiText-2, first", "7.97", "71.67", "41.28"),
    ("WikiText-2, repaired", "7.96", "12.39", "9.46"),
    ("PG-19, first", "8.63", "47.12", "35.22"),
    ("PG-19, repaired", "8.66", "8.87", "8.70"),
)
REPAIR: Final = "[yyqiu35000/CS3602-NLP](https://github.com/yyqiu35000/CS3602-NLP) at 997f7a2"
# Table 7: StreamEval, Llama-2-7B-32K-Instruct, 4 + 2044, 23 tokens a line.
RECALL: Final = (("20", "85.8"), ("80", "75.3"), ("100", "0"))
