"""Make the blocks of a store, which hold the contents of its tables."""

from dataclasses import dataclass
from importlib.metadata import version
from typing import Protocol

from apecache.data.media import Media
from apecache.data.pairs import PairSource
from apecache.data.pixels import PixelRules
from apecache.data.recorded import options_to_record
from apecache.storage.files import Files
from apecache.store.layout import SEGMENTS
from apecache.store.writer import PairColumns, add_segment, create_store


class Inputs(Protocol):
    """Give the inputs of one block: images by key, captions, and which image a caption has."""

    @property
    def keys(self) -> list[str]: ...

    @property
    def captions(self) -> list[str]: ...

    @property
    def image_rows(self) -> list[int]:
        """Return the row of each caption's image; -1 where the block does not have it."""

    @property
    def media(self) -> Media: ...

    @property
    def pixels(self) -> PixelRules: ...

    @property
    def origin(self) -> str: ...

    def __len__(self) -> int:
        """Return the number of images."""


@dataclass(frozen=True, kw_only=True)
class BlockInputs:
    """Hold the inputs of a block, each where it is now."""

    columns: PairColumns
    """The block's own table, as it is stored."""
    keys: list[str]
    """Where each image is now: its key in the table that is extracted, else that in `columns`."""
    contents: list[str]
    """BLAKE3 that each image must have; empty where it is not known."""
    media: Media
    pixels: PixelRules

    @property
    def captions(self) -> list[str]:
        return self.columns.captions

    @property
    def image_rows(self) -> list[int]:
        return self.columns.image_rows

    @property
    def origin(self) -> str:
        return self.columns.origin

    def __len__(self) -> int:
        return len(self.keys)


def pair_columns(part: PairSource | BlockInputs) -> PairColumns:
    """Return the table of a block as the store keeps it, column by column."""
    if isinstance(part, BlockInputs):
        return part.columns
    splits = [pair.split for pair in part]
    labels = [pair.label for pair in part]
    return PairColumns(
        keys=part.keys,
        splits=splits,
        labels=labels,
        captions=part.captions,
        languages=part.languages,
        image_rows=part.image_rows,
        digest=part.digest,
        origin=part.origin,
        options=options_to_record(part),
    )


@dataclass(frozen=True, kw_only=True)
class Segment:
    """Pair a block of a store with its inputs."""

    store: Files
    folder: str
    """Empty for the first block, which is the store itself."""
    part: PairSource | BlockInputs

    @property
    def files(self) -> Files:
        return self.store.child(self.folder)


def make_segment(segment: Segment) -> None:
    """Make the store, or a later block of it; what exists already stays.

    Raises as `create_store` does.
    """
    columns = pair_columns(segment.part)
    root = segment.part.media.place
    made_by = version("apecache")
    if segment.folder:
        name = segment.folder.removeprefix(f"{SEGMENTS}/")
        add_segment(segment.store, segment=name, pairs=columns, root=root, version=made_by)
    else:
        create_store(segment.store, pairs=columns, root=root, version=made_by)
