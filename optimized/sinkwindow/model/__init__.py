"""What is known of transformers models: families, hooks, arguments, calls in pieces, exact rotary tables."""
