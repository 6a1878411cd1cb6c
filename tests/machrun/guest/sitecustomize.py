"""In a Python under machrun: lets it import extension modules that are for macOS."""

import os

import machpy

machpy.install()
if os.environ.get("MACHRUN_PLATFORM") == "darwin":
    import darwin

    darwin.pretend(os.environ["MACHRUN_MACOS"])
