"""Gates: what the source itself must keep to, read from its syntax trees."""
