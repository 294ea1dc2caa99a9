"""What exported models lose: format by kind of head by libraries of the encoders.

    python -m benchmarks.quality.exports
    python -m benchmarks.quality.exports --quick          # linear heads and three formats

Small encoders of random weights are written in the files of each library, and heads of random
weights on them. `apecache export-run` writes each run in each format. The other library opens the
folder, and embeds three images and four texts. A row has the largest absolute difference of a
value to what `apecache.load` gives (vectors have length 1), the bytes of the folder and the wall
time of export and comparison. Where a format cannot hold a head or an encoder, the row has the
message. The row of the format `triple` is `apecache.open_clip_triple`, which writes nothing. Rows
are kept in `--rows`, one JSON a line; what is there is not measured again.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch

from apecache.errors import ApecacheError
from apecache.export.check import ExportedModel, compare_exported
from apecache.export.export_run import ExportRunSpec, export_run
from apecache.export.open_clip_triple import open_clip_triple
from apecache.export.whole_model import open_whole_model
from benchmarks.record import Goal, print_goals, print_table, write_result
from benchmarks.small_encoders import HEADS, PAIRS, build_run

FORMATS = ("sentence-transformers", "open_clip", "triple", "transformers", "onnx")
DTYPES = ("float16", "int8")
"""Of a further ONNX row for linear heads."""
EXACT = 1e-5
Row = dict[str, Any]
Cell = tuple[str, str, str, str]
"""Encoders, head, format and dtype."""


def main() -> None:
    options = parse_arguments()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as work:
        kept = options.rows or Path(work) / "rows.jsonl"
        rows = read_rows(kept)
        done = {cell_of(row) for row in rows}
        for row in measure(Path(work), done, options.quick):
            rows.append(row)
            with kept.open("a") as file:
                file.write(json.dumps(row) + "\n")
    measured = [row for row in rows if row["refused"] is None]
    exact = [row for row in measured if row["dtype"] == "float32"]
    worst = max(max(row["image difference"], row["text difference"]) for row in exact)
    goals = [
        Goal(
            name="largest difference of a float32 export",
            value=worst,
            target=EXACT,
            better="lower",
        ),
        Goal(
            name="runs that the triple opens",
            value=sum(row["format"] == "triple" for row in measured),
            target=sum(row["format"] == "triple" for row in rows),
            better="higher",
        ),
    ]
    print_table(rows)
    print_goals(goals)
    if options.json or not options.quick:
        write_result("quality-exports", goals, rows, options.json)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--rows", type=Path)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def read_rows(path: Path) -> list[Row]:
    """Return the rows of an earlier run that was interrupted."""
    lines = path.read_text().splitlines() if path.is_file() else []
    return [json.loads(line) for line in lines]


def cell_of(row: Row) -> Cell:
    """Return what identifies a row."""
    return row["encoders"], row["head"], row["format"], row["dtype"]


def cells(quick: bool) -> Iterator[Cell]:
    """Yield all cells of the table, those of one run one after another."""
    for pair in PAIRS:
        for head in ("linear",) if quick else HEADS:
            for format_name in FORMATS[:3] if quick else FORMATS:
                yield pair, head, format_name, "float32"
            if head == "linear" and not quick:
                for dtype in DTYPES:
                    yield pair, head, "onnx", dtype


def measure(work: Path, done: Collection[Cell], quick: bool = False) -> Iterator[Row]:
    """Yield one row per format, kind of head and pair of encoders that can have the head."""
    for pair in PAIRS:
        for head in HEADS:
            missing = [cell for cell in cells(quick) if cell[:2] == (pair, head)]
            missing = [cell for cell in missing if cell not in done]
            if not missing or (pair, head, "(no such run)", "float32") in done:
                continue
            folder = work / f"{pair} {head}".replace(" ", "-")
            try:
                run = build_run(folder, pair, head)
            except ApecacheError as error:
                yield row_of(pair, head, "(no such run)", refused=str(error))
                continue
            for _, _, format_name, dtype in missing:
                yield measure_cell(
                    run,
                    pair=pair,
                    head=head,
                    format_name=format_name,
                    dtype=dtype,
                )


def measure_cell(
    run: Path,
    pair: str,
    head: str,
    format_name: str,
    dtype: str = "float32",
) -> Row:
    """Export a run beside itself and compare; return a row."""
    out = run.with_name(f"{format_name}-{dtype}")
    begin = time.perf_counter()
    try:
        if format_name == "triple":
            difference = compare_exported(open_triple(run), open_whole_model(run))
            n_bytes = 0
        else:
            spec = ExportRunSpec(to=format_name, dtype=dtype)  # type: ignore[arg-type]
            report = export_run(run, out, spec=spec)
            assert report.difference is not None
            difference = report.difference
            n_bytes = report.n_bytes
    except ApecacheError as error:
        return row_of(pair, head, format_name, dtype=dtype, refused=str(error))
    return row_of(
        pair,
        head,
        format_name,
        dtype=dtype,
        image_difference=difference.image,
        text_difference=difference.text,
        n_bytes=n_bytes,
        seconds=time.perf_counter() - begin,
    )


def row_of(
    pair: str,
    head: str,
    format_name: str,
    dtype: str = "float32",
    image_difference: float | None = None,
    text_difference: float | None = None,
    n_bytes: int | None = None,
    seconds: float | None = None,
    refused: str | None = None,
) -> Row:
    """Return a row of the table."""
    # Folders of the machine have no place in a published table.
    return {
        "encoders": pair,
        "head": head,
        "format": format_name,
        "dtype": dtype,
        "image difference": image_difference,
        "text difference": text_difference,
        "bytes": n_bytes,
        "seconds": None if seconds is None else round(seconds, 1),
        "refused": None if refused is None else without_folders(refused),
    }


def without_folders(message: str) -> str:
    """Return a message with the last parts of absolute paths alone."""
    words = []
    for word in message.split():
        library, colon, path = word.partition(":/")
        words.append(f"{library}:{Path(path).name}" if colon else word)
    return " ".join(words)


def open_triple(run: Path) -> ExportedModel:
    """Return the triple's way to embed."""
    model, preprocess, tokenizer = open_clip_triple(run)
    return ExportedModel(
        encode_image=lambda images: model.encode_image(
            torch.stack([preprocess(image) for image in images])
        ),
        encode_text=lambda texts: model.encode_text(tokenizer(texts)),
    )


if __name__ == "__main__":
    main()
