"""Open WebDataset tars, such as img2dataset and clip_benchmark write.

Members whose names differ only in the ending make one sample. One pass over the headers makes the
index; images are read in place later. A sample's key is its members' name up to the first dot of
the file name, by WebDataset's own rule. If one key is in two tars, every key gets its tar's name in
front (`00003/000017`), so that keys depend on the given tars, not on where among them a key is
repeated.
"""

import os
import tarfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO

from apecache.data.images import REFUSED_SUFFIXES, SUFFIXES
from apecache.data.media import Member, TarMedia
from apecache.data.pairs import PairSource, source_of_rows
from apecache.data.paths import part_names
from apecache.data.sidecars import (
    SIDECAR_OPTIONS,
    TEXT_ENDINGS,
    Sidecar,
    rules_near,
    sidecar_rows,
)
from apecache.data.spec import SPLITS, OpenSpec, distinct_splits, require_only
from apecache.errors import ManifestError, counted, nearest_sibling

IMAGES = tuple(suffix.removeprefix(".") for suffix in (*SUFFIXES, *REFUSED_SUFFIXES))
WITHOUT_IMAGE = "samples without an image"
SEVERAL_IMAGES = "samples of several images, none of them KEY.jpg or the like (name --image-ext)"
MAX_TEXT_BYTES = 1 << 24
COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd")
"""First bytes of gzip, bzip2, xz and zstd files."""


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

    The image is the member of `spec.image_ext`, or else the one that ends in `.jpg` or the like;
    texts are read as `sidecar_rows` says. Tars in folders called train, val or test have that
    split.

    Raises:
        ManifestError: A tar is missing, compressed, corrupt or truncated, a name is twice in one
            tar, or there is no image.
    """
    require_only(spec, origin, *SIDECAR_OPTIONS, "image_ext")
    reader = _TarReader(spec)
    samples: list[_Sample] = []
    for number, path in enumerate(tars):
        samples += reader.samples(path, number)
    # By identity: keys are made unique below, and may repeat until then.
    images = {id(sample): reader.image(sample) for sample in samples}
    if not any(images.values()):
        members = f"expected members named KEY.{{{','.join(IMAGES[:4])},…}}"
        left_out = ", ".join(reader.skipped) or "no members"
        raise ManifestError(
            f"{origin}: no images in {counted(len(tars), 'tar')}, only {left_out}; {members}, or "
            "name their ending with --image-ext"
        )
    _make_keys_unique(samples, tars, origin)
    split_of = distinct_splits(_split_folder(path) for path in tars)
    splits = [split_of[_split_folder(path)] for path in tars]
    rules = rules_near(tars[0].parent, spec)
    sidecars = [_sidecar(sample, tars[sample.tar], splits[sample.tar]) for sample in samples]
    rows, fields, skipped = sidecar_rows(sidecars, rules=rules, origin=origin, spec=spec)
    members_by_key = {sample.key: member for sample in samples if (member := images[id(sample)])}
    media = TarMedia(tars=tuple(tars), members=members_by_key)
    has_folder_splits = fields.split is None and any(splits)
    fields = replace(
        fields,
        image=spec.image_ext or next(iter(reader.image_endings)),
        split="folder" if has_folder_splits else fields.split,
    )
    source = source_of_rows(rows, origin=origin, media=media, fields=fields)
    return replace(source, skipped={**source.skipped, **reader.skipped, **skipped})


def _split_folder(tar: Path) -> str:
    return tar.parent.name if tar.parent.name in SPLITS else ""


def _make_keys_unique(samples: Sequence[_Sample], tars: Sequence[Path], origin: str) -> None:
    """Put the names of the tars in front of all keys if any key is in two tars."""
    # All keys change, and not only the repeated ones: see the module's docstring.
    if len({sample.key for sample in samples}) == len(samples):
        return
    names = part_names(tars)
    for sample in samples:
        sample.key = f"{names[sample.tar]}/{sample.key}"
    keys = [sample.key for sample in samples]
    if len(set(keys)) < len(keys):
        raise ManifestError(f"{origin}: a tar is given twice; give each one once")


def _sidecar(sample: _Sample, tar: Path, split: str) -> Sidecar:
    return Sidecar(
        key=sample.key,
        location=f"{tar}: {_shown(sample.key)}",
        texts=sample.texts,
        split=split,
    )


def split_name(name: str) -> tuple[str, str]:
    """Split a member's name into the key of its sample and its ending, at the first dot.

    That is WebDataset's rule: `photo v1.5.jpg` has the key `photo v1` and the ending `5.jpg`.
    """
    folder, slash, last = name.rpartition("/")
    stem, _, ending = last.partition(".")
    return folder + slash + stem, ending.lower()


class _TarReader:
    """Read the headers and the small texts of tars, and count what is left out.

    Attributes:
        skipped: Number of members or samples by reason.
        image_endings: The endings of the images that were taken.
    """

    def __init__(self, spec: OpenSpec) -> None:
        self.spec = spec
        self.skipped: Counter[str] = Counter()
        self.image_endings: dict[str, None] = {}

    def image(self, sample: _Sample) -> Member | None:
        """Return the image of a sample.

        It has the ending that is asked for, a usual one, or is the only one whose last part is
        usual, as in `KEY.5.jpg`.
        """
        members = {ending: member for ending, member in sample.members.items() if _is_image(ending)}
        if self.spec.image_ext is not None:
            requested = self.spec.image_ext.lower().removeprefix(".")
            image_ending = requested if requested in sample.members else None
        else:
            image_ending = next((ending for ending in IMAGES if ending in members), None)
            if image_ending is None and len(members) == 1:
                (image_ending,) = members
        if image_ending is None:
            self.skipped[SEVERAL_IMAGES if members else WITHOUT_IMAGE] += 1
            return None
        for ending in members:
            if ending != image_ending:
                self.skipped[f"further images .{ending}"] += 1
        self.image_endings[image_ending] = None
        return sample.members[image_ending]

    def samples(self, path: Path, number: int) -> list[_Sample]:
        """Return the samples of one tar, in the order of their first member."""
        samples: dict[str, _Sample] = {}
        n_read = 0
        last = ""
        try:
            with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as archive:
                total = file.seek(0, os.SEEK_END)
                for info in archive:
                    # `tarfile` skips over data without a look: a cut inside it is not noticed.
                    if info.offset_data + info.size > total:
                        raise tarfile.ReadError(f"it ends inside {_shown(info.name)}")
                    n_read += 1
                    last = _shown(info.name)
                    name = info.name.removeprefix("./")
                    if self._is_wanted(name, info):
                        member = Member(number, info.offset_data, info.size)
                        self._add(samples, file=file, path=path, name=name, member=member)
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
        return list(samples.values())

    def _add(
        self,
        samples: dict[str, _Sample],
        file: BinaryIO,
        path: Path,
        name: str,
        member: Member,
    ) -> None:
        """Add a member to its sample."""
        key, ending = split_name(name)
        sample = samples.setdefault(key, _Sample(key=key, tar=member.tar))
        if ending in sample.members:
            raise ManifestError(
                f"{path}: {_shown(name)} is there twice; every member of a tar needs its own name"
            )
        sample.members[ending] = member
        role = self._text_role(ending)
        if role is None:
            return
        # `KEY.txt` comes before `KEY.5.txt`, whichever is first in the tar.
        if role in sample.texts:
            self.skipped[f"further texts .{ending}"] += 1
        if role not in sample.texts or ending == role:
            sample.texts[role] = _text(file, path=path, name=name, member=member)

    def _text_role(self, ending: str) -> str | None:
        """Return the usual ending of a text; None if it is not one."""
        last = ending.rpartition(".")[2]
        if self.spec.caption_ext is not None:
            requested = self.spec.caption_ext.lower().removeprefix(".")
            if ending == requested:
                return "txt"
            return last if last in ("json", "cls") and last == ending else None
        return last if last in TEXT_ENDINGS else None

    def _is_wanted(self, name: str, info: tarfile.TarInfo) -> bool:
        if info.isdir():
            return False
        segments = name.split("/")
        hidden = any(text.startswith((".", "__")) and text != ".." for text in segments)
        ending = split_name(name)[1]
        requested = (self.spec.image_ext, self.spec.caption_ext)
        is_requested = ending in [text.lower().removeprefix(".") for text in requested if text]
        usual = _is_image(ending) or self._text_role(ending) is not None
        reason = ""
        if hidden:
            reason = "hidden members"
        elif not info.isreg() or info.issparse():
            reason = "members that are links or not files"
        elif not (usual or is_requested):
            reason = f"members .{ending}" if ending else "members without an ending"
        if reason:
            self.skipped[_shown(reason)] += 1
        return not reason


def _is_image(ending: str) -> bool:
    return ending.rpartition(".")[2] in IMAGES


def _shown(name: str) -> str:
    """Return a name for an error message of one line."""
    return name if name.isprintable() else repr(name)


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
