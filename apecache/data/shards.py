"""WebDataset: tars whose members of one name, but for the ending, make a sample; img2dataset writes
folders of them.

One pass over the headers makes the index; images are read in place later. A sample's key is its
members' name up to the first dot of the last part. If one key stands in two tars, every key gets
its tar's name in front (`00003/000017`), so that keys depend on the tars that are given, not on
where among them a key is repeated.
"""

import json
import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any, BinaryIO

from apecache.data.columns import LANGUAGE_COLUMNS, to_captions, to_text
from apecache.data.media import Member, TarMedia
from apecache.data.pairs import Pair, PairSource, SourceFields
from apecache.data.spec import OpenSpec, require_only
from apecache.errors import ManifestError, nearest

IMAGES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
TEXTS = ("txt", "caption", "json", "cls")
MAX_TEXT_BYTES = 1 << 24
MAX_TARS = 100_000
RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


def brace_paths(pattern: str) -> list[Path] | None:
    """The paths that `{00000..00012}` stands for, in order; None if there is no range.

    Raises:
        ManifestError: a range that runs backwards, or far too many paths.
    """
    bounds = RANGE.findall(pattern)
    if not bounds:
        return None
    ranges = [range(int(first), int(last) + 1) for first, last in bounds]
    count = 1
    for one in ranges:
        count *= len(one)
    if not 0 < count <= MAX_TARS:
        raise ManifestError(
            f"{pattern}: {count} tars; expected 1 to {MAX_TARS:,}, written as {{00000..00012}}.tar"
        )
    widths = [len(first) for first, _ in bounds]
    plain = RANGE.split(pattern)[::3]
    paths = []
    for chosen in product(*ranges):
        numbers = [f"{number:0{width}d}" for number, width in zip(chosen, widths, strict=True)]
        paths.append(Path("".join(a + b for a, b in zip(plain, [*numbers, ""], strict=True))))
    return paths


@dataclass(kw_only=True)
class _Sample:
    key: str
    tar: int
    members: dict[str, Member] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)


def open_shards(tars: Sequence[Path], origin: str, spec: OpenSpec) -> PairSource:
    """Samples in the order of the tars. The caption is `.txt`, `.caption`, or the field `caption`
    of `.json` (or that which `caption_column` names: it then comes first); `.cls` or the field
    `label` is the label.

    Raises:
        ManifestError: a tar that is missing, compressed, corrupt or cut; a name twice in one tar;
            no image anywhere.
    """
    require_only(spec, origin, "caption_column")
    samples = [sample for number, path in enumerate(tars) for sample in _samples(path, number)]
    if not any(_image(sample) for sample in samples):
        raise ManifestError(
            f"{origin}: no images in {len(tars)} tars; expected members named "
            f"KEY.{{{','.join(IMAGES)}}}"
        )
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
    """Endings of members, and fields of their JSON as `json.FIELD`; what some sample has counts as
    taken."""
    endings = dict.fromkeys(ending for sample in samples for ending in (*sample.members,))
    described = [_json(sample.texts.get("json"), sample.key) for sample in samples]
    names = dict.fromkeys(name for record in described for name in record)
    in_json = [spec.caption_column] if spec.caption_column else []
    texts = [ending for ending in ("txt", "caption") if ending in endings and not in_json]
    captions = [
        *texts,
        *(f"json.{name}" for name in in_json or (["caption"] if "caption" in names else [])),
    ]
    labels = [*(["cls"] if "cls" in endings else []), *(["json.label"] if "label" in names else [])]
    languages = [f"json.{name}" for name in LANGUAGE_COLUMNS if name in names]
    fields = SourceFields(
        image=next(iter([ending for ending in IMAGES if ending in endings]), None),
        caption=next(iter(captions), None),
        split="json.split" if "split" in names else None,
        label=next(iter(labels), None),
        language=next(iter(languages), None),
    )
    taken = set(fields.taken.values())
    every = [
        *(ending for ending in endings if ending != "json"),
        *(f"json.{name}" for name in names),
    ]
    return replace(fields, unused=tuple(name for name in every if name not in taken))


def _image(sample: _Sample) -> Member | None:
    return next((sample.members[ending] for ending in IMAGES if ending in sample.members), None)


def _samples(path: Path, number: int) -> Iterator[_Sample]:
    """Samples of one tar, in the order of their first member."""
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
    folder, slash, last = name.rpartition("/")
    stem, _, ending = last.partition(".")
    return folder + slash + stem, ending.lower()


def _members(path: Path, number: int) -> Iterator[tuple[str, Member, str | None]]:
    """Name, place and, of small texts, content of each image and text in a tar."""
    n_read = 0
    last = ""
    try:
        with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as archive:
            total = file.seek(0, os.SEEK_END)
            for info in archive:
                if info.offset_data + info.size > total:
                    raise tarfile.ReadError(f"it ends inside {_shown(info.name)}")
                n_read = n_read + 1
                last = _shown(info.name)
                name = info.name.removeprefix("./")
                if _is_wanted(name, info):
                    member = Member(number, info.offset_data, info.size)
                    text = (
                        _text(file, path=path, name=name, member=member)
                        if _split_name(name)[1] in TEXTS
                        else None
                    )
                    yield name, member, text
            _require_end(file, archive.offset)
    except tarfile.TarError as error:
        readable = (
            f"{n_read} members can be read, the last is {last}"
            if n_read
            else "nothing of it can be read"
        )
        raise ManifestError(
            f"{path}: {_why(path, error)}; {readable}: copy it again, or leave it out"
        ) from None
    except FileNotFoundError:
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise ManifestError(f"{path}: no such file{nearest(path.name, siblings)}") from None


def _shown(name: str) -> str:
    """A name for a message of one line."""
    return name if name.isprintable() else repr(name)


def _is_wanted(name: str, info: tarfile.TarInfo) -> bool:
    hidden = any(part.startswith((".", "__")) and part != ".." for part in name.split("/"))
    return (
        info.isreg()
        and not info.issparse()
        and not hidden
        and _split_name(name)[1] in (*IMAGES, *TEXTS)
    )


def _require_end(file: BinaryIO, offset: int) -> None:
    """A whole tar ends in blocks of zeros; `tarfile` takes a damaged header or a cut for the end as
    well."""
    file.seek(offset)
    block = file.read(tarfile.BLOCKSIZE)
    if any(block):
        raise tarfile.ReadError(f"no header at byte {offset:,}")
    if len(block) < tarfile.BLOCKSIZE:
        raise tarfile.ReadError("its end is missing")


def _why(path: Path, error: tarfile.TarError) -> str:
    with path.open("rb") as file:
        magic = file.read(6)
    if (
        magic[:2] == b"\x1f\x8b"
        or magic[:3] == b"BZh"
        or magic == b"\xfd7zXZ\0"
        or magic[:4] == b"\x28\xb5\x2f\xfd"
    ):
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
    where = f"{tar}: {_shown(sample.key)}"
    described = _json(sample.texts.get("json"), where)
    plain = next(
        (sample.texts[ending] for ending in ("txt", "caption") if ending in sample.texts),
        None,
    )
    if column is not None and column not in described:
        found = ", ".join(map(_shown, described)) or "none"
        raise ManifestError(
            f"{where}: its JSON has no field {column!r}; fields found: "
            f"{found}{nearest(column, described)}"
        )
    own = described.get(column or "caption")
    captions = to_captions(own if column or plain is None else plain.rstrip("\r\n"), where)
    language = next(
        (to_text(described[name], where, name) for name in LANGUAGE_COLUMNS if name in described),
        "",
    )
    label = sample.texts.get("cls", "").strip() or to_text(described.get("label"), where, "label")
    split = to_text(described.get("split"), where, "split")
    return Pair(
        key=sample.key,
        captions=captions,
        languages=(language,) * len(captions),
        split=split,
        label=label,
    )


def _json(text: str | None, where: str) -> dict[str, Any]:
    try:
        found = json.loads(text) if text is not None else {}
    except (ValueError, RecursionError) as error:
        raise ManifestError(f"{where}: its .json cannot be read ({error})") from None
    if not isinstance(found, dict):
        raise ManifestError(f"{where}: its .json is a {type(found).__name__}; expected an object")
    return found
