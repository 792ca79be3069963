"""The MLA kernels over a cache of codes and scales, and what decode's share with those over a whole one."""
