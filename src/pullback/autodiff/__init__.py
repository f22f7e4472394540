"""Automatic differentiation made visible."""
