"""Checkpoints opened tensor by tensor, and the batch norms found in them by their tensors."""
