"""``bn.port``."""
