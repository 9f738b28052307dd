"""Backends that score rows, and the choice of what is kept of their distributions."""
