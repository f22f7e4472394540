"""The `pullback` command."""
