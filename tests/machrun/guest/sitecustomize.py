"""In a Python under machrun: lets it import extension modules that are for macOS.

And shortens the import of transformers, which takes tens of seconds there.
"""

import os

import known_imports
import machpy

machpy.install()
known_imports.install()
if os.environ.get("MACHRUN_PLATFORM") == "darwin":
    import darwin

    darwin.pretend(os.environ["MACHRUN_MACOS"])
