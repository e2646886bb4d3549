"""What is measured on: models, random shapes, texts and their tokens, and the machine."""
