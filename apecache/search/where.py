"""Parse and apply conditions on the rows of an index: `split=val and label=dog`."""

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from apecache.errors import OptionError, nearest

Operator = Literal["=", "!=", "~"]
FIELDS = ("key", "caption", "split", "label", "language")
"""Fields of a row. Images have no language, and the caption of an image is its first one."""
CONDITION = re.compile(r"(?P<field>\w+)\s*(?P<operator>!=|=|~)\s*(?P<value>.*)", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class Condition:
    """Compare one field of a row with a value."""

    field: str
    operator: Operator
    value: str

    def holds(self, row: Mapping[str, str]) -> bool:
        """Tell whether a row meets the condition."""
        text = row.get(self.field, "")
        match self.operator:
            case "=":
                return text == self.value
            case "!=":
                return text != self.value
            case "~":
                return fnmatchcase(text, self.value)


def parse_where(text: str, columns: Sequence[str] = ()) -> list[Condition]:
    """Parse conditions that are joined by `and`.

    A condition is `FIELD=VALUE`, `FIELD!=VALUE` or `FIELD~PATTERN` with `*` and `?`. A value with
    spaces stands in quotes: `label="traffic light"`.

    Args:
        text: the conditions.
        columns: fields that the rows have beside the usual ones.

    Raises:
        OptionError: not such conditions, or an unknown field.
    """
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise OptionError(f"--where {text!r}: {error}; close every quote") from None
    terms: list[list[str]] = [[]]
    for word in words:
        if word.lower() == "and":
            terms.append([])
        else:
            terms[-1].append(word)
    fields = (*FIELDS, *columns)
    return [_condition(" ".join(term), text, fields) for term in terms]


def rows_where(
    conditions: Sequence[Condition],
    rows: Sequence[Mapping[str, str]],
) -> NDArray[np.int64]:
    """Return the numbers of the rows that meet all conditions, rising."""
    matching = [
        number
        for number, row in enumerate(rows)
        if all(condition.holds(row) for condition in conditions)
    ]
    return np.array(matching, dtype=np.int64)


def _condition(term: str, text: str, fields: Sequence[str]) -> Condition:
    match = CONDITION.fullmatch(term)
    if match is None:
        raise OptionError(
            f"--where {text!r}: {term!r} is no condition; expected FIELD=VALUE, FIELD!=VALUE or "
            "FIELD~PATTERN, joined by and"
        )
    field = match["field"]
    if field not in fields:
        raise OptionError(
            f"--where {text!r}: no field {field!r}; there are {', '.join(fields)}"
            f"{nearest(field, fields)}; apecache index --column NAME adds a column of the table"
        )
    operator: Operator = match["operator"]  # type: ignore[assignment]
    return Condition(field=field, operator=operator, value=match["value"].strip())
