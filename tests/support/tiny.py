"""Small tables, stores and damages, made by functions: what tests import. The fixtures stand in
conftest.py.

A module of its own, for `conftest` is the name of several files here.
"""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from PIL.Image import Image as Picture
    from torch import Tensor

COLORS = {
    "red": (220, 30, 30),
    "green": (30, 180, 60),
    "blue": (40, 60, 220),
    "yellow": (230, 220, 40),
}
SHAPES = ("circle", "square", "triangle")


def draw_shape(color: str, shape: str, side: int = 48) -> "Picture":
    """An RGB picture of one shape on white."""
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (side, side), "white")
    pen = ImageDraw.Draw(image)
    box = (side // 8, side // 8, side - side // 8, side - side // 8)
    match shape:
        case "circle":
            pen.ellipse(box, fill=COLORS[color])
        case "square":
            pen.rectangle(box, fill=COLORS[color])
        case _:
            pen.polygon(
                [(box[0], box[3]), (box[2], box[3]), (side // 2, box[1])],
                fill=COLORS[color],
            )
    return image


def draw_landscape(width: int, height: int, shades: tuple[int, int] = (0, 255)) -> "Picture":
    """An RGB picture of smooth colors with texture, like a photo, from one shade to the other."""
    import numpy as np
    from PIL import Image

    y, x = np.mgrid[0:height, 0:width] / np.array([height - 1, width - 1]).reshape(2, 1, 1)
    texture = 0.15 * np.sin(40 * x) * np.cos(31 * y)
    channels = [np.clip(channel + texture, 0, 1) for channel in (x, y, 1 - (x + y) / 2)]
    low, high = shades
    values = np.round(low + (high - low) * np.stack(channels, axis=2)).astype(np.uint8)
    # Every channel has both ends.
    values[0, 0] = low
    values[-1, -1] = high
    return Image.fromarray(values)


def squash(image: "Picture") -> "Tensor":
    """The pixels that the tiny image encoder takes, of the whole image: resized, not cropped."""
    import numpy as np
    import torch
    from PIL import Image

    values = np.asarray(image.resize((32, 32), Image.Resampling.BICUBIC), dtype=np.float32)
    return torch.from_numpy(values / 127.5 - 1).permute(2, 0, 1)


def make_shapes(folder: Path, copies: int = 1) -> Path:
    """`copies` sizes of each of the 12 shapes; returns the path of pairs.tsv."""
    (folder / "images").mkdir(parents=True)
    lines = ["image\tcaption\tsplit\tlabel\tlang"]
    for copy in range(copies):
        for number, (color, shape) in enumerate((c, s) for c in COLORS for s in SHAPES):
            key = f"images/{color}-{shape}-{copy}.png"
            draw_shape(color, shape, 48 + 2 * copy).save(folder / key)
            split = "val" if number % 3 == 2 else "train"
            for caption in (f"a {color} {shape}", f"the {shape} in {color} on white"):
                lines.append(f"{key}\t{caption}\t{split}\t{shape}\ten")
    table = folder / "pairs.tsv"
    table.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return table


def extract_tiny(table: Path, store: Path, image: Path, text: Path, **options: object):  # type: ignore[no-untyped-def]
    """Extract with batches of 4 and shards of 5 rows."""
    from apecache.data.sources import open_pairs
    from apecache.encoders.spec import parse_encoder
    from apecache.extraction.run import ExtractSpec, extract

    settings: dict[str, object] = {
        "image_batch": 4,
        "text_batch": 4,
        "shard_rows": 5,
        "device": "cpu",
        **options,
    }
    spec = ExtractSpec(
        parse_encoder(f"timm:{image}", "image"),
        parse_encoder(f"hf:{text}", "text"),
        **settings,
    )  # type: ignore[arg-type]
    return extract(open_pairs(table), store, spec)


@functools.cache
def loaded_once(modality: str):  # type: ignore[no-untyped-def]
    """The loader of that modality, which loads each encoder once."""
    from apecache.encoders.load import load_image_encoders, load_text_encoders

    return functools.cache(load_image_encoders if modality == "image" else load_text_encoders)


class Grown(NamedTuple):
    table: Path
    store: Path


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def put(folder: Path, files: Mapping[str, bytes | None]) -> None:
    """Give files these bytes; None removes one."""
    for name, data in files.items():
        if data is None:
            (folder / name).unlink()
        else:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data)


DAMAGES = ("flip", "empty", "truncate", "enlarge", "delete", "swap")


def damaged(files: Mapping[str, bytes], name: str, how: str) -> dict[str, bytes | None]:
    """What has other bytes after one file is damaged; for `swap` two files of the same size (none
    if there are not)."""
    data = files[name]
    middle = len(data) // 2
    match how:
        case "flip":
            return {name: data[:middle] + bytes([data[middle] ^ 4]) + data[middle + 1 :]}
        case "empty":
            return {name: b""}
        case "truncate":
            return {name: data[:-1]}
        case "enlarge":
            return {name: data + b"\0"}
        case "delete":
            return {name: None}
    alike = [
        other for other, found in sorted(files.items()) if len(found) == len(data) and found != data
    ]
    alike.sort(
        key=lambda other: Path(other).parent != Path(name).parent
    )  # the likeliest to be taken for one another
    return {name: files[alike[0]], alike[0]: data} if alike else {}
