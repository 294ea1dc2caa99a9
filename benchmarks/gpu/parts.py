"""What every part of the GPU benchmark is given, and what it hands on."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

Row = dict[str, Any]


@dataclass(kw_only=True)
class PartContext:
    """Hold the settings of a part and the rows that it has measured so far.

    Rows are written as soon as they are known: a part that is cut off leaves what it had.
    """

    device: torch.device
    tiny: bool
    """Whether sizes are those of a dry run."""
    work: Path
    """Folder of inputs, shared by all parts of one run."""
    out: Path
    """File of the rows of this part."""
    rows: list[Row] = field(default_factory=list)

    def add(self, what: str, **values: Any) -> None:
        """Add a row."""
        self.rows.append({"what": what, **values})
        self.out.write_text(json.dumps(self.rows, indent=1), encoding="utf-8")

    def size(self, real: int, tiny: int) -> int:
        """Return a size for this run."""
        return tiny if self.tiny else real


Part = Callable[[PartContext], None]


def reason(error: BaseException) -> str:
    """Return the first line of an error."""
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0][:200] if lines else ''}"
