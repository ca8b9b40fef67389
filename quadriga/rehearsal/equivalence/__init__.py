"""Equivalence of layouts: the table of layouts, and the comparison of each with one process."""
