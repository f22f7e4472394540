"""From an expression to scalar code: what is computed when, in which loop."""
