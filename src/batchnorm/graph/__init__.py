"""The ``torch.compile`` backend "batchnorm": fuses normalizations in captured graphs."""

from batchnorm.graph.backend import backend as backend
