"""Helpers for tests of this package and of code built on it. Nothing in the library imports them."""

from tutelage.testing.shapes import shapes_match_names

__all__ = ["shapes_match_names"]
