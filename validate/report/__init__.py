"""The accuracy report: JSON, page, files."""
