"""Methods that choose how trained tensors move: optimizers, objectives, which they lower, and schedules, which rewrite terms meanwhile."""
