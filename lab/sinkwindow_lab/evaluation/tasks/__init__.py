"""Tasks of lm-eval over the embedded texts; their YAML files are read by `TaskManager(include_path=...)`."""
