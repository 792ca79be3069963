"""TensorRT plans: what is asked for, how they are built, and whether they belong to a machine."""
