"""Rows of a step: what one may hold, and what the session computes of it."""
