"""The reference under whole Hugging Face models: everything that knows transformers."""
