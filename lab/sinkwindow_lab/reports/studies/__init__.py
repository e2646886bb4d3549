"""Studies beyond the two experiments of the original reproduction: each is collected once, and rendered elsewhere."""
