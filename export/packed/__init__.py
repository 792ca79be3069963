"""Published checkpoints whose weights are packed already: what their settings say, which tensors, and their numbers."""
