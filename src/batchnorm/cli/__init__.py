"""The command ``batchnorm``."""

from batchnorm.cli.entry import main as main
