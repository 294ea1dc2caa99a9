"""Splits from a file or by shares: each image in one, whatever else is in the table."""

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apecache.data.pairs import Pair, PairSource
from apecache.data.sources import open_pairs
from apecache.data.spec import OpenSpec
from apecache.data.splits import parse_fractions, resplit
from apecache.errors import ManifestError, OptionError

THREE = (("train", 0.8), ("val", 0.1), ("test", 0.1))
KEYS = st.lists(st.text(min_size=1, max_size=8), min_size=1, max_size=20, unique=True)


def source_of(keys: list[str], split: str = "old") -> PairSource:
    return PairSource(tuple(Pair(key, ("one", "two"), ("", ""), split) for key in keys), "here")


def splits_of(source: PairSource, **options: object) -> dict[str, str]:
    return {pair.key: pair.split for pair in resplit(source, OpenSpec(**options))}  # type: ignore[arg-type]


@given(keys=KEYS, more=KEYS, seed=st.integers(0, 3))
def test_rows_that_are_added_move_no_other(keys: list[str], more: list[str], seed: int) -> None:
    grown = list(dict.fromkeys([*more, *keys]))
    before = splits_of(source_of(keys), split_fraction=THREE, split_seed=seed)
    after = splits_of(source_of(grown), split_fraction=THREE, split_seed=seed)
    assert before.items() <= after.items()
    assert set(after.values()) <= {"train", "val", "test"}


def test_the_shares_come_out_and_the_seed_matters() -> None:
    source = source_of([f"images/{row}.jpg" for row in range(20_000)])
    found = splits_of(source, split_fraction=THREE)
    counts = Counter(found.values())
    for name, share in THREE:
        assert abs(counts[name] / 20_000 - share) < 0.01  # more than three standard deviations
    other = splits_of(source, split_fraction=THREE, split_seed=1)
    assert 0.3 < sum(found[key] != other[key] for key in found) / 20_000 < 0.4  # 1 - .8² - 2 · .1² = .34


def test_captions_stay_with_their_image_and_nothing_else_changes() -> None:
    source = source_of(["a", "b"])
    changed = resplit(source, OpenSpec(split_fraction=(("train", 1.0),)))
    assert [pair.split for pair in changed] == ["train", "train"]
    assert (changed.keys, changed.captions, changed.media) == (source.keys, source.captions, source.media)


@pytest.mark.parametrize("text", ["train=.9,val=.1", " train = 0.9, val=1e-1", "val=.1,train=.9"])
def test_shares_are_read(text: str) -> None:
    assert dict(parse_fractions(text)) == {"train": 0.9, "val": 0.1}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "expected shares like"),
        ("train", "expected shares like"),
        ("train=a", "expected shares like"),
        ("train=.9,val=.2", "sum to 1.1; expected 1"),
        ("train=1,val=0", "each with a share above 0"),
        ("train=2,val=-1", "each with a share above 0"),
        ("train=nan,val=1", "each with a share above 0"),
        ("train=.5,train=.5", "different names"),
        ("=1", "different names"),
    ],
)
def test_wrong_shares_are_refused(text: str, said: str) -> None:
    with pytest.raises(OptionError, match=said):
        parse_fractions(text)


@pytest.mark.parametrize(
    "files",
    [
        {"s.tsv": "a\ttrain\nb\tval\n"},
        {"s.tsv": "key\tsplit\r\nb\tval\r\na\ttrain\r\n"},
        {"s.tsv/train.txt": "a\n\n", "s.tsv/validation.txt": "b"},
    ],
)
def test_a_split_file_says_the_splits_and_other_images_have_none(files: dict[str, str], tmp_path: Path) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(text.encode())
    found = splits_of(source_of(["a", "b", "c"]), split_file=tmp_path / "s.tsv")
    assert found == {"a": "train", "b": "val", "c": ""}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "no splits"),
        (b"photo1\ttrain\nphoto22\ttrain\n", r"line 2: 'photo22' is no key of here; did you mean photo2, photo1\?"),
        (b"photo1\ttrain\nphoto1\tval\n", r"line 2: 'photo1' has a split already \(train\)"),
        (b"photo1 train\n", "line 1: 1 columns; expected key and split"),
        (b"photo1\t\n", "line 1: 2 columns"),
        (b"photo1\t\xff\n", r"line 1, byte 8"),
    ],
)
def test_a_wrong_split_file_is_refused(content: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / "s.tsv").write_bytes(content)
    with pytest.raises(ManifestError, match=said) as caught:
        splits_of(source_of(["photo1", "photo2"]), split_file=tmp_path / "s.tsv")
    assert "s.tsv" in str(caught.value)


def test_a_missing_split_file_is_refused_with_a_near_name(tmp_path: Path) -> None:
    (tmp_path / "splits.tsv").write_text("a\ttrain\n")
    with pytest.raises(ManifestError, match=r"split\.tsv: no such split file; did you mean splits\.tsv\?"):
        splits_of(source_of(["a"]), split_file=tmp_path / "split.tsv")


def test_splits_from_two_places_are_refused() -> None:
    with pytest.raises(OptionError, match=r"give one of --split, --split-file and --split-fraction"):
        splits_of(source_of(["a"]), split_column="split", split_fraction=THREE)


def test_the_tables_own_splits_give_way(tmp_path: Path) -> None:
    """Also where they contradict one another."""
    (tmp_path / "t.csv").write_text("image,split\na,train\na,val\n")
    source = open_pairs(tmp_path / "t.csv", OpenSpec(split_fraction=(("dev", 1.0),)))
    assert [pair.split for pair in source] == ["dev"]
