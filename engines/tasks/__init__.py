"""Bundles that do not generate: embeddings and classes."""
