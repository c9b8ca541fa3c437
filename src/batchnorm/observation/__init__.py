"""What enters activations and batch normalizations while a model trains."""
