"""One part of the model in memory at a time."""
