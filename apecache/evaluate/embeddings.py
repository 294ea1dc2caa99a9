"""Embeddings of a store's images and captions under a run."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from apecache.arguments import require_type
from apecache.data.images import Picture, open_picture
from apecache.errors import DataError, OptionError, RowError, nearest
from apecache.evaluate.left_out import LeftOut
from apecache.fingerprint import Fingerprint, Json, Modality
from apecache.metrics.relevance import Relevance
from apecache.runs.heads import TrainedHeads, TrainedSide
from apecache.store.array import FeatureArray
from apecache.store.equal import equal_images
from apecache.store.reader import FeatureStore

OpenImage = Callable[[str], Picture]
"""Key of the pair table -> picture, in any form that `open_picture` takes; raises RowError."""


class LiveSide(Protocol):
    """A modality whose tower was trained: it embeds images or texts themselves, no features of
    them. `encoder`, `fingerprint`: of the encoder before training, as of a `TrainedSide`."""

    @property
    def encoder(self) -> Mapping[str, Json]: ...

    @property
    def fingerprint(self) -> Fingerprint: ...

    def require_encoder(self, found: Fingerprint, where: str) -> None: ...

    def embed(self, inputs: Sequence[Any], batch: int = 64) -> Tensor:
        """float32 [n, dim], L2-normalised."""


class Run(Protocol):
    """What is measured, of either trainer."""

    @property
    def image(self) -> TrainedSide | LiveSide: ...

    @property
    def text(self) -> TrainedSide | LiveSide: ...


@dataclass(frozen=True, kw_only=True)
class Embeddings:
    """`image` [n, dim] and `text` [m, dim], float32, L2-normalised, in the order of the table.

    `image_rows`, `text_rows`: rows of the store; `image_of_text` int64 [m]: the row in `image` of
    each caption's image. `left_out`: what was asked for and is not among them. `relevance`: the
    right answers where captions or images are equal; None: each image's own captions alone.
    """

    image: Tensor
    text: Tensor
    image_rows: NDArray[np.int64]
    text_rows: NDArray[np.int64]
    image_of_text: Tensor
    left_out: LeftOut = field(default_factory=LeftOut)
    relevance: Relevance | None = None


def embed_store(
    run: Run,
    store: FeatureStore,
    split: str | None = None,
    open_image: OpenImage | None = None,
    among: NDArray[np.bool_] | None = None,
    uncaptioned: bool = False,
) -> Embeddings:
    """Embed the usable images and captions of a store that belong together.

    A frozen side is read from the store's features; a tower that was trained runs from the
    captions, or from images that `open_image` reads.

    Args:
        split: only this one. None: all.
        among: bool [n_images], only these images, for a dev split that has no name.
        uncaptioned: take images without a usable caption too, and a store without features of
            texts. Retrieval cannot use those images, so by default they are left out, and counted.

    Raises:
        MismatchError: the store has no features of a frozen encoder. DataError: no such split,
            nothing in it, or an
        image that cannot be read. OptionError: images are needed. IncompleteError, DamagedError:
            the store.
    """
    require_type(store, FeatureStore, "store")
    _require_run(run)
    pairs = store.pairs
    asked = _split_mask(store, split) if among is None else among
    image_ok = _usable(run.image, store, "image")
    text_ok = _usable_texts(run.text, store, uncaptioned)
    keep = image_ok & asked
    texts = np.flatnonzero(text_ok & keep[pairs.image_rows])
    captioned = np.unique(pairs.image_rows[texts])
    images = np.flatnonzero(keep) if uncaptioned else captioned
    if not len(images):
        lacking = "image that could be read" if uncaptioned else "image with a caption"
        raise DataError(f"{store.path}: split {split!r} has no {lacking}")
    owners = torch.from_numpy(np.searchsorted(images, pairs.image_rows[texts]))
    image = embed_rows(run.image, store=store, modality="image", rows=images, open_image=open_image)
    text = (
        embed_rows(run.text, store=store, modality="text", rows=texts)
        if len(texts)
        else image.new_empty(0, image.shape[1])
    )
    left_out = LeftOut(
        unreadable_images=int((asked & ~image_ok).sum()),
        uncaptioned_images=len(np.flatnonzero(keep)) - len(images),
        **_captions_left_out(
            run.text,
            store=store,
            asked=asked,
            image_ok=image_ok,
            text_ok=text_ok,
        ),
    )
    owners = owners.to(image.device)
    relevance = None
    if len(images) == len(
        captioned
    ):  # an image without a caption is no query, so nothing is ranked
        content = equal_content(run.image, store)
        relevance = Relevance.of(
            owners,
            torch.from_numpy(pairs.caption_ids[texts]),
            None if content is None else torch.from_numpy(content[images]),
        )
    return Embeddings(
        image=image,
        text=text.to(image.device),
        image_rows=images,
        text_rows=texts,
        image_of_text=owners,
        left_out=left_out,
        relevance=relevance,
    )


def _require_run(run: object) -> None:
    if not (hasattr(run, "image") and hasattr(run, "text")):
        require_type(run, (TrainedHeads,), "run")


def _usable_texts(
    side: TrainedSide | LiveSide,
    store: FeatureStore,
    uncaptioned: bool,
) -> NDArray[np.bool_]:
    """As `_usable`; with `uncaptioned` a store without any features of texts has no usable ones."""
    if uncaptioned and isinstance(side, TrainedSide) and not store.arrays("text"):
        return np.zeros(len(store.pairs.captions), dtype=bool)
    return _usable(side, store, "text")


def _captions_left_out(
    side: TrainedSide | LiveSide,
    store: FeatureStore,
    asked: NDArray[np.bool_],
    image_ok: NDArray[np.bool_],
    text_ok: NDArray[np.bool_],
) -> dict[str, int]:
    """How many captions of the images that are asked for are not used, each by the first reason
    that holds."""
    pairs = store.pairs
    owner_ok = image_ok[pairs.image_rows]
    unused = asked[pairs.image_rows] & ~(text_ok & owner_ok)
    empty = np.array([not str(caption).strip() for caption in pairs.captions], dtype=bool)
    no_features = isinstance(side, TrainedSide) and not store.arrays("text")
    counts = {"empty_captions": int((unused & empty).sum())}
    rest = unused & ~empty
    counts["captions_of_unreadable_images"] = int((rest & ~owner_ok).sum())
    counts["captions_without_features" if no_features else "unusable_captions"] = int(
        (rest & owner_ok).sum()
    )
    return counts


def equal_content(side: TrainedSide | LiveSide, store: FeatureStore) -> NDArray[np.int64] | None:
    """int64 [n_images]: equal numbers for images of equal content, None where all differ or no
    features tell."""
    if isinstance(side, TrainedSide):
        return equal_images(find_features(side, store, "image"))
    return next((equal_images(array) for array in store.arrays("image")), None)


def embed_rows(
    side: TrainedSide | LiveSide,
    store: FeatureStore,
    modality: Modality,
    rows: NDArray[np.int64],
    open_image: OpenImage | None = None,
    batch: int = 64,
) -> Tensor:
    """Rows of the store's table -> float32 [n, dim], L2-normalised. Raises as `embed_store`
    does."""
    if isinstance(side, TrainedSide):
        array = find_features(side, store, modality)
        return side.embed(torch.from_numpy(array.load()[rows]), _select(load_lengths(array), rows))
    if modality == "text":
        return side.embed([str(store.pairs.captions[row]) for row in rows])
    if open_image is None:
        raise OptionError(
            "this run trained its image tower, so it needs the images; give their folder (--root)"
        )
    keys = [str(store.pairs.keys[row]) for row in rows]
    return torch.cat(
        [side.embed(_read(keys[i : i + batch], open_image)) for i in range(0, len(keys), batch)]
    )


def _read(keys: Sequence[str], open_image: OpenImage) -> list[Image.Image]:
    try:
        return [open_picture(open_image(key), key) for key in keys]
    except RowError as error:
        raise DataError(
            f"an image cannot be read ({error}); mend it, or take it out of the table"
        ) from None


def _usable(
    side: TrainedSide | LiveSide,
    store: FeatureStore,
    modality: Modality,
) -> NDArray[np.bool_]:
    """Rows that can be embedded: those with features; for a trained tower those that any encoder
    could read."""
    if isinstance(side, TrainedSide):
        return find_features(side, store, modality).load_ok()
    arrays = store.arrays(modality)
    values: Any = store.pairs.keys if modality == "image" else store.pairs.captions
    there = np.array([bool(str(value).strip()) for value in values], dtype=bool)
    return there & arrays[0].load_ok() if arrays else there


def load_lengths(array: FeatureArray) -> Tensor | None:
    """int64 [rows]: tokens of each row that are there; None for pooled features, and where all rows
    have all tokens."""
    ragged = array.load_lengths()
    return None if ragged is None else torch.from_numpy(ragged.astype(np.int64))


def _select(lengths: Tensor | None, rows: NDArray[np.int64]) -> Tensor | None:
    return None if lengths is None else lengths[torch.from_numpy(rows)]


def find_features(
    side: TrainedSide | LiveSide,
    store: FeatureStore,
    modality: Modality,
) -> FeatureArray:
    """The store's features of the encoder that the head was trained on, whatever they are called:
    of the images as they are, which is what a head serves that was trained on augmented views of
    them.

    Raises:
        MismatchError: there are only others. DataError: there are none, or augmented views only.
    """
    arrays = store.arrays(modality)
    own = [array for array in arrays if array.record.encoder.digest == side.fingerprint.digest]
    for array in own:
        if array.views is None:
            return array
    if own:
        raise DataError(
            f"{store.path} has augmented views of the {modality}s only ({own[0].name}); measured "
            f"are {modality}s as "
            "they are: add them with the same apecache extract --add, without --views"
        )
    if not arrays:
        raise DataError(
            f"{store.path} has no {modality} features; make them with: apecache extract"
        )
    side.require_encoder(
        arrays[0].record.encoder,
        f"{store.path}: {modality} features {arrays[0].name}",
    )
    raise AssertionError("unreachable: the digests differ")


def _split_mask(store: FeatureStore, split: str | None) -> NDArray[np.bool_]:
    splits = store.pairs.splits
    if split is None:
        return np.ones(len(splits), dtype=bool)
    counts = store.pairs.split_counts()
    if split not in counts:
        found = ", ".join(f"{name or '(none)'} ({count} images)" for name, count in counts.items())
        raise DataError(
            f"{store.path} has no split {split!r}; found: {found}{nearest(split, counts)}"
        )
    mask: NDArray[np.bool_] = splits == split
    return mask
