"""Take features from another store: those of equal contents under the same fingerprint.

Contents that the other store has become a block of their own, so that no shard of it has to be
encoded. Its shards are then copied, as an extraction commits them, after their checksums were
verified.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from apecache.arguments import AnyPath
from apecache.data.pairs import PairSource
from apecache.extraction.contents import stored_blocks, table_contents
from apecache.extraction.encode import ImageJob
from apecache.extraction.encode_texts import TextJob
from apecache.extraction.matching import Matching
from apecache.extraction.segments import BlockInputs, Segment, make_segment
from apecache.extraction.stamps import stamp_table, write_stamps
from apecache.extraction.table_plan import block_table, new_folder, require_same_scale
from apecache.fingerprint import Modality, content_hash
from apecache.storage.files import Files
from apecache.store.array import FeatureArray
from apecache.store.gather import gathered_rows
from apecache.store.layout import storable
from apecache.store.reader import FeatureStore
from apecache.store.writer import ArrayWriter


@dataclass(frozen=True, kw_only=True)
class ReusableStore:
    """Find features of another store by content."""

    store: FeatureStore

    @staticmethod
    def open(path: AnyPath | None) -> "ReusableStore | None":
        """Open the store to take features from; None without one."""
        return None if path is None else ReusableStore(store=FeatureStore.open(path))

    @cached_property
    def image_contents(self) -> set[str]:
        return self._contents("image")

    @cached_property
    def text_contents(self) -> set[str]:
        return self._contents("text")

    def _contents(self, modality: Modality) -> set[str]:
        """Return the hashes of all inputs that any array has features of."""
        contents: set[str] = set()
        for array in self.store.arrays(modality):
            if array.complete:
                contents.update(rows_by_content(array))
        return contents

    def copy_shards(
        self,
        writer: ArrayWriter,
        job: ImageJob | TextJob,
        shards: Sequence[int],
    ) -> list[int]:
        """Commit the shards whose contents the other store has, all under the same fingerprint.

        Args:
            writer: Of the array to fill.
            job: Knows the content of each row.
            shards: Shards that are to be filled.

        Returns:
            The shards that were committed.

        Raises:
            DamagedError: A shard of the other store is not what was committed.
        """
        record = writer.record
        array = next(
            (
                array
                for array in self.store.arrays(record.modality)
                if array.record.fingerprint.digest == record.fingerprint.digest and array.complete
            ),
            None,
        )
        # Token arrays are as wide as their longest caption, and int8 would be rounded twice.
        if array is None or array.tokens is not None or record.layout.scaled:
            return []
        row_of_content = rows_by_content(array)
        copied: list[int] = []
        for shard in shards:
            contents = [row_content(job, row) for row in writer.layout.shard(shard)]
            rows = [row_of_content.get(content, -1) for content in contents]
            if min(rows) >= 0:
                index: NDArray[np.int64] = np.array(rows, np.int64)
                features = gathered_rows(array, index)
                writer.commit(shard, features=features, content=contents)
                copied.append(shard)
        return copied


def rows_by_content(array: FeatureArray) -> dict[str, int]:
    """Return the row of each content that an array has features of."""
    described = zip(array.content(), array.load_ok().tolist(), strict=True)
    return {content: row for row, (content, ok) in enumerate(described) if content and ok}


def row_content(job: ImageJob | TextJob, row: int) -> str:
    """Return the hash of a row's input; empty where it is not known."""
    if isinstance(job, TextJob):
        return content_hash(job.source.captions[row])
    return job.source.contents[row] if isinstance(job.source, BlockInputs) else ""


def add_reusable_block(source: PairSource, files: Files, reusable: ReusableStore) -> None:
    """Make a block of the contents that a store lacks and another one has.

    Args:
        source: The table to extract.
        files: The store; it may not exist yet.
        reusable: The other store.

    Raises:
        MismatchError: The pixels of the other store's images were scaled otherwise.
    """
    require_same_scale(source, reusable.store.files)
    blocks = stored_blocks(files)
    matching = Matching(source=source, blocks=blocks, newest=None, retry=False)
    contents = table_contents(source, files=files, hashed=True)
    known_images = {content for content in matching.contents if content}
    known_texts = {str(caption) for block in blocks for caption in block.table.captions}
    keys: dict[str, str] = {}
    for key, content in zip(source.keys, contents.contents, strict=True):
        if content in reusable.image_contents and content not in known_images:
            keys.setdefault(content, key)
    captions: dict[str, str] = {}
    for caption, language in zip(source.captions, source.languages, strict=True):
        is_reusable = content_hash(caption) in reusable.text_contents
        if is_reusable and storable(caption) not in known_texts:
            captions.setdefault(caption, language)
    if not keys and not captions:
        return
    columns = block_table(
        keys=list(keys.values()),
        contents=list(keys),
        captions=list(captions),
        languages=list(captions.values()),
        image_rows=[-1] * len(captions),
        origin=source.origin,
    )
    block_inputs = BlockInputs(
        columns=columns,
        keys=columns.keys,
        contents=list(keys),
        media=source.media,
        pixels=source.pixels,
    )
    folder = new_folder(files, columns.digest)
    make_segment(Segment(store=files, folder=folder, part=block_inputs))
    # What was hashed here is not hashed again when the table is planned.
    write_stamps(files, stamp_table(source.keys, contents.stamps, contents.contents))
