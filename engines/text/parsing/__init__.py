"""What a model writes, as what it means: reasoning, calls of tools, and the rest, while it is written."""
