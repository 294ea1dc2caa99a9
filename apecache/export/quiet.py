"""Silence what libraries report while they open and write models."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Hide progress bars, reports of unused weights and warnings of exporters."""
    from transformers.utils import logging as library_logging

    # Whatever logger a library uses, nothing below an error is shown.
    disabled = logging.root.manager.disable
    bars = library_logging.is_progress_bar_enabled()
    logging.disable(logging.WARNING)
    library_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
        if bars:
            library_logging.enable_progress_bar()
