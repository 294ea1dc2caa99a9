import os
import shutil
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorstore
import xarray
import zarr

from apecache.errors import DamagedError, IncompleteError, MismatchError, StoreError
from apecache.storage.local_files import LocalFiles
from apecache.store.array import FeatureArray
from apecache.store.layout import PAIRS, SOURCE, chunk_name, commit_name, quarantine_name
from apecache.store.reader import FeatureStore
from apecache.store.writer import ArrayWriter, create_array, create_store
from benchmarks.reliability.injection import tower
from benchmarks.reliability.injection.damage import CHANGES, UNREAD, covering, damages, judge, serve
from benchmarks.reliability.injection.syscalls import intercepted, unsynced
from benchmarks.reliability.injection.tower import (
    MODALITIES,
    NAME,
    SMALL,
    array_record,
    columns,
    commit_shard,
    expected,
    tree,
)

LONG = os.environ.get("APECACHE_FAULTS") == "long"


def same(a: Any, b: Any) -> bool:
    return bool(np.array_equal(np.asarray(a), b, equal_nan=True))


# --- other readers --------------------------------------------------------------------------------


@pytest.mark.parametrize("modality", MODALITIES)
def test_zarr_reads_features_status_and_table(tower_store_once: Path, modality: str) -> None:
    root = zarr.open_group(tower_store_once / "features.zarr", mode="r")
    values = expected(SMALL, modality)
    table = columns(SMALL)
    assert same(root[f"{modality}/{NAME}/features"][:], values)  # type: ignore[index]
    assert same(root[f"{modality}/{NAME}/status"][:], np.where(np.isnan(values).any(1), 2, 1))  # type: ignore[index]
    assert list(root["pairs/text_caption"][:]) == table.captions  # type: ignore[index, arg-type, call-overload]
    assert same(root["pairs/text_image_row"][:], table.image_rows)  # type: ignore[index]
    assert len(list(root.members(max_depth=None))) == 15


@pytest.mark.parametrize("modality", MODALITIES)
def test_xarray_reads_a_group_and_the_whole_tree_without_a_warning(
    tower_store_once: Path,
    modality: str,
) -> None:
    values = expected(SMALL, modality)
    zarr_folder = tower_store_once / "features.zarr"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        group = xarray.open_zarr(
            zarr_folder / modality / NAME,
            consolidated=False,
            mask_and_scale=False,
        )
        tree_ = xarray.open_datatree(zarr_folder, engine="zarr", consolidated=False)
        pairs = xarray.open_zarr(zarr_folder / "pairs", consolidated=False)
    assert same(group["features"], values)
    assert group["features"].dims == (modality, "features_feature")
    assert same(tree_[f"{modality}/{NAME}/features"], values)
    assert pairs["text_caption"].to_numpy().tolist() == columns(SMALL).captions


@pytest.mark.parametrize("part", ["features", "status"])
@pytest.mark.parametrize("modality", MODALITIES)
def test_tensorstore_reads_the_numeric_arrays(
    tower_store_once: Path,
    modality: str,
    part: str,
) -> None:
    path = tower_store_once / "features.zarr" / modality / NAME / part
    where = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(path)}}
    stored = tensorstore.open(where, read=True, open=True).result().read().result()
    values = expected(SMALL, modality)
    assert same(stored, values if part == "features" else np.where(np.isnan(values).any(1), 2, 1))


def test_the_lines_in_the_stores_readme_run(tower_store_once: Path) -> None:
    text = (tower_store_once / "README.md").read_text()
    lines = [line.strip() for line in text.splitlines() if line.startswith("    ")]
    code = "\n".join(lines).replace("NAME", NAME)
    script = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(script, cwd=tower_store_once, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "features" in done.stdout


def test_a_shard_that_is_not_there_reads_as_nan_with_status_0_and_never_as_zeros(
    tmp_path: Path,
) -> None:
    files = LocalFiles(tmp_path / "store")
    record = array_record(SMALL, "image")
    create_store(files, pairs=columns(SMALL), root="/data", version="0")
    create_array(files, record)
    commit_shard(ArrayWriter(files, record), SMALL, 1)
    group = zarr.open_group(tmp_path / "store" / "features.zarr" / "image" / NAME, mode="r")
    stored = np.asarray(group["features"][:])  # type: ignore[index]
    assert same(stored[4:8], expected(SMALL, "image")[4:8])
    assert np.isnan(stored[[0, 1, 2, 3, 8, 9]]).all()
    assert np.asarray(group["status"][:]).tolist() == [0, 0, 0, 0, 1, 2, 1, 1, 0, 0]  # type: ignore[index]


# --- our own reading ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("shard_rows", [1, 3, 4, 10])
def test_what_was_written_is_loaded_row_by_row_in_its_place(
    tmp_path: Path,
    shard_rows: int,
    dtype: str,
) -> None:
    spec = replace(SMALL, image_shard=shard_rows, dtype=dtype)
    with intercepted(tmp_path, unsynced()):
        tower.run(tmp_path / "store", spec)
    array = FeatureStore.open(tmp_path / "store").array("image")
    values = expected(spec, "image")
    for threads in (1, 4):
        assert same(array.load(threads=threads), values)
    assert array.load().dtype == dtype
    assert same(array.load_ok(), ~np.isnan(values).any(1))
    for shard in range(spec.layout("image").n_shards):
        rows = spec.layout("image").shard(shard)
        assert same(array.load_shard(shard), values[rows])
        assert array.rows_ok(shard) == [row for row in rows if row != 5]


def test_the_table_comes_back_as_it_was(tower_store_once: Path) -> None:
    pairs = FeatureStore.open(tower_store_once).pairs
    table = columns(SMALL)
    assert pairs.keys.tolist() == table.keys
    assert pairs.splits.tolist() == table.splits
    assert pairs.labels.tolist() == table.labels
    assert pairs.captions.tolist() == table.captions
    assert pairs.languages.tolist() == table.languages
    assert pairs.image_rows.tolist() == table.image_rows
    assert pairs.digest == table.digest
    assert pairs.row_of_key[table.keys[7]] == 7
    assert pairs.split_counts() == {"val": 4, "train": 6}


def test_loading_fills_the_buffer_that_was_given(tower_store_once: Path) -> None:
    array = FeatureStore.open(tower_store_once).array("text")
    buffer = np.zeros((array.rows, array.dim), array.dtype)
    assert array.load(buffer) is buffer
    assert same(buffer, expected(SMALL, "text"))


def read_only(shape: tuple[int, int]) -> Any:
    array = np.zeros(shape, np.float16)
    array.flags.writeable = False
    return array


@pytest.mark.parametrize(
    "buffer",
    [
        np.zeros((20, 9), np.float16),
        np.zeros((19, 8), np.float16),
        np.zeros((20, 8), np.float32),
        np.zeros((20, 8), ">f2"),
        np.zeros((8, 20), np.float16).T,
        np.zeros((40, 8), np.float16)[::2],
        np.zeros(160, np.float16),
        read_only((20, 8)),
    ],
    ids=["wide", "short", "dtype", "byte order", "transposed", "strided", "flat", "read-only"],
)
def test_a_buffer_that_does_not_fit_is_refused(tower_store_once: Path, buffer: Any) -> None:
    with pytest.raises(
        ValueError,
        match=r"out: expected contiguous, writable \(20, 8\) of float16",
    ):
        FeatureStore.open(tower_store_once).array("text").load(buffer)
    assert not buffer.any()


def test_an_array_that_is_not_complete_is_not_loaded_and_says_how_far_it_is(tmp_path: Path) -> None:
    files = LocalFiles(tmp_path / "store")
    record = array_record(SMALL, "image")
    create_store(files, pairs=columns(SMALL), root="/data", version="0")
    create_array(files, record)
    commit_shard(ArrayWriter(files, record), SMALL, 1)
    array = FeatureStore.open(tmp_path / "store").array("image")
    for read in (array.load, array.load_ok):
        with pytest.raises(IncompleteError, match=f"image/{NAME} is 40% done; resume"):
            read()
    with pytest.raises(IncompleteError, match=f"shard 0 of image/{NAME} is not committed"):
        array.load_shard(0)
    assert same(array.load_shard(1), expected(SMALL, "image")[4:8])


def test_an_array_opened_before_extraction_ended_is_not_served_with_holes(tmp_path: Path) -> None:
    """What was read of it then is stale now."""
    files = LocalFiles(tmp_path / "store")
    record = array_record(SMALL, "image")
    create_store(files, pairs=columns(SMALL), root="/data", version="0")
    create_array(files, record)
    commit_shard(ArrayWriter(files, record), SMALL, 1)
    array = FeatureStore.open(tmp_path / "store").array("image")
    assert list(array.commits) == [1]
    tower.run(tmp_path / "store", SMALL)
    assert same(array.load(), expected(SMALL, "image"))
    assert array.n_quarantined == 1


class CountedFiles(LocalFiles):
    """Knows how often each object was read."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.times: Counter[str] = Counter()

    def read(self, name: str) -> bytes:
        self.times[name] += 1
        return super().read(name)


USES: dict[str, Callable[[FeatureArray], object]] = {
    "what info says": lambda array: (
        array.share_done,
        array.complete,
        array.n_quarantined,
        array.quarantined(),
    ),
    "load": lambda array: (array.load(), array.load_ok(), array.share_done),
    "hashes of inputs": lambda array: array.content(),
    "resume": lambda array: ArrayWriter(array.files, array.record).pending(),
    "seal": lambda array: ArrayWriter(array.files, array.record).seal(),
}


@pytest.mark.parametrize("use", USES)
def test_every_record_is_read_once(tower_store_once: Path, use: str) -> None:
    """There may be tens of thousands of them."""
    files = CountedFiles(tower_store_once)
    USES[use](FeatureStore(files).array("text"))
    records = {name: times for name, times in files.times.items() if "/commits/" in name}
    assert records == {commit_name("text", NAME, shard): 1 for shard in range(4)}


def test_hashes_of_inputs_do_not_stay_in_memory(tower_store_once: Path) -> None:
    array = FeatureStore.open(tower_store_once).array("text")
    assert len(array.content()) == array.rows == 20
    array.load()
    known = [
        *array.commits.values(),
        *array._sealed.values(),
        *ArrayWriter(array.files, array.record).committed().values(),
    ]
    assert [record.content for record in known] == [()] * 12


def test_arrays_are_found_by_modality_and_name_and_a_wrong_one_is_answered_with_the_nearest(
    tower_store: Path,
) -> None:
    store = FeatureStore.open(tower_store)
    assert [(array.record.modality, array.name) for array in store.arrays()] == [
        ("image", NAME),
        ("text", NAME),
    ]
    assert store.array("image").name == store.array("image", NAME).name
    with pytest.raises(
        StoreError,
        match="no image features 'towr'; found: tower; did you mean tower",
    ):
        store.array("image", "towr")
    for folder in ("records", "features.zarr"):
        shutil.rmtree(tower_store / folder / "image" / NAME)
    with pytest.raises(StoreError, match="0 arrays of image features; found: none"):
        store.array("image")


def test_a_stray_file_among_the_arrays_is_no_array(tower_store: Path) -> None:
    (tower_store / "records" / "image" / ".DS_Store").write_bytes(b"")
    assert len(FeatureStore.open(tower_store).arrays()) == 2


# --- damage ---------------------------------------------------------------------------------------

CHUNK, STATUS = (
    chunk_name(array_record(SMALL, "image"), part, 1) for part in ("features", "status")
)
COMMIT = commit_name("image", NAME, 1)
QUARANTINE = quarantine_name("image", NAME, 1)
FINGERPRINT = f"records/image/{NAME}/fingerprint.json"
SEAL = f"records/image/{NAME}/seal.json"
CAPTIONS = "features.zarr/pairs/text_caption/c/0"
OBJECTS = [CHUNK, STATUS, COMMIT, QUARANTINE, FINGERPRINT, SEAL, CAPTIONS, SOURCE, PAIRS]
OBJECTS += ["features.zarr/pairs/text_image_row/zarr.json", "features.zarr/zarr.json"]
DAMAGE: dict[str, Callable[[bytes], bytes | None]] = {
    "first bit": lambda data: bytes([data[0] ^ 1]) + data[1:],
    "middle bit": lambda data: (
        data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 4]) + data[len(data) // 2 + 1 :]
    ),
    "last bit": lambda data: data[:-1] + bytes([data[-1] ^ 128]),
    "cut": lambda data: data[:-1],
    "half": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "longer": lambda data: data + b"\n\0",
    "zeros": lambda data: bytes(len(data)),
    "gone": lambda data: None,
}


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.parametrize("name", OBJECTS)
def test_reading_what_a_damaged_object_belongs_to_raises_and_names_it(
    tower_store: Path,
    damage: Callable[..., Path],
    name: str,
    kind: str,
) -> None:
    before = serve(tower_store)
    after = serve(damage(name, DAMAGE[kind]))
    assert judge(before, after, [name]) == []
    assert covering(name)
    for thing in covering(name):
        error = after[thing]
        assert isinstance(error, StoreError), f"{thing} was served"
        if (name, kind) == (COMMIT, "gone"):
            assert "2 of 3 commit records found" in str(error)
        elif name == SEAL and kind == "gone":
            assert isinstance(error, IncompleteError)
        elif not (name == PAIRS and kind == "gone"):  # then it is not a store (yet)
            assert Path(name).name in str(error), str(error)


@pytest.mark.parametrize(
    "folder",
    [f"features.zarr/image/{NAME}/features", f"records/image/{NAME}/commits"],
)
@pytest.mark.parametrize("pair", [(0, 1), (1, 2), (0, 2)])
def test_two_swapped_files_are_noticed(
    tower_store: Path,
    folder: str,
    pair: tuple[int, int],
) -> None:
    names = sorted((tower_store / folder).glob("c.*" if "zarr" in folder else "*.json"))
    a = names[pair[0]]
    b = names[pair[1]]
    first = a.read_bytes()
    second = b.read_bytes()
    a.write_bytes(second)
    b.write_bytes(first)
    with pytest.raises(DamagedError, match=rf"{a.name}|{b.name}"):
        FeatureStore.open(tower_store).array("image").load()


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (SOURCE, PAIRS),
        (SEAL, SEAL.replace("image", "text")),
        (FINGERPRINT, FINGERPRINT.replace("image", "text")),
    ],
)
def test_a_record_in_the_place_of_another_is_refused(
    tower_store: Path,
    first: str,
    second: str,
) -> None:
    shutil.copy(tower_store / second, tower_store / first)
    store = FeatureStore(LocalFiles(tower_store))
    with pytest.raises(DamagedError, match=rf"{first} is in the wrong place \({second}\)"):
        _ = store.source, store.array("image").load()


def test_a_chunk_of_another_array_is_noticed(tmp_path: Path) -> None:
    """Same shape, same rows, a valid crc32c: only the record tells."""
    for encoder in ("a", "bb"):
        tower.run(tmp_path / encoder, replace(SMALL, encoder=encoder))
    shutil.copy(tmp_path / "bb" / CHUNK, tmp_path / "a" / CHUNK)
    with pytest.raises(DamagedError, match=r"c.1.0 \(shard 1\) differs from its commit record"):
        FeatureStore.open(tmp_path / "a").array("image").load()


def test_a_shard_of_another_encoder_with_its_record_is_refused(tmp_path: Path) -> None:
    for encoder in ("a", "bb"):
        tower.run(tmp_path / encoder, replace(SMALL, encoder=encoder))
    for name in (CHUNK, STATUS, COMMIT):
        shutil.copy(tmp_path / "bb" / name, tmp_path / "a" / name)
    with pytest.raises(
        MismatchError,
        match=r"00000001.json: shard 1 of tower was made by another encoder",
    ):
        FeatureStore.open(tmp_path / "a").array("image").load()


def test_a_shard_of_another_table_with_its_record_is_refused(tmp_path: Path) -> None:
    """Every single record is valid in its place: only the seal tells."""
    tower.run(tmp_path / "a", SMALL)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    (tmp_path / "b" / COMMIT).unlink()
    writer = ArrayWriter(LocalFiles(tmp_path / "b"), array_record(SMALL, "image"))
    writer.commit(1, np.ones((4, 8), np.float16), ["other"] * 4)
    for name in (CHUNK, STATUS, COMMIT):
        shutil.copy(tmp_path / "b" / name, tmp_path / "a" / name)
    with pytest.raises(DamagedError, match="is not what was sealed"):
        FeatureStore.open(tmp_path / "a").array("image").load()


def test_a_pair_table_and_a_source_of_two_tables_are_refused(tmp_path: Path) -> None:
    for images in (10, 11):
        tower.run(tmp_path / str(images), replace(SMALL, images=images))
    shutil.copy(tmp_path / "11" / SOURCE, tmp_path / "10" / SOURCE)
    with pytest.raises(DamagedError, match="are of different tables"):
        _ = FeatureStore.open(tmp_path / "10").pairs


def test_damage_is_noticed_in_a_buffer_that_holds_the_rows_already(tower_store: Path) -> None:
    """A short file must not leave the rows of an earlier load standing."""
    store = FeatureStore.open(tower_store)
    buffer = store.array("image").load()
    (tower_store / CHUNK).write_bytes(b"")
    with pytest.raises(DamagedError, match=r"c.1.0"):
        store.array("image").load(buffer)


@pytest.mark.parametrize("name", sorted(UNREAD))
@pytest.mark.parametrize("kind", CHANGES)
def test_reading_does_not_look_at_the_readme_and_at_zarrs_metadata_of_features(
    tower_store: Path,
    name: str,
    kind: str,
) -> None:
    """They are written for other readers; `apecache verify` looks at them."""
    import random

    before = serve(tower_store)
    changed = CHANGES[kind](random.Random(0), (tower_store / name).read_bytes())
    if changed is None:
        (tower_store / name).unlink()
    else:
        (tower_store / name).write_bytes(changed)
    assert serve(tower_store) == before


def test_any_random_damage_is_noticed_or_changes_nothing_that_is_served(tower_store: Path) -> None:
    before = tree(tower_store)
    outcomes, wrong = damages(tower_store, count=5000 if LONG else 500, seed=20)
    assert wrong == []
    assert outcomes["noticed"] > 0.7 * outcomes.total(), outcomes
    assert outcomes["the same"] < 0.1 * outcomes.total(), outcomes
    assert tree(tower_store) == before


# --- tokens, views and other stores ---------------------------------------------------------------


def test_ragged_tokens_come_back_with_their_lengths_and_padding_is_zero(
    tmp_path: Path,
    write_store: Callable[..., FeatureStore],
) -> None:
    chance = np.random.default_rng(0)
    patches = chance.standard_normal((7, 3, 4)).astype(np.float16)
    tokens = chance.standard_normal((9, 5, 2))
    lengths = np.array([5, 1, 2, 3, 4, 5, 5, 1, 2])
    store = write_store(
        tmp_path / "store", patches, tokens.astype(np.float32), [0, 0, *range(7)], ["train"] * 7,
        shard_rows=4, bad_texts=(6,), text_lengths=lengths,
    )  # fmt: skip
    image = store.array("image")
    text = store.array("text")
    assert (image.tokens, image.row_shape, image.load_lengths()) == (3, (3, 4), None)
    assert same(image.load(), patches)
    wanted = np.where((np.arange(5) < lengths[:, None])[..., None], tokens.astype(np.float32), 0)
    wanted[6] = np.nan
    assert same(text.load(), wanted)
    found = text.load_lengths()
    assert found is not None
    assert found.dtype == np.uint16
    assert found.tolist() == [*lengths[:6], 0, *lengths[7:]]
    assert same(text.load_shard(2), wanted[8:])
    root = zarr.open_group(store.path / "features.zarr", mode="r")
    assert same(root["text/words/features"][:], wanted)  # type: ignore[index]
    assert same(root["text/words/length"][:], found)  # type: ignore[index]
    group = xarray.open_zarr(
        store.path / "features.zarr/text/words",
        consolidated=False,
        mask_and_scale=False,
    )
    assert group["features"].dims == ("text", "features_token", "features_feature")
    tree_ = xarray.open_datatree(store.path / "features.zarr", engine="zarr", consolidated=False)
    assert same(tree_["text/words/length"], found)


@pytest.mark.parametrize("part", ["features", "length"])
def test_damaged_tokens_and_lengths_are_noticed(
    tmp_path: Path,
    write_store: Callable[..., FeatureStore],
    part: str,
) -> None:
    tokens = np.ones((4, 3, 2), np.float16)
    store = write_store(
        tmp_path / "store",
        np.ones((4, 2), np.float16),
        tokens,
        range(4),
        [""] * 4,
        text_lengths=np.ones(4, np.int64),
    )
    name = chunk_name(store.array("text").record, part, 0)
    data = store.files.read(name)
    (store.path / name).write_bytes(bytes([data[0] ^ 1]) + data[1:])
    read = store.array("text").load if part == "features" else store.array("text").load_lengths
    with pytest.raises(DamagedError, match=Path(name).name):
        read()


def test_a_longer_chunk_is_noticed_by_who_reads_one_shard(tower_store: Path) -> None:
    with (tower_store / CHUNK).open("ab") as file:
        file.write(b"\0\0")
    with pytest.raises(DamagedError, match=r"c.1.0 \(shard 1\) differs"):
        FeatureStore.open(tower_store).array("image").load_shard(1)


def test_a_read_that_returns_few_bytes_at_a_time_is_no_damage(
    tower_store: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As reads over a network do."""
    whole = FeatureStore.open(tower_store).array("image").load()
    real = os.readv
    monkeypatch.setattr(os, "readv", lambda file, views: real(file, [views[0][:3]]))
    assert same(FeatureStore.open(tower_store).array("image").load(), whole)


def test_an_array_of_the_store_of_another_table_is_refused(tmp_path: Path) -> None:
    """All of it, data and records, in the place of the array of that name: only the table's digest
    tells."""
    for images in (10, 11):
        tower.run(tmp_path / str(images), replace(SMALL, images=images))
    for folder in (f"records/text/{NAME}", f"features.zarr/text/{NAME}"):
        shutil.rmtree(tmp_path / "10" / folder)
        shutil.copytree(tmp_path / "11" / folder, tmp_path / "10" / folder)
    store = FeatureStore.open(tmp_path / "10")
    assert store.array("image").load().shape == (10, 8)
    with pytest.raises(
        DamagedError,
        match=f"text/{NAME} is of another table than .* apecache remove",
    ):
        store.array("text")
