"""The same five images as a source of every kind, each written by the library that people write it
with."""

import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tiny import COLORS, draw_shape

NAMES = ("a.png", "b.png", "c.png", "d.png", "e.png")
CAPTIONS = tuple(f"a {color} circle" for color in (*COLORS, "white"))
SPLITS = ("train", "train", "train", "val", "test")
LABELS = ("warm", "cold", "cold", "warm", "cold")


def image_bytes(number: int) -> bytes:
    buffer = io.BytesIO()
    draw_shape([*COLORS, "red"][number], "circle", 40 + number).save(buffer, "PNG")
    return buffer.getvalue()


def write_images(folder: Path, names: Sequence[str] = NAMES) -> Path:
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(image_bytes(number))
    return folder


def write_tar(path: Path, members: Mapping[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def samples(rows: Sequence[int] = range(5), json_too: bool = False) -> dict[str, bytes]:
    """Members of a tar as img2dataset writes them."""
    members: dict[str, bytes] = {}
    for row in rows:
        key = NAMES[row].removesuffix(".png")
        members |= {
            f"{key}.png": image_bytes(row),
            f"{key}.txt": CAPTIONS[row].encode(),
            f"{key}.cls": b"7",
        }
        if json_too:
            members[f"{key}.json"] = json.dumps(
                {"caption": f"{key} in JSON", "alt": "other", "split": "val"}
            ).encode()
    return members


def write_parquet(
    path: Path,
    columns: Mapping[str, Any],
    row_group_size: int | None = None,
    **types: Any,
) -> Path:
    import pyarrow as pa
    from pyarrow import parquet

    arrays = {name: pa.array(values, types.get(name)) for name, values in columns.items()}
    parquet.write_table(pa.table(arrays), path, row_group_size=row_group_size)
    return path


def struct_type() -> Any:
    import pyarrow as pa

    return pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def structs(names: Sequence[str | None] = NAMES) -> list[dict[str, Any]]:
    return [{"bytes": image_bytes(row), "path": name} for row, name in enumerate(names)]


def write_table(path: Path, header: Sequence[str], rows: Sequence[Sequence[str]]) -> Path:
    separator = "\t" if path.suffix == ".tsv" else ","
    path.write_text(
        "\n".join(separator.join(row) for row in (header, *rows)) + "\n",
        encoding="utf-8",
    )
    return path
