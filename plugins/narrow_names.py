"""Names of the plugins over narrow weights, and what their codes are for TensorRT; without torch, as sessions ask."""

CODES_DTYPE = "int8"


def plugin_name(op: str, format: str) -> str:
    """The plugin of LinearNarrow or MoeExpertsNarrow for a format, e.g. LinearNarrowInt4."""
    return f"{op}{format.capitalize()}"
