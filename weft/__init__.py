"""weft: every weight is an expression, every method a small rewrite, and everything composes."""
