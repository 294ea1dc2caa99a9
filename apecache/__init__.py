"""apecache: an embedding cache and head trainer for image-text models.

Public names are listed in `__init__.pyi` and resolved when they are first used, so that importing
the package costs nothing.

The library logs its stages to the logger `apecache`, and prints nothing. A program that sets up no
logging sees none of it.
"""

import logging

import lazy_loader

# Without a handler, Python would print warnings of the library to standard error.
logging.getLogger(__name__).addHandler(logging.NullHandler())

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
