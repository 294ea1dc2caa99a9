"""The goals of the GPU benchmark, from its rows. Goals without a row are left out."""

from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks.gpu.parts import Row
from benchmarks.record import Goal

FIT_SECONDS = {1024: 5.0, 4096: 8.0, 16_384: 60.0}
"""Seconds of the fits of `heads.FITS`, by batch size."""
CAPTIONS_S = 25_000
GEMM_SHARE = 0.4
END_TO_END_SHARE = 0.9
MEMBERS_GAIN = 8.0
HEAD_DISTANCE = 1e-3
FEATURE_ERROR = 1e-4


def reached_goals(rows: Sequence[Row]) -> list[Goal]:
    """Compare what was measured with the ceilings of the same run and with fixed goals."""
    return [*_encoder_goals(rows), *_head_goals(rows)]


def _encoder_goals(rows: Sequence[Row]) -> Iterator[Goal]:
    gemm = _value(rows, "TFLOP/s", what="gemm", precision="float16")
    model_flops = _value(
        rows, "TFLOP/s", what="bare image model", model="vit-b", precision="float16"
    )
    if gemm and model_flops:
        yield Goal(
            name="ViT-B/14 in float16, share of the rate of products",
            value=round(model_flops / gemm, 3),
            target=GEMM_SHARE,
            better="higher",
        )
    model = _value(rows, "images_s", what="bare image model", model="vit-b", precision="float16")
    decoding = _value(rows, "images_s", what="decoding", resize="torchvision")
    whole = _value(rows, "image_rows_s", what="extraction", run="vit-b torchvision")
    if model and decoding and whole:
        yield Goal(
            name="extraction by ViT-B/14, share of the slower of decoding and model",
            value=round(whole / min(model, decoding), 3),
            target=END_TO_END_SHARE,
            better="higher",
        )
    on_device = _value(rows, "images_s", what="decoding on the device", resized=True)
    run = "vit-b decoded on the device"
    decoded_there = _value(rows, "image_rows_s", what="extraction", run=run)
    if model and on_device and decoded_there:
        # The card does both, one after the other.
        both = 1 / (1 / model + 1 / on_device)
        yield Goal(
            name="extraction with --decode cuda, share of decoding and model on the card",
            value=round(decoded_there / both, 3),
            target=END_TO_END_SHARE,
            better="higher",
        )
    captions = _value(rows, "text_rows_s", what="extraction", run="captions")
    counted = _value(rows, "text_rows_s", what="extraction", run="captions, 256 in a batch")
    if captions and counted:
        yield Goal(
            name="captions in batches of tokens, times the rate of 256 in a batch",
            value=round(captions / counted, 3),
            target=1.0,
            better="higher",
        )
    if captions:
        yield Goal(
            name="captions a second, BERT-base in float16",
            value=captions,
            target=CAPTIONS_S,
            better="higher",
        )
    error = _value(rows, "error", what="features", precision="float32")
    if error is not None:
        yield Goal(
            name="features in float32, worst 1 - cosine to the CPU's",
            value=error,
            target=FEATURE_ERROR,
            better="lower",
        )


def _head_goals(rows: Sequence[Row]) -> Iterator[Goal]:
    distances = [row["distance"] for row in rows if row["what"] == "recipe" and "distance" in row]
    if distances:
        yield Goal(
            name="embeddings of all recipes after three steps, distance to the CPU's",
            value=max(distances),
            target=HEAD_DISTANCE,
            better="lower",
        )
    for row in rows:
        if row["what"] == "fit" and row["batch"] in FIT_SECONDS:
            yield Goal(
                name=f"seconds of projection on {row['pairs']:,} pairs, batch {row['batch']:,}",
                value=row["fit_seconds"],
                target=FIT_SECONDS[row["batch"]],
                better="lower",
            )
        if row["what"] in ("fit", "population") and row.get("waits") is not None:
            size = row.get("batch") or f"{row['recipe']}, {row['members']} members"
            yield Goal(
                name=f"waits a step, {row['what']} {size}",
                value=row["waits"],
                target=0.0,
                better="lower",
            )
    gain = _value(rows, "alone / together", what="population", recipe="projection", members=32)
    if gain:
        yield Goal(
            name="32 members together, times as fast as one by one",
            value=gain,
            target=MEMBERS_GAIN,
            better="higher",
        )


def _value(rows: Sequence[Row], name: str, **criteria: Any) -> Any:
    """Return a value of the first row that meets the criteria; None without one."""
    for row in rows:
        if name in row and all(row.get(key) == value for key, value in criteria.items()):
            return row[name]
    return None
