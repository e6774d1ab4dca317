"""Learning: data, objectives, one trainer."""
