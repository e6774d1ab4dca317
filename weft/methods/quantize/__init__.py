"""Methods that put weights on a grid."""
