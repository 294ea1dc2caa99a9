"""Define every error that the library raises on purpose.

    ApecacheError                     exit code 1
    ├── MissingExtraError             1  an optional package is not installed (also ImportError)
    ├── EngineError                   1  a cluster that cannot be used (also RuntimeError)
    ├── OptionError                   2  a setting that makes no sense (also ValueError)
    ├── DataError                     3  something given to us cannot be used (also ValueError)
    │   ├── ManifestError                the table of images and captions
    │   ├── BadRowsError                 more unreadable rows than the limit allows
    │   ├── EncoderError                 an encoder that cannot be found or used
    │   ├── RecipeError                  a recipe or one of its settings
    │   ├── RunError                     a run folder, head or index
    │   └── StoreError                   not a store, or object storage that does not answer
    │       ├── UnwritableError       1  nothing can be stored at the path
    │       ├── IncompleteError          extraction has not finished
    │       └── DamagedError             bytes differ from their commit record
    └── MismatchError                 4  does not belong to this store or run (also ValueError)

Messages are one line: what was found, what was expected, what mends it. `exit_code` is the exit
code of the command line. `RowError` does not end a run: it says why one row could not be encoded.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path

SEPARATORS = str.maketrans("", "", "-_ ./")
"""Removes the characters that separate the words of a name."""


class ApecacheError(Exception):
    """Report a failure that a user can understand and fix."""

    exit_code = 1


class MissingExtraError(ApecacheError, ImportError):
    """Report an optional package that is not installed."""

    def __init__(self, module: str, extra: str) -> None:
        super().__init__(
            f"{module} is not installed; install it with: pip install 'apecache[{extra}]'"
        )


class EngineError(ApecacheError, RuntimeError):
    """Report a cluster that cannot be used."""


class OptionError(ApecacheError, ValueError):
    """Report a setting that makes no sense."""

    exit_code = 2


class DataError(ApecacheError, ValueError):
    """Report an input that cannot be used."""

    exit_code = 3


class ManifestError(DataError):
    """Report a fault of the table of images and captions."""


class BadRowsError(DataError):
    """Report more unreadable rows than the limit allows."""


class EncoderError(DataError):
    """Report an encoder that cannot be found or used."""


class RecipeError(DataError):
    """Report a fault of a recipe or of one of its settings."""


class RunError(DataError):
    """Report a run folder, head or index that cannot be used."""


class StoreError(DataError):
    """Report a path that is not a store, or object storage that does not answer."""


class UnwritableError(StoreError):
    """Report a path at which the system lets nothing be stored; nothing is stored there yet."""

    exit_code = 1


class IncompleteError(StoreError):
    """Report a store whose extraction has not finished."""


class DamagedError(StoreError):
    """Report bytes that differ from their commit record."""


class MismatchError(ApecacheError, ValueError):
    """Report what does not belong to this store or run."""

    exit_code = 4

    def __init__(
        self,
        message: str,
        differences: Iterable[tuple[str, object, object]] = (),
    ) -> None:
        """Store the differences, which the command line prints as a table.

        Args:
            message: one line.
            differences: triples of field, found value and expected value.
        """
        super().__init__(message)
        self.differences = tuple(differences)


class RowError(Exception):
    """Report one row that cannot be encoded.

    Args:
        reason: a short fixed word, which rows are counted by.
        detail: the explanation, for people.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


def nearest(name: str, known: Iterable[str], limit: int = 3) -> str:
    """Return `; did you mean a, b?` for the known names closest to `name`, or an empty string."""
    names_by_letters: dict[str, list[str]] = {}
    for known_name in known:
        names_by_letters.setdefault(_letters(known_name), []).append(known_name)
    close_letters = get_close_matches(_letters(name), names_by_letters, n=limit, cutoff=0.5)
    close_names = [close for letters in close_letters for close in names_by_letters[letters]]
    close_names = close_names[:limit]
    return f"; did you mean {', '.join(close_names)}?" if close_names else ""


def nearest_sibling(path: Path, limit: int = 3) -> str:
    """Return `nearest` for a path that does not exist, among the names beside it.

    It is empty for a path that exists, and where the folder cannot be listed.
    """
    # Of `os.path`: the methods of Path raise where a folder above may not be searched.
    if os.path.exists(path):
        return ""
    # A hint is for an error that is being reported: it must not raise another one.
    try:
        siblings = os.listdir(path.parent)
    except OSError:
        return ""
    return nearest(path.name, siblings, limit)


def raise_if_refused(path: Path) -> None:
    """Raise the system's own error if it does not let a file be opened.

    Call it before a file that could not be read is reported as missing or damaged: libraries say
    neither that a permission is missing nor that too many files are open.

    Raises:
        OSError: The file is there, or may be there, and cannot be opened; it names the path.
    """
    try:
        with path.open("rb"):
            pass
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return


def _letters(name: str) -> str:
    """Return a name without what people mistype most: case and the separators of its words."""
    letters = name.casefold().translate(SEPARATORS)
    return letters or name


def counted(count: int, noun: str) -> str:
    """Return a count with its noun, such as `1 image` or `2,000 images`; plurals end in s."""
    plural = noun if count == 1 else f"{noun}es" if noun.endswith("s") else f"{noun}s"
    return f"{count:,} {plural}"


def one_line(text: object, limit: int = 200) -> str:
    """Return the text of another program as one line of at most `limit` characters."""
    return " ".join(str(text).split())[:limit]


@contextmanager
def naming(known: object, internal: object) -> Iterator[None]:
    """Replace a name in the messages of errors.

    Args:
        known: the path or option that the user gave.
        internal: what messages would name, such as a temporary copy.
    """
    try:
        yield
    except ApecacheError as error:
        error.args = (str(error).replace(str(internal), str(known)), *error.args[1:])
        raise


def require_local(folder: Path, what: str) -> None:
    """Refuse a URL of object storage where only a folder will do.

    Raises:
        RunError: `folder` is one.
    """
    # One slash: `Path` has made one of the two in a URL.
    scheme, colon, _ = str(folder).partition(":/")
    if colon and scheme in ("s3", "gs", "az"):
        raise RunError(f"{what} {folder} is on object storage; this command takes a folder")


def require_new(
    folder: Path,
    what: str,
    overwrite: bool = False,
    holds_another: bool = True,
    remedy: str = "choose another --out, or add --overwrite",
) -> None:
    """Refuse to write over something that exists.

    Args:
        folder: the output.
        what: the kind of output, for messages.
        overwrite: whether `--overwrite` was given.
        holds_another: whether `folder` holds an output of this kind, which may be overwritten.
        remedy: what the command that writes it offers.

    Raises:
        RunError: `folder` is not empty, and holds something else or is not to be overwritten.
    """
    require_local(folder, what)
    # An empty folder may be filled: nothing in it can be lost.
    is_filled = folder.is_dir() and any(folder.iterdir())
    if is_filled or folder.is_file():
        if not holds_another:
            raise RunError(
                f"{folder} holds other files than those of one {what}, so it is not overwritten; "
                "choose another --out"
            )
        if overwrite:
            return
        raise RunError(f"{what} {folder} exists already; {remedy}")
