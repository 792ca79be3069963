"""Sampling in Triton: tokens of a batch from logits that stay on the GPU, the same as the CPU samplers pick."""
