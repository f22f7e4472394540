"""Graphs of computations: traced, simplified, drawn."""
