"""The MLA ops over a cache of codes and scales: same sums as over a whole one, once what is cached has been widened."""
