"""In every Python that the tests start: transformers is imported in half the time."""

import known_imports

known_imports.install()
