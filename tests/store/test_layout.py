import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from apecache.errors import StoreError
from apecache.store.layout import (
    VIEW_FORMAT_VERSION,
    ArrayLayout,
    ArrayRecord,
    chunk_bytes,
    chunk_name,
    pair_objects,
    require_format,
    storable,
)
from benchmarks.reliability.injection.tower import MODALITIES, NAME, SMALL, TowerSpec, array_record


@settings(max_examples=100, deadline=None)
@given(rows=st.integers(1, 5000), shard_rows=st.integers(1, 600))
def test_shards_are_consecutive_and_hold_every_row_once(rows: int, shard_rows: int) -> None:
    layout = ArrayLayout(
        rows=rows,
        dim=4,
        dtype="float16",
        shard_rows=shard_rows,
        batch_size=8,
        threads=1,
    )
    shards = [layout.shard(index) for index in range(layout.n_shards)]
    assert [row for shard in shards for row in shard] == list(range(rows))
    assert all(len(shard) == shard_rows for shard in shards[:-1])


@pytest.mark.parametrize("modality", MODALITIES)
def test_a_chunk_file_has_the_size_and_the_name_that_zarr_gives_it(
    tower_store_once: Path,
    modality: str,
) -> None:
    sizes = chunk_bytes(SMALL.layout(modality))
    for part, size in sizes.items():
        array = zarr.open_array(
            tower_store_once / "features.zarr" / modality / NAME / part,
            mode="r",
        )
        for shard in range(SMALL.layout(modality).n_shards):
            name = chunk_name(array_record(SMALL, modality), part, shard)
            assert name.endswith(
                f"{part}/{array.metadata.encode_chunk_key((shard, 0)[: array.ndim])}"
            )
            assert (tower_store_once / name).stat().st_size == size


@pytest.mark.parametrize("modality", MODALITIES)
def test_an_array_record_survives_its_file(modality: str) -> None:
    record = array_record(TowerSpec(), modality)
    again = ArrayRecord.from_json(modality, NAME, json.loads(json.dumps(record.to_json())))
    assert again == record


def test_a_record_whose_digest_is_not_that_of_its_fields_is_refused() -> None:
    value = array_record(SMALL, "image").to_json()
    other = array_record(replace(SMALL, encoder="another"), "image").to_json()
    with pytest.raises(StoreError, match=f"image/{NAME} are damaged: its digest"):
        ArrayRecord.from_json("image", NAME, {**value, "fields": other["fields"]})


@pytest.mark.parametrize(
    "missing",
    ["spec", "fields", "layout", "metadata", "environment", "digest"],
)
def test_an_array_record_without_a_part_is_refused(missing: str) -> None:
    value = array_record(SMALL, "image").to_json()
    del value[missing]
    with pytest.raises(StoreError, match=f"image/{NAME} are damaged"):
        ArrayRecord.from_json("image", NAME, value)


def test_a_newer_format_is_refused_by_name() -> None:
    with pytest.raises(
        StoreError,
        match=rf"x.json has format {VIEW_FORMAT_VERSION + 1}; .*upgrade apecache",
    ):
        require_format({"format": VIEW_FORMAT_VERSION + 1}, "x.json")


@pytest.mark.parametrize("value", [None, [], {}, {"format": "1"}, "format"])
def test_what_has_no_format_is_no_record(value: object) -> None:
    with pytest.raises(StoreError, match=r"x.json is not an apecache record"):
        require_format(value, "x.json")


@pytest.mark.parametrize(
    ("text", "stored"),
    [
        ("caf\u00e9 \U0001f431", "caf\u00e9 \U0001f431"),
        ("a\ud800b", "a\ufffdb"),
        ("\udfff\ud83d", "\ufffd\ufffd"),
        ("?", "?"),
    ],
)
def test_a_lone_surrogate_is_stored_as_the_replacement_character(text: str, stored: str) -> None:
    assert storable(text) == stored


@settings(max_examples=25, deadline=None)
@given(
    captions=st.lists(st.text(max_size=30), max_size=20),
    rows=st.lists(st.integers(0, 2**40), min_size=1, max_size=20),
)
def test_columns_come_back_from_zarr_as_they_were(
    tmp_path_factory: pytest.TempPathFactory,
    captions: list[str],
    rows: list[int],
) -> None:
    folder = tmp_path_factory.mktemp("pairs")
    objects = pair_objects({"caption": ("text", list(captions)), "row": ("image", list(rows))})
    for name, data in objects.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    group = zarr.open_group(folder / "features.zarr" / "pairs", mode="r")
    assert np.asarray(group["caption"][:]).tolist() == captions
    assert np.asarray(group["row"][:]).tolist() == rows
