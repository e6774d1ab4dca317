"""Methods that add or take low-rank factors."""
