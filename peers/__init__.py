"""Comparison with other caches (peers), each in its own environment: `nox -s peers` (see docs/peers.md)."""
