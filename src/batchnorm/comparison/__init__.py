"""Whether two models compute the same, and two checkpoints hold the same."""
