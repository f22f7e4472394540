"""Compile, cache and launch."""
