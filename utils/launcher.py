"""The process that started this one, noted before the imports that take seconds, in which it may be gone."""

import os

PARENT = os.getppid()
