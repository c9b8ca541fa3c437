"""Reading checkpoints tensor by tensor, and finding batch norms in them by tensor names."""
