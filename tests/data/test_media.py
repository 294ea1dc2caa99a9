"""Where bytes come from: what is read, what is refused, and that every medium can be pickled and shared by threads."""

import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from inputs import NAMES, image_bytes, samples, struct_type, structs, write_images, write_parquet, write_tar

from apecache.data import media as media_module
from apecache.data.media import FolderMedia, Media, Member, NoMedia, TarMedia
from apecache.data.sources import open_pairs
from apecache.errors import RowError


def of_kind(kind: str, folder: Path) -> Media:
    match kind:
        case "folder":
            return FolderMedia(write_images(folder))
        case "tar":
            source = open_pairs(write_tar(folder / "x.tar", samples()))
        case "parquet":
            pytest.importorskip("pyarrow")
            table = write_parquet(folder / "x.parquet", {"image": structs()}, 2, image=struct_type())
            source = open_pairs(table)
        case _:
            datasets = pytest.importorskip("datasets")
            features = datasets.Features({"image": datasets.Image()})
            datasets.Dataset.from_dict({"image": structs()}, features=features).save_to_disk(folder / "saved")
            source = open_pairs(f"hf-datasets:{folder / 'saved'}")
    return source.media


KINDS = ("folder", "tar", "parquet", "hub")


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_in_another_process_reads_the_same_in_any_order_and_from_many_threads(kind: str, tmp_path: Path) -> None:
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


def test_a_tar_that_was_cut_or_taken_away_after_it_was_opened_gives_bad_rows(tmp_path: Path) -> None:
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
    size: int, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(media_module, "MAX_IMAGE_BYTES", 10)
    (tmp_path / "a.png").write_bytes(bytes(size))
    with pytest.raises(RowError, match=f"^{reason}: a.png has {size} bytes"):
        FolderMedia(tmp_path).read("a.png")
    with pytest.raises(RowError, match=f"^{reason}: a has {size} bytes"):
        TarMedia((tmp_path / "none.tar",), {"a": Member(0, 0, size)}).read("a")
