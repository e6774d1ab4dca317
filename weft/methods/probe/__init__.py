"""Methods that find out what was done to a model."""
