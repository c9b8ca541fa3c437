"""Normalizations in graphs that ``torch.compile`` captures, fused with what follows them."""

from batchnorm.graph.backend import backend as backend
