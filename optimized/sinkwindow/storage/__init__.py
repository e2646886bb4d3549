"""Where keys and values are: tensors, the two layouts of their slots, and changes in place that can be interrupted."""
