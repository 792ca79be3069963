"""What every backend is fed."""
