"""Which encoders, layers and poolings go together: measured on a small sample of pairs before
anything is extracted."""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from apecache.arguments import require_type
from apecache.data.decoding import preprocess_ahead, reading_ahead
from apecache.data.images import load_image
from apecache.data.pairs import PairSource
from apecache.encoders.encoder import ImageEncoder, TextEncoder, encode_images, encode_texts
from apecache.encoders.load import load_image_encoders, load_text_encoders
from apecache.encoders.spec import EncoderSpec
from apecache.errors import DataError, OptionError, nearest
from apecache.extraction.encode import caption_error, encode_or_halve
from apecache.metrics.geometry import Likeness, likeness
from apecache.metrics.relevance import Relevance
from apecache.metrics.retrieval import mean_chance
from apecache.store.equal import equal_captions

SMALLEST = 24
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class ScoutSpec:
    """`image`, `text`: encoders and their cuts; cuts of one encoder cost one pass. `n_pairs` and
    `seed` say which images are drawn, which of their captions, and which half the regression is
    fitted on."""

    image: tuple[EncoderSpec, ...]
    text: tuple[EncoderSpec, ...]
    n_pairs: int = 1000
    seed: int = 0
    device: str = "auto"
    batch: int = 32
    workers: int = os.cpu_count() or 1


@dataclass(frozen=True, kw_only=True)
class ScoutRow:
    """One cut of an image encoder with one of a text encoder, by the names that their features get
    in a store."""

    image: str
    text: str
    likeness: Likeness


@dataclass(frozen=True, kw_only=True)
class ScoutReport:
    """`rows`: best mean R@1 first. `chance`: expected R@1 of a random order, in per cent.
    `n_unreadable`: images of the sample that were left out."""

    rows: tuple[ScoutRow, ...]
    n_fit: int
    n_measured: int
    n_unreadable: int
    chance: float
    chance_mutual_knn: float


def scout(source: PairSource, spec: ScoutSpec, progress: Progress = lambda *_: None) -> ScoutReport:
    """Every image cut with every text cut, on one sample of images with one caption each.

    Raises:
        DataError: too few images with captions that can be read. EncoderError: an encoder or a cut
            that cannot be had.
        OptionError: a cut that keeps tokens, or no encoder of one modality.
    """
    require_type(source, PairSource, "source")
    require_type(spec, ScoutSpec, "spec")
    _require_pooled(spec)
    keys, captions = draw_pairs(source, spec.n_pairs, spec.seed)
    images, ok = _encode_all_images(source, keys=keys, spec=spec, progress=progress)
    if int(ok.sum()) < SMALLEST:
        raise DataError(
            f"{source.origin}: {int(ok.sum())} images with captions can be read; a scout "
            f"needs {SMALLEST}"
        )
    usable = [caption for caption, good in zip(captions, ok.tolist(), strict=True) if good]
    texts = _encode_all_texts(usable, spec, progress)
    n = int(ok.sum())
    fit = torch.zeros(n, dtype=torch.bool)
    fit[torch.from_numpy(np.random.default_rng((spec.seed, 1)).permutation(n)[: n // 2])] = True
    measured = n - n // 2
    caption_ids = torch.from_numpy(equal_captions(np.array(usable, object)))[~fit]
    relevance = Relevance.of(torch.arange(measured), caption_ids, None)
    rows = [
        ScoutRow(
            image=image.slug,
            text=text.slug,
            likeness=likeness(x[ok], text=y, fit=fit, relevance=relevance),
        )
        for image, x in images.items()
        for text, y in texts.items()
    ]
    rows.sort(key=lambda row: -row.likeness.recall_at_1)
    chance = (
        100 / measured
        if relevance is None
        else mean_chance(measured, relevance.n_right_images(), 1)
    )
    return ScoutReport(
        rows=tuple(rows),
        n_fit=n // 2,
        n_measured=measured,
        n_unreadable=len(keys) - n,
        chance=chance,
        chance_mutual_knn=min(10, n - 1) / (n - 1),
    )


def draw_pairs(source: PairSource, n: int, seed: int) -> tuple[list[str], list[str]]:
    """Keys of up to n images, and one usable caption of each; in the order of the source."""
    chance = np.random.default_rng((seed, 0))
    usable = {
        row: [c for c in pair.captions if caption_error(c) is None]
        for row, pair in enumerate(source)
    }
    rows = [row for row, captions in usable.items() if captions]
    drawn = sorted(rows[i] for i in chance.permutation(len(rows))[:n])
    return [source.keys[row] for row in drawn], [
        usable[row][chance.integers(len(usable[row]))] for row in drawn
    ]


def _encode_all_images(
    source: PairSource,
    keys: list[str],
    spec: ScoutSpec,
    progress: Progress,
) -> tuple[dict[EncoderSpec, Tensor], Tensor]:
    """Features [n, dim] of every cut, one encoder in memory at a time; and bool [n], whether all
    could read the row."""
    features = dict[EncoderSpec, Tensor]()
    ok = torch.ones(len(keys), dtype=torch.bool)
    for cuts in by_encoder(spec.image):
        encoders = load_image_encoders(cuts, spec.device)
        parts: list[list[Tensor]] = []
        for begin, pixels, good in _pixel_batches(
            source,
            keys=keys,
            encoder=encoders[0],
            spec=spec,
        ):
            ok[begin : begin + len(good)] &= good
            parts.append(
                [f.cpu() for f in encode_or_halve(partial(encode_images, encoders), pixels)]
            )
            progress(f"{cuts[0].library}:{cuts[0].name}", begin + len(good), len(keys))
        features |= zip(cuts, map(torch.cat, zip(*parts, strict=True)), strict=True)
    return features, ok


def _pixel_batches(
    source: PairSource,
    keys: list[str],
    encoder: ImageEncoder,
    spec: ScoutSpec,
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(first row, float32 [n, 3, height, width], bool [n]); what cannot be read is zeros."""
    ahead = reading_ahead(source.media, spec.workers, 2 * spec.batch + spec.workers)
    with preprocess_ahead(
        keys,
        load=lambda key: load_image(key, source.media),
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
    progress: Progress,
) -> dict[EncoderSpec, Tensor]:
    features = dict[EncoderSpec, Tensor]()
    for cuts in by_encoder(spec.text):
        encoders: list[TextEncoder] = load_text_encoders(cuts, spec.device)
        ids = encoders[0].tokenise(captions).ids
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        made = [torch.empty(len(ids), encoder.dim) for encoder in encoders]
        for begin in range(0, len(order), spec.batch):
            rows = order[begin : begin + spec.batch]
            found = encode_or_halve(partial(encode_texts, encoders), [ids[i] for i in rows])
            for out, part in zip(made, found, strict=True):
                out[rows] = part.cpu()
            progress(f"{cuts[0].library}:{cuts[0].name}", begin + len(rows), len(order))
        features |= zip(cuts, made, strict=True)
    return features


def by_encoder(specs: Sequence[EncoderSpec]) -> list[list[EncoderSpec]]:
    """Cuts of one encoder together; each once."""
    groups: dict[EncoderSpec, list[EncoderSpec]] = {}
    for spec in dict.fromkeys(specs):
        groups.setdefault(replace(spec, pooling="default", layer=None), []).append(spec)
    return list(groups.values())


def _require_pooled(spec: ScoutSpec) -> None:
    for what, specs in (("image", spec.image), ("text", spec.text)):
        if not specs:
            raise OptionError(f"no {what} encoder: give --{what}")
        if any(cut.pooling == "tokens" for cut in specs):
            raise OptionError(
                f"--{what}-cut tokens: a scout compares one vector for each; give mean, cls, "
                "max or cls+mean"
            )


def of_split(source: PairSource, split: str | None) -> PairSource:
    """The pairs of a split; by default of train where there is one, for what is chosen must not be
    what is reported.

    Raises:
        DataError: no such split.
    """
    there = dict.fromkeys(pair.split for pair in source)
    if split is not None:
        wanted = split
    elif "train" in there:
        wanted = "train"
    else:
        wanted = None
    if wanted is not None and wanted not in there:
        found = ", ".join(name or "(none)" for name in there)
        raise DataError(
            f"{source.origin}: no split {wanted!r}; found: {found}{nearest(wanted, there)}"
        )
    return (
        source
        if wanted is None
        else replace(source, pairs=tuple(p for p in source if p.split == wanted))
    )
