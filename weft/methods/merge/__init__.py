"""Combine several models into one, a weight at a time."""
