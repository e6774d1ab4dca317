"""Methods that choose how trained tensors move: optimizers."""
