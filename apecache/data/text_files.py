"""Open text files, compressed or not."""

import gzip
import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TextIO, cast

from apecache.errors import ManifestError, MissingExtraError


@contextmanager
def open_text(path: Path, newline: str | None = "") -> Iterator[TextIO]:
    """Open a file of UTF-8 text, with or without a byte order mark; `.gz` and `.zst` are unpacked.

    Args:
        path: The file.
        newline: As of `open`: by default lines end in any of the usual ways. Line ends are not
            translated.

    Raises:
        ManifestError: The file is not UTF-8, or its compression is damaged.
        MissingExtraError: pyarrow is not installed, which unpacks `.zst`.
    """
    try:
        with (
            _open_binary(path) as raw,
            io.TextIOWrapper(
                raw,
                "utf-8-sig",
                newline=newline,
            ) as file,
        ):
            yield file
    except UnicodeDecodeError as error:
        raise ManifestError(not_utf8(path, error)) from None
    except (gzip.BadGzipFile, EOFError) as error:
        raise ManifestError(f"{path}: a damaged gzip file ({error}); copy it again") from None


def _open_binary(path: Path) -> IO[bytes]:
    match path.suffix.lower():
        case ".gz":
            # Its type says less than it can do.
            return cast("IO[bytes]", gzip.open(path, "rb"))
        case ".zst":
            try:
                import pyarrow as pa
            except ImportError:
                raise MissingExtraError("pyarrow", "parquet") from None
            try:
                with pa.input_stream(str(path), compression="zstd") as stream:
                    return io.BytesIO(stream.read())
            except pa.ArrowException as error:
                raise ManifestError(f"{path}: a damaged zstd file ({error})") from None
            except OSError as error:
                if error.errno:
                    raise
                raise ManifestError(f"{path}: a damaged zstd file ({error})") from None
        case _:
            return path.open("rb")


def not_utf8(path: Path, error: UnicodeDecodeError) -> str:
    """Return the error message for a file that is not UTF-8."""
    return f"{path}: not UTF-8 ({_place(path, error)}); save the file as UTF-8"


def _place(path: Path, error: UnicodeDecodeError) -> str:
    """Return the line and the byte where the file stops being UTF-8."""
    # The codec's own offset counts from the start of its buffer, so the file is read again.
    with _open_binary(path) as file:
        for line, raw in enumerate(file, 1):
            try:
                raw.decode("utf-8-sig" if line == 1 else "utf-8")
            except UnicodeDecodeError as inner:
                return f"line {line}, byte {inner.start + 1}"
    return str(error.reason)
