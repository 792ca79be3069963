"""How fast: kernels for the custom ops, compiled ahead of time into one plugin library."""
