"""Read and write the object that remembers what image files looked like: a cache, with a hash."""

from blake3 import blake3

from apecache.errors import DamagedError
from apecache.storage.files import Files
from apecache.store.layout import STAMPS

MAGIC = b"apecache stamps 1\n"
HASH_BYTES = 32


def write_stamp_file(files: Files, body: bytes) -> None:
    """Write the object, unless it has these bytes already."""
    data = MAGIC + blake3(body).digest() + body
    if not files.exists(STAMPS) or files.read(STAMPS) != data:
        files.write(STAMPS, data)


def read_stamp_file(files: Files) -> bytes:
    """Return the bytes that were written; none if there is no such object.

    Raises:
        DamagedError: The object is not what was written.
    """
    try:
        data = files.read(STAMPS)
    except FileNotFoundError:
        return b""
    head = len(MAGIC) + HASH_BYTES
    body = data[head:]
    if not data.startswith(MAGIC) or data[len(MAGIC) : head] != blake3(body).digest():
        raise DamagedError(
            f"{files.where(STAMPS)} is damaged; remove it: the next extract hashes all images"
        )
    return body
