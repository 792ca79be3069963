"""The bundle: the folder that export writes and everything else reads; its graphs' IO, recipes and weights."""
