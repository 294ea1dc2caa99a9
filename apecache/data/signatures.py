"""Recognize the format of a file by its first bytes."""

SIGNATURE_BYTES = 32

READABLE = (
    (0, b"\xff\xd8\xff"),
    (0, b"\x89PNG\r\n\x1a\n"),
    (0, b"GIF8"),
    (0, b"BM"),
    (0, b"II*\x00"),
    (0, b"MM\x00*"),
    (8, b"WEBP"),
    (4, b"ftypavif"),
    (4, b"ftypavis"),
)
"""Offset and bytes of each format that is read."""

REFUSED = (
    (4, b"ftypheic", "HEIC"),
    (4, b"ftypheix", "HEIC"),
    (4, b"ftypmif1", "HEIF"),
    (4, b"ftypmsf1", "HEIF"),
    (0, b"\xff\x0a", "JPEG XL"),
    (0, b"\x00\x00\x00\x0cJXL ", "JPEG XL"),
    (0, b"\x00\x00\x00\x0cjP  ", "JPEG 2000"),
    (0, b"\xff\x4f\xff\x51", "JPEG 2000"),
    (0, b"8BPS", "a Photoshop file"),
    (0, b"%PDF", "a PDF"),
    (4, b"ftyp", "a video"),
    (0, b"\x1aE\xdf\xa3", "a video"),
    (0, b"PK\x03\x04", "a zip file"),
    (0, b"\x1f\x8b", "a gzip file"),
    (0, b"version https://git-lfs", "a Git LFS pointer (git lfs pull fetches the file)"),
    (0, b"<!DOCTYPE html", "a web page"),
    (0, b"<!doctype html", "a web page"),
    (0, b"<html", "a web page"),
    (0, b"<svg", "SVG"),
    (0, b"<?xml", "XML or SVG"),
)
"""Offset, bytes and name of formats that are found in place of images."""


def is_readable_image(head: bytes) -> bool:
    """Return whether the first bytes of a file are those of a format that is read."""
    return any(head[offset:].startswith(magic) for offset, magic in READABLE)


def name_of_content(head: bytes) -> str | None:
    """Return the name of a format that is not read; None if the bytes tell nothing."""
    for offset, magic, name in REFUSED:
        if head[offset : offset + len(magic)] == magic:
            return name
    return None
