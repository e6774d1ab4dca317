"""Methods that spend a budget."""
