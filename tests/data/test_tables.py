"""Tables of pairs: what is read, and what each kind of broken table says."""

import csv
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from apecache.data.pairs import Pair, PairSource
from apecache.data.sources import open_pairs
from apecache.data.spec import OpenSpec
from apecache.errors import ManifestError

Write = Callable[[str, bytes | str], Path]

TWO_IMAGES = (
    Pair(key="a.jpg", captions=("a dog", "a brown dog"), languages=("", "")),
    Pair(key="b.jpg", captions=("a cat",), languages=("",)),
)


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def to(name: str, content: bytes | str) -> Path:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
        return path

    return to


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("t.tsv", "image\tcaption\na.jpg\ta dog\na.jpg\ta brown dog\nb.jpg\ta cat\n"),
        ("t.csv", "image,caption\na.jpg,a dog\na.jpg,a brown dog\nb.jpg,a cat\n"),
        ("t.CSV", "image,caption\r\na.jpg,a dog\r\na.jpg,a brown dog\r\nb.jpg,a cat\r\n"),
        ("t.csv", "caption,image\na dog,a.jpg\na brown dog,a.jpg\na cat,b.jpg\n"),
        ("t.tsv", "\ufeffimage\tcaption\na.jpg\ta dog\n\na.jpg\ta brown dog\nb.jpg\ta cat"),
        ("t.jsonl", '{"image": "a.jpg", "caption": ["a dog", "a brown dog"]}\n'
         '{"image": "b.jpg", "caption": "a cat"}\n'),
        ("t.jsonl", '\ufeff{"image": "a.jpg", "caption": "a dog"}\n\n  \n{"caption": ["a brown dog"], "image": "a.jpg"}'
         '\n{"image": "b.jpg", "caption": ["a cat"]}'),
    ],
    ids=["tsv", "csv", "upper case and CRLF", "other column order", "BOM and blank line", "list captions", "jsonl BOM"],
)  # fmt: skip
def test_every_format_gives_the_same_pairs(write: Write, name: str, content: str) -> None:
    source = open_pairs(write(name, content))
    assert source.pairs == TWO_IMAGES
    assert source.image_rows == [0, 0, 1]


def test_rows_of_one_image_are_joined_in_the_order_of_first_appearance(write: Write) -> None:
    table = write("t.tsv", "image\tcaption\nb\tone\na\ttwo\nb\tthree\na\tfour\n")
    source = open_pairs(table)
    assert source.keys == ["b", "a"]
    assert source.captions == ["one", "three", "two", "four"]
    assert source.image_rows == [0, 0, 1, 1]
    assert source.origin == str(table)


@pytest.mark.parametrize("column", ["lang", "language"])
def test_language_split_and_label_are_read(write: Write, column: str) -> None:
    text = (
        f"image\tcaption\tsplit\t{column}\tlabel\na\tein Hund\ttrain\tde\tdog\na\ta "
        "dog\ttrain\ten\tdog\n"
    )
    assert open_pairs(write("t.tsv", text)).pairs == (
        Pair(
            key="a",
            captions=("ein Hund", "a dog"),
            languages=("de", "en"),
            split="train",
            label="dog",
        ),
    )


def test_a_split_column_is_chosen_by_name(write: Write) -> None:
    table = write("t.csv", "image,caption,split,fold\na,x,train,1\nb,y,val,2\n")
    assert [pair.split for pair in open_pairs(table)] == ["train", "val"]
    assert [pair.split for pair in open_pairs(table, OpenSpec(split_column="fold"))] == ["1", "2"]


def test_a_table_for_labels_needs_no_captions(write: Write) -> None:
    table = write("t.tsv", "image\tlabel\na\tdog\nb\tcat\n")
    source = open_pairs(table, OpenSpec(require=("image", "label")))
    assert [(pair.label, pair.captions) for pair in source] == [("dog", ()), ("cat", ())]


def test_quoted_cells_hold_separators_quotes_and_line_breaks(write: Write) -> None:
    source = open_pairs(
        write(
            "t.csv",
            'image,caption\n"a,1.jpg","he said ""go"",\nthen left"\nb.jpg,it\'s 5" wide\n',
        )
    )
    assert source.keys == ["a,1.jpg", "b.jpg"]
    assert source.captions == ['he said "go",\nthen left', "it's 5\" wide"]


@pytest.mark.parametrize(
    "caption",
    ["\u202eright to left", "<script>alert(1)</script>", "=HYPERLINK(1)", "\x07 bell"],
)
def test_strange_captions_are_kept_exactly(write: Write, caption: str) -> None:
    assert open_pairs(write("t.tsv", f"image\tcaption\na\t{caption}\n")).captions == [caption]


def test_json_values_become_text_and_null_captions_are_none(write: Write) -> None:
    lines = [
        {"image": 7, "caption": [1.5, "x"], "label": 3},
        {"image": "b", "caption": None},
        {"image": "c", "caption": []},
    ]
    source = open_pairs(write("t.jsonl", "\n".join(map(json.dumps, lines))))
    assert source.pairs == (
        Pair(key="7", captions=("1.5", "x"), languages=("", ""), split="", label="3"),
        Pair(key="b", captions=(), languages=()),
        Pair(key="c", captions=(), languages=()),
    )


LINE_1 = '{"image": "a", "caption": "x"}\n'
BROKEN = [
    ("empty.tsv", b"", ["the file is empty", "image, caption"]),
    ("empty.jsonl", b"", ["the file is empty", "image, caption"]),
    ("header.csv", b"image,caption\n", ["a header but no rows", "expected a row"]),
    ("blank.tsv", b"image\tcaption\n\n\n", ["a header but no rows"]),
    ("column.tsv", b"imagee\tcaptn\na\tb\n",
     ["no column 'image'", "columns found: imagee, captn", "did you mean imagee?"]),
    ("column.jsonl", b'{"image": "a", "captn": "x"}\n',
     ["no column 'caption'", "columns found: image, captn", "did you mean captn?", "--caption-column"]),
    ("two.csv", b"image,text,title\na,x,y\n",
     ["columns 'title' and 'text' could each be the caption", "--caption-column"]),
    ("two.jsonl", b'{"path": "a", "filename": "b", "caption": "x"}\n',
     ["columns 'path' and 'filename' could each be the image", "--image-column"]),
    ("url.tsv", b"image\tcaption\na\tx\nhttps://example.org/a.jpg\ty\n", ["line 3", "is a URL", "download the images"]),
    ("column.jsonl", b"{}\n", ["no column 'image'", "columns found: none"]),
    ("line break.csv", b'"ima\nge",caption\na,b\n', ["no column 'image'", r"'ima\nge'"]),
    ("latin1.tsv", "image\tcaption\na\tcaf\u00e9\n".encode("latin-1"), ["line 2, byte 6", "save the file as UTF-8"]),
    ("utf16.csv", "image,caption\na,b\n".encode("utf-16"), ["line 1, byte 1", "save the file as UTF-8"]),
    ("latin1.jsonl", LINE_1.encode() * 3000 + b"\xff\n", ["line 3001, byte 1", "save the file as UTF-8"]),
    ("few.tsv", b"image\tcaption\na\tx\nb\n", ["line 3", "1 column, the header has 2", "one line is one row", "--quoting csv"]),
    ("many.csv", b"image,caption\na,x\nb,y,z\n", ["line 3", "3 columns, the header has 2", "quote cells"]),
    ("many later.csv", b'image,caption\na,"x\n\ny"\nb,y,z\n', ["line 5", "3 columns"]),
    ("quote.csv", b'image,caption\na,"x\nb,y\nc,z\n', ["line 2", "unexpected end of data", "double the quotes", "--quoting none"]),
    ("twice.tsv", b"image\tcaption\timage\na\tb\tc\n", ["line 1", "column 'image' appears twice", "rename"]),
    ("twice.jsonl", LINE_1.encode() + b'{"image": "a", "caption": "x", "image": "b"}\n', ["line 2", "appears twice"]),
    ("list.jsonl", LINE_1.encode() + b"\n[1, 2]\n", ["line 3", "expected a JSON object, found list", "one object on"]),
    ("not.jsonl", LINE_1.encode() + b"{'image': 'a'}\n", ["line 2", "not a JSON object", "one object on each"]),
    ("deep.jsonl", b"[" * 200_000 + b"\n", ["line 1", "not a JSON object"]),
    ("digits.jsonl", b'{"image": ' + b"9" * 5000 + b"}\n", ["line 1", "not a JSON object"]),
    ("bool.jsonl", b'{"image": true, "caption": "x"}\n', ["line 1", "image is a bool; expected text"]),
    ("dict.jsonl", b'{"image": "a", "caption": {"en": "x"}}\n', ["line 1", "caption is a dict; expected text"]),
    ("nested.jsonl", b'{"image": "a", "caption": [["x"]]}\n', ["line 1", "caption is a list; expected text"]),
    ("splits.tsv", b"image\tcaption\tsplit\na\tx\ttrain\nb\ty\tval\na\tz\tval\n",
     ["line 4", "image 'a' has split 'val' here and 'train' on line 2", "give one split per image"]),
    ("labels.csv", b"image,caption,label\na,x,dog\na,y,cat\n",
     ["line 3", "label 'cat' here and 'dog' on line 2", "give one label per image"]),
    ("break.csv", b'image,caption,split\n"a\nb",x,1\n"a\nb",y,2\n', ["line 4", r"image 'a\nb' has split"]),
    ("table.tvs", b"image\n", [".tsv, .csv, .jsonl", "did you mean .tsv"]),
    ("table", b"image\n", [".tsv, .csv, .jsonl"]),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    BROKEN,
    ids=[f"{i}-{row[0]}" for i, row in enumerate(BROKEN)],
)
def test_a_broken_table_is_refused_in_one_line_that_says_what_mends_it(
    write: Write,
    name: str,
    content: bytes,
    parts: list[str],
) -> None:
    table = write(name, content)
    with pytest.raises(ManifestError) as caught:
        open_pairs(table, OpenSpec(require=("image", "caption")))
    message = str(caught.value)
    assert message.startswith(str(table))
    assert [part for part in parts if part not in message] == []
    assert "\n" not in message
    assert caught.value.exit_code == 3


def test_a_missing_split_column_is_refused_with_the_nearest_name(write: Write) -> None:
    table = write("t.tsv", "image\tcaption\tfold\na\tx\t1\n")
    with pytest.raises(
        ManifestError,
        match=r"no column 'folds'; columns found: image, caption, fold; did you mean fold\?",
    ):
        open_pairs(table, OpenSpec(split_column="folds"))


def test_a_missing_table_is_refused_with_a_near_name(write: Write) -> None:
    there = write("captions.tsv", "image\tcaption\na\tx\n")
    with pytest.raises(
        ManifestError,
        match=r"caption\.tsv: no such file; did you mean captions\.tsv\?$",
    ) as caught:
        open_pairs(there.with_name("caption.tsv"))
    assert caught.value.exit_code == 3
    with pytest.raises(ManifestError, match=r"no such file$"):
        open_pairs(there.parent / "no folder" / "captions.tsv")


@pytest.mark.parametrize("kind", ["fifo", "long"])
def test_a_path_that_is_no_file_is_refused_at_once(tmp_path: Path, kind: str) -> None:
    path = tmp_path / ("x" * 300 + ".tsv" if kind == "long" else "t.tsv")
    if kind == "fifo":
        os.mkfifo(path)
    with pytest.raises(
        ManifestError,
        match="File name too long; expected" if kind == "long" else "a device or pipe",
    ):
        open_pairs(path)


def test_a_refusal_leaves_no_file_open(write: Write) -> None:
    folder = "/proc/self/fd"
    if not os.path.isdir(folder):
        pytest.skip("needs /proc")
    before = len(os.listdir(folder))
    for name, content, _ in BROKEN:
        with pytest.raises(ManifestError) as caught:
            open_pairs(write(name, content), OpenSpec(require=("image", "caption")))
        del caught
    # Files of other tests may be closed meanwhile.
    assert len(os.listdir(folder)) <= before


CELLS = [b"image", b"caption", b"split", b"\t", b",", b'"', b"\n", b"\r", b"\0", b"\xff", b"a"]
JSON = [
    b'{"image": ',
    b'"a"',
    b', "caption": ',
    b"[",
    b"]",
    b"{",
    b"}",
    b"\n",
    b"null",
    b"1e999",
    b'"\\ud800"',
    b":",
]
BYTES = st.one_of(
    st.binary(max_size=200),
    st.lists(st.sampled_from(CELLS), max_size=40).map(b"".join),
    st.lists(st.sampled_from(JSON), max_size=20).map(b"".join),
    st.binary(max_size=60).map(lambda raw: b"image,caption\n" + raw),
    st.binary(max_size=60).map(lambda raw: b"image\tcaption\na\tb\n" + raw),
    st.binary(max_size=60).map(lambda raw: b'{"image": "a", "caption": "x"}\n' + raw),
)


@settings(
    max_examples=400,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(content=BYTES, suffix=st.sampled_from([".tsv", ".csv", ".jsonl"]))
def test_whatever_the_bytes_only_pairs_or_a_manifest_error_come_out(
    write: Write,
    content: bytes,
    suffix: str,
) -> None:
    table = write(f"fuzz{suffix}", content)
    outcome = read_or_refuse(table)
    if isinstance(outcome, ManifestError):
        assert "\n" not in str(outcome)
        assert str(outcome).startswith(str(table))
    else:
        assert len(outcome) == len(set(outcome.keys)) > 0
        assert all(key.strip() for key in outcome.keys)
        assert len(outcome.digest) == 64


def read_or_refuse(table: Path) -> PairSource | ManifestError:
    try:
        return open_pairs(table)
    except ManifestError as error:
        return error


# The characters that str.splitlines and universal newlines take for the end of a line are in on
# purpose.
TEXT = st.text(st.sampled_from("ab\"',\t\n\r\x85\u2028\u202e{}[]é漢 "), max_size=8)
ONE_LINE = st.text(st.sampled_from("ab\"',\t\r\x85\u2028\u202e{}[]é漢 "), max_size=8)


@st.composite
def sources(draw: st.DrawFn) -> tuple[PairSource, str]:
    """A source, and the ending of a table that can hold it: a TSV has no line breaks in cells."""
    suffix = draw(st.sampled_from([".tsv", ".csv", ".jsonl"]))
    texts = ONE_LINE if suffix == ".tsv" else TEXT
    filled = texts.filter(str.strip)
    pairs = []
    for key in draw(st.lists(filled, min_size=1, max_size=5, unique=True)):
        captions = draw(st.lists(st.tuples(filled, texts), min_size=1, max_size=3))
        pair = Pair(
            key=key,
            captions=tuple(caption for caption, _ in captions),
            languages=tuple(language for _, language in captions),
            split=draw(texts),
            label=draw(texts),
        )
        pairs.append(pair)
    return PairSource(tuple(pairs)), suffix


@settings(
    max_examples=90,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(drawn=sources())
def test_what_is_written_with_proper_quoting_is_read_back(
    tmp_path: Path,
    drawn: tuple[PairSource, str],
) -> None:
    source, suffix = drawn
    columns = ("image", "caption", "lang", "split", "label")
    rows = [
        dict(zip(columns, (pair.key, caption, language, pair.split, pair.label), strict=True))
        for pair in source
        for caption, language in zip(pair.captions, pair.languages, strict=True)
    ]
    path = tmp_path / f"round{suffix}"
    with path.open("w", encoding="utf-8", newline="") as file:
        if suffix == ".jsonl":
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        else:
            writer = csv.DictWriter(
                file,
                columns,
                dialect="excel-tab" if suffix == ".tsv" else "excel",
            )
            writer.writeheader()
            writer.writerows(rows)
    read = open_pairs(path)
    assert read == source
    assert read.digest == source.digest


def test_labeled_texts_need_no_images_unless_they_are_asked_for(tmp_path: Path) -> None:
    table = tmp_path / "texts.tsv"
    table.write_text("text\tlabel\na red fox\tanimal\n\na red fox\tanimal\n", encoding="utf-8")
    source = open_pairs(table, OpenSpec(require=("caption", "label")))
    assert source.keys == ["2", "4"]
    assert [pair.captions for pair in source] == [("a red fox",)] * 2
    for require in (("caption",), ("image", "caption", "label"), ()):
        with pytest.raises(ManifestError, match="no column 'image'"):
            open_pairs(table, OpenSpec(require=require))
    table.write_text("image\ttext\tlabel\na.png\tx\tfox\na.png\ty\tfox\n", encoding="utf-8")
    (pair,) = open_pairs(table, OpenSpec(require=("caption", "label")))
    assert (pair.key, pair.captions) == ("a.png", ("x", "y"))
