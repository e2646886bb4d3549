"""Ours beside what people use today, each in an environment of its own: `nox -s peers` (see docs/peers.md)."""
