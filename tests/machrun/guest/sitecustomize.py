"""In a Python under machrun: lets it import extension modules that are for macOS."""

import machpy

machpy.install()
