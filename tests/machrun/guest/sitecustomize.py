"""In a Python under machrun: lets it import extension modules that are for macOS.

And shortens the import of transformers, which takes tens of seconds there.
"""

import known_imports
import machpy

machpy.install()
known_imports.install()
