"""lm-evaluation-harness: a model that streams, tasks that need no network, and a comparison of configurations."""
