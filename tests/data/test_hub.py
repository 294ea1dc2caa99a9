"""Data sets of Hugging Face's library: splits, keys, images inside and as files, and how a name is
read."""

import sys
from pathlib import Path
from typing import Any

import pytest
from inputs import CAPTIONS, NAMES, image_bytes, structs, write_images

from apecache.data.hub import HubMedia, HubRow
from apecache.data.media import FolderMedia
from apecache.data.pairs import Pair
from apecache.data.sources import open_pairs
from apecache.data.spec import OpenSpec
from apecache.errors import ManifestError, MissingExtraError, RowError

datasets = pytest.importorskip("datasets")


def made(columns: dict[str, Any], **features: Any) -> Any:
    kinds = {name: features.get(name, datasets.Value("string")) for name in columns}
    return datasets.Dataset.from_dict(columns, features=datasets.Features({**kinds}))


def saved(folder: Path, **parts: Any) -> str:
    whole = datasets.DatasetDict(parts) if "alone" not in parts else parts["alone"]
    whole.save_to_disk(folder / "saved")
    return f"hf-datasets:{folder / 'saved'}"


def images(rows: list[int], names: list[str | None] | None = None) -> Any:
    chosen = [structs(names or NAMES)[row] for row in rows]
    return made({"photo": chosen, "text": [CAPTIONS[row] for row in rows]}, photo=datasets.Image())


def test_the_one_column_of_images_is_found_whatever_its_name_and_parts_are_splits(
    tmp_path: Path,
) -> None:
    source = open_pairs(saved(tmp_path, train=images([0, 1, 2]), validation=images([3, 4])))
    splits = ["train"] * 3 + ["val"] * 2
    rows = zip(NAMES, CAPTIONS, splits, strict=True)
    assert list(source) == [
        Pair(key=key, captions=(caption,), languages=("",), split=split)
        for key, caption, split in rows
    ]
    assert [source.media.read(key) for key in source.keys] == [image_bytes(row) for row in range(5)]


def test_images_without_a_name_of_their_own_are_numbered_within_their_part(tmp_path: Path) -> None:
    alike: list[str | None] = ["image.png"] * 5
    source = open_pairs(saved(tmp_path, train=images([0, 1], alike), test=images([2], alike)))
    assert source.keys == ["train/0", "train/1", "test/0"]
    assert source.media.read("test/0") == image_bytes(2)


def test_a_split_column_comes_before_the_parts(tmp_path: Path) -> None:
    part = made({"image": structs()[:2], "fold": ["x", "y"]}, image=datasets.Image())
    uri = saved(tmp_path, train=part)
    assert [pair.split for pair in open_pairs(uri, OpenSpec(split_column="fold"))] == ["x", "y"]
    assert [pair.split for pair in open_pairs(uri)] == ["train", "train"]


def test_several_captions_and_missing_labels(tmp_path: Path) -> None:
    label = datasets.ClassLabel(names=["cat"])
    columns = {"image": structs()[:2], "captions": [["one", "two"], []], "label": [0, -1]}
    part = made(
        columns,
        image=datasets.Image(),
        captions=datasets.List(datasets.Value("string")),
        label=label,
    )
    assert list(open_pairs(saved(tmp_path, alone=part))) == [
        Pair(key="a.png", captions=("one", "two"), languages=("", ""), label="cat"),
        Pair(key="b.png", captions=(), languages=()),
    ]


def test_images_that_are_files_are_read_below_the_data_set_only(tmp_path: Path) -> None:
    write_images(tmp_path / "saved" / "files", ["in.png"])
    write_images(tmp_path, ["out.png"])
    rows = [{"bytes": None, "path": path} for path in ("files/in.png", str(tmp_path / "out.png"))]
    table = made({"image": rows}, image=datasets.Image(decode=False))
    places = {"a": HubRow(0, 0), "b": HubRow(0, 1)}
    media = HubMedia(
        split_images=(table.with_format("arrow"),),
        rows_by_key=places,
        files=FolderMedia(root=tmp_path / "saved"),
        place="",
    )
    assert media.read("a") == image_bytes(0)
    with pytest.raises(RowError, match="outside-root"):
        media.read("b")


def test_a_column_of_paths_is_a_table_of_files(tmp_path: Path) -> None:
    write_images(tmp_path / "files")
    uri = saved(tmp_path, alone=made({"image": list(NAMES), "caption": list(CAPTIONS)}))
    source = open_pairs(uri, OpenSpec(root=tmp_path / "files"))
    assert source.keys == list(NAMES)
    assert source.media.read("b.png") == image_bytes(1)


def test_a_store_of_a_copied_data_set_knows_its_new_place(tmp_path: Path) -> None:
    uri = saved(tmp_path, alone=images([0]))
    assert open_pairs(uri).media.place == str((tmp_path / "saved").resolve())


@pytest.mark.parametrize(
    ("uri", "asked"),
    [
        ("hf-datasets:owner/name", ("owner/name", None, None)),
        ("hf-datasets:name:small", ("name", "small", None)),
        ("hf-datasets:owner/name@abc123", ("owner/name", None, "abc123")),
        ("hf-datasets:owner/name:small@refs/pr/1", ("owner/name", "small", "refs/pr/1")),
    ],
)
def test_a_name_may_have_a_configuration_and_a_revision(
    uri: str,
    asked: tuple[Any, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[tuple[Any, ...]] = []

    def load(name: str, config: str | None, *, revision: str | None) -> Any:
        calls.append((name, config, revision))
        return images([0])

    monkeypatch.setattr(datasets, "load_dataset", load)
    source = open_pairs(uri)
    assert calls == [asked]
    assert (source.keys, source.origin) == (["a.png"], uri)


@pytest.mark.parametrize(
    "error",
    [
        ConnectionError("no\nnet"),
        ValueError("no config"),
        RuntimeError("Dataset scripts are no longer supported"),
    ],
)
def test_what_the_library_says_becomes_one_line(
    error: Exception,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def load(*_: Any, **__: Any) -> Any:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(
        ManifestError,
        match=r"^hf-datasets:x: cannot be opened \((no|Dataset)",
    ) as caught:
        open_pairs("hf-datasets:x")
    assert "\n" not in str(caught.value)


def test_a_data_set_without_rows_is_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(ManifestError, match="cannot be opened"):
        open_pairs(saved(tmp_path, alone=images([])))
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: images([]))
    with pytest.raises(ManifestError, match="has no rows"):
        open_pairs("hf-datasets:x")


def test_without_the_library_the_extra_is_named(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'apecache\[hf\]'"):
        open_pairs(f"hf-datasets:{tmp_path}")
