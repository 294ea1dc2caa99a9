"""Hold what checks of a fit found."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from apecache.errors import DataError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Report what a check found."""

    check: str
    """Short name of the check."""
    level: Literal["error", "warning"]
    """An error stops a fit."""
    message: str
    """What was found, and how to fix it."""

    def __str__(self) -> str:
        return f"{self.check}: {self.message}"


def require_sound(findings: Sequence[Finding]) -> None:
    """Log the warnings, and check that no finding is an error.

    Raises:
        DataError: Some are. It names every error.
    """
    for finding in findings:
        if finding.level == "warning":
            logger.warning("%s", finding)
    errors = [str(finding) for finding in findings if finding.level == "error"]
    if errors:
        failed = "1 check fails" if len(errors) == 1 else f"{len(errors)} checks fail"
        raise DataError(f"{failed}: {'; '.join(errors)}")
