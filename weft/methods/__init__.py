"""One file a method, a folder a verb."""
