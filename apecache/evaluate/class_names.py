"""Match the labels of images, which may be folders, numbers or WordNet ids, with class names."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from apecache.arguments import AnyPath, as_path
from apecache.errors import OptionError, counted, nearest, one_line, raise_if_refused


@dataclass(frozen=True, kw_only=True)
class ClassNames:
    """Hold the classes of a benchmark or of a file."""

    names: tuple[str, ...]
    """All class names, in the order of the classes. Empty: the labels must be names."""
    origin: str
    """Where the names come from."""
    labels: tuple[str, ...] | None = None
    """The labels that images of each class have, in the same order, if known."""
    present_only: bool = False
    """Whether classes without an image are excluded from the candidates."""
    first: int = 0
    """Number of the first class, where labels are numbers."""


@dataclass(frozen=True, kw_only=True)
class Classes:
    """Hold the candidates of a classification."""

    names: tuple[str, ...]
    """The candidates."""
    place: Mapping[str, int]
    """The index in `names` of each label."""
    matched: str
    """How labels and names were matched, in words."""


def match_labels(labels: Sequence[str], known: ClassNames | None = None) -> Classes:
    """Find the class of each label.

    A label stands for the class with that label or name, or else for the class with that number.
    If no label matches, but there are as many labels as classes, the sorted labels stand for the
    classes in their order, as folders of classes are numbered.

    Args:
        labels: of the images.
        known: the classes. None: the labels themselves, sorted.

    Raises:
        OptionError: a label that stands for no class.
    """
    distinct = sorted(set(labels))
    if known is not None and not known.names and any(label.isdecimal() for label in distinct):
        raise OptionError(
            f"the labels of {known.origin} are numbers here; give --class-names FILE, one "
            "name a line"
        )
    if known is None or not known.names:
        return Classes(
            names=tuple(distinct),
            place=_numbered(distinct),
            matched="by the labels themselves",
        )
    class_of_label, matched = _places(distinct, known)
    if not known.present_only:
        return Classes(names=known.names, place=class_of_label, matched=matched)
    # Classes without an image leave the candidates, so the indices of the others move up.
    present = sorted(set(class_of_label.values()))
    return Classes(
        names=tuple(known.names[index] for index in present),
        place={label: present.index(index) for label, index in class_of_label.items()},
        matched=matched,
    )


def _places(labels: Sequence[str], classes: ClassNames) -> tuple[dict[str, int], str]:
    """Return the index of the class of each label, and how they were matched."""
    n_classes = len(classes.names)
    first = 0 if "0" in labels else classes.first
    numbers = _numbered([str(first + index) for index in range(n_classes)])
    if first and str(n_classes) not in labels:
        # Without the last number the labels could begin with 0 as well as with 1.
        numbers = {}
    unpadded = [str(int(label)) if label.isdecimal() else label for label in labels]
    by_label = dict(zip(classes.labels or (), range(n_classes), strict=False))
    # Tried in this order: a table, the key in it of each label, and its name in reports.
    attempts = (
        (by_label, labels, "by label"),
        (_by_name(classes.names), [_plain(label) for label in labels], "by name"),
        (numbers, unpadded, f"by number from {first}"),
    )
    matches_some = False
    for table, keys, matched in attempts:
        is_match = [key in table for key in keys]
        if all(is_match):
            return {label: table[key] for label, key in zip(labels, keys, strict=True)}, matched
        matches_some = matches_some or any(is_match)
    # One match shows that the labels are names or numbers, so their order means nothing.
    if classes.labels is None and len(labels) == n_classes and not matches_some:
        return _numbered(labels), "by sorted order"
    raise OptionError(_strange(labels, classes))


def _numbered(labels: Sequence[str]) -> dict[str, int]:
    """Return the position of each label."""
    return {label: index for index, label in enumerate(labels)}


def _strange(labels: Sequence[str], classes: ClassNames) -> str:
    """Return the message about labels that stand for no class."""
    named = {*map(_plain, classes.labels or ()), *_by_name(classes.names)}
    strange = [label for label in labels if _plain(label) not in named]
    shown = ", ".join(map(repr, strange[:3])) + (", …" if len(strange) > 3 else "")
    hint = nearest(strange[0], classes.labels or classes.names) if strange else ""
    return (
        f"{len(strange)} of {len(labels)} labels are none of {classes.origin}'s "
        f"{len(classes.names)} classes ({shown}); "
        f"give --class-names FILE with lines of label, tab and name{hint}"
    )


def _by_name(names: Sequence[str]) -> dict[str, int]:
    """Return the index of each name; a name of two classes is left out, as it is ambiguous."""
    plain_names = [_plain(name) for name in names]
    occurrences = Counter(plain_names)
    return {name: index for index, name in enumerate(plain_names) if occurrences[name] == 1}


def _plain(name: str) -> str:
    """Return a name for comparison: lower case, with single spaces for `-`, `_` and white space."""
    return re.sub(r"[-_\s]+", " ", name.casefold()).strip()


def read_class_names(path: AnyPath) -> ClassNames:
    """Read a file of class names.

    Each line is a name, in the order of the classes; or each is label, tab, name. Empty lines are
    skipped.

    Raises:
        OptionError: not UTF-8, no name, lines of both kinds, or a label or name that occurs twice,
            with the number of its line.
    """
    path = as_path(path, "path")
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise_if_refused(path)
        raise OptionError(
            f"{path}: cannot be read ({one_line(error)}); save the file as UTF-8"
        ) from None
    rows = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            cells = [cell.strip() for cell in line.split("\t")]
            rows.append((number, cells))
    if not rows:
        raise OptionError(
            f"{path}: no class name; expected one on each line, or label, tab and name"
        )
    width = len(rows[0][1])
    for number, cells in rows:
        if len(cells) != width or width > 2 or not all(cells):
            raise OptionError(
                f"{path}, line {number}: {counted(len(cells), 'cell')}; expected a name, or "
                "label, tab "
                "and name"
            )
    columns = list(zip(*(cells for _, cells in rows), strict=True))
    for column in columns:
        twice = next((row for row, value in enumerate(column) if value in column[:row]), None)
        if twice is not None:
            raise OptionError(
                f"{path}, line {rows[twice][0]}: {column[twice]!r} again; classes must differ"
            )
    return ClassNames(
        names=tuple(columns[-1]),
        origin=str(path),
        labels=tuple(columns[0]) if width == 2 else None,
    )
