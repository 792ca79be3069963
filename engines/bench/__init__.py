"""How fast a bundle generates, beside what memory bandwidth allows."""
