"""``bn.insert`` and ``bn.remove``: batch normalization between a linear map and its activation."""
