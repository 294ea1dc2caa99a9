import contextlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apecache.errors import DamagedError, MismatchError, StoreError
from apecache.storage.local_files import LocalFiles
from apecache.store.layout import VIEW_FORMAT_VERSION, chunk_name, commit_name
from apecache.store.records import (
    CommitRecord,
    ObjectRecord,
    parse_record,
    read_commits,
    seal_record,
    with_checksum,
)
from apecache.store.writer import ArrayWriter
from benchmarks.reliability.injection.tower import NAME, SMALL, array_record

objects = st.dictionaries(
    st.text(max_size=20),
    st.builds(
        ObjectRecord,
        st.integers(0, 2**40),
        st.text(max_size=8),
        st.none() | st.integers(0, 9),
    ),
)
records = st.builds(
    CommitRecord,
    st.integers(0, 10**7),
    st.tuples(st.integers(0, 10**9), st.integers(0, 10**9)),
    st.integers(0, 10**6),
    st.integers(0, 10**6),
    objects,
    st.lists(st.sampled_from(["", "0" * 64, "f" * 64]), max_size=5),
    st.text(max_size=8),
)


@settings(max_examples=60, deadline=None)
@given(record=records)
def test_a_record_survives_its_file(record: CommitRecord) -> None:
    again = CommitRecord.from_bytes(record.to_bytes(), "x")
    assert again == record
    assert again.to_bytes() == record.to_bytes()


@settings(max_examples=300, deadline=None)
@given(data=st.data(), record=records)
def test_a_record_with_a_flipped_bit_is_refused_or_says_the_same(
    data: st.DataObject,
    record: CommitRecord,
) -> None:
    raw = bytearray(record.to_bytes())
    raw[data.draw(st.integers(0, len(raw) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    with contextlib.suppress(StoreError):
        assert CommitRecord.from_bytes(bytes(raw), "x") == record


def test_a_record_that_says_something_else_than_what_was_committed_is_damaged() -> None:
    raw = seal_record("x.json", {"rows": 10})
    assert parse_record(raw, "x.json")["rows"] == 10
    with pytest.raises(
        DamagedError,
        match=r"x.json: the record is damaged \(its checksum does not fit\)",
    ):
        parse_record(raw.replace(b'"rows":10', b'"rows":11'), "x.json")


@settings(max_examples=100, deadline=None)
@given(
    raw=st.binary(max_size=60)
    | st.just(b"[" * 100_000)
    | st.sampled_from([b'{"checksum":1}', b"NaN", b'{"a":NaN}'])
)
def test_what_is_no_record_at_all_is_a_store_error(raw: bytes) -> None:
    with pytest.raises(StoreError, match=r"x.json"):
        parse_record(raw, "x.json")


@pytest.mark.parametrize("missing", ["shard", "rows", "objects", "content", "fingerprint", "n_ok"])
def test_a_record_without_a_part_is_damaged_though_its_checksum_fits(missing: str) -> None:
    value = json.loads(
        CommitRecord(
            0,
            rows=(0, 1),
            n_ok=1,
            n_quarantined=0,
            objects={},
            content=[""],
            fingerprint="f",
        ).to_bytes()
    )
    body = {key: part for key, part in value.items() if key not in ("checksum", missing)}
    with pytest.raises(DamagedError, match=r"x.json: the record is damaged"):
        CommitRecord.from_bytes(with_checksum(body), "x.json")


def test_a_record_of_a_newer_format_is_refused_by_name() -> None:
    data = with_checksum({"format": VIEW_FORMAT_VERSION + 1, "anything": []})
    with pytest.raises(StoreError, match=f"has format {VIEW_FORMAT_VERSION + 1}.*upgrade apecache"):
        CommitRecord.from_bytes(data, "x.json")


def commits(store: Path) -> list[CommitRecord]:
    return [record for record, _ in read_commits(LocalFiles(store), array_record(SMALL, "image"))]


def change(store: Path, place: int, **changes: object) -> None:
    """A valid record in the place of another: its checksum fits, its contents do not."""
    path = store / commit_name("image", NAME, place)
    path.write_bytes(replace(CommitRecord.from_bytes(path.read_bytes(), ""), **changes).to_bytes())


def test_records_come_in_the_order_of_shards(tower_store_once: Path) -> None:
    assert [record.rows for record in commits(tower_store_once)] == [(0, 4), (4, 8), (8, 10)]


def test_a_record_of_another_fingerprint_is_refused(tower_store: Path) -> None:
    change(tower_store, 1, fingerprint="0" * 64)
    with pytest.raises(
        MismatchError,
        match=r"00000001.json: shard 1 of tower was made by another encoder",
    ):
        commits(tower_store)


@pytest.mark.parametrize(
    "changes",
    [
        {"shard": 0},
        {"shard": 9},
        {"shard": -1},
        {"rows": (4, 7)},
        {"rows": (0, 4)},
        {"objects": {}},
        {
            "objects": {
                chunk_name(array_record(SMALL, "image"), part, 1): ObjectRecord(10**12, "", 0)
                for part in ("features", "status")
            }
        },
        {"content": [""] * 3},
    ],
    ids=str,
)
def test_a_valid_record_that_is_not_of_its_place_is_refused(
    tower_store: Path,
    changes: dict[str, object],
) -> None:
    change(tower_store, 1, **changes)
    with pytest.raises(DamagedError, match=r"00000001.json: the record is not of this shard"):
        commits(tower_store)


def test_a_copy_of_another_shards_record_is_refused(tower_store: Path) -> None:
    first, second = (tower_store / commit_name("image", NAME, shard) for shard in (0, 1))
    second.write_bytes(first.read_bytes())
    with pytest.raises(DamagedError, match=r"00000001.json: the record is not of this shard"):
        commits(tower_store)


def test_a_writer_refuses_records_that_are_not_its_own_before_it_writes(tower_store: Path) -> None:
    other = ArrayWriter(
        LocalFiles(tower_store),
        array_record(replace(SMALL, encoder="bb"), "image"),
    )
    for ask in (other.pending, other.committed, other.seal):
        with pytest.raises(MismatchError, match="made by another encoder"):
            ask()
