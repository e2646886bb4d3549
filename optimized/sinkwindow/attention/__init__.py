"""How positions rotate keys, and which keys each query may attend to."""
