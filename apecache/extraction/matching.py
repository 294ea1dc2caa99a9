"""Find the row in a store of each image and caption of a table.

Images are compared by the BLAKE3 of their files, captions by their characters.
"""

from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from apecache.data.media import NoMedia
from apecache.data.pairs import PairSource
from apecache.extraction.contents import SEEN, StoredBlock, TableContents
from apecache.extraction.encode_texts import caption_error
from apecache.extraction.kept_columns import has_columns, source_columns
from apecache.fingerprint import Modality
from apecache.store.layout import storable
from apecache.store.reader import FeatureStore

NO_ROW = -1
"""Row of an input that cannot be read."""
NEW = -2
"""Row of an input that the store lacks; -2, -3, … are row 0, 1, … of a new block."""


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Hold the content row of each input of a table, counted through all blocks of the store."""

    images: NDArray[np.int64]
    texts: NDArray[np.int64]
    problems: Mapping[int, str]
    """Why images have no row, by their row in the table."""
    first_image: Mapping[str, int] = field(default_factory=dict)
    """First image row of each block, by folder."""
    first_text: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Matching:
    """Compare a table with the blocks of a store."""

    source: PairSource
    blocks: Sequence[StoredBlock]
    newest: FeatureStore | None
    """The newest view."""
    retry: bool
    """Whether rows that could not be encoded are tried again."""

    @cached_property
    def first_image(self) -> dict[str, int]:
        return self._first_rows("image")

    @cached_property
    def first_text(self) -> dict[str, int]:
        return self._first_rows("text")

    def _first_rows(self, modality: Modality) -> dict[str, int]:
        first = 0
        first_rows: dict[str, int] = {}
        for block in self.blocks:
            first_rows[block.folder] = first
            first += block.reference.rows(modality)
        return first_rows

    @cached_property
    def newest_folders(self) -> list[str]:
        """Return the folders of the newest view's blocks."""
        if self.newest is None:
            return []
        if self.newest.view is not None:
            return [block.folder for block in self.newest.view.record.blocks]
        # Without views, the first blocks are the ones whose rows are the table.
        return [block.folder for block in self.blocks[: len(self.newest.blocks)]]

    def is_unchanged(self, rows: Rows) -> bool:
        """Return whether the newest view has this table and these rows."""
        return (
            self.newest is not None
            and has_table(self.newest, self.source)
            and has_columns(self.newest.pairs, source_columns(self.source))
            and np.array_equal(rows.images, self.newest_rows("image"))
            and np.array_equal(rows.texts, self.newest_rows("text"))
        )

    def newest_rows(self, modality: Modality) -> NDArray[np.int64]:
        """Return the content row of each row of the newest view, counted through all blocks."""
        if self.newest is None:
            return np.zeros(0, np.int64)
        first_rows = self.first_image if modality == "image" else self.first_text
        all_rows: list[NDArray[np.int64]] = []
        for block in self.blocks:
            if block.folder in self.newest_folders:
                first = first_rows[block.folder]
                all_rows.append(np.arange(first, first + block.reference.rows(modality)))
        rows_of_view = np.append(np.concatenate(all_rows), NO_ROW)
        if self.newest.view is None:
            return rows_of_view[:-1]
        content_rows: NDArray[np.int64] = rows_of_view[self.newest.view.content_rows(modality)]
        return content_rows

    def rows(self, contents: TableContents) -> Rows:
        """Return the row of each image and caption of the table.

        Args:
            contents: What its images are now.
        """
        images, problems = self._image_rows(contents)
        return Rows(
            images=images,
            texts=self._text_rows(),
            problems=problems,
            first_image=self.first_image,
            first_text=self.first_text,
        )

    # --- images -----------------------------------------------------------------------------------

    @cached_property
    def contents(self) -> list[str | None]:
        """Return the hash of each image in the blocks, as `StoredBlock.contents` does."""
        contents: list[str | None] = []
        for block in self.blocks:
            contents += block.contents
        return contents

    @property
    def has_contents(self) -> bool:
        """Return whether the hash of any image is known."""
        return any(content is not None for content in self.contents)

    @cached_property
    def _row_of_content(self) -> dict[str, int]:
        # The last row counts: it is there because an earlier one could not be encoded.
        return {content: row for row, content in enumerate(self.contents) if content}

    @cached_property
    def _row_of_key(self) -> dict[str, int]:
        rows: dict[str, int] = {}
        for block in self.blocks:
            for row, key in enumerate(block.table.keys, self.first_image[block.folder]):
                rows[str(key)] = row
        return rows

    @cached_property
    def _newest_row_of_key(self) -> dict[str, int]:
        if self.newest is None:
            return {}
        rows = self.newest_rows("image").tolist()
        return dict(zip(map(str, self.newest.pairs.keys), rows, strict=True))

    @cached_property
    def _bad_images(self) -> set[int]:
        return self._bad_rows("image")

    def _bad_rows(self, modality: Modality) -> set[int]:
        first_rows = self.first_image if modality == "image" else self.first_text
        rows: set[int] = set()
        for block in self.blocks:
            first = first_rows[block.folder]
            rows.update(first + row for row in block.bad_rows(modality))
        return rows

    @cached_property
    def failed_rows(self) -> list[int]:
        """Return the rows of the table whose images could not be encoded."""
        failed: list[int] = []
        for row, key in enumerate(self.source.keys):
            content_row = self._newest_row_of_key.get(key)
            if content_row is not None and (content_row < 0 or content_row in self._bad_images):
                failed.append(row)
        return failed

    def _image_rows(self, table: TableContents) -> tuple[NDArray[np.int64], dict[int, str]]:
        """Return the row of each image, and why some have none."""
        without_images = isinstance(self.source.media, NoMedia)
        rows = np.full(len(self.source), NO_ROW, np.int64)
        problems: dict[int, str] = {}
        new_rows: dict[str, int] = {}
        described = zip(self.source.keys, table.contents, table.recorded, strict=True)
        for row, (key, content, recorded) in enumerate(described):
            content_row = self._image_row(key, content, recorded)
            if content_row == NEW and without_images:
                content_row = NO_ROW
            if content_row == NEW:
                # Equal files are encoded once. A file that was not hashed equals no other.
                identity = content if content and content != SEEN else f"row {row}"
                content_row = NEW - new_rows.setdefault(identity, len(new_rows))
            if content_row == NO_ROW:
                problems[row] = table.problems.get(row) or self._earlier_problem(key)
            rows[row] = content_row
        return rows, problems

    def _image_row(self, key: str, content: str | None, recorded: bool) -> int:
        """Find the row of one image; NEW where the store lacks it.

        Args:
            key: Its key in the table.
            content: What it is now, as in `TableContents.contents`.
            recorded: Whether an earlier extraction has seen its file.
        """
        own_row = self._newest_row_of_key.get(key)
        key_row = self._row_of_key.get(key)
        usual_row = key_row if own_row is None else own_row
        if content is None or content == SEEN:
            return NEW if usual_row is None else usual_row
        if content == "":
            return self._unreadable_row(own_row, key_row)
        match_row = self._matching_row(content, own_row, key_row)
        if match_row is None and self.newest is None and key_row is not None:
            # The file of this row was there, but no image: its content was not recorded.
            return NEW if self.contents[key_row] else key_row
        if match_row is None:
            # The stamps are lost, so that nobody knows whether the unreadable file has changed.
            if not recorded and not self.retry and own_row is not None and own_row >= 0:
                return own_row if self.contents[own_row] == "" else NEW
            return NEW
        if self.retry and match_row in self._bad_images:
            last_row = self._row_of_content.get(content, match_row)
            return NEW if last_row in self._bad_images else last_row
        return match_row

    def _matching_row(self, content: str, own_row: int | None, key_row: int | None) -> int | None:
        """Find a row that has this content; the row of the same key is preferred."""
        if own_row is not None and own_row >= 0 and self.contents[own_row] == content:
            return own_row
        if content in self._row_of_content:
            return self._row_of_content[content]
        # A row that is planned, but not encoded, gets what its file has then.
        for row in (own_row, key_row):
            if row is not None and row >= 0 and self.contents[row] is None:
                return row
        return None

    def _unreadable_row(self, own_row: int | None, key_row: int | None) -> int:
        """Find the row of an image that cannot be read: one that is as bad, or none."""
        if own_row == NO_ROW:
            return NO_ROW
        for row in (own_row, key_row):
            if row is not None and not self.contents[row]:
                return row
        return NO_ROW

    def _earlier_problem(self, key: str) -> str:
        """Return what the newest view says about an image that it has no features of."""
        if self.newest is None or self.newest.view is None:
            return ""
        row = self.newest.pairs.row_of_key.get(key)
        return "" if row is None else str(self.newest.view.problems[row])

    # --- captions ---------------------------------------------------------------------------------

    def _text_rows(self) -> NDArray[np.int64]:
        """Return the row of each caption."""
        captions = [storable(caption) for caption in self.source.captions]
        bad_rows = self._bad_rows("text") if self.retry else set[int]()
        own_rows = self._own_texts
        new_rows: dict[str, int] = {}
        rows = np.empty(len(captions), np.int64)
        for row, caption in enumerate(captions):
            key = self.source.keys[self.source.image_rows[row]]
            same = own_rows.get((key, caption))
            content_row = same.popleft() if same else self._row_of_caption.get(caption, NEW)
            if content_row in bad_rows and not caption_error(self.source.captions[row]):
                content_row = NEW
            if content_row == NEW:
                content_row = NEW - new_rows.setdefault(caption, len(new_rows))
            rows[row] = content_row
        return rows

    @cached_property
    def _row_of_caption(self) -> dict[str, int]:
        rows: dict[str, int] = {}
        for block in self.blocks:
            for row, caption in enumerate(block.table.captions, self.first_text[block.folder]):
                rows[str(caption)] = row
        return rows

    @cached_property
    def _own_texts(self) -> dict[tuple[str, str], deque[int]]:
        """Return the rows of the newest view by key and caption.

        Only needed where a block has a caption twice: equal captions may differ in their last bits.
        """
        n_texts = sum(block.reference.n_texts for block in self.blocks)
        rows: dict[tuple[str, str], deque[int]] = defaultdict(deque)
        if self.newest is None or len(self._row_of_caption) == n_texts:
            return rows
        pairs = self.newest.pairs
        owners = pairs.keys[pairs.image_rows]
        content_rows = self.newest_rows("text").tolist()
        for key, caption, row in zip(owners, pairs.captions, content_rows, strict=True):
            rows[str(key), str(caption)].append(row)
        return rows


def has_table(store: FeatureStore, source: PairSource) -> bool:
    """Return whether the table of an opened store is this source."""
    if store.view is not None:
        return store.view.record.table == source.digest
    first = 0
    for block in store.blocks:
        n_images = block.block_source["n_images"]
        if source.part(first, first + n_images).digest != block.block_source["digest"]:
            return False
        first += n_images
    return first == len(source)
