"""`sinkwindow tables`: the two experiments of the original reproduction, and the studies."""
