"""`open_pairs`: every kind of source gives its pairs, every kind of bad input one clear line, and
all give the same features."""

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from inputs import (
    CAPTIONS,
    LABELS,
    NAMES,
    SPLITS,
    image_bytes,
    samples,
    struct_type,
    structs,
    write_images,
    write_parquet,
    write_table,
    write_tar,
)

from apecache.data.pairs import Pair
from apecache.data.sources import open_pairs
from apecache.data.spec import OpenSpec
from apecache.encoders.spec import parse_encoder
from apecache.errors import ManifestError, OptionError, RowError
from apecache.extraction.run import ExtractSpec, extract
from apecache.store.reader import FeatureStore

KEYS = tuple(name.removesuffix(".png") for name in NAMES)


def save_dataset(
    folder: Path,
    columns: dict[str, Any],
    label_names: list[str] | None = None,
) -> str:
    datasets = pytest.importorskip("datasets")
    features = {name: datasets.Value("string") for name in columns}
    features["image"] = datasets.Image()
    if label_names:
        features["label"] = datasets.ClassLabel(names=label_names)
    datasets.Dataset.from_dict(columns, features=datasets.Features(features)).save_to_disk(
        folder / "saved"
    )
    return f"hf-datasets:{folder / 'saved'}"


def tables(folder: Path, name: str, header: tuple[str, str] = ("image", "caption")) -> str:
    write_images(folder)
    return str(write_table(folder / name, header, list(zip(NAMES, CAPTIONS, strict=True))))


def jsonl(folder: Path, name: str) -> str:
    write_images(folder)
    rows = zip(NAMES, CAPTIONS, strict=True)
    (folder / name).write_text(
        "".join(json.dumps({"file_name": n, "text": [c]}) + "\n" for n, c in rows)
    )
    return str(folder / name)


def coco(folder: Path) -> str:
    write_images(folder)
    images = [{"id": 10 + row, "file_name": name} for row, name in enumerate(NAMES)]
    annotations = [
        {"id": row, "image_id": 10 + row, "caption": caption}
        for row, caption in enumerate(CAPTIONS)
    ]
    (folder / "captions_val.json").write_text(
        json.dumps({"images": images, "annotations": annotations})
    )
    return str(folder / "captions_val.json")


def karpathy(folder: Path) -> str:
    write_images(folder)
    images = [
        {"filename": name, "split": split, "sentences": [{"raw": caption, "tokens": []}]}
        for name, split, caption in zip(NAMES, SPLITS, CAPTIONS, strict=True)
    ]
    (folder / "dataset_flickr8k.json").write_text(
        json.dumps({"images": images, "dataset": "flickr8k"})
    )
    return str(folder / "dataset_flickr8k.json")


def two_tars(folder: Path) -> str:
    write_tar(folder / "00008.tar", samples(range(3)))
    write_tar(folder / "00009.tar", samples(range(3, 5)))
    return str(folder / "{00008..00009}.tar")


def parquet(folder: Path, **columns: Any) -> str:
    pytest.importorskip("pyarrow")
    types = {} if isinstance(columns["image"][0], str) else {"image": struct_type()}
    return str(write_parquet(folder / "t.parquet", columns, 2, **types))


def imagefolder(folder: Path, name: str) -> str:
    write_images(folder)
    if name.endswith(".parquet"):
        pytest.importorskip("pyarrow")
        write_parquet(folder / name, {"file_name": NAMES, "text": CAPTIONS})
    elif name.endswith(".csv"):
        tables(folder, name, ("file_name", "text"))
    else:
        jsonl(folder, name)
    return str(folder)


def text_file(folder: Path) -> str:
    (folder / "captions.txt").write_text("\n".join(CAPTIONS) + "\n")
    return str(folder / "captions.txt")


def plain(keys: tuple[str, ...] = NAMES, captions: bool = True, **fields: Any) -> list[Pair]:
    texts = [(caption,) for caption in CAPTIONS] if captions else [()] * 5
    return [
        Pair(
            key=key,
            captions=own,
            languages=("",) * len(own),
            **{name: values[row] for name, values in fields.items()},
        )
        for row, (key, own) in enumerate(zip(keys, texts, strict=True))
    ]


IN_FOLDERS = tuple(
    f"{split}/{label}/{name}" for split, label, name in zip(SPLITS, LABELS, NAMES, strict=True)
)
BY_FOLDER = sorted(
    plain(IN_FOLDERS, captions=False, split=SPLITS, label=LABELS),
    key=lambda pair: pair.key,
)
NUMBERS = ("1", "2", "3", "4", "5")

KINDS: dict[str, tuple[Callable[[Path], str], list[Pair]]] = {
    "csv": (lambda f: tables(f, "t.csv"), plain()),
    "tsv, guessed": (lambda f: tables(f, "t.tsv", ("filepath", "title")), plain()),
    "jsonl": (lambda f: jsonl(f, "t.jsonl"), plain()),
    "parquet of paths": (
        lambda f: parquet(write_images(f), image=NAMES, caption=CAPTIONS),
        plain(),
    ),
    "parquet of structs": (
        lambda f: parquet(f, image=structs(), captions=[[c] for c in CAPTIONS]),
        plain(),
    ),
    "parquet without paths": (
        lambda f: parquet(f, image=structs([None] * 5), caption=CAPTIONS, split=SPLITS),
        plain(("0", "1", "2", "3", "4"), split=SPLITS),
    ),
    "imagefolder csv": (lambda f: imagefolder(f, "metadata.csv"), plain()),
    "imagefolder jsonl": (lambda f: imagefolder(f, "metadata.jsonl"), plain()),
    "imagefolder parquet": (lambda f: imagefolder(f, "metadata.parquet"), plain()),
    "flat folder": (lambda f: str(write_images(f)), plain(captions=False)),
    "split and class folders": (lambda f: str(write_images(f, IN_FOLDERS)), BY_FOLDER),
    "karpathy": (karpathy, plain(split=SPLITS)),
    "coco": (coco, plain()),
    "tar": (lambda f: str(write_tar(f / "x.tar", samples())), plain(KEYS, label=["7"] * 5)),
    "brace range of tars": (two_tars, plain(KEYS, label=["7"] * 5)),
    "folder of tars": (lambda f: str(Path(two_tars(f)).parent), plain(KEYS, label=["7"] * 5)),
    "hugging face": (
        lambda f: save_dataset(
            f,
            {"image": structs(), "text": CAPTIONS, "label": [int(n == "warm") for n in LABELS]},
            ["cold", "warm"],
        ),
        plain(label=LABELS),
    ),
    "captions alone": (text_file, plain(NUMBERS)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_gives_its_pairs_and_its_images(kind: str, tmp_path: Path) -> None:
    make, expected = KINDS[kind]
    uri = make(tmp_path)
    source = open_pairs(uri)
    assert list(source) == expected
    assert source.origin == uri
    assert open_pairs(uri).digest == source.digest
    if kind != "captions alone":
        rows = [IN_FOLDERS.index(key) for key in source.keys] if "folders" in kind else range(5)
        assert [source.media.read(key) for key in source.keys] == [image_bytes(row) for row in rows]


@pytest.mark.usefixtures("no_fsync", "load_once")
@pytest.mark.parametrize(
    "kind",
    [kind for kind in KINDS if kind not in ("captions alone", "split and class folders")],
)
def test_the_same_images_have_bit_equal_features_wherever_they_come_from(
    kind: str,
    tmp_path: Path,
    tiny_image_encoder: Path,
    reference: tuple[Any, list[str]],
    no_fsync: None,
    load_once: None,
) -> None:
    features, content = features_of(
        KINDS[kind][0](tmp_path),
        tmp_path / "store",
        tiny_image_encoder,
    )
    assert np.array_equal(features, reference[0])
    assert content == reference[1]


@pytest.fixture(scope="module")
def reference(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_image_encoder: Path,
) -> tuple[Any, list[str]]:
    folder = tmp_path_factory.mktemp("reference")
    return features_of(tables(folder, "t.csv"), folder / "store", tiny_image_encoder)


def features_of(uri: str, store: Path, encoder: Path) -> tuple[Any, list[str]]:
    spec = ExtractSpec(
        parse_encoder(f"timm:{encoder}", "image"),
        image_batch=2,
        shard_rows=3,
        device="cpu",
    )
    extract(open_pairs(uri), store, spec)
    (array,) = FeatureStore.open(store).arrays()
    assert array.n_quarantined == 0
    return array.load(), array.content()


# --- what cannot be opened ------------------------------------------------------------------------


def write(name: str, content: bytes | str) -> Callable[[Path], str]:
    def make(folder: Path) -> str:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(folder / name)

    return make


def cut_tar(keep: Callable[[int], int], *, flip: int | None = None) -> Callable[[Path], str]:
    def make(folder: Path) -> str:
        tar = write_tar(folder / "x.tar", samples())
        data = bytearray(tar.read_bytes())
        if flip is not None:
            data[flip] ^= 0xFF
        tar.write_bytes(data[: keep(len(data))])
        return str(tar)

    return make


def cut_parquet(folder: Path) -> str:
    table = Path(parquet(folder, image=structs(), caption=CAPTIONS))
    table.write_bytes(table.read_bytes()[:-100])
    return str(table)


def in_folder(*names: str, content: bytes = b"x") -> Callable[[Path], str]:
    def make(folder: Path) -> str:
        for name in names:
            write(name, content)(folder)
        return str(folder)

    return make


def as_json(content: Any) -> Callable[[Path], str]:
    return write("x.json", json.dumps(content))


PHOTO = {"filename": "a.png", "split": "train", "sentences": [{"raw": "x"}]}
BAD: dict[str, tuple[Callable[[Path], str], list[str]]] = {
    "missing": (
        lambda f: tables(f, "pairs.csv").replace("pairs", "pair"),
        ["no such file; did you mean pairs.csv?"],
    ),
    "missing folder": (lambda f: str(f / "nowhere"), ["nowhere: no such file"]),
    "missing tar of a range": (
        lambda f: two_tars(f).replace("9}", "10}"),
        ["00010.tar: no such file"],
    ),
    "empty": (write("t.csv", b""), ["the file is empty"]),
    "empty JSON": (write("t.json", b""), ["line 1: no JSON"]),
    "empty tar": (write("t.tar", b""), ["damaged or cut", "no member can be read"]),
    "empty text": (write("t.txt", b"\n \n"), ["no captions"]),
    "empty folder": (in_folder("notes.md"), ["no images", "give the table itself"]),
    "header only": (write("t.csv", "image,caption\n"), ["a header but no rows"]),
    "columns only, Parquet": (
        lambda f: str(write_parquet(f / "t.parquet", {"image": []}, image=text())),
        ["no rows"],
    ),
    "missing column": (
        write("t.csv", "imag,caption\na,b\n"),
        ["columns found: imag, caption", "did you mean imag?"],
    ),
    "missing column, Parquet": (
        lambda f: str(write_parquet(f / "t.parquet", {"imag": ["a"]})),
        ["no column 'image'; columns found: imag; did you mean imag?", "--image-column"],
    ),
    "ambiguous columns": (
        write("t.csv", "path,filename\na,b\n"),
        ["'path' and 'filename'", "--image-column"],
    ),
    "ambiguous captions": (
        write("t.csv", "image,title,text\na,b,c\n"),
        ["'title' and 'text'", "--caption-column"],
    ),
    "duplicate key, Karpathy": (as_json({"images": [PHOTO, PHOTO]}), ["'a.png' is named twice"]),
    "duplicate id, COCO": (
        as_json(
            {
                "images": [{"id": 1, "file_name": "a"}] * 2,
                "annotations": [{"image_id": 1, "caption": "x"}],
            }
        ),
        ["two images have the same id"],
    ),
    "duplicate member": (
        lambda f: str(write_tar(f / "x.tar", {"a.png": image_bytes(0), "./a.png": image_bytes(1)})),
        ["a.png is there twice"],
    ),
    "one image in two splits": (
        write("t.csv", "image,split\na,train\na,val\n"),
        ["line 3", "one split per image"],
    ),
    "not UTF-8": (
        write("t.csv", b"image,caption\na,\xff\n"),
        ["line 2, byte 3", "save the file as UTF-8"],
    ),
    "not UTF-8, JSON": (
        write("t.json", b'{"images": "\xff"}'),
        ["line 1, byte 13", "save the file as UTF-8"],
    ),
    "not UTF-8, text": (write("t.txt", b"a\n\xff\n"), ["line 2, byte 1", "save the file as UTF-8"]),
    "not UTF-8, tar": (
        lambda f: str(write_tar(f / "x.tar", {"a.png": b"x", "a.txt": b"\xff"})),
        ["a.txt: not UTF-8"],
    ),
    "ragged row": (
        write("t.csv", "image,caption\na,b\nc\n"),
        ["line 3: 1 column, the header has 2"],
    ),
    "truncated Parquet": (
        cut_parquet,
        ["no Parquet table that can be read", "write or copy it again"],
    ),
    "truncated tar": (
        cut_tar(lambda size: 5000),
        ["x.tar", "damaged or cut", "5 members can be read, the last"],
    ),
    "tar cut inside an image": (
        cut_tar(lambda size: 600),
        ["it ends inside a.png", "no member can be read"],
    ),
    "tar cut between members": (
        cut_tar(lambda size: 1024 + 512),
        ["damaged or cut", "can be read"],
    ),
    "tar without its end": (
        lambda f: without_end(f),
        ["its end is missing", "15 members can be read"],
    ),
    "tar with a damaged header": (
        lambda f: damaged_header(f),
        ["no header at byte", "1 member can be read"],
    ),
    "compressed tar": (write("x.tar", b"\x1f\x8b" + bytes(600)), ["a compressed tar", "unpack it"]),
    "tar without images": (
        lambda f: str(write_tar(f / "x.tar", {"a.txt": b"x"})),
        ["no images in 1 tar"],
    ),
    "sample with broken JSON": (
        lambda f: str(write_tar(f / "x.tar", {"a.png": b"x", "a.json": b"{"})),
        ["x.tar: a: its .json cannot be read"],
    ),
    "JSON of neither kind": (
        as_json({"info": {}, "images": []}),
        ["with 'info', 'images'", "expected Karpathy's"],
    ),
    "JSON list": (
        as_json(["a"]),
        ["a list; expected Karpathy's", "or a list of objects"],
    ),
    "COCO instances": (
        as_json(
            {"images": [{"id": 1, "file_name": "a"}], "annotations": [{"image_id": 1, "bbox": []}]}
        ),
        ["of neither kind"],
    ),
    "Karpathy without a split": (
        as_json({"images": [{"filename": "a", "sentences": []}]}),
        ["images[0]: split is nothing; expected str"],
    ),
    "deep JSON": (write("t.json", b"[" * 100_000), ["no JSON that can be read"]),
    "class tree without images": (in_folder("cat/a.txt", "dog/b.txt"), ["no images"]),
    "images at two depths": (
        in_folder("a.png", "cat/b.png"),
        ["both in it (a.png) and in folders below"],
    ),
    "images and tars": (in_folder("a.png", "b.tar"), ["both images (a.png) and tars (b.tar)"]),
    "a table beside its images": (
        in_folder("images/a.png", "captions.tsv"),
        ["captions.tsv) beside them; give"],
    ),
    "two metadata tables": (in_folder("metadata.csv", "metadata.jsonl"), ["take one away"]),
    "metadata at two depths": (
        in_folder("metadata.csv", "train/metadata.csv"),
        ["here and in train"],
    ),
    "saved data set as a folder": (in_folder("state.json"), ["open it as hf-datasets:"]),
    "unknown suffix": (write("t.parqet", b"x"), ["ends in .tsv", "did you mean .parquet"]),
    "standard input": (lambda f: "-", ["standard input cannot be read again"]),
    "URL": (lambda f: "https://example.org/t.csv", ["a URL, and nothing is downloaded"]),
    "URL as key": (write("t.csv", "image\na\ns3://bucket/b.png\n"), ["line 3", "is a URL"]),
    "no data set": (
        lambda f: f"hf-datasets:{f / 'nowhere'}",
        ["cannot be opened", "expected hf-datasets:/folder"],
    ),
    "no name": (lambda f: "hf-datasets:", ["no name"]),
    "backward range": (lambda f: str(f / "{00009..00001}.tar"), ["0 files; expected 1 to"]),
    "endless range": (
        lambda f: str(f / "{0..999999999}.tar"),
        ["1,000,000,000 files; expected 1 to"],
    ),
}


def text() -> Any:
    return pytest.importorskip("pyarrow").string()


def without_end(folder: Path) -> str:
    tar = write_tar(folder / "x.tar", samples())
    tar.write_bytes(
        tar.read_bytes()
        .rstrip(b"\0")
        .ljust(-(-len(tar.read_bytes().rstrip(b"\0")) // 512) * 512, b"\0")
    )
    return str(tar)


def damaged_header(folder: Path) -> str:
    tar = write_tar(folder / "x.tar", samples())
    data = bytearray(tar.read_bytes())
    data[data.index(b"a.txt") + 150] ^= 0xFF
    tar.write_bytes(data)
    return str(tar)


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_that_says_what_mends_it(case: str, tmp_path: Path) -> None:
    make, parts = BAD[case]
    if "Parquet" in case:
        pytest.importorskip("pyarrow")
    if "data set" in case or case == "no name":
        pytest.importorskip("datasets")
    uri = make(tmp_path)
    with pytest.raises(ManifestError) as caught:
        open_pairs(uri)
    message = str(caught.value)
    assert [part for part in parts if part not in message] == [], message
    assert "\n" not in message
    assert caught.value.exit_code == 3
    assert Path(uri).name in message or "{" in uri or uri == "-"


@pytest.mark.parametrize(
    ("kind", "option"),
    [
        ("tar", {"root": Path()}),
        ("tar", {"image_column": "a"}),
        ("parquet of structs", {"root": Path()}),
        ("flat folder", {"image_column": "a"}),
        ("imagefolder csv", {"root": Path()}),
        ("coco", {"caption_column": "a"}),
        ("captions alone", {"root": Path()}),
        ("hugging face", {"root": Path()}),
    ],
)
def test_an_option_that_a_source_cannot_follow_is_refused(
    kind: str,
    option: dict[str, Any],
    tmp_path: Path,
) -> None:
    with pytest.raises(
        OptionError,
        match=r"--\S+ says nothing about this kind of source",
    ) as caught:
        open_pairs(KINDS[kind][0](tmp_path), OpenSpec(**option))
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("kind", "role", "there"),
    [
        ("flat folder", "caption", "images"),
        ("captions alone", "image", "captions"),
        ("coco", "label", "images, captions"),
        ("tar", None, ""),
    ],
)
def test_what_a_source_must_have_is_checked(
    kind: str,
    role: Any,
    there: str,
    tmp_path: Path,
) -> None:
    uri = KINDS[kind][0](tmp_path)
    if role is None:
        assert open_pairs(uri, OpenSpec(require=("image", "caption", "label")))
        return
    with pytest.raises(ManifestError, match=f"has no {role}s, only {there};"):
        open_pairs(uri, OpenSpec(require=(role,)))


def test_columns_can_be_named(tmp_path: Path) -> None:
    table = tmp_path / "t.csv"
    table.write_text("id,path,filename,title,text,fold\n1,a,b,c,d,val\n")
    spec = OpenSpec(image_column="filename", caption_column="text", split_column="fold")
    assert list(open_pairs(table, spec)) == [
        Pair(key="b", captions=("d",), languages=("",), split="val")
    ]
    with pytest.raises(ManifestError, match=r"no column 'fil'; columns found: id, path, filename"):
        open_pairs(table, OpenSpec(image_column="fil"))


def test_images_may_lie_in_another_folder_than_the_table(tmp_path: Path) -> None:
    (tmp_path / "tables").mkdir()
    write_images(tmp_path / "images")
    table = write_table(tmp_path / "tables" / "t.csv", ["image"], [[name] for name in NAMES])
    media = open_pairs(table, OpenSpec(root=tmp_path / "images")).media
    assert media.read("a.png") == image_bytes(0)
    assert not open_pairs(table).media.exists("a.png")


@pytest.mark.parametrize(
    ("kind", "encoder"),
    [("captions alone", "image"), ("flat folder", "text")],
)
def test_extraction_refuses_what_the_source_cannot_give(
    kind: str,
    encoder: str,
    tmp_path: Path,
    tiny_image_encoder: Path,
    tiny_text_encoder: Path,
) -> None:
    names = {"image": f"timm:{tiny_image_encoder}", "text": f"hf:{tiny_text_encoder}"}
    spec = ExtractSpec(**{encoder: parse_encoder(names[encoder], encoder)}, device="cpu")  # type: ignore[arg-type]
    what = "images" if encoder == "image" else "captions"
    with pytest.raises(ManifestError, match=f"has no {what} to encode; leave --{encoder} out"):
        extract(open_pairs(KINDS[kind][0](tmp_path)), tmp_path / "store", spec)
    assert not (tmp_path / "store").exists()


def test_captions_alone_fill_a_store_of_texts(tmp_path: Path, tiny_text_encoder: Path) -> None:
    source = open_pairs(text_file(tmp_path))
    extract(
        source,
        tmp_path / "store",
        ExtractSpec(text=parse_encoder(f"hf:{tiny_text_encoder}", "text"), device="cpu"),
    )
    store = FeatureStore.open(tmp_path / "store")
    assert [str(caption) for caption in store.pairs.captions] == list(CAPTIONS)
    assert store.arrays()[0].load().shape == (5, 32)


# --- damaged files --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """A sound file of each kind, by name."""
    folder = tmp_path_factory.mktemp("whole")
    kinds = {"x.tar": "tar", "x.txt": "captions alone", "k.json": "karpathy", "c.json": "coco"}
    if has_pyarrow():
        kinds |= {"s.parquet": "parquet of structs", "p.parquet": "parquet of paths"}
    found = {}
    for name, kind in kinds.items():
        (folder / kind).mkdir()
        found[name] = Path(KINDS[kind][0](folder / kind)).read_bytes()
    return found


def has_pyarrow() -> bool:
    from importlib.util import find_spec

    return find_spec("pyarrow") is not None


EDITS = st.lists(
    st.tuples(
        st.floats(0, 0.999),
        st.sampled_from(["set", "cut", "insert"]),
        st.binary(min_size=1, max_size=40),
    ),
    min_size=1,
    max_size=5,
)


@settings(
    max_examples=300,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(number=st.integers(0, 5), edits=EDITS)
def test_a_damaged_file_gives_pairs_or_a_manifest_error_and_nothing_else(
    whole: dict[str, bytes],
    tmp_path: Path,
    number: int,
    edits: list[tuple[float, str, bytes]],
) -> None:
    name = list(whole)[number % len(whole)]
    data = bytearray(whole[name])
    for where, how, new in edits:
        at = int(where * len(data))
        data[at : at + {"set": len(new), "cut": 20 * len(new), "insert": 0}[how]] = (
            b"" if how == "cut" else new
        )
    (tmp_path / name).write_bytes(data)
    try:
        source = open_pairs(tmp_path / name)
    except ManifestError as error:
        assert "\n" not in str(error)  # noqa: PT017
        return
    for key in source.keys:
        with contextlib.suppress(RowError):
            assert source.media.read(key)
