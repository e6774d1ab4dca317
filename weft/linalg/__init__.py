"""What methods share: grid fitting, the column solver, low-rank factors."""
