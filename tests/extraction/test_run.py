"""Extraction: nothing is done twice, nothing stale is taken for new, a table may grow, bad rows do
no harm."""

import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import Grown, draw_shape, extract_tiny, loaded_once, make_shapes, tree

import apecache.encoders.fingerprint as fingerprint_module
import apecache.encoders.preprocess as pixels
import apecache.extraction.arrays as preparation
import apecache.extraction.run as extraction
import apecache.extraction.segments as segments
from apecache.data.sources import open_pairs
from apecache.encoders.spec import EncoderSpec, parse_encoder
from apecache.errors import BadRowsError, DataError, IncompleteError, MismatchError, OptionError
from apecache.extraction.run import ExtractionState, ExtractReport, ExtractSpec, extract
from apecache.fingerprint import Fingerprint, content_hash
from apecache.store.layout import STAMPS
from apecache.store.reader import FeatureStore
from apecache.store.verify import verify_store

pytestmark = pytest.mark.usefixtures("no_fsync")


@pytest.fixture
def again(tiny_image_encoder: Path, tiny_text_encoder: Path) -> Callable[..., ExtractReport]:
    """`again(table, store, **settings)`: extract with the tiny encoders."""

    def run(table: Path, store: Path, **settings: Any) -> ExtractReport:
        return extract_tiny(
            table,
            store=store,
            image=tiny_image_encoder,
            text=tiny_text_encoder,
            **settings,
        )

    return run


@pytest.fixture
def kept(tiny_store: Path, tmp_path: Path) -> Path:
    """A copy of the finished tiny store."""
    return Path(shutil.copytree(tiny_store, tmp_path / "store"))


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    a = a.astype(np.float64)
    b = b.astype(np.float64)
    return float(((a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)).min())


# No stale cache: every field of the identity


def edit_json(file: str, **values: Any) -> Callable[[Path], None]:
    """Set values in a JSON file of an encoder's folder; `a__b` is b inside a."""

    def edit(folder: Path) -> None:
        found = json.loads((folder / file).read_text())
        for path, value in values.items():
            *parents, last = path.split("__")
            inner = found
            for parent in parents:
                inner = inner[parent]
            inner[last] = value
        (folder / file).write_text(json.dumps(found))

    return edit


def one_weight(name: str) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        state = load_file(folder / "model.safetensors")
        state[name].view(-1)[0] = torch.nextafter(state[name].view(-1)[0], torch.tensor(torch.inf))
        save_file(state, folder / "model.safetensors", {"format": "pt"})

    return edit


def swap_words(folder: Path) -> None:
    saved = json.loads((folder / "tokenizer.json").read_text())
    words = saved["model"]["vocab"]
    words["circle"], words["square"] = words["square"], words["circle"]
    (folder / "tokenizer.json").write_text(json.dumps(saved))


VIT = "config.json"
BERT = "tokenizer_config.json"


@pytest.mark.parametrize(
    ("modality", "edit", "field"),
    [
        ("image", one_weight("blocks.1.mlp.fc2.bias"), "encoder.weights"),
        ("text", one_weight("embeddings.word_embeddings.weight"), "encoder.weights"),
        (
            "image",
            edit_json(VIT, model_args__num_heads=4),
            "encoder.architecture.arguments.num_heads",
        ),
        ("text", edit_json("config.json", hidden_act="relu"), "encoder.architecture.hidden_act"),
        (
            "image",
            edit_json(VIT, pretrained_cfg__mean=[0.5, 0.5, 0.4]),
            "encoder.inputs.config.mean",
        ),
        ("image", edit_json(VIT, pretrained_cfg__std=[0.5, 0.5, 0.4]), "encoder.inputs.config.std"),
        (
            "image",
            edit_json(VIT, pretrained_cfg__interpolation="bilinear"),
            "encoder.inputs.config.interpolation",
        ),
        ("image", edit_json(VIT, pretrained_cfg__crop_pct=0.9), "encoder.inputs.config.crop_pct"),
        ("text", swap_words, "encoder.inputs.tokenizer"),
        ("text", edit_json(BERT, model_max_length=12), "encoder.inputs.max_tokens"),
    ],
)
def test_a_changed_encoder_is_refused_by_field(
    kept: Path, shapes_once: Path, tmp_path: Path, request: pytest.FixtureRequest,
    modality: str, edit: Callable[[Path], None], field: str,
) -> None:  # fmt: skip
    """The folder has the same name: only what is in it tells."""
    original = request.getfixturevalue(f"tiny_{modality}_encoder")
    folder = Path(shutil.copytree(original, tmp_path / "changed" / original.name))
    edit(folder)
    library = "timm" if modality == "image" else "hf"
    spec: Any = {modality: parse_encoder(f"{library}:{folder}", modality)}  # type: ignore[arg-type]
    refused(kept, table=shapes_once, spec=ExtractSpec(**spec, device="cpu"), field=field)


@pytest.mark.parametrize(
    ("modality", "changed", "field"),
    [
        ("image", {"revision": "main"}, "encoder.revision"),
        ("text", {"revision": "main"}, "encoder.revision"),
        ("image", {"pooling": "mean"}, "encoder.inputs.pooling"),
        ("text", {"pooling": "cls"}, "encoder.inputs.pooling"),
        ("image", {"resolution": 48}, "encoder.inputs.config.input_size"),
        ("text", {"max_tokens": 8}, "encoder.inputs.max_tokens"),
        ("image", {"dtype": "bfloat16"}, "encoder.compute_dtype"),
        ("text", {"dtype": "bfloat16"}, "encoder.compute_dtype"),
        ("image", {"image_batch": 8}, "storage.batch_size"),
        ("text", {"text_batch": 8}, "storage.batch_size"),
        ("image", {"storage_dtype": "float32"}, "storage.dtype"),
    ],
)
def test_a_changed_setting_is_refused_by_field(
    kept: Path, shapes_once: Path, tiny_image_encoder: Path, tiny_text_encoder: Path,
    modality: str, changed: dict[str, Any], field: str,
) -> None:  # fmt: skip
    name = f"timm:{tiny_image_encoder}" if modality == "image" else f"hf:{tiny_text_encoder}"
    encoder = {
        key: changed.pop(key) for key in list(changed) if key in EncoderSpec.__dataclass_fields__
    }
    spec: Any = {modality: replace(parse_encoder(name, modality), **encoder), **changed}  # type: ignore[arg-type]
    refused(kept, table=shapes_once, spec=ExtractSpec(device="cpu", **spec), field=field)


@pytest.mark.parametrize(
    ("module", "name", "value", "field"),
    [
        (fingerprint_module, "FEATURE_CODE_VERSION", 2, "encoder.feature_code"),
        (pixels, "IMAGE_DECODING", "as it comes", "encoder.inputs.decoding"),
    ],
)
def test_changed_code_of_ours_is_refused_by_field(
    kept: Path, shapes_once: Path, tiny_image_encoder: Path, monkeypatch: pytest.MonkeyPatch,
    module: Any, name: str, value: Any, field: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(module, name, value)
    spec = ExtractSpec(parse_encoder(f"timm:{tiny_image_encoder}", "image"), device="cpu")
    refused(kept, table=shapes_once, spec=spec, field=field)


@pytest.mark.parametrize(
    ("field", "value"),
    [("modality", "text"), ("library", "hf"), ("compile", "inductor")],
)
def test_any_other_field_of_the_identity_is_compared_too(
    kept: Path,
    shapes_once: Path,
    tiny_image_encoder: Path,
    monkeypatch: pytest.MonkeyPatch,
    field: str,
    value: str,
) -> None:
    spec = ExtractSpec(parse_encoder(f"timm:{tiny_image_encoder}", "image"), device="cpu")
    encoder = loaded_once("image")(spec.images, "cpu")[0]
    other = replace(
        encoder,
        fingerprint=Fingerprint(fields={**encoder.fingerprint.fields, field: value}),
    )
    monkeypatch.setattr(extraction, "load_image_encoders", lambda *_: [other])
    refused(kept, table=shapes_once, spec=spec, field=f"encoder.{field}")


def refused(store: Path, table: Path, spec: ExtractSpec, field: str) -> None:
    """With exit code 4, naming the field, before anything is written."""
    before = tree(store)
    with pytest.raises(MismatchError, match=re.escape(field)) as caught:
        extract(open_pairs(table), store, spec)
    assert caught.value.exit_code == 4
    found = {path: (here, there) for path, here, there in caught.value.differences}
    assert field in {path.split(".0")[0] for path in found}
    assert all(here != there for here, there in found.values())
    assert tree(store) == before


def rows_of(text: str) -> list[str]:
    return text.splitlines()


@pytest.mark.parametrize(
    ("change", "n_texts"),
    [
        (lambda t: t.replace("red-square-0", "red-SQUARE-0"), 0),
        (lambda t: t.replace("a blue circle", "a blue disc"), 1),
        (lambda t: t.replace("\tval\t", "\ttest\t"), 0),
        (lambda t: t.replace("\tcircle\t", "\tdisc\t"), 0),
        (lambda t: t.replace("\ten\n", "\tde\n"), 0),
        (lambda t: "\n".join([rows_of(t)[0], *rows_of(t)[:0:-1], ""]), 0),
        (lambda t: "\n".join([*rows_of(t)[:2], *rows_of(t)[3:], ""]), 0),
        (lambda t: "\n".join([*rows_of(t)[:-2], ""]), 0),
    ],
    ids=["key", "caption", "split", "label", "language", "order", "fewer captions", "fewer images"],
)
def test_a_changed_table_is_a_new_view_and_the_old_one_stays(
    kept: Path, shapes: Path, again: Callable[..., ExtractReport], load_once: None,
    change: Callable[[str], str], n_texts: int,
) -> None:  # fmt: skip
    before = tree(kept)
    old = FeatureStore.open(kept)
    old_features = old.array("text").load()
    shapes.write_text(change(shapes.read_text()))
    shutil.copy2(
        shapes.parent / "images" / "red-square-0.png",
        shapes.parent / "images" / "red-SQUARE-0.png",
    )
    report = again(shapes, kept)
    assert [array.n_encoded for array in report.arrays] == [0, n_texts]
    source = open_pairs(shapes)
    new = FeatureStore.open(kept)
    assert new.pairs.keys.tolist() == source.keys
    assert new.pairs.captions.tolist() == source.captions
    assert new.pairs.image_rows.tolist() == source.image_rows
    assert new.digest != old.digest
    features = dict(zip(old.pairs.captions, old_features, strict=True))
    for caption, row in zip(new.pairs.captions, new.array("text").load(), strict=True):
        assert np.array_equal(features.get(caption, row), row)
    first = FeatureStore.open(kept, "0000")
    assert first.digest == old.digest
    assert first.array("text").load().tobytes() == old_features.tobytes()
    unchanged = before.keys() - {STAMPS}
    assert {name: tree(kept)[name] for name in unchanged} == {n: before[n] for n in unchanged}
    assert again(shapes, kept).nothing_to_do


# What is no part of the identity


def without_stamps(store: Path) -> dict[str, bytes]:
    """All files but the cache of sizes and times."""
    return {name: data for name, data in tree(store).items() if name != STAMPS}


def moved_table(kept: Path, shapes: Path, **_: Any) -> dict[str, Any]:
    return {
        "table": Path(shutil.move(shapes.parent, shapes.parent.with_name("elsewhere")))
        / "pairs.tsv"
    }


def moved_encoders(kept: Path, shapes: Path, image: Path, text: Path) -> dict[str, Any]:
    there = shapes.parent.parent / "there"
    return {
        "image": shutil.copytree(image, there / image.name),
        "text": shutil.copytree(text, there / text.name),
    }


def renamed_encoder(kept: Path, shapes: Path, image: Path, text: Path) -> dict[str, Any]:
    return {"image": shutil.copytree(image, shapes.parent.parent / "a-new-name")}


def touched(kept: Path, shapes: Path, image: Path, text: Path) -> dict[str, Any]:
    for path in (shapes, *shapes.parent.rglob("*.png")):
        os.utime(path, (1, 1))
    return {}


@pytest.mark.parametrize(
    "change",
    [
        lambda **_: {},
        moved_table,
        moved_encoders,
        renamed_encoder,
        touched,
        lambda **_: {"workers": 7},
        lambda **_: {"device": "auto"},
        lambda **_: {"max_bad": 0.5},
        lambda **_: {"shard_rows": 3},
        lambda **_: {"image_batch": None, "text_batch": None},
        lambda **_: {"add": True},
        lambda **_: {"recheck": True},
    ],
    ids=["nothing", "the table's folder", "the encoders' folder", "an encoder's name", "mtimes", "workers", "device",
         "max_bad", "shard_rows", "batch left open", "add", "recheck"],
)  # fmt: skip
def test_what_makes_no_other_features_keeps_the_store(
    kept: Path, shapes: Path, tiny_image_encoder: Path, tiny_text_encoder: Path, load_once: None,
    change: Callable[..., dict[str, Any]],
) -> None:  # fmt: skip
    before = without_stamps(kept)
    encoders: dict[str, Any] = {"image": tiny_image_encoder, "text": tiny_text_encoder}
    settings = {"table": shapes, **encoders, **change(kept=kept, shapes=shapes, **encoders)}
    report = extract_tiny(store=kept, **settings)
    assert report.nothing_to_do
    assert [array.n_encoded for array in report.arrays] == [0, 0]
    assert without_stamps(kept) == before


def test_library_versions_and_the_working_folder_are_no_identity(
    kept: Path,
    shapes: Path,
    again: Callable[..., ExtractReport],
    load_once: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(preparation, "version", lambda name: "99.0")
    monkeypatch.setattr(segments, "version", lambda name: "99.0")
    monkeypatch.chdir(shapes.parent)
    before = without_stamps(kept)
    assert again(Path("pairs.tsv"), kept).nothing_to_do
    assert without_stamps(kept) == before


# Another encoder beside


def test_add_keeps_both_encoders_and_touches_nothing_of_the_first(
    kept: Path,
    shapes: Path,
    tiny_image_encoder: Path,
    other_text_encoder: Path,
    load_once: None,
) -> None:
    before = without_stamps(kept)
    report = extract_tiny(
        shapes,
        store=kept,
        image=tiny_image_encoder,
        text=other_text_encoder,
        add=True,
    )
    assert [array.n_encoded for array in report.arrays] == [0, 24]
    assert [array.name for array in FeatureStore.open(kept).arrays("text")] == [
        "other-bert",
        "tiny-bert",
    ]
    assert before.items() <= tree(kept).items()
    assert extract_tiny(
        shapes,
        store=kept,
        image=tiny_image_encoder,
        text=other_text_encoder,
    ).nothing_to_do


def test_nothing_to_encode_is_refused(shapes: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="--image"):
        extract(open_pairs(shapes), tmp_path / "store", ExtractSpec())


# Growing


def table_of(shapes: Path, n_images: int) -> Path:
    """The first images of a table, in a table of its own beside it."""
    part = shapes.with_name(f"first-{n_images}.tsv")
    part.write_text("\n".join(shapes.read_text().splitlines()[: 1 + 2 * n_images]) + "\n")
    return part


@pytest.fixture(scope="module")
def long_table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 images and 48 captions, all different."""
    table = make_shapes(tmp_path_factory.mktemp("long") / "shapes", copies=2)
    lines = table.read_text().splitlines()
    for row, line in enumerate(lines):
        if "-1.png" in line:
            lines[row] = line.replace("\ta ", "\tone ").replace("\tthe ", "\tthis ")
    table.write_text("\n".join(lines) + "\n")
    return table


@pytest.fixture(scope="module")
def in_one_go(
    tmp_path_factory: pytest.TempPathFactory,
    long_table: Path,
    tiny_image_encoder: Path,
    tiny_text_encoder: Path,
) -> FeatureStore:
    store = tmp_path_factory.mktemp("one-go") / "store"
    extract_tiny(long_table, store=store, image=tiny_image_encoder, text=tiny_text_encoder)
    return FeatureStore.open(store)


@pytest.mark.parametrize(
    ("first", "bit_equal"),
    [(10, True), (5, True), (17, False)],
    ids=["shards coincide", "one shard", "they do not"],
)
def test_an_appended_store_equals_one_made_in_one_go(
    tmp_path: Path, long_table: Path, in_one_go: FeatureStore, again: Callable[..., ExtractReport], load_once: None,
    first: int, bit_equal: bool,
) -> None:  # fmt: skip
    """Bit by bit where the same rows share a batch, at the same place in it. Elsewhere a kernel may
    round otherwise, by the processor."""
    store = tmp_path / "store"
    again(table_of(long_table, first), store)
    before = tree(store)
    report = again(long_table, store)
    assert [array.n_encoded for array in report.arrays] == [24 - first, 48 - 2 * first]
    assert [array.rows for array in report.arrays] == [24, 48]
    before.pop(STAMPS)
    assert before.items() <= tree(store).items()
    new = tree(store).keys() - before.keys() - {"records/segments/0001.json", STAMPS}
    assert all(name.startswith(("segments/0001/", "views/", "records/views/")) for name in new)
    opened = FeatureStore.open(store)
    for column in ("keys", "splits", "labels", "captions", "languages", "image_rows"):
        assert getattr(opened.pairs, column).tolist() == getattr(in_one_go.pairs, column).tolist()
    assert opened.pairs.split_counts() == in_one_go.pairs.split_counts()
    for modality in ("image", "text"):
        array = opened.array(modality)
        whole = in_one_go.array(modality)
        assert (array.rows, array.complete, array.share_done) == (whole.rows, True, 1.0)
        assert array.content() == whole.content()
        if bit_equal:
            assert array.load().tobytes() == whole.load().tobytes()
        assert cosine(array.load(), whole.load()) >= 0.99999
    assert again(long_table, store).nothing_to_do
    assert verify_store(store).problems == ()


def test_a_store_grows_more_than_once(
    tmp_path: Path,
    long_table: Path,
    in_one_go: FeatureStore,
    again: Callable[..., ExtractReport],
    load_once: None,
) -> None:
    for count in (5, 10, 15, 24):
        again(table_of(long_table, count), tmp_path / "store")
    opened = FeatureStore.open(tmp_path / "store")
    assert [segment.path.name for segment in opened.segments] == ["0001", "0002", "0003"]
    assert opened.array("image").load().tobytes() == in_one_go.array("image").load().tobytes()
    assert opened.array("text").load().tobytes() == in_one_go.array("text").load().tobytes()
    assert opened.pairs.image_rows.tolist() == in_one_go.pairs.image_rows.tolist()


def test_unreadable_rows_and_contents_are_counted_through_all_segments(grown_once: Grown) -> None:
    store = FeatureStore.open(grown_once.store)
    image = store.array("image")
    text = store.array("text")
    found = [(row["row"], row["key"], row["reason"]) for row in image.quarantined()]
    assert found == [
        (4, "images/green-square-0.png", "not-an-image"),
        (13, "images/red-square-1.png", "missing"),
    ]
    assert (image.n_quarantined, np.flatnonzero(~image.load_ok()).tolist()) == (2, [4, 13])
    assert [(row["row"], row["reason"]) for row in text.quarantined()] == [(3, "empty")]
    assert np.flatnonzero(np.isnan(image.load()).all(1)).tolist() == [4, 13]
    content = image.content()
    for row, key in enumerate(store.pairs.keys):
        path = grown_once.table.parent / key
        assert content[row] == (
            content_hash(path.read_bytes()) if path.is_file() and row != 4 else ""
        )


@pytest.mark.parametrize("n_batches", [0, 3])
def test_an_interrupted_growth_is_resumed_and_the_old_view_is_served_in_between(
    kept: Path, long_table: Path, again: Callable[..., ExtractReport], monkeypatch: pytest.MonkeyPatch, load_once: None,
    n_batches: int, tmp_path: Path,
) -> None:  # fmt: skip
    whole = Path(shutil.copytree(kept, tmp_path / "whole"))
    again(long_table, whole)
    with monkeypatch.context() as patch:
        calls = iter(range(n_batches))

        def lost(pixels: Any, forward: Callable[[Any], Any]) -> Any:
            if next(calls, None) is None:
                raise RuntimeError("the device is lost")
            return forward(pixels)

        wrap_encoder(patch, lost)
        with pytest.raises(RuntimeError, match="the device is lost"):
            again(long_table, kept)
    # The old view stays the newest until all of the new one is there.
    assert FeatureStore.open(kept).array("image").load().shape == (12, 64)
    assert again(long_table, kept).arrays[0].n_encoded == (7 if n_batches == 3 else 12)
    assert tree(kept) == tree(whole)


def test_an_array_that_was_not_appended_to_is_incomplete_by_its_share(
    kept: Path,
    long_table: Path,
    tiny_image_encoder: Path,
    again: Callable[..., ExtractReport],
    load_once: None,
) -> None:
    spec = ExtractSpec(
        parse_encoder(f"timm:{tiny_image_encoder}", "image"),
        device="cpu",
    )
    extract(open_pairs(long_table), kept, spec)
    store = FeatureStore.open(kept)
    image = store.array("image")
    text = store.array("text")
    assert (image.complete, text.complete, text.rows, text.share_done) == (True, False, 48, 0.5)
    with pytest.raises(IncompleteError, match="text/tiny-bert is 50% done"):
        text.load()
    assert len(text.content()) == 48
    assert not any(text.content()[24:])
    assert [array.n_encoded for array in again(long_table, kept).arrays] == [0, 24]
    assert FeatureStore.open(kept).array("text").load().shape == (48, 32)


def test_heads_are_fitted_and_evaluated_on_a_store_that_grew(
    kept: Path,
    long_table: Path,
    again: Callable[..., ExtractReport],
    tmp_path: Path,
    load_once: None,
) -> None:
    from apecache_cli.app import app
    from typer.testing import CliRunner

    again(long_table, kept)
    sizes = ["--set", "image.dim=8", "--set", "text.dim=8", "--set", "schedule.epochs=2"]
    fit = [
        "fit-head",
        str(kept),
        "--recipe",
        "projection",
        "--out",
        str(tmp_path / "run"),
        "--dev-split",
        "val",
        *sizes,
    ]
    result = CliRunner().invoke(app, fit)
    assert result.exit_code == 0, result.output
    judge = ["evaluate", str(tmp_path / "run"), "--store", str(kept), "--split", "val", "--json"]
    result = CliRunner().invoke(app, judge)
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert (told["n_images"], told["n_texts"]) == (8, 16)


# Checks


def wrap_encoder(
    monkeypatch: pytest.MonkeyPatch,
    forward: Callable[[Any, Callable[[Any], Any]], Any],
    modality: str = "image",
) -> None:
    """The encoder's network is seen through `forward(batch, the real one)`."""

    def load(*arguments: Any) -> Any:
        encoder = loaded_once(modality)(*arguments)[0]
        return [replace(encoder, forward=lambda *batch: forward(*batch, encoder.forward))]

    monkeypatch.setattr(extraction, f"load_{modality}_encoders", load)


def test_replaced_and_lost_images_are_found_by_size_and_time(
    kept: Path,
    shapes: Path,
    again: Callable[..., ExtractReport],
    load_once: None,
) -> None:
    before = FeatureStore.open(kept).array("image").load()
    images = shapes.parent / "images"
    shutil.copy(images / "blue-circle-0.png", images / "red-circle-0.png")
    draw_shape("yellow", "circle", 50).save(images / "green-square-0.png")
    (images / "red-square-0.png").unlink()
    report = again(shapes, kept, max_bad=0.1)
    assert report.arrays[0].n_encoded == 1  # the blue circle is in the store
    store = FeatureStore.open(kept)
    rows = {key: row for row, key in enumerate(store.pairs.keys)}
    image = store.array("image")
    assert [(row["key"], row["reason"]) for row in image.quarantined()] == [
        ("images/red-square-0.png", "missing")
    ]
    after = image.load()
    red, blue = rows["images/red-circle-0.png"], rows["images/blue-circle-0.png"]
    assert np.array_equal(after[red], before[blue])
    changed = {
        rows[f"images/{name}-0.png"] for name in ("green-square", "red-circle", "red-square")
    }
    others = [row for row in range(12) if row not in changed]
    assert np.array_equal(after[others], before[others])
    assert not np.array_equal(after[rows["images/green-square-0.png"]], before[4])


@pytest.mark.parametrize("recheck", [True, False])
def test_a_change_of_the_same_size_and_time_is_found_by_rechecking(
    kept: Path,
    shapes: Path,
    again: Callable[..., ExtractReport],
    load_once: None,
    recheck: bool,
) -> None:
    again(shapes, kept)  # records size and time of these files
    path = shapes.parent / "images" / "red-circle-0.png"
    times = (path.stat().st_atime_ns, path.stat().st_mtime_ns)
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    os.utime(path, ns=times)
    report = again(shapes, kept, recheck=recheck)
    assert report.arrays[0].n_encoded == int(recheck)


def test_features_that_come_out_otherwise_now_are_not_mixed_with_committed_ones(
    kept: Path,
    shapes: Path,
    again: Callable[..., ExtractReport],
    monkeypatch: pytest.MonkeyPatch,
    load_once: None,
) -> None:
    (kept / "records/image/tiny-vit/seal.json").unlink()
    (kept / "records/image/tiny-vit/commits/00000002.json").unlink()
    before = without_stamps(kept)
    for noise, refuses in ((0.1, True), (1e-4, False)):
        torch.manual_seed(0)
        wrap_encoder(
            monkeypatch,
            lambda pixels, real, noise=noise: real(pixels) + noise * torch.randn(len(pixels), 64),
        )
        if refuses:
            with pytest.raises(MismatchError, match="cosine 0") as caught:
                again(shapes, kept)
            assert caught.value.exit_code == 4
            assert without_stamps(kept) == before
        else:
            assert again(shapes, kept).arrays[0].n_encoded == 2


def test_a_committed_image_that_is_gone_does_not_stop_a_resume(
    kept: Path,
    shapes: Path,
    again: Callable[..., ExtractReport],
    load_once: None,
) -> None:
    (kept / "records/image/tiny-vit/seal.json").unlink()
    (kept / "records/image/tiny-vit/commits/00000002.json").unlink()
    (shapes.parent / "images" / "red-circle-0.png").unlink()
    again(shapes, kept, max_bad=0.1)
    (row,) = FeatureStore.open(kept).array("image").quarantined()
    assert (row["row"], row["key"]) == (0, "images/red-circle-0.png")
    # The first view still has the features of the lost file.
    assert FeatureStore.open(kept, "0000").array("image").load_ok().all()


@pytest.mark.parametrize(
    ("value", "reason", "said"),
    [(float("inf"), "not-finite", "NaN or infinity"), (float("nan"), "not-finite", "NaN or infinity"),
     (7e4, "overflow", "--storage float32")],
)  # fmt: skip
def test_an_output_that_cannot_be_stored_is_quarantined_and_its_neighbors_are_untouched(
    tmp_path: Path, shapes_once: Path, tiny_store: Path, again: Callable[..., ExtractReport],
    monkeypatch: pytest.MonkeyPatch, value: float, reason: str, said: str,
) -> None:  # fmt: skip
    batches = iter(range(100))

    def spoil(pixels: Any, real: Callable[[Any], Any]) -> Any:
        features = real(pixels).clone()
        if next(batches) == 2:  # rows 5 to 8: the first batch of the second shard
            features[1, 3] = value
        return features

    wrap_encoder(monkeypatch, spoil)
    report = again(shapes_once, tmp_path / "store", max_bad=0.1)
    assert report.arrays[0].reasons == {reason: 1}
    array = FeatureStore.open(tmp_path / "store").array("image")
    (row,) = array.quarantined()
    assert (row["row"], row["reason"]) == (6, reason)
    assert said in row["detail"]
    others = [row for row in range(12) if row != 6]
    assert (
        array.load()[others].tobytes()
        == FeatureStore.open(tiny_store).array("image").load()[others].tobytes()
    )
    assert np.isnan(array.load()[6]).all()


def test_values_beyond_float16_are_kept_as_float32(
    tmp_path: Path,
    shapes_once: Path,
    again: Callable[..., ExtractReport],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wrap_encoder(monkeypatch, lambda pixels, real: real(pixels) * 1e6)
    assert (
        again(shapes_once, tmp_path / "store", storage_dtype="float32").arrays[0].n_quarantined == 0
    )
    features = FeatureStore.open(tmp_path / "store").array("image").load()
    assert features.dtype == np.float32
    assert np.abs(features).max() > 65504


def test_out_of_memory_halves_the_batch_and_gives_the_same_features_to_five_nines(
    tmp_path: Path, shapes_once: Path, tiny_store: Path, again: Callable[..., ExtractReport],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    sizes = []

    def narrow(pixels: Any, real: Callable[[Any], Any]) -> Any:
        sizes.append(len(pixels))
        if len(pixels) > 1:
            raise torch.OutOfMemoryError("too much")
        return real(pixels)

    wrap_encoder(monkeypatch, narrow)
    assert again(shapes_once, tmp_path / "store").arrays[0].n_quarantined == 0
    assert set(sizes) == {4, 2, 1}
    halved, whole = (
        FeatureStore.open(path).array("image").load() for path in (tmp_path / "store", tiny_store)
    )
    assert cosine(halved, whole) >= 0.99999


@pytest.mark.parametrize(("max_bad", "code"), [(0.09, None), (0.08, 3)])
def test_a_run_with_unreadable_rows_succeeds_up_to_the_limit_and_encodes_all_others_above_it(
    tmp_path: Path,
    shapes: Path,
    again: Callable[..., ExtractReport],
    load_once: None,
    max_bad: float,
    code: int | None,
) -> None:
    """One of 12 images is bad."""
    (shapes.parent / "images" / "blue-square-0.png").write_bytes(b"")
    if code is None:
        assert again(shapes, tmp_path / "store", max_bad=max_bad).arrays[0].reasons == {"empty": 1}
    else:
        with pytest.raises(
            BadRowsError,
            match=r"1 of 12 image rows could not be encoded \(1 empty",
        ) as caught:
            again(shapes, tmp_path / "store", max_bad=max_bad)
        assert caught.value.exit_code == code
    array = FeatureStore.open(tmp_path / "store").array("image")
    assert array.complete
    assert array.load_ok().sum() == 11


def test_the_same_file_under_two_keys_is_counted(
    tmp_path: Path,
    shapes: Path,
    again: Callable[..., ExtractReport],
    load_once: None,
) -> None:
    images = shapes.parent / "images"
    shutil.copy(images / "red-circle-0.png", images / "red-square-0.png")  # both train
    (images / "blue-circle-0.png").unlink()
    (images / "blue-square-0.png").unlink()  # unreadable ones are not each other's duplicates
    assert again(shapes, tmp_path / "store", max_bad=0.5).duplicates == 1


def test_the_same_file_in_two_splits_is_an_error_that_names_both(
    tmp_path: Path,
    shapes: Path,
    again: Callable[..., ExtractReport],
    load_once: None,
) -> None:
    images = shapes.parent / "images"
    shutil.copy(images / "red-circle-0.png", images / "red-triangle-0.png")
    with pytest.raises(
        DataError,
        match=r"red-circle-0.png \(train\) and images/red-triangle-0.png \(val\)",
    ) as caught:
        again(shapes, tmp_path / "store")
    assert caught.value.exit_code == 3


def test_a_duplicate_in_another_split_is_found_across_segments(
    kept: Path,
    long_table: Path,
    tmp_path: Path,
    again: Callable[..., ExtractReport],
    load_once: None,
) -> None:
    root = Path(shutil.copytree(long_table.parent, tmp_path / "long"))
    shutil.copy(root / "images/red-circle-0.png", root / "images/red-triangle-1.png")
    with pytest.raises(DataError, match="the same file in two splits"):
        again(root / "pairs.tsv", kept)


@pytest.mark.parametrize(
    ("n_missing", "max_bad", "refuses"),
    [(7, 0.01, True), (7, 0.5, True), (7, 0.59, False), (6, 1.0, False)],
)
def test_more_than_half_the_images_not_found_is_a_wrong_root(
    tmp_path: Path,
    shapes: Path,
    again: Callable[..., ExtractReport],
    load_once: None,
    n_missing: int,
    max_bad: float,
    refuses: bool,
) -> None:
    for path in sorted((shapes.parent / "images").iterdir())[:n_missing]:
        path.unlink()
    if refuses:
        with pytest.raises(
            BadRowsError, match=r"7 of 12 images are not below .*--root.*--max-bad 0\.59"
        ):
            again(shapes, tmp_path / "store", max_bad=max_bad)
        assert not (tmp_path / "store").exists()
    else:
        report = again(shapes, tmp_path / "store", max_bad=max_bad)
        assert report.arrays[0].reasons == {"missing": n_missing}


def test_the_report_says_what_was_done(
    tmp_path: Path,
    shapes: Path,
    again: Callable[..., ExtractReport],
    load_once: None,
) -> None:
    long = " ".join(["red"] * 40)
    shapes.write_text(shapes.read_text().replace("a red circle", long))
    report = again(shapes, tmp_path / "store")
    image, text = report.arrays
    assert (image.rows, image.dim, image.n_encoded, image.n_truncated) == (12, 64, 12, 0)
    assert (text.rows, text.dim, text.n_encoded, text.n_truncated) == (24, 32, 24, 1)
    assert report.store == tmp_path / "store"
    assert not report.nothing_to_do


def test_progress_counts_every_row_of_both_segments_once(
    grown: Grown,
    tiny_image_encoder: Path,
    load_once: None,
) -> None:
    seen: list[ExtractionState] = []
    spec = ExtractSpec(
        parse_encoder(f"timm:{tiny_image_encoder}", "image"),
        device="cpu",
        max_bad=1.0,
    )
    shutil.rmtree(grown.store / "records/image/tiny-vit/commits")
    (grown.store / "records/image/tiny-vit/seal.json").unlink()
    extract(open_pairs(grown.table), store=grown.store, spec=spec, progress=seen.append)
    assert list(dict.fromkeys(standing.done for standing in seen)) == [0, 4, 5, 9, 10, 12, 15]
    assert {(standing.modality, standing.rows) for standing in seen} == {("image", 15)}
    assert (seen[-1].n_bad, seen[-1].n_bytes) == (1, 12 * 64 * 2)  # three rows were there
