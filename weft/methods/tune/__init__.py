"""Methods that choose how trained tensors move: optimizers, and schedules, which rewrite terms while they train."""
