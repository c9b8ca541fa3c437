"""The version of this library; pyproject.toml reads it."""

__version__ = "0.1.0"
