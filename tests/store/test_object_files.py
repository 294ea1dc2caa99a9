"""A store on object storage, against moto's S3 on loopback: the same objects as in a folder, and
the same promises."""

import threading
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
from remote import SECRET, Faults, S3Server

from apecache.errors import DamagedError, MismatchError, StoreError
from apecache.storage.files import TEMPORARY, Files
from apecache.storage.object_files import ObjectFiles
from apecache.storage.open import open_files
from apecache.store.layout import SOURCE, chunk_name
from apecache.store.maintenance import find_array, remove_array, uncommit
from apecache.store.reader import FeatureStore
from apecache.store.verify import verify_store
from apecache.store.writer import ArrayWriter, create_array, create_store
from benchmarks.reliability.injection.tower import (
    MODALITIES,
    NAME,
    SMALL,
    array_record,
    cached_tables,
    columns,
    commit_shard,
    expected,
    run,
    tree,
)


def objects(files: Files) -> dict[str, bytes]:
    """Every object of a place."""
    names = files.sizes("")
    return dict(zip(names, files.read_all(names), strict=True))


@pytest.fixture(autouse=True)
def _cached_tables() -> Iterator[None]:
    with cached_tables():
        yield


@pytest.fixture
def place(bucket: str) -> str:
    return f"{bucket}/some/store"


@pytest.fixture
def files(place: str) -> ObjectFiles:
    opened = open_files(place)
    assert isinstance(opened, ObjectFiles)
    return opened


# --- one operation after another ------------------------------------------------------------------


@pytest.mark.parametrize("where", ["folder", "storage"])
def test_both_kinds_of_places_do_the_same(where: str, tmp_path: Path, place: str) -> None:
    files = open_files(tmp_path / "store" if where == "folder" else place)
    files.prepare()
    assert files.list("") == []
    assert not files.sizes("")
    files.write("a/b/c", b"one", memoryview(b"two"))
    assert files.put_if_absent("a/b/d", b"first")
    assert not files.put_if_absent("a/b/d", b"second")
    files.write("a/b/c", b"three")
    files.write("e", b"")
    files.settle("a")
    with files.exclusive("a"):
        assert files.child("a").list("b") == ["c", "d"]
    assert files.list("") == ["a", "e"]
    assert files.list("a/b/c") == files.list("nowhere") == []
    assert files.sizes("a") == {"a/b/c": 5, "a/b/d": 5}
    assert files.child("a").sizes("") == {"b/c": 5, "b/d": 5}
    assert list(files.read_all(["a/b/d", "e", "a/b/c"])) == [b"first", b"", b"three"]
    assert [files.exists(name) for name in ("a/b/c", "a/b", "a/b/x")] == [True, False, False]
    assert files.where("a/b") == f"{files.place}/a/b" == str(files.child("a/b").place)
    with pytest.raises(FileNotFoundError):
        files.read("a/b/x")
    with pytest.raises(FileNotFoundError):
        list(files.read_all(["e", "x"]))
    files.remove("e")
    files.remove("e")
    files.remove_folder("a")
    files.remove_folder("a")
    assert not files.sizes("")
    assert files.hint() == ""


@pytest.mark.parametrize("range_bytes", [3, 1000])
@pytest.mark.parametrize(("size", "count"), [(5, 5), (8, 8), (9, 9), (20, 9), (0, 0)])
def test_reading_into_buffers_tells_a_shorter_and_a_longer_object(
    files: ObjectFiles,
    monkeypatch: pytest.MonkeyPatch,
    range_bytes: int,
    size: int,
    count: int,
) -> None:
    monkeypatch.setattr("apecache.storage.object_files.RANGE_BYTES", range_bytes)
    data = bytes(range(1, size + 1))
    files.write("x", data)
    target = bytearray(8)
    seen = bytearray()
    view = memoryview(target)
    assert files.read_into("x", [view[:5], view[5:5], view[5:]], seen.extend) == count
    assert target == data[:8].ljust(8, b"\0")
    assert seen == data[:8]
    with pytest.raises(FileNotFoundError):
        files.read_into("missing", [view], seen.extend)


def test_no_object_is_sent_in_parts(files: ObjectFiles, s3_server: S3Server) -> None:
    data = bytes(6 << 20)  # more than the parts that obstore would make of it
    with s3_server.faults(Faults()) as seen:
        files.write("large", data)
        files.put_if_absent("too", data)
    assert [method for method, _ in seen.requests] == ["PUT", "PUT"]
    assert not any("uploads" in path or "partNumber" in path for _, path in seen.requests)


def test_of_many_creators_exactly_one_puts_the_object(place: str) -> None:
    put: list[int] = []
    gate = threading.Barrier(8)

    def create(number: int) -> None:
        files = open_files(place)
        gate.wait()
        if files.put_if_absent("x", bytes([number])):
            put.append(number)

    threads = [threading.Thread(target=create, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert open_files(place).read("x") == bytes(put)


def test_a_creation_whose_answer_was_lost_is_not_taken_for_another_writers(
    files: ObjectFiles,
    s3_server: S3Server,
) -> None:
    assert not files.exists("x")
    with s3_server.faults(Faults()) as faults:
        lost = iter(["lost", "lost"])
        faults.told = lambda method, path: next(lost, None) if method == "PUT" else None
        assert files.put_if_absent("x", b"mine")
        assert faults.counts == {"lost": 2}
    assert not files.put_if_absent("x", b"others")
    assert files.read("x") == b"mine"


def test_what_killed_trials_left_is_removed_after_an_hour(
    files: ObjectFiles,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    files.write(f"{TEMPORARY}old", b"first")
    files.write("kept", b"")
    files.remove_temporary("records")
    assert files.exists(f"{TEMPORARY}old")
    assert files.list("") == ["kept"]
    monkeypatch.setattr("apecache.storage.object_files.LEFT_AFTER", timedelta(hours=-1))
    files.remove_temporary("records")
    assert list(files.sizes("")) == ["kept"]


# --- a store --------------------------------------------------------------------------------------


def test_a_store_is_byte_for_byte_that_of_a_folder(
    files: ObjectFiles,
    place: str,
    tower_store_once: Path,
) -> None:
    assert len(run(tower_store_once, SMALL, files)) == SMALL.n_shards
    assert objects(files) == tree(tower_store_once)
    store = FeatureStore.open(place)
    assert store.path == place
    assert store.pairs.keys.tolist() == columns(SMALL).keys
    for modality in MODALITIES:
        array = store.array(modality)
        assert np.array_equal(array.load(), expected(SMALL, modality), equal_nan=True)
        assert (~array.load_ok()).sum() == len(array.quarantined()) > 0
    report = verify_store(place)
    assert report.problems == ()
    assert report.store == place
    assert run(tower_store_once, SMALL, open_files(place)) == []


def test_an_interrupted_run_is_resumed_from_the_records(
    files: ObjectFiles,
    tower_store_once: Path,
) -> None:
    run(tower_store_once, SMALL, files, shards={"image": [0, 2], "text": [1]})
    left = run(tower_store_once, SMALL, files)
    assert left == ["image/1", "text/0", "text/2", "text/3"]
    assert objects(files) == tree(tower_store_once)


@pytest.mark.parametrize("how", ["flip", "cut", "longer", "empty", "gone"])
def test_damage_is_found_named_and_never_loaded(
    files: ObjectFiles,
    place: str,
    tower_store_once: Path,
    how: str,
) -> None:
    run(tower_store_once, SMALL, files)
    name = chunk_name(array_record(SMALL, "image"), "features", 1)
    data = files.read(name)
    if how == "gone":
        files.remove(name)
    else:
        files.write(
            name,
            {"flip": b"\1" + data[1:], "cut": data[:-1], "longer": data + b"\0", "empty": b""}[how],
        )
    (problem,) = verify_store(place).problems
    assert (problem.object, problem.shard) == (name, 1)
    with pytest.raises(
        DamagedError,
        match=rf"{place}/{name} \(shard 1\) .*; repair with: apecache repair STORE",
    ):
        FeatureStore.open(place).array("image").load()
    uncommit(files, modality="image", name=NAME, shards=[1])
    assert run(tower_store_once, SMALL, open_files(place)) == ["image/1"]
    assert objects(files) == tree(tower_store_once)


def test_an_array_is_removed_with_all_its_objects(
    files: ObjectFiles,
    place: str,
    tower_store_once: Path,
) -> None:
    run(tower_store_once, SMALL, files)
    before = objects(files)
    went = remove_array(files, *find_array(files, f"text/{NAME}"))
    left = objects(files)
    assert went == {
        "objects": len(before) - len(left),
        "bytes": sum(map(len, before.values())) - sum(map(len, left.values())),
    }
    assert [array.record.modality for array in FeatureStore.open(place).arrays()] == ["image"]
    assert verify_store(place).problems == ()


def test_something_else_is_refused_and_left_alone(files: ObjectFiles) -> None:
    files.write("mine.txt", b"mine")
    with pytest.raises(StoreError, match="is not empty and not a store; choose another --store"):
        create_store(files, pairs=columns(SMALL), root="/data", version="0")
    assert objects(files) == {"mine.txt": b"mine"}


def test_the_store_of_another_table_is_refused(
    files: ObjectFiles,
    place: str,
    tower_store_once: Path,
) -> None:
    run(tower_store_once, SMALL, files)
    with pytest.raises(MismatchError, match=f"{place} was made from another table"):
        create_store(files, pairs=columns(replace(SMALL, images=11)), root="/data", version="0")


@pytest.mark.parametrize("place", ["https://host/store", "file:///store", "hdfs://store"])
def test_other_urls_are_no_places_and_no_folders(
    place: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        StoreError,
        match=r":// cannot hold a store; give a folder, or a URL of s3://, gs://, az://",
    ):
        run(place, SMALL)
    assert list(tmp_path.iterdir()) == []


def test_there_is_no_store_where_none_is(place: str) -> None:
    with pytest.raises(
        StoreError,
        match=rf"{place} is not a store \(make one with: apecache extract\)",
    ):
        FeatureStore.open(place)


# --- several writers ------------------------------------------------------------------------------


def test_writers_at_the_same_time_make_the_store_of_one(place: str, tower_store_once: Path) -> None:
    errors: list[Exception] = []
    gate = threading.Barrier(3)

    def work() -> None:
        gate.wait()
        try:
            run(tower_store_once, SMALL, open_files(place))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert objects(open_files(place)) == tree(tower_store_once)


def test_a_shard_committed_with_other_bytes_is_refused(
    files: ObjectFiles,
    tower_store_once: Path,
) -> None:
    create_store(files, pairs=columns(SMALL), root="/data", version="0")
    create_array(files, array_record(SMALL, "image"))
    writer = ArrayWriter(files, array_record(SMALL, "image"))
    commit_shard(writer, SMALL, 0)
    before = objects(files)
    with pytest.raises(MismatchError, match="another writer committed this shard with other bytes"):
        writer.commit(0, np.ones((4, 8), np.float16), [""] * 4)
    assert objects(files) == before


@pytest.fixture
def heedless(s3_server: S3Server):  # type: ignore[no-untyped-def]
    """A server that overwrites what was to be created only if absent."""
    s3_server.heeds_conditions = False
    yield s3_server
    s3_server.heeds_conditions = True


def test_storage_without_put_if_absent_is_refused_before_anything_is_written(
    files: ObjectFiles,
    heedless: S3Server,
    place: str,
    tower_store_once: Path,
) -> None:
    with pytest.raises(
        StoreError,
        match=r"two writers could undo each other.*add --single-writer",
    ) as caught:
        run(tower_store_once, SMALL, files)
    assert caught.value.exit_code == 3
    assert objects(files) == {}


def test_a_single_writer_can_use_storage_without_put_if_absent(
    heedless: S3Server,
    place: str,
    tower_store_once: Path,
) -> None:
    alone = open_files(place, alone=True)
    run(tower_store_once, SMALL, alone)
    assert objects(alone) == tree(tower_store_once)
    assert run(tower_store_once, SMALL, open_files(place, alone=True)) == []
    assert not alone.put_if_absent(SOURCE, b"other")
    with pytest.raises(MismatchError, match="another table"):
        create_store(alone, pairs=columns(replace(SMALL, images=11)), root="/data", version="0")


def test_the_trial_of_put_if_absent_costs_little_and_is_made_once(
    files: ObjectFiles,
    s3_server: S3Server,
    tower_store_once: Path,
) -> None:
    with s3_server.faults(Faults()) as seen:
        files.prepare()
        files.child("segments/0001").prepare()
    assert [method for method, _ in seen.requests] == ["PUT", "PUT", "GET", "POST"]
    assert objects(files) == {}


# --- credentials ----------------------------------------------------------------------------------


def test_credentials_are_in_no_object(files: ObjectFiles, tower_store_once: Path) -> None:
    run(tower_store_once, SMALL, files)
    for name, data in objects(files).items():
        assert SECRET.encode() not in data, name
        assert b"AKIATESTS" not in data, name


def test_the_marker_of_a_folder_that_a_console_made_is_no_object(
    files: ObjectFiles,
    bucket: str,
    s3_server: S3Server,
    tower_store_once: Path,
) -> None:
    for folder in ("some/store/", "some/store/records/"):
        s3_server.put(f"{bucket}/{folder}", b"")
    assert files.list("") == ["records"]
    run(tower_store_once, SMALL, files)
    assert {problem.kind for problem in verify_store(files.place).problems} <= {"foreign"}
