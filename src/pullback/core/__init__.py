"""Operators, their algebra, the autograd bridge and the conformance kit."""
