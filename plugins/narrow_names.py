"""Names of the plugins over codes and scales, and what codes are for TensorRT; without torch, as sessions ask."""

CODES_DTYPE = "int8"


def plugin_name(op: str, format: str) -> str:
    """The plugin of an op over codes for their format, e.g. LinearNarrowInt4."""
    return f"{op}{format.capitalize()}"
