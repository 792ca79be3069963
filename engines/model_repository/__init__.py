"""A tritonserver model repository written from a bundle."""
