"""Open TFRecord files of `tf.train.Example`, as img2dataset's output `tfrecord` is.

Each record is its length, the length's checksum, the message and the message's checksum. The
message is a map from names to lists of bytes, floats or integers. Only its structure is read to
open a file: images are read in place later. TensorFlow is not needed.
"""

import json
import mmap
import struct
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from google_crc32c import value as crc32c

from apecache.data.images import SUFFIXES
from apecache.data.media import Member, TarMedia
from apecache.data.pairs import PairSource, source_of_rows
from apecache.data.paths import part_names
from apecache.data.sidecars import SIDECAR_OPTIONS, Sidecar, rules_near, sidecar_rows
from apecache.data.spec import OpenSpec, require_only
from apecache.errors import ManifestError
from apecache.fingerprint import Json

IMAGE_FEATURES = (*(suffix.removeprefix(".") for suffix in SUFFIXES), "image", "image/encoded")
TEXT_FEATURE = "txt"
HEADER = struct.Struct("<QI")
FOOTER_BYTES = 4
DELIMITED = 2
"""Wire type of submessages, texts and bytes in protocol buffers."""

Span = tuple[int, int]
"""First byte, and the byte after the last one."""


@dataclass(kw_only=True)
class _Record:
    """Hold one sample: where its image is, and its other features."""

    file: int
    image: Member | None = None
    features: dict[str, Json] = field(default_factory=dict)


def open_tfrecords(paths: Sequence[Path], origin: str, spec: OpenSpec) -> PairSource:
    """Open TFRecord files; samples are in the order of the files.

    The image is the feature called `jpg` or the like, the caption is `txt`, or as in a `.json`. The
    key is the feature `key`, or the number of the sample.

    Raises:
        ManifestError: A file is missing, damaged, or has no images.
    """
    require_only(spec, origin, *SIDECAR_OPTIONS)
    records: list[_Record] = []
    for number, path in enumerate(paths):
        records += _read_file(path, number)
    if not any(record.image for record in records):
        raise ManifestError(
            f"{origin}: no images in it; expected Examples with a feature called "
            f"{', '.join(IMAGE_FEATURES[:4])} or the like"
        )
    names = part_names(paths)
    members: dict[str, Member] = {}
    sidecars = []
    skipped: Counter[str] = Counter()
    for position, record in enumerate(records):
        key = str(record.features.get("key") or f"{names[record.file]}/{position}")
        if key in members:
            key = f"{names[record.file]}/{key}"
        if record.image is None:
            skipped["samples without an image"] += 1
        else:
            members[key] = record.image
        text = record.features.pop(TEXT_FEATURE, None)
        texts = {"json": json.dumps(record.features)}
        if isinstance(text, str):
            texts["txt"] = text
        sidecars.append(Sidecar(key=key, location=f"{paths[record.file]}: {key}", texts=texts))
    rules = rules_near(paths[0].parent, spec)
    rows, fields, further = sidecar_rows(sidecars, rules=rules, origin=origin, spec=spec)
    source = source_of_rows(
        rows,
        origin=origin,
        media=TarMedia(tars=tuple(paths), members=members),
        fields=replace(fields, image="feature"),
    )
    return replace(source, skipped={**source.skipped, **skipped, **further})


def _read_file(path: Path, number: int) -> Iterator[_Record]:
    """Yield the records of a file.

    Raises:
        ManifestError: The file is compressed, damaged or cut.
    """
    with path.open("rb") as file:
        if not path.stat().st_size:
            return
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            position = 0
            while position < len(data):
                try:
                    length, checksum = HEADER.unpack_from(data, position)
                    is_sound = checksum == _masked(crc32c(data[position : position + 8]))
                    begin = position + HEADER.size
                    end = begin + length
                    if not is_sound or end + FOOTER_BYTES > len(data):
                        raise ValueError("no record")
                    record = _read_example(data, (begin, end), number)
                except (ValueError, IndexError, struct.error):
                    raise ManifestError(
                        f"{path}: a TFRecord file that is compressed, damaged or cut (at byte "
                        f"{position:,}); unpack it, or copy it again"
                    ) from None
                yield record
                position = end + FOOTER_BYTES


def _masked(checksum: int) -> int:
    """Return a checksum as TFRecord files have it."""
    rotated = (checksum >> 15) | (checksum << 17)
    return (rotated + 0xA282EAD8) & 0xFFFFFFFF


def _read_example(data: mmap.mmap, span: Span, number: int) -> _Record:
    """Read an Example { Features { map<string, Feature> } }."""
    record = _Record(file=number)
    for features in _messages(data, span, 1):
        for entry in _messages(data, features, 1):
            (name_span,) = _messages(data, entry, 1)
            name = data[slice(*name_span)].decode()
            for feature in _messages(data, entry, 2):
                _add_feature(record, data, name=name, span=feature)
    return record


def _add_feature(record: _Record, data: mmap.mmap, name: str, span: Span) -> None:
    """Add a Feature to a record: an image by its place, others by their first value."""
    for number, _, inner in _fields(data, span):
        # BytesList is field 1, FloatList 2, Int64List 3; in each, the values are field 1.
        values = [value for field_number, _, value in _fields(data, inner) if field_number == 1]
        if not values:
            continue
        begin, end = values[0]
        if number == 1 and name.lower() in IMAGE_FEATURES:
            record.image = Member(record.file, begin, end - begin)
        elif number == 1:
            text = data[begin:end].decode("utf-8", "replace")
            record.features[name] = text or None
        elif number == 2:
            record.features[name] = struct.unpack_from("<f", data, begin)[0]
        else:
            unsigned, _ = _varint(data, begin)
            record.features[name] = unsigned - 2**64 if unsigned >= 2**63 else unsigned


def _messages(data: mmap.mmap, span: Span, number: int) -> list[Span]:
    """Return the places of the submessages of one field."""
    fields = _fields(data, span)
    return [
        inner for field_number, wire, inner in fields if (field_number, wire) == (number, DELIMITED)
    ]


def _fields(data: mmap.mmap, span: Span) -> Iterator[tuple[int, int, Span]]:
    """Yield (number, wire type, place of the value) of each field of a message."""
    position, end = span
    while position < end:
        tag, position = _varint(data, position)
        number = tag >> 3
        wire = tag & 7
        begin = position
        match wire:
            case 0:
                _, position = _varint(data, position)
            case 1:
                position += 8
            case 2:  # DELIMITED
                length, begin = _varint(data, position)
                position = begin + length
            case 5:
                position += 4
            case _:
                raise ValueError("no field of this type")
        if position > end:
            raise ValueError("a field that ends outside its message")
        yield number, wire, (begin, position)


def _varint(data: mmap.mmap, position: int) -> tuple[int, int]:
    """Return a number of variable length, and the position behind it."""
    result = 0
    for shift in range(0, 70, 7):
        byte = data[position]
        position += 1
        result |= (byte & 0x7F) << shift
        if byte < 0x80:
            return result, position
    raise ValueError("a number that does not end")
