"""The kernels over narrow weights: codes and scales are read as they are stored, and widened in registers."""
