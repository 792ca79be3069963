"""Text: tokenizers, chat templates and stop strings."""
