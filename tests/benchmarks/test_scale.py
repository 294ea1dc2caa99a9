"""The page of computed costs: the script writes it, and sizes are those of a real store."""

from functools import partial
from pathlib import Path

from tiny import extract_tiny

from apecache.encoders.load import shape_tower
from apecache.encoders.spec import parse_encoder
from apecache.plan.counting import PlanSpec
from apecache.plan.plan import plan
from apecache.recipes.recipe import load_recipe
from benchmarks.cost.scale import DEVICE, PAGE, cached_array, page


def test_the_committed_page_is_what_the_script_writes() -> None:
    assert PAGE.read_text(encoding="utf-8") == page()


def test_bytes_and_objects_are_those_of_a_real_store(
    shapes: Path,
    tmp_path: Path,
    tiny_image_encoder: Path,
    tiny_text_encoder: Path,
    no_fsync: None,
) -> None:
    store = tmp_path / "store"
    extract_tiny(
        shapes,
        store=store,
        image=tiny_image_encoder,
        text=tiny_text_encoder,
        shard_rows=12,
    )
    planned = plan(
        load_recipe("projection"),
        image=partial(shape_tower, parse_encoder(f"timm:{tiny_image_encoder}", "image")),
        text=partial(shape_tower, parse_encoder(f"hf:{tiny_text_encoder}", "text")),
        spec=PlanSpec(rows=12, tokens=16),
        device=DEVICE,
    )
    array = cached_array(planned.image, rows=12)
    data_folder = store / "features.zarr" / "image"
    data = [path for path in data_folder.rglob("c.*") if path.is_file()]
    records = list((store / "records" / "image").glob("*/commits/*.json"))
    assert array.n_shards == len(records)
    assert array.n_objects == len(data) + len(records)
    assert array.data_bytes == sum(path.stat().st_size for path in data)
    written_bytes = sum(path.stat().st_size for path in records)
    # All else in a record is below 1 kB.
    assert array.record_bytes <= written_bytes <= array.record_bytes + 1000 * len(records)
