"""WebDataset tars: keys, captions and labels of samples, and which members are passed over."""

import json
import tarfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from inputs import image_bytes, samples, write_tar

from apecache.data.pairs import Pair, PairSource
from apecache.data.paths import expand_paths
from apecache.data.sources import open_pairs
from apecache.data.spec import OpenSpec
from apecache.errors import ManifestError


def opened(folder: Path, members: dict[str, bytes], spec: OpenSpec | None = None) -> PairSource:
    return open_pairs(write_tar(folder / "x.tar", {"a.jpg": image_bytes(0), **members}), spec)


@pytest.mark.parametrize(
    ("members", "spec", "captions"),
    [
        ({}, None, ()),
        ({"a.txt": b" a dog \r\n"}, None, (" a dog ",)),
        ({"a.caption": b"a dog"}, None, ("a dog",)),
        ({"a.caption": b"two", "a.txt": b"one"}, None, ("one",)),
        ({"a.json": b'{"caption": "a dog", "url": "x"}'}, None, ("a dog",)),
        ({"a.json": b'{"caption": ["a dog", "a cat"]}'}, None, ("a dog", "a cat")),
        ({"a.json": b'{"caption": null}'}, None, ()),
        ({"a.txt": b"one", "a.json": b'{"caption": "two"}'}, None, ("one",)),
        ({"a.txt": b"one", "a.json": b'{"alt": "two"}'}, OpenSpec(caption_column="alt"), ("two",)),
    ],
)
def test_where_the_caption_comes_from(
    members: dict[str, bytes],
    spec: OpenSpec | None,
    captions: tuple[str, ...],
    tmp_path: Path,
) -> None:
    assert list(opened(tmp_path, members, spec)) == [
        Pair(key="a", captions=captions, languages=("",) * len(captions))
    ]


def test_label_split_and_language_are_read(tmp_path: Path) -> None:
    fields = {"caption": ["ein Hund", "Hund"], "lang": "de", "split": "val", "label": "dog"}
    assert list(opened(tmp_path, {"a.json": json.dumps(fields).encode()})) == [
        Pair(
            key="a",
            captions=("ein Hund", "Hund"),
            languages=("de", "de"),
            split="val",
            label="dog",
        )
    ]
    assert [pair.label for pair in opened(tmp_path, {"a.cls": b"3\n"})] == ["3"]


def test_a_caption_field_that_is_missing_is_refused_with_its_near_name(tmp_path: Path) -> None:
    with pytest.raises(
        ManifestError,
        match=r"no \.json has the field 'atl'; fields found: alt; did you mean alt\?",
    ):
        opened(tmp_path, {"a.json": b'{"alt": "x"}'}, OpenSpec(caption_column="atl"))


def test_keys_are_names_up_to_the_first_dot_of_the_last_part(tmp_path: Path) -> None:
    members = {
        "./b.c/d.seg.png": b"x",
        "b.c/d.png": b"y",
        "b.c/d.txt": b"z",
        "up/../../e.png": b"w",
    }
    source = opened(tmp_path, members)
    assert source.keys == ["a", "b.c/d", "up/../../e"]
    assert source.media.read("b.c/d") == b"y"
    assert source.media.read("up/../../e") == b"w"  # a name is only a name: nothing is extracted


def test_other_members_are_passed_over(tmp_path: Path) -> None:
    tar = tmp_path / "x.tar"
    with tarfile.open(tar, "w", format=tarfile.PAX_FORMAT) as archive:
        for name, kind in (
            ("folder.jpg", tarfile.DIRTYPE),
            ("link.jpg", tarfile.SYMTYPE),
            ("hard.jpg", tarfile.LNKTYPE),
        ):
            info = tarfile.TarInfo(name)
            info.type = kind
            info.linkname = "/etc/hostname"
            archive.addfile(info)
        for name in ("ä" * 120 + ".jpg", "__MACOSX/._a.jpg", ".hidden.jpg", "a.npy", "a.parquet"):
            path = tmp_path / "file"
            path.write_bytes(image_bytes(0))
            archive.add(path, name)
    source = open_pairs(tar)
    assert source.keys == ["ä" * 120]
    assert source.media.read(source.keys[0]) == image_bytes(0)


def test_a_sample_without_an_image_stays_as_a_row_that_has_none(tmp_path: Path) -> None:
    source = opened(tmp_path, {"b.txt": b"lost"})
    assert (source.keys, source.captions) == (["a", "b"], ["lost"])
    assert not source.media.exists("b")


def test_keys_that_repeat_across_tars_get_the_names_of_their_tars(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", samples([0, 1]))
    write_tar(tmp_path / "1.tar", samples([1, 2]))
    source = open_pairs(tmp_path)
    assert source.keys == ["0/a", "0/b", "1/b", "1/c"]
    assert source.media.read("1/c") == image_bytes(2)
    assert open_pairs(tmp_path / "1.tar").keys == ["b", "c"]


def test_img2datasets_other_files_are_passed_over(tmp_path: Path) -> None:
    write_tar(tmp_path / "00000.tar", samples(json_too=True))
    for name in ("00000.parquet", "00000_stats.json"):
        (tmp_path / name).write_bytes(b"not read")
    source = open_pairs(tmp_path)
    assert len(source) == 5
    assert {pair.split for pair in source} == {"val"}


@given(first=st.integers(0, 30), count=st.integers(1, 5), width=st.integers(1, 6))
def test_ranges_count_from_the_first_to_the_last_with_the_firsts_width(
    first: int,
    count: int,
    width: int,
) -> None:
    begin = f"{first:0{width}d}"
    last = first + count - 1
    paths = expand_paths(f"/data/x-{{{begin}..{last}}}.tar")
    assert paths == [Path(f"/data/x-{number:0{width}d}.tar") for number in range(first, last + 1)]


def test_two_ranges_make_all_pairs_and_plain_names_none() -> None:
    paths = expand_paths("{0..1}/{08..10}.tar") or []
    assert [str(path) for path in paths] == [
        "0/08.tar",
        "0/09.tar",
        "0/10.tar",
        "1/08.tar",
        "1/09.tar",
        "1/10.tar",
    ]
    assert expand_paths("a{b}.tar") is None
