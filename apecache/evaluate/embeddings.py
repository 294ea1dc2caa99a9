"""Embed a store's images and captions with a run."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from apecache.arguments import require_type
from apecache.data.images import Picture, open_picture
from apecache.data.recorded import RecordedImages
from apecache.encoders.spec import single_fingerprints, spec_from_json
from apecache.errors import DataError, RowError, counted, nearest
from apecache.evaluate.left_out import LeftOut
from apecache.fingerprint import Fingerprint, Json, Modality
from apecache.metrics.relevance import Relevance
from apecache.runs.heads import TrainedHeads, TrainedSide
from apecache.store.array import FeatureArray
from apecache.store.equal import equal_images
from apecache.store.joined import join_arrays
from apecache.store.reader import FeatureStore

logger = logging.getLogger(__name__)

OpenImage = Callable[[str], Picture]
"""Key of the pair table -> picture, in any form that `open_picture` takes; raises RowError."""
Allocate = Callable[[Modality, int, int], Tensor]
"""(modality, n, dim) -> float32 [n, dim] on the CPU, which the embeddings are written to."""


class LiveSide(Protocol):
    """Embed images or texts with a tower that was trained, without features of a store."""

    @property
    def encoder(self) -> Mapping[str, Json]:
        """Describe the encoder before training, as a `TrainedSide` does."""

    @property
    def fingerprint(self) -> Fingerprint:
        """Return the fingerprint of the encoder before training."""

    def require_encoder(self, fingerprint: Fingerprint, where: str) -> None:
        """Raise MismatchError unless `fingerprint` is the encoder before training.

        `where` has that encoder, and stands in the message.
        """

    def embed(self, inputs: Sequence[Any], batch: int = 64) -> Tensor:
        """Embed inputs -> float32 [n, dim], L2-normalized."""


class RunSides(Protocol):
    """Hold both sides of a run of either trainer."""

    @property
    def image(self) -> TrainedSide | LiveSide: ...

    @property
    def text(self) -> TrainedSide | LiveSide: ...


@dataclass(frozen=True, kw_only=True)
class Embeddings:
    """Hold the embeddings of images and captions, in the order of the store's table."""

    image: Tensor
    """float32 [n, dim], L2-normalized."""
    text: Tensor
    """float32 [m, dim], L2-normalized."""
    image_rows: NDArray[np.int64]
    """[n], rows of the store."""
    text_rows: NDArray[np.int64]
    """[m], rows of the store."""
    image_of_text: Tensor
    """int64 [m], the row in `image` of each caption's image."""
    left_out: LeftOut = field(default_factory=LeftOut)
    """Counts of images and captions that were asked for and are not here."""
    relevance: Relevance | None = None
    """The right answers where captions or images are equal. None: each image's own captions."""


def embed_store(
    run: RunSides,
    store: FeatureStore,
    split: str | None = None,
    open_image: OpenImage | None = None,
    among: NDArray[np.bool_] | None = None,
    uncaptioned: bool = False,
    allocate: Allocate | None = None,
) -> Embeddings:
    """Embed the usable images and captions of a store that belong together.

    A frozen side is read from the store's features; a tower that was trained runs from the
    captions, or from images that `open_image` reads.

    Args:
        run: the run that embeds.
        store: its features and captions.
        split: only this one. None: all.
        open_image: reads the image of a key, for runs whose image tower was trained.
        among: bool [n_images], only these images, for a dev split that has no name.
        uncaptioned: take images without a usable caption too, and a store without features of
            texts. Retrieval cannot use those images, so by default they are left out, and counted.
        allocate: gives the memory of the embeddings. None: they are where the run is.

    Raises:
        MismatchError: the store has no features of a frozen encoder.
        DataError: no such split, nothing in it, or an image that cannot be read.
        OptionError: images are needed, and are not where the store recorded them.
        IncompleteError, DamagedError: the store.
    """
    require_type(store, FeatureStore, "store")
    _require_run(run)
    pairs = store.pairs
    in_split = split_mask(store, split) if among is None else among
    image_ok = _usable(run.image, store, "image")
    text_ok = _usable_texts(run.text, store, uncaptioned)
    usable_images = image_ok & in_split
    texts = np.flatnonzero(text_ok & usable_images[pairs.image_rows])
    captioned = np.unique(pairs.image_rows[texts])
    images = np.flatnonzero(usable_images) if uncaptioned else captioned
    if not len(images):
        lacking = "image that could be read" if uncaptioned else "image with a caption"
        raise DataError(f"{store.path}: split {split!r} has no {lacking}")
    logger.info("embedding %d images and %d captions of %s", len(images), len(texts), store.path)
    # `images` is sorted, so the search gives the position of each caption's image in it.
    owners = torch.from_numpy(np.searchsorted(images, pairs.image_rows[texts]))
    image = embed_rows(
        run.image,
        store=store,
        modality="image",
        rows=images,
        open_image=open_image,
        allocate=allocate,
    )
    if len(texts):
        text = embed_rows(run.text, store=store, modality="text", rows=texts, allocate=allocate)
    else:
        # A store without features of texts has nothing to read.
        text = image.new_empty(0, image.shape[1])
    captions_left_out = _captions_left_out(
        run.text,
        store=store,
        in_split=in_split,
        image_ok=image_ok,
        text_ok=text_ok,
    )
    left_out = LeftOut(
        unreadable_images=int((in_split & ~image_ok).sum()),
        uncaptioned_images=len(np.flatnonzero(usable_images)) - len(images),
        **captions_left_out,
    )
    owners = owners.to(image.device)
    relevance = None
    # An image without a caption is not a query, so with such images nothing is ranked.
    if len(images) == len(captioned):
        content = equal_content(run.image, store)
        image_ids = None if content is None else torch.from_numpy(content[images])
        caption_ids = torch.from_numpy(pairs.caption_ids[texts])
        relevance = Relevance.of(owners, caption_ids, image_ids)
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
    """Refuse an object without both sides."""
    if not (hasattr(run, "image") and hasattr(run, "text")):
        require_type(run, (TrainedHeads,), "run")


def _usable_texts(
    side: TrainedSide | LiveSide,
    store: FeatureStore,
    uncaptioned: bool,
) -> NDArray[np.bool_]:
    """Return `_usable` of the captions.

    With `uncaptioned`, a store without any features of texts has no usable captions. Otherwise it
    is an error.
    """
    if uncaptioned and isinstance(side, TrainedSide) and not store.arrays("text"):
        return np.zeros(len(store.pairs.captions), dtype=bool)
    return _usable(side, store, "text")


def _captions_left_out(
    side: TrainedSide | LiveSide,
    store: FeatureStore,
    in_split: NDArray[np.bool_],
    image_ok: NDArray[np.bool_],
    text_ok: NDArray[np.bool_],
) -> dict[str, int]:
    """Count the captions of the split's images that are not used, by fields of `LeftOut`.

    Each caption counts once, by the first reason that holds.
    """
    pairs = store.pairs
    owner_ok = image_ok[pairs.image_rows]
    unused = in_split[pairs.image_rows] & ~(text_ok & owner_ok)
    empty = np.array([not str(caption).strip() for caption in pairs.captions], dtype=bool)
    no_features = isinstance(side, TrainedSide) and not store.arrays("text")
    with_words = unused & ~empty
    last_reason = "captions_without_features" if no_features else "unusable_captions"
    return {
        "empty_captions": int((unused & empty).sum()),
        "captions_of_unreadable_images": int((with_words & ~owner_ok).sum()),
        last_reason: int((with_words & owner_ok).sum()),
    }


def equal_content(side: TrainedSide | LiveSide, store: FeatureStore) -> NDArray[np.int64] | None:
    """Return int64 [n_images]: equal numbers for images of equal content.

    It is None where all images differ, and where the store has no image features.
    """
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
    allocate: Allocate | None = None,
) -> Tensor:
    """Embed rows of the store's table -> float32 [n, dim], L2-normalized.

    Features are read shard by shard, so that only embeddings are in memory whole. It raises the
    errors of `embed_store`.

    Args:
        side: the side of the run that embeds.
        store: its features and captions.
        modality: what is embedded.
        rows: int64 [n], rows of the table, each at most once.
        open_image: as `embed_store` takes it.
        batch: pictures that are open at once.
        allocate: as `embed_store` takes it.
    """
    if isinstance(side, TrainedSide):
        return _embed_features(side, store, modality, rows, allocate)
    if modality == "text":
        embedded = side.embed([str(store.pairs.captions[row]) for row in rows])
    else:
        open_image = open_image or RecordedImages(store.last_source)
        keys = [str(store.pairs.keys[row]) for row in rows]
        embedded_batches: list[Tensor] = []
        # Pictures are opened batch by batch: all of a split would not fit in memory.
        for first in range(0, len(keys), batch):
            embedded_batches.append(side.embed(_read(keys[first : first + batch], open_image)))
        embedded = torch.cat(embedded_batches)
    if allocate is None:
        return embedded
    return allocate(modality, *embedded.shape).copy_(embedded)


def _embed_features(
    side: TrainedSide,
    store: FeatureStore,
    modality: Modality,
    rows: NDArray[np.int64],
    allocate: Allocate | None,
) -> Tensor:
    """Embed rows of the store's features, shard by shard."""
    array = find_features(side, store, modality)
    lengths = load_lengths(array)
    # Where each row of the array stands among the rows that are asked for; -1: nowhere.
    positions = np.full(array.rows, -1, np.int64)
    positions[rows] = np.arange(len(rows))
    if allocate is None:
        target = torch.empty(len(rows), side.dim, device=side.head.mean.device)
    else:
        target = allocate(modality, len(rows), side.dim)
    for array_rows, features in array.load_shards():
        position = positions[array_rows]
        is_wanted = position >= 0
        if not is_wanted.any():
            continue
        wanted = features if is_wanted.all() else features[is_wanted]
        embedded = side.embed(torch.from_numpy(wanted), _select(lengths, array_rows[is_wanted]))
        target[torch.from_numpy(position[is_wanted]).to(target.device)] = embedded.to(target.device)
    return target


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
    """Return bool [rows]: the rows that can be embedded.

    These are the rows with features; for a trained tower, the rows that any encoder could read.
    """
    if isinstance(side, TrainedSide):
        return find_features(side, store, modality).load_ok()
    arrays = store.arrays(modality)
    values: Any = store.pairs.keys if modality == "image" else store.pairs.captions
    # A blank caption has no features in any store, so a trained tower leaves it out as well.
    is_filled = np.array([bool(str(value).strip()) for value in values], dtype=bool)
    if not arrays:
        return is_filled
    return is_filled & arrays[0].load_ok()


def load_lengths(array: FeatureArray) -> Tensor | None:
    """Return int64 [rows]: the number of valid tokens of each row.

    It is None for pooled features, and where all rows have all tokens.
    """
    ragged = array.load_lengths()
    return None if ragged is None else torch.from_numpy(ragged.astype(np.int64))


def _select(lengths: Tensor | None, rows: NDArray[np.int64]) -> Tensor | None:
    return None if lengths is None else lengths[torch.from_numpy(rows)]


def find_features(
    side: TrainedSide | LiveSide,
    store: FeatureStore,
    modality: Modality,
) -> FeatureArray:
    """Return the store's features of the encoder that the head was trained on, by any name.

    For a head on joined encoders they are joined. Features of augmented views are skipped: a head
    that was trained on views serves the images themselves.

    Raises:
        MismatchError: the store has features of other encoders only.
        DataError: it has no features of the modality, or augmented views only.
    """
    fingerprints = single_fingerprints(side.fingerprint)
    if len(fingerprints) > 1 and isinstance(side, TrainedSide):
        specs = spec_from_json(side.encoder).singles
        singles: list[FeatureArray] = []
        for spec, fingerprint in zip(specs, fingerprints, strict=True):
            single = replace(side, encoder=asdict(spec), fingerprint=fingerprint)
            singles.append(find_features(single, store, modality))
        return join_arrays(singles)
    arrays = store.arrays(modality)
    digest = side.fingerprint.digest
    encoder_arrays = [array for array in arrays if array.record.encoder.digest == digest]
    for array in encoder_arrays:
        if array.views is None:
            return array
    if encoder_arrays:
        views_name = encoder_arrays[0].name
        raise DataError(
            f"{store.path} has augmented views of the {modality}s only ({views_name}); measured "
            f"are {modality}s as "
            "they are: add them with the same apecache extract --add, without --views"
        )
    if not arrays:
        raise DataError(
            f"{store.path} has no {modality} features; make them with: apecache extract"
        )
    # Always raises here: its error says which fields of the encoders differ.
    side.require_encoder(
        arrays[0].record.encoder,
        f"{store.path}: {modality} features {arrays[0].name}",
    )
    raise AssertionError("unreachable: the digests differ")


def split_mask(store: FeatureStore, split: str | None) -> NDArray[np.bool_]:
    """Return bool [n_images]: the images of the split."""
    splits = store.pairs.splits
    if split is None:
        return np.ones(len(splits), dtype=bool)
    split_sizes = store.pairs.split_counts()
    if split not in split_sizes:
        listed_splits = ", ".join(
            f"{name or '(none)'} ({counted(count, 'image')})" for name, count in split_sizes.items()
        )
        hint = nearest(split, split_sizes)
        remedy = f"; make splits with: apecache split {store.path} --fraction train=.9,val=.1"
        if any(split_sizes):
            remedy = hint
        raise DataError(f"{store.path} has no split {split!r}; found: {listed_splits}{remedy}")
    mask: NDArray[np.bool_] = splits == split
    return mask
