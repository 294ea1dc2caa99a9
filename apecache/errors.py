"""Every error the library raises on purpose.

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
    │       ├── IncompleteError          extraction has not finished
    │       └── DamagedError             bytes differ from their commit record
    └── MismatchError                 4  does not belong to this store or run (also ValueError)

Messages are one line: what was found, what was expected, what mends it. `exit_code` is what the
command line ends with. `RowError` is no error of the run: it carries why one row could not be
encoded.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path


class ApecacheError(Exception):
    exit_code = 1


class MissingExtraError(ApecacheError, ImportError):
    def __init__(self, module: str, extra: str) -> None:
        super().__init__(
            f"{module} is not installed; install it with: pip install 'apecache[{extra}]'"
        )


class EngineError(ApecacheError, RuntimeError):
    pass


class OptionError(ApecacheError, ValueError):
    exit_code = 2


class DataError(ApecacheError, ValueError):
    exit_code = 3


class ManifestError(DataError):
    pass


class BadRowsError(DataError):
    pass


class EncoderError(DataError):
    pass


class RecipeError(DataError):
    pass


class RunError(DataError):
    pass


class StoreError(DataError):
    pass


class IncompleteError(StoreError):
    pass


class DamagedError(StoreError):
    pass


class MismatchError(ApecacheError, ValueError):
    exit_code = 4

    def __init__(
        self,
        message: str,
        differences: Iterable[tuple[str, object, object]] = (),
    ) -> None:
        """`differences`: (field, found, expected) triples, shown as a table by whoever prints the
        error."""
        super().__init__(message)
        self.differences = tuple(differences)


class RowError(Exception):
    """One row cannot be encoded: `reason` is a short fixed word for counting, `detail` is for
    people."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


def nearest(name: str, known: Iterable[str], limit: int = 3) -> str:
    """`; did you mean a, b?` for the known names closest to `name`, or an empty string."""
    found = get_close_matches(name, list(known), n=limit, cutoff=0.5)
    return f"; did you mean {', '.join(found)}?" if found else ""


def one_line(text: object, limit: int = 200) -> str:
    """What somebody else wrote, fit for a message: white space as single spaces, cut at `limit`."""
    return " ".join(str(text).split())[:limit]


@contextmanager
def naming(place: object, copy: object) -> Iterator[None]:
    """Errors name `place` in place of the temporary copy of it that is worked on."""
    try:
        yield
    except ApecacheError as error:
        error.args = (str(error).replace(str(copy), str(place)), *error.args[1:])
        raise


def require_local(folder: Path, what: str) -> None:
    """Refuse a URL of object storage where only a folder will do.

    Raises:
        RunError: `folder` is one.
    """
    scheme, colon, _ = str(folder).partition(":/")
    if colon and scheme in ("s3", "gs", "az"):
        raise RunError(f"{what} {folder} is on object storage; this command takes a folder")


def require_new(folder: Path, what: str, overwrite: bool = False) -> None:
    """Refuse to write over something that exists. `overwrite`: it was asked for, but this is
    nothing of ours.

    Raises:
        RunError: `folder` exists and is not empty.
    """
    require_local(folder, what)
    if (folder.is_dir() and any(folder.iterdir())) or folder.is_file():
        if overwrite:
            raise RunError(
                f"{folder} exists and is no {what}, so it is not overwritten; choose another --out"
            )
        raise RunError(f"{what} {folder} exists already; choose another --out, or add --overwrite")
