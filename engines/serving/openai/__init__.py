"""OpenAI's API over an engine in another process."""
