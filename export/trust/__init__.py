"""Trust: the one way to files that others may have touched: by listed names, real ones, their sha256 compared."""
