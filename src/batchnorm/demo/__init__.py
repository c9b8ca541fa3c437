"""The tour on real data that ``batchnorm demo`` shows."""
