"""Drafters: what proposes the tokens that may come next, for the scheduler to verify."""
