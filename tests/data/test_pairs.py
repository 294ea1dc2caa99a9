"""The identity of a table and how its rows are numbered."""

from dataclasses import replace
from pathlib import Path

import pytest

from apecache.data.pairs import Pair, PairSource, TableRow, join_rows
from apecache.data.sources import open_pairs
from apecache.errors import ManifestError
from apecache.fingerprint import content_hash

PAIRS = (
    Pair(key="a.jpg", captions=("one", "two"), languages=("en", "de"), split="train", label="dog"),
    Pair(key="b.jpg", captions=(), languages=(), split="train", label="cat"),
    Pair(key="c.jpg", captions=("three",), languages=("en",), split="val", label="dog"),
)


def test_texts_are_numbered_image_by_image() -> None:
    source = PairSource(PAIRS)
    assert (len(source), source.keys) == (3, ["a.jpg", "b.jpg", "c.jpg"])
    assert source.captions == ["one", "two", "three"]
    assert source.languages == ["en", "de", "en"]
    assert source.image_rows == [0, 0, 2]
    assert tuple(source) == PAIRS


def test_sources_are_hashable_and_equal_by_content() -> None:
    assert len({PairSource(PAIRS), PairSource(PAIRS, "elsewhere"), PairSource(PAIRS[:2])}) == 2


@pytest.mark.parametrize(
    "changed",
    [
        (replace(PAIRS[0], key="A.jpg"), *PAIRS[1:]),
        (replace(PAIRS[0], captions=("one", "two ")), *PAIRS[1:]),
        (replace(PAIRS[0], captions=("two", "one")), *PAIRS[1:]),
        (replace(PAIRS[0], captions=("onetwo", "")), *PAIRS[1:]),
        (replace(PAIRS[0], languages=("en", "fr")), *PAIRS[1:]),
        (replace(PAIRS[0], split="val"), *PAIRS[1:]),
        (replace(PAIRS[0], label="cat"), *PAIRS[1:]),
        (replace(PAIRS[0], split="dog", label="train"), *PAIRS[1:]),
        (PAIRS[0], replace(PAIRS[1], captions=("",), languages=("",)), PAIRS[2]),
        (replace(PAIRS[0], captions=("one",), languages=("en",)), *PAIRS[1:]),
        PAIRS[::-1],
        PAIRS[:2],
        (*PAIRS, Pair(key="d.jpg", captions=(), languages=())),
    ],
)
def test_the_digest_changes_with_every_field_and_with_the_order(changed: tuple[Pair, ...]) -> None:
    assert PairSource(changed).digest != PairSource(PAIRS).digest


def test_the_digest_is_the_same_wherever_the_table_lies(tmp_path: Path) -> None:
    content = "image\tcaption\tsplit\na.jpg\tone\ttrain\nb.jpg\ttwo\tval\n"
    (tmp_path / "one").mkdir()
    here = tmp_path / "one" / "pairs.tsv"
    there = tmp_path / "other.csv"
    here.write_text(content)
    there.write_text(content.replace("\t", ","))
    first = open_pairs(here)
    second = open_pairs(there)
    assert first.origin != second.origin
    parts = ["a.jpg", "train", "", "1", "one", "", "b.jpg", "val", "", "1", "two", ""]
    prefixed = b"".join(len(part).to_bytes(8, "little") + part.encode() for part in parts)
    assert first.digest == second.digest == content_hash(prefixed)
    assert first == second


@pytest.mark.parametrize(
    ("what", "other"),
    [
        ("split", TableRow(line=9, image="a", captions=(), split="val", language="", label="x")),
        ("label", TableRow(line=9, image="a", captions=(), split="train", language="", label="y")),
    ],
)
def test_one_image_has_one_split_and_one_label(what: str, other: TableRow) -> None:
    rows = [
        TableRow(line=2, image="a", captions=(), split="train", language="", label="x"),
        TableRow(line=3, image="b", captions=(), split="val", language="", label="y"),
        other,
    ]
    with pytest.raises(
        ManifestError,
        match=rf"^where, line 9: image 'a' has {what} .* on line 2; give one {what}",
    ):
        join_rows(rows, "where")
