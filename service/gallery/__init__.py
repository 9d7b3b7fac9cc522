"""The index: which enrolled faces are most similar to a probe."""
