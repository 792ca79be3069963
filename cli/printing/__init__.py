"""Printing: what commands say on stdout and stderr, for people and for machines."""
