"""Open WebDataset tars, such as img2dataset writes.

Members whose names differ only in the ending make one sample. One pass over the headers makes the
index; images are read in place later. A sample's key is its members' name up to the first dot of
the file name. If one key is in two tars, every key gets its tar's name in front (`00003/000017`),
so that keys depend on the given tars, not on where among them a key is repeated.
"""

import json
import os
import re
import tarfile
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, product
from pathlib import Path
from typing import Any, BinaryIO

from apecache.data.columns import LANGUAGE_COLUMNS, to_captions, to_text
from apecache.data.media import Member, TarMedia
from apecache.data.pairs import Pair, PairSource, SourceFields
from apecache.data.spec import OpenSpec, require_only
from apecache.errors import ManifestError, counted, nearest, nearest_sibling

IMAGES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
TEXTS = ("txt", "caption", "json", "cls")
MAX_TEXT_BYTES = 1 << 24
MAX_TARS = 100_000
RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd")
"""First bytes of gzip, bzip2, xz and zstd files."""


def brace_paths(pattern: str) -> list[Path] | None:
    """Return the paths that `{00000..00012}` stands for, in order; None if there is no range.

    Raises:
        ManifestError: A range runs backwards, or there are far too many paths.
    """
    bounds = RANGE.findall(pattern)
    if not bounds:
        return None
    ranges = [range(int(first), int(last) + 1) for first, last in bounds]
    count = 1
    for number_range in ranges:
        count *= len(number_range)
    if not 0 < count <= MAX_TARS:
        raise ManifestError(
            f"{pattern}: {counted(count, 'tar')}; expected 1 to {MAX_TARS:,}, written as "
            "{00000..00012}.tar"
        )
    widths = [len(first) for first, _ in bounds]
    literals = RANGE.split(pattern)[::3]
    paths = []
    for range_values in product(*ranges):
        numbers = [
            f"{number:0{width}d}" for number, width in zip(range_values, widths, strict=True)
        ]
        # There is one literal more than numbers: the text behind the last range.
        texts = zip(literals, [*numbers, ""], strict=True)
        paths.append(Path("".join(chain.from_iterable(texts))))
    return paths


@dataclass(kw_only=True)
class _Sample:
    """Hold the members of one sample by their endings."""

    key: str
    tar: int
    """Index of its tar."""
    members: dict[str, Member] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    """Contents of its small texts."""


def open_shards(tars: Sequence[Path], origin: str, spec: OpenSpec) -> PairSource:
    """Open tars; samples are in the order of the tars.

    The caption is the field of `.json` that `spec.caption_column` names, or else `.txt`,
    `.caption`, or the field `caption` of `.json`. The label is `.cls` or the field `label`.

    Raises:
        ManifestError: A tar is missing, compressed, corrupt or truncated, a name is twice in one
            tar, or there is no image.
    """
    require_only(spec, origin, "caption_column")
    samples: list[_Sample] = []
    for number, path in enumerate(tars):
        samples += _samples(path, number)
    if not any(_image(sample) for sample in samples):
        raise ManifestError(
            f"{origin}: no images in {counted(len(tars), 'tar')}; expected members named "
            f"KEY.{{{','.join(IMAGES)}}}"
        )
    # All keys change, and not only the repeated ones: see the module's docstring.
    if len({sample.key for sample in samples}) < len(samples):
        for sample in samples:
            sample.key = f"{tars[sample.tar].stem}/{sample.key}"
    keys = [sample.key for sample in samples]
    if len(set(keys)) < len(keys):
        raise ManifestError(
            f"{origin}: two tars have the same name and the same keys; give them other names"
        )
    members = {sample.key: member for sample in samples if (member := _image(sample))}
    pairs = tuple(_pair(sample, spec.caption_column, tars[sample.tar]) for sample in samples)
    return PairSource(
        pairs,
        origin=origin,
        media=TarMedia(tars=tuple(tars), members=members),
        fields=_fields(samples, spec),
    )


def _fields(samples: Sequence[_Sample], spec: OpenSpec) -> SourceFields:
    """Return which endings and JSON fields have which role; JSON fields are called `json.FIELD`.

    A role counts as filled if any sample has it.
    """
    names: dict[str, None] = {}
    json_names: dict[str, None] = {}
    for sample in samples:
        names |= dict.fromkeys(sample.members)
        record = _json(sample.texts.get("json"), sample.key)
        json_names |= dict.fromkeys(f"json.{name}" for name in record)
    names.pop("json", None)
    names |= json_names
    captions: tuple[str, ...] = ("txt", "caption", "json.caption")
    if spec.caption_column:
        captions = (f"json.{spec.caption_column}",)
        names |= dict.fromkeys(captions)
    languages = [f"json.{name}" for name in LANGUAGE_COLUMNS]
    fields = SourceFields(
        image=_first_present(IMAGES, names),
        caption=_first_present(captions, names),
        split=_first_present(("json.split",), names),
        label=_first_present(("cls", "json.label"), names),
        language=_first_present(languages, names),
    )
    used_names = set(fields.taken.values())
    return replace(fields, unused=tuple(name for name in names if name not in used_names))


def _first_present(candidates: Sequence[str], names: Container[str]) -> str | None:
    return next((name for name in candidates if name in names), None)


def _image(sample: _Sample) -> Member | None:
    ending = _first_present(IMAGES, sample.members)
    return None if ending is None else sample.members[ending]


def _samples(path: Path, number: int) -> Iterator[_Sample]:
    """Return the samples of one tar, in the order of their first member."""
    samples: dict[str, _Sample] = {}
    for name, member, text in _members(path, number):
        key, ending = _split_name(name)
        sample = samples.setdefault(key, _Sample(key=key, tar=number))
        if ending in sample.members:
            raise ManifestError(
                f"{path}: {_shown(name)} is there twice; every member of a tar needs its own name"
            )
        sample.members[ending] = member
        if text is not None:
            sample.texts[ending] = text
    return iter(samples.values())


def _split_name(name: str) -> tuple[str, str]:
    """Split a member's name into the key of its sample and its ending."""
    folder, slash, last = name.rpartition("/")
    stem, _, ending = last.partition(".")
    return folder + slash + stem, ending.lower()


def _members(path: Path, number: int) -> Iterator[tuple[str, Member, str | None]]:
    """Yield the name, the place and, for small texts, the content of each image and text."""
    n_read = 0
    last = ""
    try:
        with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as archive:
            total = file.seek(0, os.SEEK_END)
            for info in archive:
                # `tarfile` skips over data without a look, so a cut inside it would go unnoticed.
                if info.offset_data + info.size > total:
                    raise tarfile.ReadError(f"it ends inside {_shown(info.name)}")
                n_read += 1
                last = _shown(info.name)
                name = info.name.removeprefix("./")
                if _is_wanted(name, info):
                    member = Member(number, info.offset_data, info.size)
                    text = None
                    if _split_name(name)[1] in TEXTS:
                        text = _text(file, path=path, name=name, member=member)
                    yield name, member, text
            _require_end(file, archive.offset)
    except tarfile.TarError as error:
        readable = "no member can be read"
        if n_read:
            readable = f"{counted(n_read, 'member')} can be read, the last is {last}"
        raise ManifestError(
            f"{path}: {_why(path, error)}; {readable}: copy it again, or leave it out"
        ) from None
    except FileNotFoundError:
        raise ManifestError(f"{path}: no such file{nearest_sibling(path)}") from None


def _shown(name: str) -> str:
    """Return a name for an error message of one line."""
    return name if name.isprintable() else repr(name)


def _is_wanted(name: str, info: tarfile.TarInfo) -> bool:
    hidden = any(segment.startswith((".", "__")) and segment != ".." for segment in name.split("/"))
    if hidden or not info.isreg() or info.issparse():
        return False
    _, ending = _split_name(name)
    return ending in (*IMAGES, *TEXTS)


def _require_end(file: BinaryIO, offset: int) -> None:
    """Check that the tar ends in a block of zeros.

    `tarfile` also takes a damaged header or a cut for the end.

    Raises:
        tarfile.ReadError: The block has other bytes, or is cut.
    """
    file.seek(offset)
    block = file.read(tarfile.BLOCKSIZE)
    if any(block):
        raise tarfile.ReadError(f"no header at byte {offset:,}")
    if len(block) < tarfile.BLOCKSIZE:
        raise tarfile.ReadError("its end is missing")


def _why(path: Path, error: tarfile.TarError) -> str:
    """Return what is wrong with a tar that cannot be read."""
    with path.open("rb") as file:
        magic = file.read(6)
    if magic.startswith(COMPRESSED):
        return "a compressed tar, whose members cannot be read in place (unpack it to a plain .tar)"
    return f"a tar that is damaged or cut ({error})"


def _text(file: BinaryIO, path: Path, name: str, member: Member) -> str:
    if member.size > MAX_TEXT_BYTES:
        raise ManifestError(
            f"{path}: {_shown(name)} has {member.size:,} bytes; expected a caption, at most "
            f"{MAX_TEXT_BYTES:,}"
        )
    file.seek(member.offset)
    data = file.read(member.size)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ManifestError(
            f"{path}: {_shown(name)}: not UTF-8 (byte {error.start + 1}); write texts as UTF-8"
        ) from None


def _pair(sample: _Sample, column: str | None, tar: Path) -> Pair:
    location = f"{tar}: {_shown(sample.key)}"
    described = _json(sample.texts.get("json"), location)
    text_ending = _first_present(("txt", "caption"), sample.texts)
    if column is not None and column not in described:
        field_names = ", ".join(map(_shown, described)) or "none"
        raise ManifestError(
            f"{location}: its JSON has no field {column!r}; fields found: "
            f"{field_names}{nearest(column, described)}"
        )
    if column or text_ending is None:
        captions = to_captions(described.get(column or "caption"), location)
    else:
        captions = to_captions(sample.texts[text_ending].rstrip("\r\n"), location)
    language_field = _first_present(LANGUAGE_COLUMNS, described)
    language = ""
    if language_field is not None:
        language = to_text(described[language_field], location, language_field)
    label = sample.texts.get("cls", "").strip()
    if not label:
        label = to_text(described.get("label"), location, "label")
    split = to_text(described.get("split"), location, "split")
    return Pair(
        key=sample.key,
        captions=captions,
        languages=(language,) * len(captions),
        split=split,
        label=label,
    )


def _json(text: str | None, location: str) -> dict[str, Any]:
    """Return the fields of a sample's JSON; none if it has no JSON."""
    try:
        record = json.loads(text) if text is not None else {}
    except (ValueError, RecursionError) as error:
        raise ManifestError(f"{location}: its .json cannot be read ({error})") from None
    if not isinstance(record, dict):
        raise ManifestError(
            f"{location}: its .json is a {type(record).__name__}; expected an object"
        )
    return record
