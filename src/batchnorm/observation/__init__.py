"""Statistics of the inputs of activations and batch normalizations while a model trains."""
