"""The formula language: expressions, the tables of operations and reductions, derivatives, rewriting."""
