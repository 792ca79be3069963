"""config.json, translated once into frozen dataclasses."""
