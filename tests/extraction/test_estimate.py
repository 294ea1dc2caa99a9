"""A dry run: the rows, bytes, seconds and price of the extraction that would follow, and nothing
written."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny import Grown, make_shapes, tree

import apecache.extraction.estimate as planning
from apecache.data.augment import Views
from apecache.data.sources import open_pairs
from apecache.encoders.spec import parse_encoder
from apecache.errors import ManifestError, OptionError
from apecache.extraction.estimate import plan_extraction
from apecache.extraction.run import ExtractSpec, extract

pytestmark = pytest.mark.usefixtures("no_fsync")


@pytest.fixture
def spec(tiny_image_encoder: Path, tiny_text_encoder: Path) -> ExtractSpec:
    encoders = (
        parse_encoder(f"timm:{tiny_image_encoder}", "image"),
        parse_encoder(f"hf:{tiny_text_encoder}", "text"),
    )
    return ExtractSpec(
        *encoders,
        image_batch=4,
        text_batch=4,
        shard_rows=5,
        workers=2,
        device="cpu",
    )


def test_a_plan_counts_what_the_extraction_then_writes(
    shapes: Path,
    tmp_path: Path,
    spec: ExtractSpec,
) -> None:
    source = open_pairs(shapes)
    store = tmp_path / "deep" / "store"
    before = tree(shapes.parent)
    plan = plan_extraction(source, store, spec)
    assert not store.parent.exists()
    assert tree(shapes.parent) == before
    assert [
        (a.modality, a.name, a.rows, a.row_shape, a.dtype, a.n_pending) for a in plan.arrays
    ] == [
        ("image", "tiny-vit", 12, (64,), "float16", 12),
        ("text", "tiny-bert", 24, (32,), "float16", 24),
    ]
    extract(source, store, spec)
    for array in plan.arrays:
        files = (store / "features.zarr" / array.modality / array.name).rglob("c.*")
        written = sum(path.stat().st_size for path in files)
        assert written <= array.n_bytes <= 1.06 * written
    assert plan.n_bytes == sum(array.n_bytes for array in plan.arrays)
    assert plan.fits
    assert plan.image_seconds > 0
    assert plan.text_seconds > 0
    assert plan.price is None


def test_a_finished_store_needs_nothing_and_a_begun_one_the_rest(
    shapes: Path,
    tmp_path: Path,
    spec: ExtractSpec,
) -> None:
    source = open_pairs(shapes)
    store = tmp_path / "store"
    extract(source, store, spec)
    done = tree(store)
    plan = plan_extraction(source, store=store, spec=spec, price_per_hour=3600.0)
    assert [array.n_pending for array in plan.arrays] == [0, 0]
    assert (plan.n_bytes, plan.seconds, plan.price) == (0, 0.0, 0.0)
    (store / "records/image/tiny-vit/seal.json").unlink()
    (store / "records/image/tiny-vit/commits/00000002.json").unlink()
    begun = tree(store)
    plan = plan_extraction(source, store, spec)
    assert [array.n_pending for array in plan.arrays] == [2, 0]
    assert plan.image_seconds > 0
    assert plan.text_seconds == 0
    assert tree(store) == begun
    assert extract(source, store, spec).arrays[0].n_encoded == 2
    assert tree(store) == done


def test_appended_rows_are_planned_beside_those_that_are_there(
    tmp_path: Path,
    spec: ExtractSpec,
) -> None:
    table = make_shapes(tmp_path / "shapes", copies=2)
    store = tmp_path / "store"
    source = open_pairs(table)
    extract(source.part(0, 12), store, spec)
    before = tree(store)
    image, text = plan_extraction(source, store, spec).arrays
    assert (image.rows, image.n_pending) == (24, 12)
    # The captions of these images are those of others.
    assert (text.rows, text.n_pending) == (24, 0)
    assert tree(store) == before


@pytest.mark.parametrize(
    ("device_is_cpu", "expected"), [(True, 12 * (0.5 + 2.0 / 4)), (False, 12 * 0.5)]
)
def test_seconds_are_rows_by_what_a_row_took(
    shapes: Path, tmp_path: Path, spec: ExtractSpec, monkeypatch: pytest.MonkeyPatch, device_is_cpu: bool,
    expected: float,
) -> None:  # fmt: skip
    ticks = iter([0.0, 4.0])  # eight images take four seconds to decode
    monkeypatch.setattr(planning.time, "perf_counter", lambda: next(ticks))
    monkeypatch.setattr(planning, "_seconds_of", lambda work, times=2: 2.0)
    if not device_is_cpu:
        monkeypatch.setattr(planning, "_share_cores", lambda device: False)
    image_only = replace(spec, text=None)
    plan = plan_extraction(
        open_pairs(shapes),
        tmp_path / "store",
        image_only,
        price_per_hour=3600.0,
    )
    assert plan.seconds == plan.image_seconds == pytest.approx(expected)
    assert plan.price == pytest.approx(expected)


def test_views_several_cuts_and_bad_rows_are_planned_too(
    grown: Grown,
    spec: ExtractSpec,
    tmp_path: Path,
) -> None:
    image = spec.images[0]
    several = replace(
        spec,
        image=(image, replace(image, pooling="tokens")),
        views=Views(3),
        max_bad=1.0,
    )
    plan = plan_extraction(open_pairs(grown.table), tmp_path / "other", several)
    assert [(a.name, a.row_shape) for a in plan.arrays[:2]] == [
        ("tiny-vit-3views", (3, 64)),
        ("tiny-vit-tokens-3views", (3, 5, 64)),
    ]
    assert plan.image_seconds > 0


def test_what_extract_refuses_is_refused(shapes: Path, tmp_path: Path, spec: ExtractSpec) -> None:
    source = open_pairs(shapes)
    store = tmp_path / "store"
    with pytest.raises(OptionError, match="nothing to encode"):
        plan_extraction(source, store, replace(spec, image=None, text=None))
    for price in (-1.0, float("nan")):
        with pytest.raises(OptionError, match="expected 0 or more"):
            plan_extraction(source, store=store, spec=spec, price_per_hour=price)
    no_captions: Any = open_pairs(shapes.parent / "images")
    with pytest.raises(ManifestError, match="no captions"):
        plan_extraction(no_captions, store, spec)
    assert not os.path.exists(store)
