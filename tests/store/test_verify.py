"""Verification: every damage to every object is found and named; what does no harm is told apart
from it."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tiny import DAMAGES, Grown, damaged, put, tree

from apecache.errors import DamagedError, StoreError
from apecache.store.layout import STAMPS
from apecache.store.reader import FeatureStore
from apecache.store.verify import Problem, verify_store

pytestmark = pytest.mark.usefixtures("no_fsync")

ARRAY = re.compile(r"(?:^|/)(?:records|features\.zarr)/(image|text)/([^/]+)/")
SHARD = re.compile(r"(?:commits|quarantine)/(\d{8})\.|(?:features/c\.(\d+)\.0|status/c\.(\d+))$")


def part_of(name: str) -> tuple[tuple[str, str] | None, int | None]:
    """The array and the shard that an object belongs to, by its name."""
    array = ARRAY.search(name)
    shard = SHARD.search(name)
    number = next((group for group in shard.groups() if group is not None), None) if shard else None
    return (array.group(1), array.group(2)) if array else None, None if number is None else int(
        number
    )


def test_a_store_that_grew_is_sound_and_every_object_was_read(grown_once: Grown) -> None:
    read: list[int] = []
    report = verify_store(grown_once.store, progress=read.append)
    assert (report.sound, report.problems) == (True, ())
    records = [
        name
        for name in tree(grown_once.store)
        if "/records/" in f"/{name}" and name.endswith(".json")
    ]
    others = {name: data for name, data in tree(grown_once.store).items() if name not in records}
    assert report.n_objects == len(read) == len(others)  # records check themselves
    assert report.n_bytes == sum(read) == sum(map(len, others.values()))


@pytest.mark.parametrize("how", DAMAGES)
def test_every_damage_to_every_object_is_found_and_named(grown: Grown, how: str) -> None:
    files = tree(grown.store)
    for name in sorted(files):
        if how == "delete" and name == STAMPS:
            continue  # a cache: without it the images are hashed again
        changed = damaged(files, name, how)
        put(grown.store, changed)
        found = verify_store(grown.store).problems
        unsealed = how == "delete" and name.endswith(("seal.json", "view.json"))
        if unsealed:
            kind = "unsealed"
        elif how == "delete":
            kind = "missing"
        else:
            kind = "damaged"
        wanted = {(kind, object_, *part_of(object_)) for object_ in changed}
        assert {(p.kind, p.object, p.array, p.shard) for p in found} == wanted, (name, how)
        put(grown.store, {object_: files[object_] for object_ in changed})
    assert verify_store(grown.store).problems == ()


def test_an_array_without_its_seal_is_unsealed_which_does_no_harm(grown: Grown) -> None:
    (grown.store / "records/image/tiny-vit/seal.json").unlink()
    report = verify_store(grown.store)
    assert [problem.kind for problem in report.problems] == ["unsealed"]
    assert report.sound


@pytest.mark.parametrize("how", ["flip", "delete"])
def test_an_array_whose_fingerprint_is_lost_is_one_problem_and_not_one_for_each_of_its_objects(
    grown: Grown,
    how: str,
) -> None:
    name = "records/text/tiny-bert/fingerprint.json"
    put(grown.store, damaged(tree(grown.store), name, how))
    (problem,) = verify_store(grown.store).problems
    assert (problem.object, problem.array, problem.harmful) == (name, ("text", "tiny-bert"), True)


def test_what_is_not_committed_or_not_ours_is_reported_and_does_no_harm(grown: Grown) -> None:
    (grown.store / "records/image/tiny-vit/seal.json").unlink()
    (grown.store / "records/image/tiny-vit/commits/00000001.json").unlink()
    strangers = {
        ".DS_Store": "foreign",
        "features.zarr/.tmp-1-ab": "temporary",
        "features.zarr/image/tiny-vit/features/c.9.0": "foreign",
        "records/image/tiny-vit/commits/1.json": "foreign",
        "records/image/tiny-vit/commits/00000001.txt": "foreign",
        "records/text/.tmp-2-cd": "temporary",
        "segments/0001/notes.txt": "foreign",
        "segments/0001/records/.tmp-3-ef": "temporary",
        "segments/junk/x.txt": "foreign",
    }
    put(grown.store, dict.fromkeys(strangers, b"x"))
    report = verify_store(grown.store)
    image = ("image", "tiny-vit")
    uncommitted = {
        f"features.zarr/image/tiny-vit/{chunk}" for chunk in ("features/c.1.0", "status/c.1")
    }
    assert {p.object: p.kind for p in report.problems} == {
        **strangers,
        **dict.fromkeys(uncommitted, "uncommitted"),
    }
    assert {(p.array, p.shard) for p in report.problems if p.kind == "uncommitted"} == {(image, 1)}
    assert report.sound


def test_a_shard_that_left_without_a_trace_is_missing_all_the_same(grown: Grown) -> None:
    for name in tree(grown.store):
        if (
            name.startswith(("records/text/tiny-bert", "features.zarr/text"))
            and part_of(name)[1] == 2
        ):
            (grown.store / name).unlink()
    (problem,) = verify_store(grown.store).problems
    assert (problem.kind, problem.array, problem.shard) == ("missing", ("text", "tiny-bert"), 2)


def test_two_damages_are_two_problems(grown: Grown) -> None:
    names = [
        "features.zarr/image/tiny-vit/features/c.2.0",
        "segments/0001/features.zarr/text/tiny-bert/features/c.0.0",
    ]
    for name in names:
        put(grown.store, damaged(tree(grown.store), name, "flip"))
    assert [problem.object for problem in verify_store(grown.store).problems] == names


def test_a_seal_over_other_records_is_damaged(grown: Grown) -> None:
    """Both are valid: a whole shard and its record came from elsewhere, from before a change to the
    images, say."""
    from apecache.store.records import seal_record

    name = "records/image/tiny-vit/seal.json"
    (grown.store / name).write_bytes(
        seal_record(name, {"digest": "0" * 64, "rows": 12, "n_ok": 11})
    )
    (problem,) = verify_store(grown.store).problems
    assert (problem.kind, problem.object) == ("damaged", name)


def test_the_tables_of_two_stores_do_not_mix(grown: Grown) -> None:
    other = grown.store / "segments/0001"
    for part in ("records/pairs.json", "features.zarr/pairs"):
        source = other / part
        target = grown.store / part
        shutil.copytree(source, target, dirs_exist_ok=True) if source.is_dir() else shutil.copy(
            source,
            target,
        )
    (problem, *_) = verify_store(grown.store).problems
    assert (problem.kind, problem.object) == ("damaged", "records/pairs.json")
    assert "another table" in problem.detail


@pytest.mark.parametrize(
    "make",
    [lambda path: None, lambda path: path.mkdir(), lambda path: path.write_text("x")],
)
def test_what_is_no_store_is_refused(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "none")
    with pytest.raises(StoreError, match="is not a store"):
        verify_store(tmp_path / "none")


def test_harm_is_what_is_damaged_or_missing() -> None:
    kinds = ("damaged", "missing", "unsealed", "uncommitted", "temporary", "foreign")
    assert [kind for kind in kinds if Problem(kind=kind, object="x", detail="").harmful] == [
        "damaged",
        "missing",
    ]


# Segments


def _segments(store: Path) -> list[str]:
    return [problem.object for problem in verify_store(store).problems if problem.harmful]


def test_a_deleted_segment_is_missed(grown: Grown) -> None:
    shutil.rmtree(grown.store / "segments/0001")
    assert _segments(grown.store) == ["segments/0001"]
    with pytest.raises(DamagedError, match=r"segments/0001 is missing \(3 images\)"):
        FeatureStore.open(grown.store)


def test_a_segment_whose_record_is_lost_is_not_left_out(grown: Grown) -> None:
    (grown.store / "records/segments/0001.json").unlink()
    assert _segments(grown.store) == ["records/segments/0001.json"]
    with pytest.raises(
        DamagedError,
        match=r"0001.json is missing; write it again with: apecache repair",
    ):
        FeatureStore.open(grown.store)


def test_swapped_segments_are_noticed(
    tmp_path: Path,
    write_store: Callable[..., FeatureStore],
) -> None:
    """Each is a sound store of its own."""
    for folder, key in (("", "a"), ("segments/0001", "b"), ("segments/0002", "c")):
        write_store(
            tmp_path / "store" / folder,
            np.ones((1, 2), "f2"),
            np.ones((1, 2), "f2"),
            [0],
            [""],
            keys=[key],
        )
    assert FeatureStore.open(tmp_path / "store").pairs.keys.tolist() == ["a", "b", "c"]
    segments = tmp_path / "store" / "segments"
    (segments / "0001").rename(segments / "x")
    (segments / "0002").rename(segments / "0001")
    (segments / "x").rename(segments / "0002")
    assert _segments(tmp_path / "store") == ["segments/0001", "segments/0002"]
    with pytest.raises(
        DamagedError,
        match="0001 is not the segment that was appended in its place",
    ):
        FeatureStore.open(tmp_path / "store")
