"""Splits from a file or by shares: each image in one, whatever else is in the table."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from inputs import image_bytes, write_parquet, write_tar

from apecache.data.media import FolderMedia
from apecache.data.pairs import Pair, PairSource
from apecache.data.sources import open_pairs
from apecache.data.spec import OpenSpec
from apecache.data.splits import parse_fractions, resplit, split_of
from apecache.encoders.spec import parse_encoder
from apecache.errors import ManifestError, OptionError, RowError
from apecache.extraction.run import ExtractSpec, extract

THREE = (("train", 0.8), ("val", 0.1), ("test", 0.1))
KEYS = st.lists(st.text(min_size=1, max_size=8), min_size=1, max_size=20, unique=True)


def source_of(keys: list[str], split: str = "old") -> PairSource:
    return PairSource(
        tuple(
            Pair(key=key, captions=("one", "two"), languages=("", ""), split=split) for key in keys
        ),
        "here",
    )


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
    assert (
        0.3 < sum(found[key] != other[key] for key in found) / 20_000 < 0.4
    )  # 1 - .8² - 2 · .1² = .34


def test_captions_stay_with_their_image_and_nothing_else_changes() -> None:
    source = source_of(["a", "b"])
    changed = resplit(source, OpenSpec(split_fraction=(("train", 1.0),)))
    assert [pair.split for pair in changed] == ["train", "train"]
    assert (changed.keys, changed.captions, changed.media) == (
        source.keys,
        source.captions,
        source.media,
    )


@pytest.mark.parametrize("text", ["train=.9,val=.1", " train = 0.9, val=1e-1", "val=.1,train=.9"])
def test_shares_are_read(text: str) -> None:
    assert dict(parse_fractions(text)) == {"train": 0.9, "val": 0.1}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", r"expected fractions that add to 1, like train=\.8,val=\.2$"),
        ("train", "expected fractions that add to 1"),
        ("train=a", "expected fractions that add to 1"),
        (
            "train=80,val=20",
            r"^split fractions train=80,val=20 add to 100; expected fractions above 0 that add to "
            r"1, like train=\.8,val=\.2$",
        ),
        ("train=.9,val=.2", r"add to 1\.1; expected fractions"),
        ("train=1,val=0", "fractions above 0"),
        ("train=2,val=-1", "fractions above 0"),
        ("train=nan,val=1", "fractions above 0"),
        ("train=inf,val=1", "fractions above 0"),
        ("train=.5,train=.5", "different names"),
        ("=1", "different names"),
    ],
)
def test_wrong_shares_are_refused(text: str, said: str) -> None:
    with pytest.raises(OptionError, match=said):
        parse_fractions(text)


def test_a_list_of_keys_is_split_at_line_ends_alone(tmp_path: Path) -> None:
    keys = ["a\u2028b", "c\x0bd", "e\x85f", "g"]
    (tmp_path / "train.txt").write_bytes("\r\n".join(keys[:2]).encode())
    (tmp_path / "val.txt").write_bytes(("\n".join(keys[2:]) + "\n").encode())
    assert splits_of(source_of(keys), split_file=tmp_path) == {
        keys[0]: "train",
        keys[1]: "train",
        keys[2]: "val",
        keys[3]: "val",
    }


@pytest.mark.parametrize(
    "files",
    [
        {"s.tsv": "a\ttrain\nb\tval\n"},
        {"s.tsv": "key\tsplit\r\nb\tval\r\na\ttrain\r\n"},
        {"s.tsv/train.txt": "a\n\n", "s.tsv/validation.txt": "b"},
    ],
)
def test_a_split_file_says_the_splits_and_other_images_have_none(
    files: dict[str, str],
    tmp_path: Path,
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(text.encode())
    found = splits_of(source_of(["a", "b", "c"]), split_file=tmp_path / "s.tsv")
    assert found == {"a": "train", "b": "val", "c": ""}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "no splits"),
        (
            b"photo1\ttrain\nphoto22\ttrain\n",
            r"line 2: 'photo22' is not a key of here; did you mean photo2, photo1\?",
        ),
        (b"photo1\ttrain\nphoto1\tval\n", r"line 2: 'photo1' has a split already \(train\)"),
        (b"photo1 train\n", "line 1: 1 column; expected key and split"),
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
    with pytest.raises(
        ManifestError,
        match=r"split\.tsv: no such split file; did you mean splits\.tsv\?",
    ):
        splits_of(source_of(["a"]), split_file=tmp_path / "split.tsv")


def test_splits_from_two_places_are_refused() -> None:
    with pytest.raises(
        OptionError,
        match=r"give one of --split, --split-file and --split-fraction",
    ):
        splits_of(source_of(["a"]), split_column="split", split_fraction=THREE)


def test_the_tables_own_splits_give_way(tmp_path: Path) -> None:
    """Also where they contradict one another."""
    (tmp_path / "t.csv").write_text("image,split\na,train\na,val\n")
    source = open_pairs(tmp_path / "t.csv", OpenSpec(split_fraction=(("dev", 1.0),)))
    assert [pair.split for pair in source] == ["dev"]


# --- images of equal content ----------------------------------------------------------------------

HALVES = (("train", 0.5), ("val", 0.5))
UNREADABLE = b"a file that cannot be read"
CONTENTS = st.lists(st.integers(0, 4), min_size=1, max_size=14)


@dataclass(frozen=True, kw_only=True)
class MadeUpMedia:
    """Bytes by key. `reads`: the keys that were read."""

    contents: Mapping[str, bytes]
    reads: list[str] = field(default_factory=list)
    place = "made up"

    def read(self, key: str) -> bytes:
        self.reads.append(key)
        if self.contents[key] in (b"", UNREADABLE):
            raise RowError("missing", key)
        return self.contents[key]

    def exists(self, key: str) -> bool:
        return bool(self.contents[key])

    def sizes(self, keys: Sequence[str]) -> list[int | None]:
        return [len(self.contents[key]) or None for key in keys]


def pictured(contents: Mapping[str, bytes]) -> PairSource:
    return replace(source_of(list(contents)), media=MadeUpMedia(contents=contents))


@given(contents=CONTENTS, n_before=st.integers(0, 14), seed=st.integers(0, 3))
def test_equal_images_stay_together_and_added_ones_move_no_other(
    contents: list[int],
    n_before: int,
    seed: int,
) -> None:
    """Bytes of 0 to 4: an empty file cannot be read, so it is equal to none."""
    table = {f"{row}.jpg": bytes([content]) * bool(content) for row, content in enumerate(contents)}
    after = splits_of(pictured(table), split_fraction=HALVES, split_seed=seed)
    for key, content in table.items():
        first = (
            next(other for other, bytes_ in table.items() if bytes_ == content) if content else key
        )
        alone = splits_of(source_of([first]), split_fraction=HALVES, split_seed=seed)
        assert after[key] == alone[first]
    before = splits_of(
        pictured(dict(list(table.items())[:n_before])),
        split_fraction=HALVES,
        split_seed=seed,
    )
    assert before.items() <= after.items()


@given(contents=CONTENTS, order=st.randoms())
def test_the_order_of_a_table_moves_equal_images_together_and_no_other(
    contents: list[int],
    order: Any,
) -> None:
    table = {f"{row}.jpg": bytes([content]) for row, content in enumerate(contents)}
    keys = list(table)
    order.shuffle(keys)
    found = splits_of(pictured(table), split_fraction=HALVES)
    shuffled = splits_of(pictured({key: table[key] for key in keys}), split_fraction=HALVES)
    for key, content in table.items():
        if list(table.values()).count(content) == 1:
            assert found[key] == shuffled[key]
    assert all(
        len({shuffled[key] for key in keys if table[key] == content}) == 1
        for content in table.values()
    )


def test_only_images_of_equal_size_are_read() -> None:
    source = pictured({"a": b"1", "b": b"22", "c": b"333", "d": b"44", "e": b""})
    splits_of(source, split_fraction=HALVES)
    assert sorted(source.media.reads) == ["b", "d"]  # type: ignore[attr-defined]
    splits_of(source)
    assert len(source.media.reads) == 2  # type: ignore[attr-defined]


def copies(folder: Path, kind: str, n: int = 24) -> str:
    """A source of n images of which every four after one another are one file."""
    images = {f"{row:02}.png": image_bytes(row // 4 % 5) + bytes([row // 4]) for row in range(n)}
    match kind:
        case "files":
            (folder / "images").mkdir()
            for name, data in images.items():
                (folder / "images" / name).write_bytes(data)
            (folder / "t.csv").write_text(
                "image\n" + "".join(f"images/{name}\n" for name in images)
            )
            return str(folder / "t.csv")
        case "tar":
            return str(write_tar(folder / "t.tar", images))
        case "bytes":
            return str(
                write_parquet(
                    folder / "t.parquet",
                    {"image": list(images.values())},
                    row_group_size=5,
                )
            )
        case "structs":
            structs = [{"bytes": data, "path": name} for name, data in images.items()]
            return str(write_parquet(folder / "t.parquet", {"image": structs}, row_group_size=5))
    datasets = pytest.importorskip("datasets")
    structs = [{"bytes": data, "path": name} for name, data in images.items()]
    features = datasets.Features({"image": datasets.Image()})
    datasets.Dataset.from_dict({"image": structs}, features=features).save_to_disk(
        str(folder / "hub")
    )
    return f"hf-datasets:{folder / 'hub'}"


@pytest.mark.parametrize("kind", ["files", "tar", "bytes", "structs", "hub"])
def test_copies_are_known_wherever_the_bytes_come_from(kind: str, tmp_path: Path) -> None:
    source = open_pairs(copies(tmp_path, kind), OpenSpec(split_fraction=HALVES))
    splits = [pair.split for pair in source]
    assert len(splits) == 24
    assert all(len(set(splits[row : row + 4])) == 1 for row in range(0, 24, 4))
    assert set(splits) == {"train", "val"}
    by_key = [split_of(key, OpenSpec(split_fraction=HALVES)) for key in source.keys]
    assert splits == [by_key[row - row % 4] for row in range(24)]
    assert splits != by_key


def test_images_that_are_missing_or_no_files_fall_by_their_keys(tmp_path: Path) -> None:
    (tmp_path / "same").mkdir()
    keys = ["gone-1", "gone-2", "same", "../outside", "a\0b"]
    source = replace(source_of(keys), media=FolderMedia(root=tmp_path))
    assert splits_of(source, split_fraction=HALVES) == splits_of(
        source_of(keys),
        split_fraction=HALVES,
    )


def test_images_of_one_size_that_cannot_be_read_are_no_copies() -> None:
    keys = [f"{row}.jpg" for row in range(12)]
    source = pictured(dict.fromkeys(keys, UNREADABLE))
    assert splits_of(source, split_fraction=HALVES) == splits_of(
        source_of(keys),
        split_fraction=HALVES,
    )
    assert sorted(source.media.reads) == sorted(keys)  # type: ignore[attr-defined]


def test_a_store_takes_a_copy_that_is_appended_later(
    tmp_path: Path,
    tiny_image_encoder: Path,
    tiny_text_encoder: Path,
) -> None:
    """Without the rule copies fall to both sides and the extraction ends in an error."""
    table = Path(copies(tmp_path, "files"))
    rows = table.read_text().splitlines()
    spec = ExtractSpec(
        parse_encoder(f"timm:{tiny_image_encoder}", "image"),
        device="cpu",
        workers=0,
    )
    for count in (13, 24):
        table.write_text("\n".join(rows[: count + 1]) + "\n")
        source = open_pairs(table, OpenSpec(split_fraction=HALVES))
        report = extract(source, tmp_path / "store", spec)
    assert report.duplicates == 24 - 6
