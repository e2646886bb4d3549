"""A stream of tokens: its state, its calls, its steps at fixed shapes, and the way back. Independent of any model."""
