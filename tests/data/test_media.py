"""Where bytes come from: what is read, what is refused, and that every medium can be pickled and
shared by threads."""

import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from inputs import (
    NAMES,
    image_bytes,
    samples,
    struct_type,
    structs,
    write_images,
    write_parquet,
    write_tar,
)

from apecache.data import media as media_module
from apecache.data.media import (
    FolderMedia,
    Media,
    Member,
    NoMedia,
    ObjectMedia,
    TarMedia,
    media_at,
    media_below,
)
from apecache.data.sources import open_pairs
from apecache.errors import RowError
from apecache.storage.bucket import open_bucket


def of_kind(kind: str, folder: Path) -> Media:
    match kind:
        case "folder":
            return FolderMedia(root=write_images(folder))
        case "tar":
            source = open_pairs(write_tar(folder / "x.tar", samples()))
        case "parquet":
            pytest.importorskip("pyarrow")
            table = write_parquet(
                folder / "x.parquet",
                {"image": structs()},
                2,
                image=struct_type(),
            )
            source = open_pairs(table)
        case _:
            datasets = pytest.importorskip("datasets")
            features = datasets.Features({"image": datasets.Image()})
            datasets.Dataset.from_dict({"image": structs()}, features=features).save_to_disk(
                folder / "saved"
            )
            source = open_pairs(f"hf-datasets:{folder / 'saved'}")
    return source.media


KINDS = ("folder", "tar", "parquet", "hub")


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_in_another_process_reads_the_same_in_any_order_and_from_many_threads(
    kind: str,
    tmp_path: Path,
) -> None:
    here = of_kind(kind, tmp_path)
    there = pickle.loads(pickle.dumps(here))  # noqa: S301  (ours, as worker processes get it)
    names = [name.removesuffix(".png") if kind == "tar" else name for name in NAMES]
    wanted = [image_bytes(row) for row in range(5)]
    assert [there.read(name) for name in names] == wanted
    assert [here.read(name) for name in names[::-1]] == wanted[::-1]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(here.read, names * 20)) == wanted * 20
    assert (there.place, all(map(there.exists, names))) == (here.place, True)


@pytest.mark.parametrize("kind", KINDS)
def test_a_key_that_is_not_there_is_a_bad_row(kind: str, tmp_path: Path) -> None:
    media = of_kind(kind, tmp_path)
    assert not media.exists("nowhere")
    with pytest.raises(RowError, match=r"^missing: nowhere"):
        media.read("nowhere")


def test_no_media_has_no_images() -> None:
    assert not NoMedia().exists("a")
    with pytest.raises(RowError, match=r"^missing: a"):
        NoMedia().read("a")


def test_a_tar_that_was_cut_or_taken_away_after_it_was_opened_gives_bad_rows(
    tmp_path: Path,
) -> None:
    tar = write_tar(tmp_path / "x.tar", samples())
    media = open_pairs(tar).media
    last = max(media.members.values(), key=lambda member: member.offset)  # type: ignore[attr-defined]
    tar.write_bytes(tar.read_bytes()[: last.offset + 10])
    assert media.read("a") == image_bytes(0)
    with pytest.raises(RowError, match=r"^truncated: e: .*x\.tar ends inside it"):
        media.read("e")
    tar.unlink()
    with pytest.raises(RowError, match=r"^missing: a: .*x\.tar: No such file"):
        media.read("a")


@pytest.mark.parametrize(("size", "reason"), [(0, "empty"), (11, "too-large")])
def test_the_declared_size_is_checked_before_anything_is_read(
    size: int,
    reason: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(media_module, "MAX_IMAGE_BYTES", 10)
    (tmp_path / "a.png").write_bytes(bytes(size))
    with pytest.raises(RowError, match=f"^{reason}: a.png has {size} bytes"):
        FolderMedia(root=tmp_path).read("a.png")
    with pytest.raises(RowError, match=f"^{reason}: a has {size} bytes"):
        TarMedia(tars=(tmp_path / "none.tar",), members={"a": Member(0, 0, size)}).read("a")


# --- objects --------------------------------------------------------------------------------------


@pytest.fixture
def stored(bucket: str, tmp_path: Path) -> ObjectMedia:
    """The images of a folder, as objects below a root, and one object beside it."""
    opened = open_bucket(bucket)[0]
    folder = write_images(tmp_path)
    for path in (path for path in folder.rglob("*") if path.is_file()):
        opened.write(f"deep/below/{path.relative_to(folder).as_posix()}", path.read_bytes())
    opened.write("deep/secret.png", image_bytes(0))
    opened.write("deep/below/empty.png", b"")
    return ObjectMedia(f"{bucket}/deep/below/")


def test_objects_are_read_as_files_are_also_by_threads_and_by_a_copy(
    stored: ObjectMedia,
    tmp_path: Path,
) -> None:
    files = FolderMedia(root=tmp_path)
    wanted = [files.read(name) for name in NAMES]
    there = pickle.loads(pickle.dumps(stored))  # noqa: S301  (ours)
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(stored.read, NAMES)) == list(pool.map(there.read, NAMES)) == wanted
    assert pickle.loads(pickle.dumps(stored)) == there  # noqa: S301  (ours)
    assert all(stored.exists(name) for name in NAMES)
    assert stored.place.endswith("/deep/below")


def test_sizes_of_objects_are_those_of_files(stored: ObjectMedia, tmp_path: Path) -> None:
    keys = [*NAMES, "none.png", "../secret.png"]
    assert stored.sizes(keys) == FolderMedia(root=tmp_path).sizes(keys)
    assert stored.sizes(keys)[-2:] == [None, None]
    assert stored.sizes(["empty.png"]) == [0]


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        ("../secret.png", "outside-root"),
        ("a/../../secret.png", "outside-root"),
        ("/deep/secret.png", "outside-root"),
        ("..", "outside-root"),
        ("", "outside-root"),
        ("a\0.png", "outside-root"),
        ("none.png", "missing"),
        ("\ud800.png", "missing"),
        ("a\n.png", "missing"),
        ("empty.png", "empty"),
    ],
)
def test_no_key_leads_out_of_the_root_or_to_nothing(
    stored: ObjectMedia,
    key: str,
    reason: str,
) -> None:
    with pytest.raises(RowError) as caught:
        stored.read(key)
    assert caught.value.reason == reason
    assert stored.exists(key) == (reason == "empty")


def test_a_large_object_is_refused_before_it_is_read_and_others_are_read_whole(
    stored: ObjectMedia,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = stored.read(NAMES[0])
    monkeypatch.setattr(media_module, "READ_AT_ONCE", 100)
    assert stored.read(NAMES[0]) == whole
    monkeypatch.setattr(media_module, "MAX_IMAGE_BYTES", len(whole) - 1)
    with pytest.raises(RowError, match="too-large"):
        stored.read(NAMES[0])


def test_a_place_is_a_folder_or_a_url(tmp_path: Path) -> None:
    assert media_below(tmp_path) == media_at(str(tmp_path)) == FolderMedia(root=tmp_path)
    assert media_below("s3://bucket/a") == media_at("s3://bucket/a") == ObjectMedia("s3://bucket/a")
    assert media_at("") == media_at(str(tmp_path / "gone")) == NoMedia()
