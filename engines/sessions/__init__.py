"""Sessions: a bundle ready to run, one file or folder a backend."""
