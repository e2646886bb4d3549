"""Ways of remembering, by name: a configuration opens a session, and a session feeds a model."""
