"""Build and run: engines from bundles, sessions over engines, text from sessions."""
