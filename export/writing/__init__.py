"""Writing a bundle: which tensors, into which files, safe from kills."""
