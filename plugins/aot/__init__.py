"""Kernels compiled ahead of time: which variants, by which process, into which records."""
