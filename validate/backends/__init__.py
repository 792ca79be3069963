"""What is compared: one file a backend, and the runners that step it."""
