"""Methods that zero weights."""
