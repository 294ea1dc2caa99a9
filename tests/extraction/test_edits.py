"""A store outlives its table: only new contents are encoded, and a view says where all others
are."""

from collections.abc import Callable
from pathlib import Path

import pytest
from tiny import COLORS, SHAPES, draw_shape, extract_tiny

from apecache.store.verify import verify_store
from benchmarks.reliability.edits import Catalog, Row, run_edits

pytestmark = pytest.mark.usefixtures("no_fsync", "load_once")


@pytest.fixture
def catalog(tmp_path: Path) -> Catalog:
    """12 pictures, each with two English captions and a German one."""
    folder = tmp_path / "data"
    (folder / "images").mkdir(parents=True)
    rows = []
    for color in COLORS:
        for shape in SHAPES:
            key = f"images/{color}-{shape}.png"
            draw_shape(color, shape).save(folder / key)
            for caption in (f"a {color} {shape}", f"the {shape} in {color} on white"):
                rows.append(Row(image=key, caption=caption))
            rows.append(Row(image=key, caption=f"{shape} {color}", lang="de"))
    return Catalog(folder=folder, rows=rows)


@pytest.fixture
def new_images(tmp_path: Path) -> list[Path]:
    paths = []
    for number, color in enumerate(COLORS):
        paths.append(tmp_path / f"new-{number}.png")
        draw_shape(color, "circle", 60).save(paths[-1])
    return paths


@pytest.fixture
def extract(tiny_image_encoder: Path, tiny_text_encoder: Path) -> Callable[..., object]:
    def run(table: Path, store: Path, **options: object) -> object:
        options = {"max_bad": 0.2, **options}
        return extract_tiny(
            table,
            store=store,
            image=tiny_image_encoder,
            text=tiny_text_encoder,
            **options,
        )

    return run


def test_twelve_edits_encode_only_what_is_new(
    catalog: Catalog,
    new_images: list[Path],
    extract: Callable[..., object],
    tmp_path: Path,
) -> None:
    results = list(run_edits(catalog, tmp_path / "store", new_images, extract))  # type: ignore[arg-type]
    assert [result.edit.name for result in results if not result.right] == []
    assert len(results) == 13  # a file is missing, and is back: one edit of two steps
    assert verify_store(tmp_path / "store").problems == ()
