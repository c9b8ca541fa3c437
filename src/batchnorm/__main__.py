"""``python -m batchnorm`` is the command ``batchnorm``."""

import sys

from batchnorm.cli.entry import main

sys.exit(main())
