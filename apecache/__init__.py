"""apecache: an embedding cache and head trainer for image-text models.

Public names are listed in `__init__.pyi` and resolved when they are first used, so that importing
the package costs nothing.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
