"""Edit a table twelve times: only new contents are encoded, and all other features stay the same.

python -m benchmarks.reliability.edits [--pairs TABLE…] [--image ENCODER --text ENCODER]
    [--reuse STORE] [--quick]
"""

import argparse
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from apecache.data.sources import open_pairs
from apecache.encoders.packaged import write_packaged_encoders
from apecache.encoders.spec import parse_encoder
from apecache.extraction.report import ExtractReport
from apecache.extraction.run import ExtractSpec, extract
from apecache.fingerprint import Modality, content_hash
from apecache.store.reader import FeatureStore
from benchmarks.record import Goal, print_goals, print_table, write_result

N_ADDED = 100
DRAWINGS = Path(__file__).parents[2] / "examples" / "drawings" / "pairs.tsv"
HEADER = ("image", "caption", "split", "label", "lang")


@dataclass(frozen=True, kw_only=True)
class Row:
    """Hold one line of the table."""

    image: str
    caption: str
    split: str = ""
    label: str = ""
    lang: str = "en"


@dataclass(kw_only=True)
class Catalog:
    """Hold a table and the folder of its images, to be edited."""

    folder: Path
    rows: list[Row]
    kept: dict[str, Path] = field(default_factory=dict)
    """Files that are out of the way."""

    @property
    def table(self) -> Path:
        return self.folder / "table.tsv"

    @property
    def images(self) -> list[str]:
        return list(dict.fromkeys(row.image for row in self.rows))

    def write(self) -> Path:
        """Write the table; columns that are empty everywhere are left out."""
        names = [name for name in HEADER if any(getattr(row, name) for row in self.rows)]
        lines = ["\t".join(names)]
        for row in self.rows:
            lines.append("\t".join(getattr(row, name) for name in names))
        self.table.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return self.table

    def change(self, change: Callable[[Row], Row]) -> None:
        self.rows = [change(row) for row in self.rows]


@dataclass(frozen=True, kw_only=True)
class Edit:
    """Name an edit, and count what it adds."""

    name: str
    n_images: int = 0
    """Images with new contents."""
    n_texts: int = 0
    """Captions with new characters."""


@dataclass(frozen=True, kw_only=True)
class EditResult:
    """Say what an extraction after an edit did."""

    edit: Edit
    n_rows: int
    """Images of the table."""
    n_images: int
    """Images that were encoded."""
    n_texts: int
    """Captions that were encoded."""
    n_changed: int
    """Features that are not what they were before, bit by bit."""
    seconds: float

    @property
    def right(self) -> bool:
        wanted = (self.edit.n_images, self.edit.n_texts, 0)
        return (self.n_images, self.n_texts, self.n_changed) == wanted


def edits(catalog: Catalog, new_images: Sequence[Path]) -> Iterator[Edit]:
    """Edit a catalog twelve times; the table is written before each edit is given.

    Args:
        catalog: Rows without splits, in two languages, with images in `images/`.
        new_images: Files that the catalog does not have: one replaces a photo, the rest are added.
    """
    first_rows = list(catalog.rows)
    images = catalog.folder / "images"
    removed = catalog.images[1]
    catalog.rows = [row for row in catalog.rows if row.image != removed]
    yield _written(catalog, Edit(name="remove a row"))

    fixed = catalog.rows[0]
    caption = f"{fixed.caption} corrected"
    catalog.rows[0] = replace(fixed, caption=caption)
    yield _written(catalog, Edit(name="fix a caption", n_texts=1))

    random.Random(0).shuffle(catalog.rows)
    yield _written(catalog, Edit(name="shuffle"))

    catalog.change(lambda row: replace(row, split=_split_of(row.image)))
    yield _written(catalog, Edit(name="add a split column"))

    added, replacement = new_images[:-1], new_images[-1]
    for number, path in enumerate(added):
        key = f"images/new-{number}{path.suffix}"
        shutil.copy2(path, catalog.folder / key)
        catalog.rows.append(Row(image=key, caption=f"new picture {number}", split="train"))
    edit = Edit(name=f"add {len(added)} images", n_images=len(added), n_texts=len(added))
    yield _written(catalog, edit)

    photo = catalog.folder / catalog.images[0]
    original = photo.read_bytes()
    _put(photo, replacement.read_bytes())
    yield _written(catalog, Edit(name="replace a photo", n_images=1))

    moved = catalog.folder / "moved"
    images.rename(moved)
    catalog.change(lambda row: replace(row, image=row.image.replace("images/", "moved/")))
    yield _written(catalog, Edit(name="rename the folder"))

    catalog.rows = [row for row in catalog.rows if row.lang == "en"]
    yield _written(catalog, Edit(name="drop a language"))

    missing = catalog.folder / catalog.images[2]
    away = catalog.folder / "away"
    missing.rename(away)
    yield _written(catalog, Edit(name="a file is missing"))
    away.rename(missing)
    yield _written(catalog, Edit(name="and is back"))

    for number, row in enumerate(catalog.rows[:3]):
        key = f"moved/copy-{number}{Path(row.image).suffix}"
        shutil.copyfile(catalog.folder / row.image, catalog.folder / key)
        catalog.rows.append(replace(row, image=key))
    yield _written(catalog, Edit(name="duplicate rows"))

    catalog.change(lambda row: replace(row, label=content_hash(row.image)[:1]))
    yield _written(catalog, Edit(name="change the label column"))

    moved.rename(images)
    _put(images / photo.name, original)
    catalog.rows = first_rows
    yield _written(catalog, Edit(name="undo everything"))


def _written(catalog: Catalog, edit: Edit) -> Edit:
    catalog.write()
    return edit


def _split_of(key: str) -> str:
    return "val" if content_hash(key) < "4" else "train"


def _put(path: Path, data: bytes) -> None:
    """Replace a file: the path may be a hard link to a file that must stay as it is."""
    temporary = path.with_name("temporary")
    temporary.write_bytes(data)
    os.replace(temporary, path)


def run_edits(
    catalog: Catalog,
    store: Path,
    new_images: Sequence[Path],
    extract: Callable[[Path, Path], ExtractReport],
) -> Iterator[EditResult]:
    """Extract a catalog, then extract it after each edit.

    Args:
        catalog: As `edits` takes it.
        store: Folder of the new store.
        new_images: As `edits` takes it.
        extract: Extracts a table into a store.
    """
    features: dict[tuple[Modality, str], bytes] = {}
    extract(catalog.write(), store)
    _compare(store, catalog, features)
    for edit in edits(catalog, new_images):
        report = extract(catalog.table, store)
        n_encoded = {array.modality: array.n_encoded for array in report.arrays}
        yield EditResult(
            edit=edit,
            n_rows=len(catalog.images),
            n_images=n_encoded["image"],
            n_texts=n_encoded["text"],
            n_changed=_compare(store, catalog, features),
            seconds=report.seconds,
        )


def _compare(store: Path, catalog: Catalog, features: dict[tuple[Modality, str], bytes]) -> int:
    """Count wrong rows of the newest view, and remember the features of contents that are new.

    A row is wrong if it has not the content that its key has now, or if the features of the content
    are not those that it had before.
    """
    opened = FeatureStore.open(store)
    n_wrong = 0
    keys = opened.pairs.keys
    source = open_pairs(catalog.table)
    n_wrong += int(keys.tolist() != source.keys)
    n_wrong += int(opened.pairs.captions.tolist() != source.captions)
    inputs: dict[Modality, list[str]] = {
        "image": [_digest(catalog.folder / key) for key in source.keys],
        "text": [content_hash(caption) for caption in source.captions],
    }
    for modality, digests in inputs.items():
        array = opened.array(modality)
        loaded = array.load()
        ok = array.load_ok()
        for row, digest in enumerate(digests):
            if not digest:
                n_wrong += int(ok[row])
                continue
            row_bytes = loaded[row].tobytes()
            n_wrong += int(not ok[row])
            n_wrong += int(features.setdefault((modality, digest), row_bytes) != row_bytes)
    return n_wrong


def _digest(path: Path) -> str:
    return content_hash(path.read_bytes()) if path.is_file() else ""


# --- the benchmark --------------------------------------------------------------------------------


def catalog_of(tables: Sequence[Path], folder: Path, n_images: int) -> tuple[Catalog, list[Path]]:
    """Copy the first images of tables into a folder, to be edited; and return files to add.

    The captions of all tables are joined by image; 100 further images are to be added, and one is a
    replacement.
    """
    rows: list[Row] = []
    sources = [open_pairs(table) for table in tables]
    keys = sources[0].keys[: n_images + N_ADDED + 1]
    n_images = len(keys) - N_ADDED - 1
    kept = set(keys[:n_images])
    root = tables[0].parent
    for source in sources:
        for pair in source:
            if pair.key in kept:
                for caption, language in zip(pair.captions, pair.languages, strict=True):
                    rows.append(Row(image=pair.key, caption=caption, lang=language or "en"))
    for key in kept:
        (folder / key).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(root / key, folder / key)
    order = {key: row for row, key in enumerate(keys)}
    rows.sort(key=lambda row: order[row.image])
    return Catalog(folder=folder, rows=rows), [root / key for key in keys[n_images:]]


def main() -> int:
    """Edit a catalog twelve times, print the table, and write the JSON file."""
    parser = argparse.ArgumentParser(description="What twelve edits of a table encode.")
    parser.add_argument(
        "--pairs",
        type=Path,
        nargs="+",
        default=[DRAWINGS],
        help="tables of the images, the first with all of them; default: the demo's drawings",
    )
    parser.add_argument("--image", help="image encoder, as apecache extract takes it")
    parser.add_argument("--text", help="text encoder; without both, the packaged ones")
    parser.add_argument("--images", type=int, default=400, help="images of the catalog")
    parser.add_argument("--reuse", help="store of which the first extraction takes rows")
    parser.add_argument("--quick", action="store_true", help="200 images")
    parser.add_argument("--json", type=Path, help="where to write the result")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        image, text = options.image, options.text
        if not (image and text):
            image_folder, text_folder = write_packaged_encoders(Path(folder) / "encoders")
            image, text = f"timm:{image_folder}", f"hf:{text_folder}"
        spec = ExtractSpec(
            image=parse_encoder(image, "image"),
            text=parse_encoder(text, "text"),
            device="cpu",
        )
        first_spec = replace(spec, reuse=options.reuse)
        n_images = 200 if options.quick else options.images
        catalog, new_images = catalog_of(options.pairs, Path(folder) / "data", n_images)
        results = run_edits(
            catalog,
            Path(folder) / "store",
            new_images,
            lambda table, store: extract(
                open_pairs(table),
                store=store,
                spec=spec if store.exists() else first_spec,
            ),
        )
        rows: list[dict[str, object]] = []
        for result in results:
            row = {
                "edit": result.edit.name,
                "images": result.n_rows,
                "encoded_images": result.n_images,
                "encoded_captions": result.n_texts,
                "changed_features": result.n_changed,
                "right": result.right,
                "seconds": round(result.seconds, 2),
            }
            rows.append(row)
    print_table(rows)
    n_wrong = sum(not row["right"] for row in rows)
    goals = [
        Goal(
            name="edits that encode more or less than their new contents, or change a feature",
            value=n_wrong,
            target=0,
            better="lower",
        )
    ]
    print_goals(goals)
    if options.json or not options.quick:
        write_result("reliability-edits", goals=goals, rows=rows, path=options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
