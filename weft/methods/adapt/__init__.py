"""Methods that fine-tune few parameters."""
