import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from numpy.typing import NDArray

from apecache.errors import DamagedError, MismatchError, StoreError
from apecache.storage.files import TEMPORARY, Buffer, PutStaged
from apecache.storage.local_files import LocalFiles
from apecache.store.layout import PAIRS, SOURCE, VIEW_FORMAT_VERSION, chunk_name, commit_name
from apecache.store.reader import FeatureStore
from apecache.store.records import with_checksum
from apecache.store.writer import ArrayWriter, QuarantinedRow, create_array, create_store
from benchmarks.reliability.injection import tower
from benchmarks.reliability.injection.program import program_environment
from benchmarks.reliability.injection.syscalls import SimulatedKill, Stop, intercepted, unsynced
from benchmarks.reliability.injection.tower import (
    MODALITIES,
    NAME,
    SMALL,
    array_record,
    columns,
    commit_shard,
    expected,
    features,
    tree,
)


def begin(store: Path, **changes: Any) -> ArrayWriter:
    """A new store with an image array and no shards."""
    files = LocalFiles(store)
    spec = replace(SMALL, **changes)
    create_store(files, pairs=columns(spec), root="/data", version="0")
    record = array_record(spec, "image")
    create_array(files, record)
    return ArrayWriter(files, record)


# --- what is written ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_chunk_files_equal_those_that_zarr_writes_byte_for_byte(tmp_path: Path, dtype: str) -> None:
    spec = replace(SMALL, dtype=dtype)
    tower.run(tmp_path / "store", spec)
    for modality in MODALITIES:
        layout = spec.layout(modality)
        values = expected(spec, modality)
        ours = tmp_path / "store" / "features.zarr" / modality / NAME
        theirs = zarr.open_group(shutil.copytree(ours, tmp_path / modality), mode="a")
        for part, data in (
            ("features", values),
            ("status", np.where(np.isnan(values).any(1), 2, 1).astype(np.uint8)),
        ):
            for chunk in (tmp_path / modality / part).glob("c.*"):
                chunk.unlink()
            theirs[part][:] = data  # type: ignore[index]
            chunks = sorted((tmp_path / modality / part).glob("c.*"))
            assert len(chunks) == layout.n_shards
            assert layout.rows % layout.shard_rows, "the last shard should be a partial one"
            for chunk in chunks:
                assert (ours / part / chunk.name).read_bytes() == chunk.read_bytes()


def test_a_quarantined_row_is_nan_with_status_2_and_its_neighbors_are_untouched(
    tmp_path: Path,
) -> None:
    writer = begin(tmp_path / "store")
    values = features(SMALL, "image", range(4))
    values[2] = np.inf
    writer.commit(
        0,
        features=values,
        content=["a", "b", "", "d"],
        quarantined=[QuarantinedRow(row=2, key="k", reason="truncated", detail="ends early")],
    )
    group = zarr.open_group(tmp_path / "store" / "features.zarr" / "image" / NAME, mode="r")
    stored: NDArray[Any] = np.asarray(group["features"][:4])  # type: ignore[index]
    assert np.isnan(stored[2]).all()
    assert np.array_equal(stored[[0, 1, 3]], features(SMALL, "image", [0, 1, 3]))
    assert np.asarray(group["status"][:]).tolist() == [1, 1, 2, 1, 0, 0, 0, 0, 0, 0]  # type: ignore[index]
    array = FeatureStore.open(tmp_path / "store").array("image")
    assert array.quarantined() == [
        {"row": 2, "key": "k", "reason": "truncated", "detail": "ends early"}
    ]
    assert (array.commits[0].n_ok, array.commits[0].n_quarantined) == (3, 1)


@pytest.mark.parametrize(
    ("shape", "content", "bad"),
    [
        ((4, 7), 4, []),
        ((3, 8), 4, []),
        ((4, 8), 3, []),
        ((4, 8), 5, []),
        ((4, 8), 4, [-1]),
        ((4, 8), 4, [4]),
        ((4, 8), 4, [1, 1]),
    ],
)
def test_what_does_not_fit_the_shard_is_refused_and_nothing_is_written(
    tmp_path: Path,
    shape: tuple[int, int],
    content: int,
    bad: list[int],
) -> None:
    writer = begin(tmp_path / "store")
    before = tree(tmp_path)
    with pytest.raises(ValueError, match="shard 0: "):
        writer.commit(
            0,
            features=np.zeros(shape),
            content=[""] * content,
            quarantined=[QuarantinedRow(row=row, key="", reason="", detail="") for row in bad],
        )
    assert tree(tmp_path) == before


class Corrupting(LocalFiles):
    """A disk that keeps something else than it was given."""

    def stage(
        self,
        objects: Mapping[str, Sequence[Buffer]],
    ) -> AbstractContextManager[PutStaged]:
        kept: dict[str, Sequence[Buffer]] = {}
        for name, buffers in objects.items():
            data = b"".join(buffers)
            flipped = data[:-1] + bytes([data[-1] ^ 1])
            kept[name] = (flipped if "/status/c." in name else data,)
        return super().stage(kept)


def test_a_shard_that_does_not_read_back_as_written_is_not_committed(tmp_path: Path) -> None:
    record = begin(tmp_path / "store").record
    writer = ArrayWriter(Corrupting(tmp_path / "store"), record)
    with pytest.raises(
        DamagedError,
        match=r"status/c.0: what was read back is not what was written",
    ):
        commit_shard(writer, SMALL, 0)
    assert writer.pending() == [0, 1, 2]


# --- several writers ------------------------------------------------------------------------------


def test_a_shard_committed_twice_with_the_same_bytes_stays_as_it_is(tmp_path: Path) -> None:
    writer = begin(tmp_path / "store")
    commit_shard(writer, SMALL, 0)
    before = {
        path: path.stat().st_ino for path in (tmp_path / "store").rglob("*") if path.is_file()
    }
    commit_shard(ArrayWriter(LocalFiles(tmp_path / "store"), writer.record), SMALL, 0)
    assert {
        path: path.stat().st_ino for path in (tmp_path / "store").rglob("*") if path.is_file()
    } == before


def test_a_shard_committed_with_other_bytes_is_refused_and_what_was_committed_stays(
    tmp_path: Path,
) -> None:
    writer = begin(tmp_path / "store")
    commit_shard(writer, SMALL, 0)
    before = tree(tmp_path)
    with pytest.raises(
        MismatchError,
        match=r"commits/00000000.json: another writer committed this shard with other",
    ):
        writer.commit(0, features(SMALL, "image", range(4)) + 1, [""] * 4)
    assert tree(tmp_path) == before


def test_of_writers_that_disagree_one_wins_and_its_shard_is_whole(tmp_path: Path) -> None:
    """As two devices would: the same shard at the same time, other bytes."""
    record = begin(tmp_path / "store").record
    gate = threading.Barrier(4)
    refused = []

    def work(number: int) -> None:
        writer = ArrayWriter(LocalFiles(tmp_path / "store"), record)
        gate.wait()
        for shard in range(2):
            try:
                writer.commit(shard, np.full((4, 8), number, np.float16), [""] * 4)
            except MismatchError:
                refused.append(number)

    with intercepted(tmp_path, unsynced()):
        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(refused) == 6
    array = FeatureStore.open(tmp_path / "store").array("image")
    for shard in range(2):
        assert len(np.unique(array.load_shard(shard))) == 1


def test_a_writer_cannot_overwrite_a_shard_that_another_is_about_to_commit(tmp_path: Path) -> None:
    """The worst moment: both have looked and found nothing, and the second writes between the
    first's read-back and its record."""
    record = begin(tmp_path / "store").record
    written = threading.Event()
    finished = threading.Event()
    refused = []

    class Second(LocalFiles):
        def put_if_absent(self, name: str, *buffers: Buffer) -> bool:
            if "/commits/" in name:
                written.set()
                finished.wait(10)
            return super().put_if_absent(name, *buffers)

    def intrude() -> None:
        try:
            ArrayWriter(Second(tmp_path / "store"), record).commit(
                0,
                np.ones((4, 8), np.float16),
                [""] * 4,
            )
        except MismatchError:
            refused.append(2)

    second = threading.Thread(target=intrude)

    class First(LocalFiles):
        def put_if_absent(self, name: str, *buffers: Buffer) -> bool:
            second.start()
            written.wait(0.5)
            return super().put_if_absent(name, *buffers)

    commit_shard(ArrayWriter(First(tmp_path / "store"), record), SMALL, 0)
    finished.set()
    second.join()
    assert refused == [2]
    assert np.array_equal(
        FeatureStore.open(tmp_path / "store").array("image").load_shard(0),
        expected(SMALL, "image")[:4],
    )


def test_a_committed_chunk_that_was_damaged_is_mended_by_committing_its_shard_again(
    tmp_path: Path,
) -> None:
    writer = begin(tmp_path / "store")
    commit_shard(writer, SMALL, 0)
    before = tree(tmp_path)
    (tmp_path / "store" / chunk_name(array_record(SMALL, "image"), "features", 0)).write_bytes(
        b"rotten"
    )
    commit_shard(writer, SMALL, 0)
    assert tree(tmp_path) == before


def test_an_array_is_sealed_only_when_it_is_whole_and_only_once(tmp_path: Path) -> None:
    writer = begin(tmp_path / "store")
    commit_shard(writer, SMALL, 1)
    with pytest.raises(StoreError, match=f"image/{NAME}: 2 shards missing"):
        writer.seal()
    for shard in writer.pending():
        commit_shard(writer, SMALL, shard)
    writer.seal()
    before = tree(tmp_path)
    writer.seal()
    assert tree(tmp_path) == before


def test_an_array_sealed_with_other_records_is_not_sealed_again(tower_store: Path) -> None:
    files = LocalFiles(tower_store)
    record = array_record(SMALL, "image")
    name = commit_name("image", NAME, 0)
    shutil.copy(tower_store / name, tower_store / "kept")
    (tower_store / name).unlink()
    ArrayWriter(files, record).commit(0, features(SMALL, "image", range(4)), ["other"] * 4)
    with pytest.raises(DamagedError, match=r"seal.json: sealed with other records"):
        ArrayWriter(files, record).seal()


# --- making a store -------------------------------------------------------------------------------


def test_making_a_store_that_is_there_changes_nothing(tower_store: Path) -> None:
    before = tree(tower_store)
    create_store(LocalFiles(tower_store), pairs=columns(SMALL), root="/elsewhere", version="9")
    assert tree(tower_store) == before


@pytest.mark.parametrize("inside", ["notes.txt", "records/notes.txt", "features.zarr/zarr.json"])
def test_a_folder_of_something_else_is_refused_and_left_alone(tmp_path: Path, inside: str) -> None:
    path = tmp_path / "folder" / inside
    path.parent.mkdir(parents=True)
    path.write_text("mine")
    with pytest.raises(StoreError, match="is not empty and not a store; choose another --store"):
        create_store(
            LocalFiles(tmp_path / "folder"),
            pairs=columns(SMALL),
            root="/data",
            version="0",
        )
    assert tree(tmp_path) == {f"folder/{inside}": b"mine"}


def test_a_store_that_another_writer_makes_at_this_moment_is_not_something_else(
    tmp_path: Path,
) -> None:
    class Late(LocalFiles):
        """Another writer makes the store right after we have looked for its source."""

        def exists(self, name: str) -> bool:
            found = super().exists(name)
            if name == SOURCE:
                create_store(
                    LocalFiles(tmp_path / "store"),
                    pairs=columns(SMALL),
                    root="/data",
                    version="0",
                )
            return found

    create_store(Late(tmp_path / "store"), pairs=columns(SMALL), root="/data", version="0")
    assert FeatureStore.open(tmp_path / "store").source["n_images"] == SMALL.images


def test_a_file_is_no_place_for_a_store(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(StoreError, match="file is a file; give a folder as --store"):
        create_store(LocalFiles(tmp_path / "file"), pairs=columns(SMALL), root="/data", version="0")


def test_an_empty_folder_may_become_a_store(tmp_path: Path) -> None:
    create_store(LocalFiles(tmp_path), pairs=columns(SMALL), root="/data", version="0")
    assert FeatureStore.open(tmp_path).source["n_images"] == SMALL.images


def test_the_store_of_another_table_is_refused_with_the_difference(tower_store: Path) -> None:
    before = tree(tower_store)
    with pytest.raises(MismatchError, match=r"another table \(t.tsv\).*n_images") as caught:
        create_store(
            LocalFiles(tower_store),
            pairs=columns(replace(SMALL, images=11)),
            root="/data",
            version="0",
        )
    assert [field for field, *_ in caught.value.differences] == ["digest", "n_images", "n_texts"]
    assert tree(tower_store) == before


def test_a_store_that_lost_its_source_is_damaged_and_not_claimed_anew(tower_store: Path) -> None:
    (tower_store / SOURCE).unlink()
    with pytest.raises(DamagedError, match=r"source.json is missing"):
        create_store(LocalFiles(tower_store), pairs=columns(SMALL), root="/data", version="0")
    assert not (tower_store / SOURCE).exists()


def test_creation_interrupted_at_any_call_is_finished_by_the_next_run(tmp_path: Path) -> None:
    with intercepted(tmp_path, unsynced()):
        create_store(
            LocalFiles(tmp_path / "whole"),
            pairs=columns(SMALL),
            root="/data",
            version="0",
        )
    whole = tree(tmp_path / "whole")
    for nth in range(1, 1000):
        store = tmp_path / f"{nth}"
        try:
            with intercepted(tmp_path, Stop(nth=nth, then=unsynced())):
                create_store(LocalFiles(store), pairs=columns(SMALL), root="/data", version="0")
            break
        except SimulatedKill:
            with intercepted(tmp_path, unsynced()):
                create_store(LocalFiles(store), pairs=columns(SMALL), root="/data", version="0")
        assert tree(store) == whole, f"killed at call {nth}"
    assert nth > 50


def test_until_creation_is_finished_there_is_no_store_to_open(
    tmp_path: Path,
    tower_store: Path,
) -> None:
    (tower_store / PAIRS).unlink()
    for folder in ("records", "features.zarr"):
        for modality in MODALITIES:
            shutil.rmtree(tower_store / folder / modality)
    with pytest.raises(
        StoreError,
        match="was not finished being made; run the same apecache extract again",
    ):
        FeatureStore.open(tower_store)
    with pytest.raises(StoreError, match=r"is not a store.*make one with: apecache extract"):
        FeatureStore.open(tmp_path / "nowhere")


def test_a_misspelt_store_is_answered_with_the_one_beside_it(tower_store: Path) -> None:
    with pytest.raises(StoreError, match="did you mean store"):
        FeatureStore.open(tower_store.parent / "stroe")


def test_a_store_of_a_newer_format_is_refused_by_name(tower_store: Path) -> None:
    newer = with_checksum({"format": VIEW_FORMAT_VERSION + 1})
    for name in (PAIRS, SOURCE):
        (tower_store / name).write_bytes(newer)
    for what in (
        lambda: FeatureStore.open(tower_store),
        lambda: create_store(LocalFiles(tower_store), pairs=columns(SMALL), root="/", version="0"),
    ):
        with pytest.raises(
            StoreError,
            match=f"has format {VIEW_FORMAT_VERSION + 1}; .*upgrade apecache",
        ):
            what()


def test_an_array_begun_by_a_killed_writer_is_finished_and_not_in_the_way(tmp_path: Path) -> None:
    """The folder is there, its fingerprint is not."""
    files = LocalFiles(tmp_path / "store")
    create_store(files, pairs=columns(SMALL), root="/data", version="0")
    (tmp_path / "store" / "records" / "image" / NAME).mkdir(parents=True)
    assert FeatureStore.open(tmp_path / "store").arrays() == []
    tower.run(tmp_path / "store", SMALL)
    assert FeatureStore.open(tmp_path / "store").array("image").complete


def test_an_array_of_other_features_under_the_same_name_is_refused(tower_store: Path) -> None:
    with pytest.raises(MismatchError, match=f"has just made image/{NAME} otherwise"):
        create_array(LocalFiles(tower_store), array_record(replace(SMALL, encoder="bb"), "image"))


def test_captions_that_unicode_cannot_hold_are_kept_with_a_replacement_character(
    tmp_path: Path,
) -> None:
    table = columns(SMALL)
    table.captions[3] = "half of a \ud83d pair \u202e<script>"
    create_store(LocalFiles(tmp_path / "store"), pairs=table, root="/data", version="0")
    stored = FeatureStore.open(tmp_path / "store").pairs.captions
    assert stored[3] == "half of a \ufffd pair \u202e<script>"
    assert stored[4:].tolist() == table.captions[4:]


def test_zarr_does_not_stumble_over_what_a_killed_writer_left(tmp_path: Path) -> None:
    tower.run(tmp_path / "store", SMALL)
    leftover = tmp_path / "store" / "features.zarr" / "image" / NAME / f"{TEMPORARY}1-0"
    leftover.write_bytes(b"half")
    tower.run(tmp_path / "store", SMALL)
    assert not leftover.exists()


# --- memory ---------------------------------------------------------------------------------------

WRITE = """
import sys, tracemalloc
from pathlib import Path
from benchmarks.reliability.injection import tower
from benchmarks.reliability.injection.syscalls import intercepted, unsynced
from apecache.storage.local_files import LocalFiles
from apecache.store.writer import ArrayWriter, create_array

folder, rows = Path(sys.argv[1]), int(sys.argv[2])
spec = tower.TowerSpec(images=rows, dim=512, image_shard=2048)
with intercepted(folder, unsynced()):
    files, record = LocalFiles(folder / str(rows)), tower.array_record(spec, "image")
    # Only now: the table behind the record has all rows.
    tracemalloc.start()
    create_array(files, record)
    writer = ArrayWriter(files, record)
    for shard in writer.pending():
        tower.commit_shard(writer, spec, shard)
    writer.seal()
sys.stdout.write(str(tracemalloc.get_traced_memory()[1] >> 20))
"""


@pytest.mark.slow
def test_the_memory_of_writing_does_not_grow_with_the_rows(tmp_path: Path) -> None:
    peaks = []
    for rows in (50_000, 200_000):
        command = [sys.executable, "-c", WRITE, str(tmp_path), str(rows)]
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            check=True,
            env=program_environment(),
        )
        peaks.append(json.loads(done.stdout))
        shutil.rmtree(tmp_path / str(rows))
    assert peaks[1] - peaks[0] < 5, f"{peaks} MB for 50,000 and 200,000 rows of 1 KB"
