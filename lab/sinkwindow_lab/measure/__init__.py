"""Measurements of one thing each: losses, generations, steps, memory, attention."""
