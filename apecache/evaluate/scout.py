"""Compare encoders, layers and poolings on a small sample of pairs, before any extraction."""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from apecache.arguments import require_spec, require_type
from apecache.data.decoding import preprocess_ahead, reading_ahead
from apecache.data.images import load_image
from apecache.data.pairs import PairSource
from apecache.encoders.encoder import ImageEncoder, TextEncoder, encode_images, encode_texts
from apecache.encoders.load import load_image_encoders, load_text_encoders
from apecache.encoders.spec import EncoderSpec
from apecache.errors import DataError, OptionError, counted, nearest
from apecache.extraction.encode import encode_or_halve
from apecache.extraction.encode_texts import caption_error
from apecache.metrics.geometry import KNN_NEIGHBORS, FeatureSimilarity, likeness
from apecache.metrics.relevance import Relevance
from apecache.metrics.retrieval import mean_chance
from apecache.store.equal import equal_captions

SMALLEST = 24
"""Least number of images that a scout measures."""
ScoutProgress = Callable[[str, int, int], None]
"""Called with the name of an encoder, the rows done and all rows."""


@dataclass(frozen=True)
class ScoutSpec:
    """Say which encoders are compared, and on which sample."""

    image: tuple[EncoderSpec, ...]
    """Image encoders and their cuts. Cuts of one encoder cost one pass."""
    text: tuple[EncoderSpec, ...]
    """Text encoders and their cuts."""
    n_pairs: int = 1000
    """Images to draw."""
    seed: int = 0
    """Draws images, one caption of each, and the half that the regression is fitted on."""
    device: str = "auto"
    batch: int = 32
    workers: int = os.cpu_count() or 1


@dataclass(frozen=True, kw_only=True)
class ScoutRow:
    """Compare one cut of an image encoder with one cut of a text encoder."""

    image: str
    """The name that its features get in a store."""
    text: str
    """The name that its features get in a store."""
    likeness: FeatureSimilarity


@dataclass(frozen=True, kw_only=True)
class ScoutReport:
    """Hold the comparison of all pairs of cuts."""

    rows: tuple[ScoutRow, ...]
    """Best mean R@1 first."""
    n_fit: int
    """Pairs that the regression was fitted on."""
    n_measured: int
    """Pairs that recall was measured on."""
    n_unreadable: int
    """Images of the sample that were left out."""
    chance: float
    """Expected R@1 of a random order, in per cent."""
    chance_mutual_knn: float
    """Expected `mutual_knn` of unrelated features, 0 to 1."""


def scout(
    source: PairSource,
    spec: ScoutSpec,
    progress: ScoutProgress = lambda *_: None,
) -> ScoutReport:
    """Compare every image cut with every text cut, on one sample of images with one caption each.

    Raises:
        DataError: too few images with captions that can be read.
        EncoderError: an encoder or a cut that cannot be loaded.
        OptionError: a cut that keeps tokens, or no encoder of one modality.
    """
    require_type(source, PairSource, "source")
    require_spec(spec, ScoutSpec, "spec")
    _require_pooled(spec)
    keys, captions = draw_pairs(source, spec.n_pairs, spec.seed)
    images, ok = _encode_all_images(source, keys=keys, spec=spec, progress=progress)
    if int(ok.sum()) < SMALLEST:
        raise DataError(
            f"{source.origin}: {counted(int(ok.sum()), 'image')} with captions can be read; a "
            "scout "
            f"needs {SMALLEST}"
        )
    usable = [caption for caption, good in zip(captions, ok.tolist(), strict=True) if good]
    texts = _encode_all_texts(usable, spec, progress)
    n = int(ok.sum())
    n_fit = n // 2
    # A stream of its own, so that the half does not depend on how the pairs were drawn.
    order = np.random.default_rng((spec.seed, 1)).permutation(n)
    fit = torch.zeros(n, dtype=torch.bool)
    fit[torch.from_numpy(order[:n_fit])] = True
    n_measured = n - n_fit
    caption_ids = torch.from_numpy(equal_captions(np.array(usable, object)))[~fit]
    relevance = Relevance.of(torch.arange(n_measured), caption_ids, None)
    rows = []
    for image, image_features in images.items():
        for text, text_features in texts.items():
            measured = likeness(
                image_features[ok],
                text=text_features,
                fit=fit,
                relevance=relevance,
            )
            rows.append(ScoutRow(image=image.slug, text=text.slug, likeness=measured))
    rows.sort(key=lambda row: -row.likeness.recall_at_1)
    if relevance is None:
        chance = 100 / n_measured
    else:
        chance = mean_chance(n_measured, relevance.n_right_images(), 1)
    return ScoutReport(
        rows=tuple(rows),
        n_fit=n_fit,
        n_measured=n_measured,
        n_unreadable=len(keys) - n,
        chance=chance,
        # `mutual_knn` compares so many neighbors, or all if there are fewer.
        chance_mutual_knn=min(KNN_NEIGHBORS, n - 1) / (n - 1),
    )


def draw_pairs(source: PairSource, n: int, seed: int) -> tuple[list[str], list[str]]:
    """Draw up to n images and one usable caption of each, in the order of the source.

    Returns:
        The keys of the images, and the captions.
    """
    generator = np.random.default_rng((seed, 0))
    usable = {}
    for row, pair in enumerate(source):
        captions = [caption for caption in pair.captions if caption_error(caption) is None]
        if captions:
            usable[row] = captions
    rows = list(usable)
    drawn_rows = sorted(rows[i] for i in generator.permutation(len(rows))[:n])
    keys = [source.keys[row] for row in drawn_rows]
    drawn_captions = []
    for row in drawn_rows:
        captions = usable[row]
        drawn_captions.append(captions[generator.integers(len(captions))])
    return keys, drawn_captions


def _encode_all_images(
    source: PairSource,
    keys: list[str],
    spec: ScoutSpec,
    progress: ScoutProgress,
) -> tuple[dict[EncoderSpec, Tensor], Tensor]:
    """Encode images by every cut, with one encoder in memory at a time.

    Returns:
        Features [n, dim] of every cut, and bool [n]: whether all encoders could read the row.
    """
    features = dict[EncoderSpec, Tensor]()
    ok = torch.ones(len(keys), dtype=torch.bool)
    for cuts in by_encoder(spec.image):
        encoders = load_image_encoders(cuts, spec.device)
        batches: list[list[Tensor]] = []
        for begin, pixels, good in _pixel_batches(
            source,
            keys=keys,
            encoder=encoders[0],
            spec=spec,
        ):
            ok[begin : begin + len(good)] &= good
            batch_features = encode_or_halve(
                partial(encode_images, encoders),
                pixels,
                encoders[0].device,
            )
            batches.append([cut_features.cpu() for cut_features in batch_features])
            progress(f"{cuts[0].library}:{cuts[0].name}", begin + len(good), len(keys))
        # From one list per batch to one list per cut.
        batches_of_cut = zip(*batches, strict=True)
        features |= zip(cuts, map(torch.cat, batches_of_cut), strict=True)
    return features, ok


def _pixel_batches(
    source: PairSource,
    keys: list[str],
    encoder: ImageEncoder,
    spec: ScoutSpec,
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield the first row of a batch, its pixels, and which of its images could be read.

    Pixels are float32 [n, 3, height, width], zeros where the image could not be read; the mask is
    bool [n].
    """
    # Two batches: one is encoded while the next is decoded.
    ahead = reading_ahead(source.media, spec.workers, 2 * spec.batch + spec.workers)
    with preprocess_ahead(
        keys,
        load=lambda key: load_image(key, source.media, source.pixels),
        preprocess=lambda loaded: [encoder.preprocess(loaded.image)],
        shapes=[encoder.input_shape],
        ahead=ahead,
    ) as decoded:
        for begin in range(0, len(keys), spec.batch):
            count = min(spec.batch, len(keys) - begin)
            pixels = torch.zeros(count, *encoder.input_shape)
            good = torch.zeros(count, dtype=torch.bool)
            for slot in range(count):
                row = next(decoded)
                if row.value is not None:
                    pixels[slot] = row.value[0]
                    good[slot] = True
            yield begin, pixels, good


def _encode_all_texts(
    captions: list[str],
    spec: ScoutSpec,
    progress: ScoutProgress,
) -> dict[EncoderSpec, Tensor]:
    features = dict[EncoderSpec, Tensor]()
    for cuts in by_encoder(spec.text):
        encoders: list[TextEncoder] = load_text_encoders(cuts, spec.device)
        ids = encoders[0].tokenize(captions).ids
        # Texts of similar length share a batch, so little of it is padding.
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        outputs = [torch.empty(len(ids), encoder.dim) for encoder in encoders]
        for begin in range(0, len(order), spec.batch):
            rows = order[begin : begin + spec.batch]
            batch_ids = [ids[i] for i in rows]
            batch_features = encode_or_halve(
                partial(encode_texts, encoders),
                batch_ids,
                encoders[0].device,
            )
            for out, cut_features in zip(outputs, batch_features, strict=True):
                out[rows] = cut_features.cpu()
            progress(f"{cuts[0].library}:{cuts[0].name}", begin + len(rows), len(order))
        features |= zip(cuts, outputs, strict=True)
    return features


def by_encoder(specs: Sequence[EncoderSpec]) -> list[list[EncoderSpec]]:
    """Group the cuts of each encoder, each cut once."""
    groups: dict[EncoderSpec, list[EncoderSpec]] = {}
    # Cuts of one encoder differ in pooling and layer alone.
    for spec in dict.fromkeys(specs):
        groups.setdefault(replace(spec, pooling="default", layer=None), []).append(spec)
    return list(groups.values())


def _require_pooled(spec: ScoutSpec) -> None:
    """Refuse a scout without an encoder of one modality, or with a cut that keeps tokens."""
    for modality, specs in (("image", spec.image), ("text", spec.text)):
        if not specs:
            raise OptionError(f"no {modality} encoder: give --{modality}")
        if any(cut.pooling == "tokens" for cut in specs):
            raise OptionError(
                f"--{modality}-cut tokens: a scout compares one vector for each; give mean, cls, "
                "max or cls+mean"
            )


def of_split(source: PairSource, split: str | None) -> PairSource:
    """Return the pairs of a split.

    The default is the train split if the source has one, and otherwise all pairs: the reported
    split must not take part in the choice of encoders.

    Raises:
        DataError: no such split.
    """
    source_splits = dict.fromkeys(pair.split for pair in source)
    if split is not None:
        chosen_split = split
    elif "train" in source_splits:
        chosen_split = "train"
    else:
        chosen_split = None
    if chosen_split is not None and chosen_split not in source_splits:
        listed_splits = ", ".join(name or "(none)" for name in source_splits)
        hint = nearest(chosen_split, source_splits)
        raise DataError(f"{source.origin}: no split {chosen_split!r}; found: {listed_splits}{hint}")
    if chosen_split is None:
        return source
    return replace(source, pairs=tuple(pair for pair in source if pair.split == chosen_split))
