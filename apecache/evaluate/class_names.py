"""From the labels of images, which may be folders, numbers or WordNet ids, to names of classes that
can be spoken."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from apecache.arguments import AnyPath, as_path
from apecache.errors import OptionError, nearest, one_line


@dataclass(frozen=True, kw_only=True)
class ClassNames:
    """`names` of all classes in their order, and where they come from. `labels`: what images of
    each call it, in the same order, where that is known. `present_only`: classes without an image
    are no candidates. `first`: the number of the first class where labels are numbers that do not
    begin with 0. No names at all: labels must be names."""

    names: tuple[str, ...]
    origin: str
    labels: tuple[str, ...] | None = None
    present_only: bool = False
    first: int = 0


@dataclass(frozen=True, kw_only=True)
class Classes:
    """Candidates, the place among them of each label, and how the two were matched, in words."""

    names: tuple[str, ...]
    place: Mapping[str, int]
    matched: str


def match_labels(labels: Sequence[str], known: ClassNames | None = None) -> Classes:
    """The classes of images with these labels; without `known` the labels themselves, sorted.

    A label stands for the class whose label or name it is, else for the class of its number; where
    no label does either but there are as many as classes, they count in sorted order, as folders of
    classes are numbered.

    Raises:
        OptionError: a label that stands for no class.
    """
    found = sorted(set(labels))
    if known is not None and not known.names and any(label.isdecimal() for label in found):
        raise OptionError(
            f"the labels of {known.origin} are numbers here; give --class-names FILE, one "
            "name a line"
        )
    if known is None or not known.names:
        return Classes(
            names=tuple(found),
            place={label: place for place, label in enumerate(found)},
            matched="by the labels themselves",
        )
    places, matched = _places(found, known)
    if not known.present_only:
        return Classes(names=known.names, place=places, matched=matched)
    kept = sorted(set(places.values()))
    return Classes(
        names=tuple(known.names[place] for place in kept),
        place={label: kept.index(place) for label, place in places.items()},
        matched=matched,
    )


def _places(found: Sequence[str], known: ClassNames) -> tuple[dict[str, int], str]:
    first = 0 if "0" in found else known.first
    numbers = {str(first + place): place for place in range(len(known.names))}
    if first and str(len(known.names)) not in found:
        numbers = {}  # they could begin with 0 as well as with 1
    padded = {label: str(int(label)) if label.isdecimal() else label for label in found}
    ways = (
        (
            dict(zip(known.labels or (), range(len(known.names)), strict=False)),
            {x: x for x in found},
            "by label",
        ),
        (_by_name(known.names), {x: _plain(x) for x in found}, "by name"),
        (numbers, padded, f"by number from {first}"),
    )
    for table, asked, matched in ways:
        if all(asked[label] in table for label in found):
            return {label: table[asked[label]] for label in found}, matched
    known_some = any(asked[label] in table for table, asked, _ in ways for label in found)
    if known.labels is None and len(found) == len(known.names) and not known_some:
        return {label: place for place, label in enumerate(found)}, "by sorted order"
    raise OptionError(_strange(found, known))


def _strange(found: Sequence[str], known: ClassNames) -> str:
    named = {*map(_plain, known.labels or ()), *_by_name(known.names)}
    strange = [label for label in found if _plain(label) not in named]
    shown = ", ".join(map(repr, strange[:3])) + (", …" if len(strange) > 3 else "")
    hint = nearest(strange[0], known.labels or known.names) if strange else ""
    return (
        f"{len(strange)} of {len(found)} labels are none of {known.origin}'s {len(known.names)} "
        f"classes ({shown}); "
        f"give --class-names FILE with lines of label, tab and name{hint}"
    )


def _by_name(names: Sequence[str]) -> dict[str, int]:
    """Place of each name; none of one that two classes have."""
    often = Counter(map(_plain, names))
    return {_plain(name): place for place, name in enumerate(names) if often[_plain(name)] == 1}


def _plain(name: str) -> str:
    return re.sub(r"[-_\s]+", " ", name.casefold()).strip()


def read_class_names(path: AnyPath) -> ClassNames:
    """A name on each line, in the order of the classes; or label, tab, name. Empty lines do not
    count.

    Raises:
        OptionError: not UTF-8, no name, lines of both kinds, or a label or name that stands there
            twice, by its line.
    """
    path = as_path(path, "path")
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(
            f"{path}: cannot be read ({one_line(error)}); save the file as UTF-8"
        ) from None
    rows = [
        (number, [cell.strip() for cell in line.split("\t")])
        for number, line in enumerate(lines, 1)
        if line.strip()
    ]
    if not rows:
        raise OptionError(
            f"{path}: no class name; expected one on each line, or label, tab and name"
        )
    width = len(rows[0][1])
    for number, cells in rows:
        if len(cells) != width or width > 2 or not all(cells):
            raise OptionError(
                f"{path}, line {number}: {len(cells)} cells; expected a name, or label, tab "
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
