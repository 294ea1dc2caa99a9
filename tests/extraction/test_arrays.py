"""Before anything is encoded: how a new array is laid out, what a resume takes from the store, and
whether it fits."""

import shutil
from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import extract_tiny, loaded_once, tree

import apecache.extraction.arrays as preparation
import apecache.extraction.spec as extraction_spec
from apecache.data.sources import open_pairs
from apecache.encoders.encoder import ImageEncoder, TextEncoder
from apecache.encoders.spec import parse_encoder
from apecache.errors import MismatchError, StoreError
from apecache.extraction.arrays import environment, prepare_arrays
from apecache.extraction.encode import use_threads
from apecache.extraction.run import ExtractSpec
from apecache.extraction.segments import pair_columns
from apecache.storage.local_files import LocalFiles
from apecache.store.layout import ArrayRecord
from apecache.store.reader import FeatureStore
from apecache.store.writer import create_store

pytestmark = pytest.mark.usefixtures("no_fsync", "load_once")


def prepare_one(store, encoder, rows, spec, like=None, captions=()):  # type: ignore[no-untyped-def]
    """The record of one array."""
    layouts = {} if like is None else {encoder.spec.slug: like}
    (record,) = prepare_arrays(
        store,
        encoders=[encoder],
        rows=rows,
        spec=spec,
        like=layouts,
        captions=captions,
    )
    return record


@pytest.fixture
def vit(tiny_image_encoder: Path) -> ImageEncoder:
    encoder: ImageEncoder = loaded_once("image")(
        (parse_encoder(f"timm:{tiny_image_encoder}", "image"),),
        "cpu",
    )[0]
    return encoder


@pytest.fixture
def bert(tiny_text_encoder: Path) -> TextEncoder:
    encoder: TextEncoder = loaded_once("text")(
        (parse_encoder(f"hf:{tiny_text_encoder}", "text"),),
        "cpu",
    )[0]
    return encoder


@pytest.fixture
def empty(tmp_path: Path, shapes_once: Path) -> FeatureStore:
    """A store of the shapes without features."""
    create_store(
        LocalFiles(tmp_path / "store"),
        pairs=pair_columns(open_pairs(shapes_once)),
        root="",
        version="0",
    )
    return FeatureStore.open(tmp_path / "store")


def test_what_is_asked_for_is_what_is_recorded(empty: FeatureStore, vit: ImageEncoder) -> None:
    spec = ExtractSpec(image_batch=3, text_batch=7, shard_rows=5, storage_dtype="float32")
    record = prepare_one(empty, encoder=vit, rows=12, spec=spec)
    layout = record.layout
    assert (layout.rows, layout.dim, layout.dtype, layout.shard_rows, layout.batch_size) == (
        12,
        64,
        "float32",
        5,
        3,
    )
    assert layout.threads == torch.get_num_threads()
    assert (record.name, record.modality) == ("tiny-vit", "image")
    assert record.encoder.digest == vit.fingerprint.digest
    assert record.fingerprint.fields["storage"] == {"dtype": "float32", "batch_size": 3}
    assert FeatureStore.open(empty.path).array("image").record == record


def test_captions_are_batched_by_their_own_batch_size(
    empty: FeatureStore,
    bert: TextEncoder,
) -> None:
    assert (
        prepare_one(
            empty,
            encoder=bert,
            rows=24,
            spec=ExtractSpec(image_batch=3, text_batch=7, shard_rows=5),
        ).layout.batch_size
        == 7
    )


def test_without_a_batch_size_the_default_on_a_cpu_is_32_images_or_64_captions(
    empty: FeatureStore,
    vit: ImageEncoder,
    bert: TextEncoder,
) -> None:
    assert (
        prepare_one(empty, encoder=vit, rows=12, spec=ExtractSpec(shard_rows=5)).layout.batch_size
        == 32
    )
    assert (
        prepare_one(empty, encoder=bert, rows=24, spec=ExtractSpec(shard_rows=5)).layout.batch_size
        == 64
    )


def test_tokens_of_a_batch_are_recorded_and_part_of_the_fingerprint_only_where_they_are_limited(
    empty: FeatureStore,
    bert: TextEncoder,
) -> None:
    spec = ExtractSpec(text_batch_tokens=96, shard_rows=5)
    layout = prepare_one(empty, encoder=bert, rows=24, spec=spec).layout
    assert (layout.batch_tokens, layout.batch_size) == (96, preparation.MAX_CAPTIONS)
    recorded = FeatureStore.open(empty.path).array("text").record
    assert recorded.layout == layout
    storage = recorded.fingerprint.fields["storage"]
    assert storage == {"dtype": "float16", "batch_size": 4096, "batch_tokens": 96}
    # A resume takes what is recorded, and another limit is another array.
    assert prepare_one(empty, encoder=bert, rows=24, spec=ExtractSpec()).layout == layout
    for other in (ExtractSpec(text_batch_tokens=97), ExtractSpec(text_batch=64)):
        with pytest.raises(MismatchError, match=r"storage\.batch"):
            prepare_one(empty, encoder=bert, rows=24, spec=other)
    assert "batch_tokens" not in replace(layout, batch_tokens=None).to_json()


def test_on_an_accelerator_batches_of_captions_are_limited_by_their_tokens(
    empty: FeatureStore,
    bert: TextEncoder,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(preparation, "is_accelerator", lambda device: True)
    tokens = preparation._default_batching(bert).tokens
    assert tokens == preparation.CUDA_BATCH_TOKENS
    # A number of captions that is asked for is the only limit.
    asked = preparation._asked_batching(bert, ExtractSpec(text_batch=64))
    assert asked is not None
    assert (asked.size, asked.tokens) == (64, None)


@pytest.mark.parametrize(
    ("seconds", "rows"),
    [(0.001, 4096), (1.0, 1024), (1.5, 1024), (2.0, 512), (100.0, 256)],
    ids=["fast: at most 4096", "1 s a batch", "1.5 s a batch", "2 s a batch", "slow: at least 256"],
)
@pytest.mark.parametrize("modality", ["image", "text"])
def test_a_shard_is_about_a_minute_of_encoding(
    empty: FeatureStore, vit: ImageEncoder, bert: TextEncoder, monkeypatch: pytest.MonkeyPatch,
    modality: str, seconds: float, rows: int,
) -> None:  # fmt: skip
    """Each batch of 32 takes so many seconds: the largest power of two within 60 seconds."""
    monkeypatch.setattr(preparation, "timed_seconds", lambda run, device: seconds)
    encoder: Any = vit if modality == "image" else bert
    record = prepare_one(
        empty,
        encoder=encoder,
        rows=100_000,
        spec=ExtractSpec(image_batch=32, text_batch=32),
        captions=["a red circle"],
    )
    assert record.layout.shard_rows == rows


@pytest.mark.parametrize("modality", ["image", "text"])
def test_a_shard_is_calibrated_where_a_whole_batch_does_not_fit(
    empty: FeatureStore,
    vit: ImageEncoder,
    bert: TextEncoder,
    modality: str,
) -> None:
    encoder: Any = vit if modality == "image" else bert

    def forward(*inputs: torch.Tensor) -> torch.Tensor:
        if len(inputs[0]) > 2:
            raise torch.OutOfMemoryError("made up")
        features: torch.Tensor = encoder.forward(*inputs)
        return features

    record = prepare_one(
        empty,
        encoder=replace(encoder, forward=forward),
        rows=100_000,
        spec=ExtractSpec(image_batch=8, text_batch=8),
        captions=["a red circle"] * 8,
    )
    assert record.layout.shard_rows >= 256


@pytest.mark.parametrize(
    ("dim", "rows", "shard_rows"),
    [(64, 12, 12), (1 << 20, 12, 12), (1 << 23, 12, 4), (1 << 26, 12, 1)],
    ids=["the table", "the table, 24 MB", "64 MB", "one row"],
)
def test_a_shard_is_no_longer_than_the_table_and_no_larger_than_64_mb(
    empty: FeatureStore,
    vit: ImageEncoder,
    dim: int,
    rows: int,
    shard_rows: int,
) -> None:
    record = prepare_one(
        empty,
        encoder=replace(vit, row_shape=(dim,)),
        rows=rows,
        spec=ExtractSpec(shard_rows=4096),
    )
    assert record.layout.shard_rows == shard_rows


Usage = namedtuple("Usage", "total used free")


@pytest.mark.parametrize(("free", "fits"), [(1.30e6, True), (1.20e6, False)])
def test_too_little_disk_is_refused_before_anything_is_encoded(
    empty: FeatureStore,
    vit: ImageEncoder,
    monkeypatch: pytest.MonkeyPatch,
    free: float,
    fits: bool,
) -> None:
    """9,000 rows of 64 float16 and a byte of status in shards of 100, and 5 % for the rest: 1.22
    MB."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, int(free)))
    before = tree(empty.path)
    if fits:
        prepare_one(empty, encoder=vit, rows=9000, spec=ExtractSpec(shard_rows=100))
    else:
        with pytest.raises(
            StoreError,
            match=r"1.2 MB needed for the features, 1.2 MB free",
        ) as caught:
            prepare_one(empty, encoder=vit, rows=9000, spec=ExtractSpec(shard_rows=100))
        assert caught.value.exit_code == 3
        assert tree(empty.path) == before


def test_a_resume_needs_no_room_for_what_is_there(
    tmp_path: Path, tiny_store: Path, shapes_once: Path, tiny_image_encoder: Path, tiny_text_encoder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    store = Path(shutil.copytree(tiny_store, tmp_path / "store"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, 0))
    assert extract_tiny(
        shapes_once,
        store=store,
        image=tiny_image_encoder,
        text=tiny_text_encoder,
    ).nothing_to_do


def test_a_resume_takes_batch_shards_and_threads_from_the_store(
    empty: FeatureStore,
    vit: ImageEncoder,
) -> None:
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        first = prepare_one(
            empty,
            encoder=vit,
            rows=12,
            spec=ExtractSpec(image_batch=3, shard_rows=5),
        )
        torch.set_num_threads(2)
        again = prepare_one(
            FeatureStore.open(empty.path),
            encoder=vit,
            rows=12,
            spec=ExtractSpec(shard_rows=9),
        )
        assert again == first
        assert (again.layout.threads, torch.get_num_threads()) == (1, 2)
        use_threads(again.layout)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("gone", ["zarr.json", "features/zarr.json", "status/zarr.json"])
def test_an_array_that_a_killed_run_had_begun_is_finished(
    empty: FeatureStore,
    vit: ImageEncoder,
    gone: str,
) -> None:
    prepare_one(empty, encoder=vit, rows=12, spec=ExtractSpec(image_batch=3, shard_rows=5))
    before = tree(empty.path)
    (empty.path / "features.zarr/image/tiny-vit" / gone).unlink()
    prepare_one(FeatureStore.open(empty.path), encoder=vit, rows=12, spec=ExtractSpec())
    assert tree(empty.path) == before


def test_an_appended_segment_is_laid_out_as_the_first(
    empty: FeatureStore,
    vit: ImageEncoder,
) -> None:
    like = prepare_one(
        empty,
        encoder=vit,
        rows=12,
        spec=ExtractSpec(image_batch=3, shard_rows=5),
    ).layout
    shutil.rmtree(empty.path / "records/image")
    shutil.rmtree(empty.path / "features.zarr/image/tiny-vit")
    layout = prepare_one(
        FeatureStore.open(empty.path),
        encoder=vit,
        rows=40,
        spec=ExtractSpec(shard_rows=30),
        like=like,
    ).layout
    assert (layout.rows, layout.batch_size, layout.shard_rows) == (40, 3, 5)


def test_another_encoder_is_refused_or_with_add_put_beside(
    empty: FeatureStore,
    vit: ImageEncoder,
) -> None:
    prepare_one(empty, encoder=vit, rows=12, spec=ExtractSpec(image_batch=3, shard_rows=5))
    store = FeatureStore.open(empty.path)
    other = replace(
        vit,
        spec=replace(vit.spec, pooling="cls"),
        fingerprint=fields(vit, weights="0"),
    )
    with pytest.raises(MismatchError, match="add --add to keep both"):
        prepare_one(store, encoder=other, rows=12, spec=ExtractSpec(shard_rows=5))
    assert (
        prepare_one(store, encoder=other, rows=12, spec=ExtractSpec(shard_rows=5, add=True)).name
        == "tiny-vit-cls"
    )


def test_add_does_not_put_two_encoders_under_one_name(
    empty: FeatureStore,
    vit: ImageEncoder,
) -> None:
    prepare_one(empty, encoder=vit, rows=12, spec=ExtractSpec(image_batch=3, shard_rows=5))
    other = replace(vit, fingerprint=fields(vit, weights="0"))
    with pytest.raises(MismatchError, match=r"encoder\.weights") as caught:
        prepare_one(
            FeatureStore.open(empty.path),
            encoder=other,
            rows=12,
            spec=ExtractSpec(shard_rows=5, add=True),
        )
    assert "--add" not in str(caught.value)


def fields(encoder: ImageEncoder, **changed: str) -> Any:
    return type(encoder.fingerprint)(fields={**encoder.fingerprint.fields, **changed})


def test_the_environment_names_versions_and_device_and_no_host() -> None:
    told = environment(torch.device("cpu"))
    assert told["versions"]["torch"] == torch.__version__.split("+")[0]
    assert told["device"] == "cpu"
    assert set(told) == {"versions", "device", "hardware", "python"}


def test_the_environment_is_recorded_and_no_part_of_the_identity(
    empty: FeatureStore,
    vit: ImageEncoder,
) -> None:
    record: ArrayRecord = prepare_one(empty, encoder=vit, rows=12, spec=ExtractSpec(shard_rows=5))
    assert record.environment == environment(torch.device("cpu"))
    assert "versions" not in record.fingerprint.fields


@pytest.mark.parametrize(
    ("cores", "expected"),
    [(1, 0), (2, 0), (3, 3), (8, 8), (64, 16), (None, 0)],
)
def test_decoding_has_a_process_for_each_core_and_threads_on_few(
    cores: int | None,
    expected: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(extraction_spec, "cpu_count", lambda: cores)
    assert ExtractSpec().decoders == expected
    assert ExtractSpec(workers=5).decoders == 5
