"""Choose the precision of encoders that fill new arrays, and measure its error.

The error of a precision is the worst 1 - cosine of a row against the same encoder in float32, on a
probe of real rows.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from apecache.data.images import LoadedImage, load_as, load_image
from apecache.data.pairs import PairSource
from apecache.data.tensors import decode_tensor
from apecache.device import (
    CPU,
    is_accelerator,
    release_cached_memory,
    resolve_device,
    timed_seconds,
)
from apecache.encoders.encoder import ImageEncoder, TextEncoder, encode_images, encode_texts
from apecache.encoders.load import load_image_encoders, load_text_encoders
from apecache.encoders.spec import PRECISIONS, EncoderSpec, Precision
from apecache.errors import OptionError, RowError, nearest
from apecache.extraction.encode import encode_or_halve
from apecache.extraction.encode_texts import caption_error
from apecache.extraction.spec import ExtractSpec, MeasuredPrecision
from apecache.fingerprint import Modality
from apecache.storage.files import Files
from apecache.store.layout import SOURCE, ArrayRecord
from apecache.store.reader import FeatureStore

MAX_ERROR = 1e-4
"""Largest error of a precision that is chosen by default."""
PROBED_ROWS = 256
PROBED_ROWS_CPU = 32
PROBE_BATCH = 64
MODEL_PATIENCE = 0.95
"""A less exact precision must take less than this share of the time of a more exact one."""
BY_EXACTNESS: tuple[Precision, ...] = ("float32", "tf32", "float16", "bfloat16")
"""Candidates, the most exact first, as measured on ViTs and CNNs."""

Item = TypeVar("Item")
Encoder = ImageEncoder | TextEncoder


@dataclass(frozen=True, kw_only=True)
class ProbeResult:
    """Hold what an encoder made of the probe."""

    features: list[Tensor]
    """For each cut float32 [n, dim] on the CPU; tokens are flattened, padding is zero."""
    seconds: float
    """Of the probe once more, when everything is warm."""


def with_precision(
    source: PairSource,
    files: Files,
    spec: ExtractSpec,
    measure: bool = True,
) -> ExtractSpec:
    """Return the spec with the precision of every encoder decided, and the errors measured.

    Arrays that the store has keep their precision, on whichever device they are resumed. For new
    arrays it is what the spec asks for, else on a CPU float32, else the fastest one whose error on
    real rows is at most `MAX_ERROR`.

    Args:
        source: its rows are the probe.
        files: of the store, which need not exist.
        measure: whether this process may load encoders; without, float32 is the default.

    Raises:
        OptionError: an unknown precision.
        EncoderError: an encoder cannot be loaded.
    """
    if spec.precision is not None and spec.precision not in PRECISIONS:
        known_precisions = ", ".join(PRECISIONS)
        hint = nearest(spec.precision, PRECISIONS)
        raise OptionError(f"precision {spec.precision!r}: expected one of {known_precisions}{hint}")
    device = resolve_device(spec.device) if measure else CPU
    records = _records(files)
    measured: list[MeasuredPrecision] = []
    decided: dict[EncoderSpec, Precision] = {}
    for cuts in _by_model((*spec.images, *spec.texts)):
        stored = _stored_precisions(cuts, records)
        requested_precision = spec.precision or (
            cuts[0].dtype if cuts[0].dtype != "float32" else None
        )
        if stored and (requested_precision is None or requested_precision in stored):
            precision: Precision = requested_precision or stored[0]
        elif requested_precision is not None:
            precision = requested_precision
            if requested_precision != "float32" and measure:
                figures = _measured(cuts, [requested_precision], source, spec, device)
                measured.append(figures[requested_precision])
        elif is_accelerator(device):
            by_precision = _measured(cuts, BY_EXACTNESS[1:], source, spec, device)
            precision = _fastest(by_precision.values())
            if precision != "float32":
                measured.append(by_precision[precision])
        else:
            precision = "float32"
        decided |= dict.fromkeys(cuts, precision)
    return replace(
        spec,
        image=tuple(replace(cut, dtype=decided[cut]) for cut in spec.images),
        text=tuple(replace(cut, dtype=decided[cut]) for cut in spec.texts),
        measured=tuple(measured),
    )


def _records(files: Files) -> list[ArrayRecord]:
    """Return the records of the arrays of a store; none where there is no store yet."""
    if not files.exists(SOURCE):
        return []
    store = FeatureStore.at(files)
    modalities: tuple[Modality, ...] = ("image", "text")
    return [array.record for modality in modalities for array in store.arrays(modality)]


def _by_model(specs: Sequence[EncoderSpec]) -> list[list[EncoderSpec]]:
    """Group cuts of one model: they have one forward pass, and so one precision."""
    groups: dict[EncoderSpec, list[EncoderSpec]] = {}
    for spec in specs:
        groups.setdefault(_model_of(spec), []).append(spec)
    return list(groups.values())


def _model_of(spec: EncoderSpec) -> EncoderSpec:
    return replace(spec, pooling="default", layer=None)


def _stored_precisions(
    cuts: Sequence[EncoderSpec],
    records: Iterable[ArrayRecord],
) -> list[Precision]:
    """Return the precisions in which a store has one of these cuts."""
    without_precision = {replace(cut, dtype="float32") for cut in cuts}
    return [
        record.spec.dtype
        for record in records
        if replace(record.spec, dtype="float32") in without_precision
    ]


# --- the probe ------------------------------------------------------------------------------------


def _measured(
    cuts: Sequence[EncoderSpec],
    precisions: Sequence[Precision],
    source: PairSource,
    spec: ExtractSpec,
    device: torch.device,
) -> dict[Precision, MeasuredPrecision]:
    """Measure precisions of one model, float32 included."""
    n_rows = PROBED_ROWS if is_accelerator(device) else PROBED_ROWS_CPU
    exact = _probe(cuts, "float32", source, spec, n_rows)
    results: dict[Precision, MeasuredPrecision] = {}
    for precision in ("float32", *precisions):
        result = exact if precision == "float32" else _probe(cuts, precision, source, spec, n_rows)
        results[precision] = MeasuredPrecision(
            model=_model_of(replace(cuts[0], dtype=precision)),
            error=_worst_error(exact.features, result.features),
            n_rows=len(exact.features[0]),
            seconds=result.seconds,
        )
    return results


def _fastest(measured: Iterable[MeasuredPrecision]) -> Precision:
    """Return the fastest precision that is exact enough, the more exact one where it is close."""
    by_precision = {result.model.dtype: result for result in measured}
    best = by_precision["float32"]
    for precision in BY_EXACTNESS[1:]:
        result = by_precision[precision]
        if result.error <= MAX_ERROR and result.seconds < MODEL_PATIENCE * best.seconds:
            best = result
    return best.model.dtype


def _probe(
    cuts: Sequence[EncoderSpec],
    precision: Precision,
    source: PairSource,
    spec: ExtractSpec,
    n_rows: int,
) -> ProbeResult:
    """Encode the probe in one precision, twice: the second time is measured."""
    specs = [replace(cut, dtype=precision) for cut in cuts]
    if specs[0].modality == "image":
        images = load_image_encoders(specs, spec.device)
        pixels = _probe_pixels(images[0], source, n_rows)
        result = _encode_twice(images, pixels)
    else:
        texts = load_text_encoders(specs, spec.device)
        captions = _spread([text for text in source.captions if not caption_error(text)], n_rows)
        ids = sorted(texts[0].tokenize(captions).ids, key=len)
        result = _encode_twice(texts, ids)
    release_cached_memory(resolve_device(spec.device))
    return result


def _probe_pixels(encoder: ImageEncoder, source: PairSource, n_rows: int) -> Tensor:
    """Return the pixels of images that are spread over the source; unreadable ones are left out."""
    pixels: list[Tensor] = []
    for key in _spread(source.keys, n_rows):
        try:
            # An encoder that resizes tensors takes them as well as Pillow's images.
            loaded: LoadedImage[Any] = (
                load_as(decode_tensor, key, source.media, source.pixels)
                if encoder.spec.resize == "torchvision"
                else load_image(key, source.media, source.pixels)
            )
            pixels.append(encoder.preprocess(loaded.image))
        except (RowError, ValueError, OSError, RuntimeError):
            continue
    return torch.stack(pixels) if pixels else torch.zeros(1, *encoder.input_shape)


def _spread(items: Sequence[Item], count: int) -> list[Item]:
    """Return at most `count` items, spread evenly."""
    stride = max(1, -(-len(items) // count))
    return list(items[::stride])


def _encode_twice(
    encoders: Sequence[ImageEncoder] | Sequence[TextEncoder],
    rows: Tensor | list[list[int]],
) -> ProbeResult:
    device = encoders[0].device
    features = _encode(encoders, rows)
    seconds = timed_seconds(lambda: _encode(encoders, rows), device)
    return ProbeResult(features=features, seconds=seconds)


def _encode(
    encoders: Sequence[ImageEncoder] | Sequence[TextEncoder],
    rows: Tensor | list[list[int]],
) -> list[Tensor]:
    """Return for each encoder float32 [n, numbers of a row] on the CPU."""

    def run(batch: Tensor | list[list[int]]) -> list[Tensor]:
        if isinstance(batch, Tensor):
            return encode_images(encoders, batch)  # type: ignore[arg-type]
        return encode_texts(encoders, batch)  # type: ignore[arg-type]

    features: list[list[Tensor]] = [[] for _ in encoders]
    for first in range(0, len(rows), PROBE_BATCH):
        batch = rows[first : first + PROBE_BATCH]
        for row_lists, encoded in zip(
            features,
            encode_or_halve(run, batch, encoders[0].device),
            strict=True,
        ):
            row_lists.extend(_valid_numbers(encoded.cpu(), batch))
    return [torch.nn.utils.rnn.pad_sequence(row_list, batch_first=True) for row_list in features]


def _valid_numbers(encoded: Tensor, batch: Tensor | list[list[int]]) -> list[Tensor]:
    """Return each row flattened, without the tokens of padding."""
    if isinstance(batch, Tensor) or encoded.ndim == 2:
        return [row.flatten() for row in encoded]
    pairs = zip(encoded, batch, strict=True)
    return [row[: len(ids)].flatten() for row, ids in pairs]


def _worst_error(exact: Sequence[Tensor], rounded: Sequence[Tensor]) -> float:
    """Return the largest 1 - cosine of a row of any cut; infinity where numbers are not finite."""
    errors: list[float] = []
    for exact_rows, rounded_rows in zip(exact, rounded, strict=True):
        cosines = torch.cosine_similarity(exact_rows.double(), rounded_rows.double())
        errors.append(float((1 - cosines).max()))
    worst = max(errors)
    # NaN would pass every comparison with a limit.
    return max(0.0, worst) if worst == worst else float("inf")
